"""Estimate of a Frobenius norm from products. The interface is that of curvlinops 3.0.1."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.operators.estimators.probes import Distribution, Matrix, checked_budget, probes


def hutchinson_squared_fro(
    A: Matrix, num_matvecs: int, distribution: Distribution = "rademacher", *, generator: torch.Generator | None = None
) -> Tensor:
    """The mean of `‖A v‖²` over random vectors: Hutchinson's estimate of the trace of `Aᵀ A`. Unbiased.

    A matrix that is wider than tall is replaced by its adjoint, whose norm is the same.

    Args:
        A: Operator or matrix, of any shape.
        num_matvecs: Products, fewer than A's smaller dimension.
        distribution: Of the vectors' entries, `"rademacher"` or `"normal"`.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        The squared norm, as a tensor without axes.

    Raises:
        ValueError: If A is no matrix, or an argument is out of range.

    >>> hutchinson_squared_fro(torch.diag(torch.tensor([1.0, 2.0, 3.0])), num_matvecs=2)
    tensor(14.)
    """
    number = checked_budget(A, num_matvecs, square=False)
    tall = A.adjoint() if A.shape[1] > A.shape[0] else A
    vectors = probes(number, tall.shape[1], distribution, A, generator)
    return (tall @ vectors).square().sum() / number
