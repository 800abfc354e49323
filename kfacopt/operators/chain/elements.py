"""The elements of a chain: what each layer of an `nn.Sequential` is to the recursion of `linalg.riccati`.

An element runs its layer forward at the chain's own precision, and backward brings the gradient from its output to its
input and keeps the derivatives that a `Stage` asks for. States are the layers' outputs, flattened, data first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kfacopt.linalg.riccati import Fork, Join, Stage
from kfacopt.linalg.tensors import flat_columns, split_columns


class Element(Stage):
    """A stage that is linearised from a layer.

    Attributes:
        parameters: The layer's trainable parameters, in the layer's order.
        gradient: Of the loss with respect to them, `[p 1]`; None without controls.
    """

    parameters: Sequence[Tensor] = ()
    gradient: Tensor | None = None

    @abstractmethod
    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        """The layer's output; `kept` holds the inputs of the residual blocks that are open."""

    @abstractmethod
    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        """From the gradient at the output to that at the input; `kept` holds gradients for open blocks' inputs."""

    def forget_curvature(self) -> None:
        """Drop the layer's own second derivatives: what is left is the generalised Gauss-Newton matrix."""

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors `[*parameter m]` as controls `[p m]`."""
        return flat_columns(parts)

    def unpack(self, controls: Tensor) -> list[Tensor]:
        """Controls `[p m]` as tensors `[*parameter m]`."""
        return split_columns(controls, [parameter.shape for parameter in self.parameters])


class Affine(Element):
    """`nn.Linear`: `u = z Wᵀ + b` over rows (data, and positions of a sequence).

    Controls are `[i, o]`, the bias as a last row i. With Z the inputs and a column of ones `[n i]`, c the gradient at
    the output: `B x = Z x`, `C y = yᵀ c`. Where there are fewer rows than inputs, only the n directions that Z spans
    reach the output: `Zᵀ = P Lᵀ` by QR.
    """

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self._weight = module.weight.detach().to(dtype, copy=True)
        self._bias = None if module.bias is None else module.bias.detach().to(dtype, copy=True)
        self._weight_moves = module.weight.requires_grad
        self._bias_moves = module.bias is not None and module.bias.requires_grad
        moving = (module.weight if self._weight_moves else None, module.bias if self._bias_moves else None)
        self.parameters = tuple(p for p in moving if p is not None)
        self._cotangent: Tensor | None = None

    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        out, features = self._weight.shape
        rows = z.reshape(-1, features)
        self._n, self._o, self._i = rows.shape[0], out, features
        self.rows_in, self.rows_out = z.numel(), self._n * out
        moving = [rows] if self._weight_moves else []
        if self._bias_moves:
            moving.append(rows.new_ones(self._n, 1))
        if moving:
            self._inputs = torch.cat(moving, dim=1)
            inputs = self._inputs.shape[1]
            self.controls, self._basis, self._left = inputs * out, None, self._inputs
            if self._n < inputs:
                basis, upper = torch.linalg.qr(self._inputs.mT)
                self._basis, self._left = basis, upper.mT.contiguous()
            self.reduced = self._left.shape[1] * out
        u = rows @ self._weight.mT
        if self._bias is not None:
            u += self._bias
        return u.view(*z.shape[:-1], out)

    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        rows = cotangent.reshape(self._n, self._o)
        if self.controls:
            self.gradient = (self._inputs.mT @ rows).view(-1, 1)
        if self._weight_moves:
            self._cotangent = rows
        return (rows @ self._weight).view(*cotangent.shape[:-1], self._i)

    def forget_curvature(self) -> None:
        self._cotangent = None

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        rows = [part.movedim(0, 1) if part.ndim == 3 else part.unsqueeze(0) for part in parts]
        return (torch.cat(rows) if len(rows) > 1 else rows[0]).flatten(0, 1)

    def unpack(self, controls: Tensor) -> list[Tensor]:
        rows = controls.unflatten(0, (-1, self._o))
        weight = [rows[: self._i].movedim(0, 1)] if self._weight_moves else []
        return weight + ([rows[-1]] if self._bias_moves else [])

    def _push(self, y: Tensor) -> Tensor:
        return _rows_times(y, self._n, self._weight.mT)

    def _pull(self, g: Tensor) -> Tensor:
        return _rows_times(g, self._n, self._weight)

    def steer(self, x: Tensor) -> Tensor:
        return (self._inputs @ x.reshape(-1, self._o * x.shape[-1])).view(self.rows_out, -1)

    def sense(self, g: Tensor) -> Tensor:
        return (self._inputs.mT @ g.reshape(self._n, -1)).view(self.controls, -1)

    def project(self, g: Tensor) -> Tensor:
        return (self._left.mT @ g.reshape(self._n, -1)).view(self.reduced, -1)

    def reduce(self, x: Tensor) -> Tensor:
        if self._basis is None:
            return x
        product: Tensor = self._basis.mT @ x.reshape(self._basis.shape[0], -1)
        return product.view(self.reduced, -1)

    def expand(self, x: Tensor) -> Tensor:
        if self._basis is None:
            return x
        product: Tensor = self._basis @ x.reshape(self._basis.shape[1], -1)
        return product.view(self.controls, -1)

    def mix(self, y: Tensor) -> Tensor | None:
        if self._cotangent is None:
            return None
        columns = y.shape[-1]
        mixed = (y.reshape(self._n, -1).mT @ self._cotangent).view(self._i, columns, self._o).mT
        if self._bias_moves:
            mixed = torch.cat([mixed, mixed.new_zeros(1, self._o, columns)])
        return mixed.reshape(self.controls, columns)

    def mix_transposed(self, x: Tensor) -> Tensor | None:
        if self._cotangent is None:
            return None
        weight = x.view(-1, self._o, x.shape[-1])[: self._i]
        return (self._cotangent @ weight.movedim(0, 1).reshape(self._o, -1)).view(self.rows_in, -1)

    def add_mixed(self, coupling: Tensor) -> None:
        if self._cotangent is None:
            return
        blocks = coupling.unflatten(1, (self._n, self._i)).unflatten(0, (-1, self._o))  # [k o n i]
        if self._basis is None:
            blocks[: self._i].diagonal(dim1=0, dim2=3).add_(self._cotangent.mT.unsqueeze(-1))
        else:
            seen = self._basis[: self._i].mT
            blocks.addcmul_(seen[:, None, None, :], self._cotangent.mT[None, :, :, None])

    def add_curvature(self, value: Tensor, damping: float) -> None:
        if self._cotangent is None or self._basis is None:
            return
        seen = self._basis[: self._i]
        hidden = torch.eye(self._i, dtype=seen.dtype, device=seen.device) - seen @ seen.mT
        gram = self._cotangent @ self._cotangent.mT
        blocks = value.unflatten(0, (self._n, self._i)).unflatten(-1, (self._n, self._i))
        blocks.addcmul_(gram[:, None, :, None], hidden[None, :, None, :], value=-1.0 / damping)


class Pointwise(Element):
    """An elementwise activation: `A = diag(σ′)`, `Q = diag(c ∘ σ″)`; σ″ is 0 where a kink has none."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._curvature: Tensor | None = None

    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        self.rows_in = self.rows_out = z.numel()
        with torch.enable_grad():
            x = z.detach().requires_grad_()
            out = self._function(x.clone())  # a clone: the activation may work in place
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            bend = None
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope.sum(), x, allow_unused=True)
        self._slope = slope.detach().reshape(-1, 1)
        self._bend = None if bend is None else bend.reshape(-1, 1)
        return out.detach()

    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        flat = cotangent.reshape(-1, 1)
        self._curvature = None if self._bend is None else flat * self._bend
        return (flat * self._slope).view(cotangent.shape)

    def forget_curvature(self) -> None:
        self._curvature = None

    def _push(self, y: Tensor) -> Tensor:
        return self._slope * y

    def _pull(self, g: Tensor) -> Tensor:
        return self._slope * g

    def sandwich(self, value: Tensor) -> Tensor:
        rows = self.rows_in
        value[:rows] *= self._slope
        value[:, :rows] *= self._slope.mT
        return value

    def curve(self, y: Tensor) -> Tensor | None:
        return None if self._curvature is None else self._curvature * y

    def add_curvature(self, value: Tensor, damping: float) -> None:
        if self._curvature is not None:
            value.diagonal().add_(self._curvature.view(-1))


class Reshape(Element):
    """A layer that only arranges anew: Flatten, Unflatten, Identity, dropout that is off."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        self.rows_in = self.rows_out = z.numel()
        self._shape = z.shape
        out: Tensor = self._module.forward(z)
        return out

    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        return cotangent.reshape(self._shape)

    def _push(self, y: Tensor) -> Tensor:
        return y

    def _pull(self, g: Tensor) -> Tensor:
        return g

    def sandwich(self, value: Tensor) -> Tensor:
        return value


class Split(Fork, Element):
    """The entrance of a residual block."""

    def __init__(self) -> None:
        pass

    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        Fork.__init__(self, z.numel())
        kept.append(z)
        return z

    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        return cotangent + kept.pop()


class Merge(Join, Element):
    """The exit of a residual block.

    Raises:
        ValueError: If the block's layers change the shape.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def forward(self, z: Tensor, kept: list[Tensor]) -> Tensor:
        before = kept.pop()
        if before.shape != z.shape:
            raise ValueError(
                f"the residual block {self._name!r} maps {list(before.shape)} to {list(z.shape)}: z + f(z) needs the "
                f"same shape"
            )
        Join.__init__(self, z.numel())
        return before + z

    def backward(self, cotangent: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(cotangent)
        return cotangent


def _rows_times(y: Tensor, rows: int, matrix: Tensor) -> Tensor:
    """Every row of `[(n i) m]` times `[i o]`: `[(n o) m]`."""
    columns = y.shape[-1]
    if columns == 1:  # one product; a batched one would take several times as long for small rows
        return (y.reshape(rows, -1) @ matrix).view(-1, 1)
    return (matrix.mT @ y.reshape(rows, -1, columns)).flatten(0, 1)
