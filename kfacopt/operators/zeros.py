"""Products with a tensor of zeros, without multiplying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


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
