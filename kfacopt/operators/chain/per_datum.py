"""Elements of a chain whose derivatives are formed densely for each datum, by autograd."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from kfacopt.operators.chain.elements import Element


class PerDatum(Element):
    """Any layer that treats each datum alone and is affine in its parameters: convolutions, normalisations, pooling.

    Its derivatives are formed densely for each datum by autograd: `[n out in]`, `[n out p]`, `[n p in]`, `[n in in]`.

    Raises:
        ValueError: If an input's axes do not tell which are the data.
    """

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        self._name, self._module = name, module
        named = {name: p.detach() for name, p in module.named_parameters()}
        self._moving = {n: named[n].to(dtype, copy=True) for n, p in module.named_parameters() if p.requires_grad}
        self._still = {n: p.to(dtype, copy=True) for n, p in named.items() if n not in self._moving}
        self._still |= {n: b.to(dtype, copy=True) if b.is_floating_point() else b for n, b in module.named_buffers()}
        self.parameters = tuple(p for p in module.parameters() if p.requires_grad)
        self.controls = self.reduced = sum(p.numel() for p in self.parameters)
        self._mixed: Tensor | None = None
        self._curvature: Tensor | None = None

    def _run(self, z: Tensor, moving: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(self._module, moving | self._still, (z.unsqueeze(0),))
        return out.squeeze(0)

    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        axes = _axes_of_a_batch(self._module)
        if axes is not None and z.ndim not in axes:
            raise ValueError(
                f"the layer {self._name!r} ({type(self._module).__name__}) gets {list(z.shape)}: its first axis must "
                f"be the data, with {' or '.join(map(str, axes))} axes in all"
            )
        self._z, self._n = z, z.shape[0]
        out: Tensor = functional_call(self._module, self._moving | self._still, (z,))
        self.rows_in, self.rows_out = z.numel(), out.numel()
        self._shapes = (z.shape[1:], out.shape[1:])
        by_input, by_moving = vmap(jacrev(self._run, argnums=(0, 1)), in_dims=(0, None))(z, self._moving)
        self._jacobian = by_input.reshape(self._n, out[0].numel(), z[0].numel())
        if self.controls:
            flat = [block.reshape(self.rows_out, -1) for block in by_moving.values()]
            self._reach = torch.cat(flat, dim=1)
        return out.detach()

    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        def weighted(z: Tensor, moving: dict[str, Tensor], c: Tensor) -> Tensor:
            return (self._run(z, moving) * c).sum()

        second = vmap(jacrev(grad(weighted, argnums=(0, 1)), argnums=0), in_dims=(0, None, 0))
        by_input, by_moving = second(self._z, self._moving, cotangent)
        size = prod(self._shapes[0])
        self._curvature = by_input.detach().reshape(self._n, size, size)
        if self.controls:
            flat = [block.detach().reshape(self._n, -1, size) for block in by_moving.values()]
            self._mixed = torch.cat(flat, dim=1)
            self.gradient = self._reach.mT @ cotangent.reshape(-1, 1)
        return self._pull(cotangent.reshape(-1, 1)).view(self._n, *self._shapes[0])

    def forget_curvature(self) -> None:
        self._curvature = self._mixed = None

    def _by_blocks(self, blocks: Tensor, y: Tensor) -> Tensor:
        product: Tensor = blocks @ y.reshape(self._n, -1, y.shape[-1])
        return product.flatten(0, 1)

    def _push(self, y: Tensor) -> Tensor:
        return self._by_blocks(self._jacobian, y)

    def _pull(self, g: Tensor) -> Tensor:
        return self._by_blocks(self._jacobian.mT, g)

    def steer(self, x: Tensor) -> Tensor:
        return torch.mm(self._reach, x)

    def sense(self, g: Tensor) -> Tensor:
        return torch.mm(self._reach.mT, g)

    def curve(self, y: Tensor) -> Tensor | None:
        if self._curvature is None:
            return None
        return self._by_blocks(self._curvature, y)

    def mix(self, y: Tensor) -> Tensor | None:
        if self._mixed is None:
            return None
        return (self._mixed @ y.reshape(self._n, -1, y.shape[-1])).sum(0)

    def mix_transposed(self, x: Tensor) -> Tensor | None:
        return None if self._mixed is None else (self._mixed.mT @ x).flatten(0, 1)

    def add_mixed(self, coupling: Tensor) -> None:
        if self._mixed is not None:
            coupling += self._mixed.movedim(0, 1).flatten(1)

    def add_curvature(self, value: Tensor, damping: float) -> None:
        if self._curvature is not None:
            blocks = value.unflatten(0, (self._n, -1)).unflatten(-1, (self._n, -1))
            blocks.diagonal(dim1=0, dim2=2).add_(self._curvature.movedim(0, -1))


def _axes_of_a_batch(module: nn.Module) -> tuple[int, ...] | None:
    """How many axes an input has whose first axis is the data; None: any number."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        assert isinstance(weight, Tensor)
        return (weight.ndim,)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        normalized = len(module.normalized_shape)
        return tuple(range(normalized + 1, normalized + 6))
    return None
