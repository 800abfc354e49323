"""Estimates of a diagonal from products: Hutchinson's and XDiag. The interface is that of curvlinops 3.0.1."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.operators.estimators.probes import (
    Distribution,
    Matrix,
    checked_budget,
    probes,
    range_of,
    without_own_column,
)


def hutchinson_diag(
    A: Matrix, num_matvecs: int, distribution: Distribution = "rademacher", *, generator: torch.Generator | None = None
) -> Tensor:
    """The mean of `v ⊙ A v` over random vectors (Bekas, Kokiopoulou & Saad 2007): unbiased.

    The variance of entry i is the sum of squares of the rest of A's row i, over `num_matvecs`; for normal vectors
    `2 A_ii²` is added to the sum.

    Args:
        A: Square operator or matrix.
        num_matvecs: Products with A, fewer than its dimension.
        distribution: Of the vectors' entries, `"rademacher"` or `"normal"`.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        The diagonal, `[D]`.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> hutchinson_diag(torch.diag(torch.tensor([1.0, 2.0, 3.0])), num_matvecs=1)
    tensor([1., 2., 3.])
    """
    number = checked_budget(A, num_matvecs)
    vectors = probes(number, A.shape[1], distribution, A, generator)
    return (vectors * (A @ vectors)).sum(dim=1) / number


def xdiag(A: Matrix, num_matvecs: int, *, generator: torch.Generator | None = None) -> Tensor:
    """XDiag (Epperly, Tropp & Webber 2024): exact on the range of A times the other vectors, one sample for the rest.

    Half the products are with A, half with its adjoint. Unbiased; exact where A times the other vectors spans A's
    range, as a rule where its rank is below `num_matvecs / 2`. (There curvlinops 3.0.1 inverts a factor that is
    singular, and fails if rounding does not hide it.)

    Args:
        A: Square operator or matrix; an operator must have an adjoint.
        num_matvecs: Products; even and fewer than A's dimension.
        generator: What draws the (Rademacher) vectors; default: torch's global generator of A's device.

    Returns:
        The diagonal, `[D]`.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> ones = torch.ones(5, 5)
    >>> xdiag(ones, num_matvecs=4, generator=torch.Generator().manual_seed(1)).round(decimals=4)
    tensor([1., 1., 1., 1., 1.])
    """
    number = checked_budget(A, num_matvecs, divisor=2)
    vectors = probes(number, A.shape[1], "rademacher", A, generator)
    sketch = A @ vectors
    basis, left_out = range_of(sketch)
    rows = (A.adjoint() @ basis).T  # Qᵀ A
    inside = (basis * rows.T).sum(dim=1) - ((basis @ left_out) * (left_out.T @ rows).T).sum(dim=1) / number
    rest = sketch - basis @ without_own_column(rows @ vectors, left_out)
    return inside + (vectors * rest).mean(dim=1)
