"""Every product of a forward with a weight, recorded in the backward: rows of per-datum gradients of any model.

While a model runs within `ProductRecorder.recording()`, `F.linear` and (ungrouped) `F.conv2d` become a product whose
backward is again such a product. A model that differentiates itself (a residual of a differential equation) then holds
several products with the same weight in one graph: of its layers, of its derivatives, of theirs. In the backward pass
from a prediction each of them sees both sides `a` and `g` of its part `g aᵀ` of the weight's gradient; row by row these
are the per-datum gradients, and all products with a weight are its places `s`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Sides = tuple[Tensor, Tensor]
"""`a [n s i]` and `g [n s o]`."""


class ProductRecorder:
    """Runs models with recorded products, and keeps what the next backward passes show of them.

    >>> weight, recorder = torch.eye(2, requires_grad=True), ProductRecorder()
    >>> with recorder.recording():
    ...     y = F.linear(torch.ones(3, 2), weight)
    >>> _ = recorder.backward([y], [weight], [torch.ones(3, 2)])
    >>> [tuple(side.shape) for side in recorder.take(weight)[0]]
    [(3, 1, 2), (3, 1, 2)]
    """

    def __init__(self) -> None:
        self._listening = False
        self._seen: dict[int, list[Sides]] = {}
        self._wanted: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context, products with weights are recorded ones."""
        with _Rewriting(self):
            yield

    def backward(
        self, outputs: Sequence[Tensor], weights: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """One backward pass that notes the sides; the gradients of noted weights are None or without meaning."""
        self._seen, self._wanted, self._listening = {}, {id(w) for w in weights}, True
        try:
            return torch.autograd.grad(
                list(outputs), list(weights), list(cotangents), retain_graph=True, allow_unused=True
            )
        finally:
            self._listening = False

    def take(self, weight: Tensor) -> list[Sides]:
        """What the last backward pass noted of a weight; of a bias, `a` is one column of ones."""
        return self._seen.pop(id(weight), [])

    @property
    def listening(self) -> bool:
        """Whether a pass of `backward` is under way."""
        return self._listening

    def note(self, weight: Tensor, inputs: Tensor, gradient: Tensor) -> None:
        """Take in both sides of one product, `[n ... i]` and `[n ... o]`."""
        if id(weight) in self._wanted:
            self._seen.setdefault(id(weight), []).append((_with_places(inputs), _with_places(gradient)))


class _Rewriting(TorchFunctionMode):
    """Replaces `F.linear` and `F.conv2d` by recorded products where a parameter is the weight."""

    def __init__(self, recorder: ProductRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return self._linear(*args, **kwargs)
        if func is F.conv2d and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return self._conv2d(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not weight.is_leaf or input.ndim < 2 or input.dtype != weight.dtype:
            return F.linear(input, weight, bias)
        return self._product(input, weight, bias)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if not weight.is_leaf or groups != 1 or isinstance(padding, str) or input.ndim != 4:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        kernel, strides, paddings, dilations = weight.shape[2:], _pair(stride), _pair(padding), _pair(dilation)
        patches = F.unfold(input, kernel, dilations, paddings, strides).mT
        result = self._product(patches, weight, bias).mT
        height = (input.shape[2] + 2 * paddings[0] - dilations[0] * (kernel[0] - 1) - 1) // strides[0] + 1
        unflattened: Tensor = result.unflatten(2, (height, -1))
        return unflattened

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = _Product.apply(input, weight, self._recorder, False)  # type: ignore[no-untyped-call]
        if bias is None:
            return result
        shifted: Tensor = _Shift.apply(result, bias, self._recorder)  # type: ignore[no-untyped-call]
        return shifted


class _Product(torch.autograd.Function):
    """`x Wᵀ`, or `x W`; of a weight with more than two axes, all but the first are the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recorder: ProductRecorder, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder, ctx.transposed = recorder, transposed
        matrix = weight.flatten(1)
        return x @ matrix if transposed else x @ matrix.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        a, g = (gradient, x) if ctx.transposed else (x, gradient)
        of_weight = None
        if ctx.recorder.listening:
            ctx.recorder.note(weight, a.detach(), g.detach())
        elif ctx.needs_input_grad[1]:
            of_weight = (g.flatten(0, -2).T @ a.flatten(0, -2)).view_as(weight)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = _Product.apply(gradient, weight, ctx.recorder, not ctx.transposed)  # type: ignore[no-untyped-call]
        return of_x, of_weight, None, None


class _Shift(torch.autograd.Function):
    """`x + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, recorder: ProductRecorder) -> Tensor:
        ctx.save_for_backward(bias)
        ctx.recorder = recorder
        return x + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (bias,) = ctx.saved_tensors
        of_bias = None
        if ctx.recorder.listening:
            ctx.recorder.note(bias, gradient.new_ones(()).expand(*gradient.shape[:-1], 1), gradient.detach())
        elif ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return gradient, of_bias, None


def _with_places(side: Tensor) -> Tensor:
    return side.reshape(side.shape[0], side.shape[1:-1].numel(), side.shape[-1])


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
