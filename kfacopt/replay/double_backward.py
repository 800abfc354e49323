"""Derivatives of a graph, and of its gradient: products with Jacobians and Hessians by reverse mode alone.

The gradient `Jᵀ w` is linear in its cotangent w, so its derivative with respect to w is the Jacobian: `J v` takes two
backward passes, asks nothing of operations but that their backward is differentiable, and serves any number of vectors
with one graph. For `J v` alone any w will do. With a zero one the products of the first pass are all zero and are
skipped, so that no more is multiplied than in forward mode (MLP 784-512-256-10, batch 512: 1.55 gradients' flops, 1.95
gradients' time for a GGN product, where forward mode takes 1.98 and a Hessian product 3.6 instead of 2.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kfacopt.capture.guard import Guard
from kfacopt.capture.tensor_hooks import HooksSince

_aten = torch.ops.aten


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Only kernels that can be differentiated twice: fused attention cannot.

    For forwards, and for backwards too, in which activation checkpointing runs forwards again.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


def guard_of(outputs: Sequence[Tensor], since: HooksSince) -> Guard:
    """A guard for passes through the graph of some outputs, whose forward began when `since` was made."""
    return Guard([output.grad_fn for output in outputs], since)


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], guard: Guard | None = None
) -> list[Tensor]:
    """`Jᵀ w`, shaped as the inputs: tensors of their own, that may be written to. The graph stays.

    Args:
        outputs: With or without graphs.
        inputs: What to differentiate with respect to; zeros come back for those that no output depends on.
        cotangents: w, shaped as the outputs.
        guard: Of the outputs.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradients([x**2], [x], [torch.ones(2)])
    [tensor([2., 4.])]
    """
    pairs = [(output, w) for output, w in zip(outputs, cotangents, strict=True) if output.requires_grad]
    return _own(_grad(pairs, inputs, guard), inputs, [*cotangents, *inputs])


class DoubleBackward:
    """The gradient `Jᵀ w` of a graph's outputs as a graph of its own, to be differentiated once more.

    Args:
        outputs: With or without graphs; those are kept.
        inputs: What to differentiate with respect to.
        cotangents: w, shaped as the outputs; None: zero, for `jacobian` alone.
        guard: Of the outputs.

    Raises:
        RuntimeError: If a custom function in the graph has a backward that cannot be differentiated.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> twice = DoubleBackward([x**3], [x], [torch.ones(2)])
    >>> twice.jacobian([torch.ones(2)]), twice.hessian([torch.ones(2)])
    ([tensor([ 3., 12.])], [tensor([ 6., 12.])])
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._inputs, self._curved, self._guard = list(inputs), cotangents is not None, guard
        given = [torch.zeros_like(output) for output in outputs] if cotangents is None else cotangents
        self._cotangents = [w.detach().requires_grad_() for w in given]
        pairs = [(output, w) for output, w in zip(outputs, self._cotangents, strict=True) if output.requires_grad]
        # Only the graph is wanted. On an accelerator, asking whether numbers are zero takes longer than multiplying.
        skips = cotangents is None and all(w.device.type == "cpu" for w in given)
        with torch.enable_grad(), SkippedZeroProducts() if skips else nullcontext():  # type: ignore[no-untyped-call]
            found = _grad(pairs, self._inputs, guard, create_graph=True)
        self._gradients = {i: g for i, g in enumerate(found) if g is not None and g.requires_grad}
        if guard is not None and guard.functions:
            self._check_linear(outputs, guard)

    def _check_linear(self, outputs: Sequence[Tensor], guard: Guard) -> None:
        """A custom function may detach what it computes: `(J v) · w` must be `v · (Jᵀ w)`."""
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        v, w = ([draw(t.shape).to(t) for t in tensors] for tensors in (self._inputs, outputs))
        along = gradients(outputs, self._inputs, w, guard)
        try:
            pairs = [zip(v, along, strict=True), zip(w, self.jacobian(v), strict=True)]
        except RuntimeError as error:  # torch's does not say whose code it is
            raise RuntimeError(
                f"{guard.functions}: cannot be differentiated through, which products with the Jacobian need: {error}"
            ) from error
        products = [torch.cat([(a * b).double().flatten() for a, b in some]) for some in pairs]
        tolerance = 10 * max(torch.finfo(t.dtype).eps for t in (*v, *w)) ** 0.5
        if abs(products[0].sum() - products[1].sum()) > tolerance * max(p.abs().sum() for p in products):
            raise RuntimeError(
                f"{guard.functions}: cannot be differentiated through, as it detaches what its gradient is computed "
                f"of, and products with the Jacobian need that. Compute the gradient with differentiable operations of "
                f"torch, or write @once_differentiable above a backward that cannot"
            )

    def jacobian(self, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """`J v`, shaped as the outputs, for v shaped as the inputs; None stands for zeros."""
        return self._second(tangents, self._cotangents)

    def hessian(self, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """The Hessian of `wᵀ outputs` times v: both shaped as the inputs."""
        assert self._curved, "without cotangents there is no second derivative"
        return self._second(tangents, self._inputs)

    def both(self, tangents: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        """`jacobian` and `hessian` in one pass."""
        assert self._curved, "without cotangents there is no second derivative"
        found = self._second(tangents, [*self._cotangents, *self._inputs])
        return found[: len(self._cotangents)], found[len(self._cotangents) :]

    def _second(self, tangents: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of `Σ vᵀ gradient` with respect to what is wanted."""
        pairs = [(g, v) for i, g in self._gradients.items() if (v := tangents[i]) is not None]
        return _own(_grad(pairs, wanted, self._guard), wanted, [*(v for _, v in pairs), *self._inputs])


def _grad(
    pairs: Sequence[tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    guard: Guard | None,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """autograd's gradients of outputs with their cotangents; the graph stays."""
    if not pairs:
        return [None for _ in inputs]
    outputs, cotangents = zip(*pairs, strict=True)
    with twice_differentiable(), nullcontext() if guard is None else guard():
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )


def _own(found: Sequence[Tensor | None], like: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as tensors of their own: autograd may return one twice, expanded, sparse, or the very one given."""
    held = {tensor.untyped_storage().data_ptr() for tensor in given}
    result = []
    for gradient, parameter in zip(found, like, strict=True):
        if gradient is None:
            result.append(torch.zeros_like(parameter))
            continue
        if gradient.layout != torch.strided:  # nn.Embedding(sparse=True)
            gradient = gradient.to_dense()
        storage = gradient.untyped_storage()
        whole = storage.nbytes() == gradient.numel() * gradient.element_size() and gradient.is_contiguous()
        own = whole and storage.data_ptr() not in held
        held.add(storage.data_ptr())
        result.append(gradient.detach() if own else gradient.detach().clone(memory_format=torch.contiguous_format))
    return result


class SkippedZeroProducts(TorchDispatchMode):
    """Within this context matrix products and convolutions' backwards of a tensor of zeros are zeros at once.

    For a backward pass of a zero cotangent that is only run for its graph: all of its products are zero. Whether a
    tensor is zero is asked of its numbers, so that anything else comes out as ever.

    >>> with SkippedZeroProducts():
    ...     torch.zeros(2, 3) @ torch.ones(3, 1)
    tensor([[0.],
            [0.]])
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        zero = _ZEROS.get(func)
        found = None if zero is None else zero(*args)
        return func(*args, **(kwargs or {})) if found is None else found


def _of_product(a: Tensor, b: Tensor) -> Tensor | None:
    if a.any() and b.any():
        return None
    return a.new_zeros(*a.shape[:-1], b.shape[-1])


def _of_convolution(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *options: Any
) -> tuple[Tensor | None, ...] | None:
    if grad_output.any():
        return None
    for_x, for_weight, for_bias = options[-1]
    return (
        torch.zeros_like(x) if for_x else None,
        torch.zeros_like(weight) if for_weight else None,
        grad_output.new_zeros(bias_sizes) if for_bias and bias_sizes is not None else None,
    )


_ZEROS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _of_product,
    _aten.bmm.default: _of_product,
    _aten.convolution_backward.default: _of_convolution,
}
