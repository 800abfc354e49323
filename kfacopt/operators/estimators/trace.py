"""Estimates of a trace from products: Hutchinson, Hutch++, XTrace. The interface is that of curvlinops 3.0.1."""

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


def hutchinson_trace(
    A: Matrix, num_matvecs: int, distribution: Distribution = "rademacher", *, generator: torch.Generator | None = None
) -> Tensor:
    """The mean of `vᵀ A v` over random vectors (Girard 1989, Hutchinson 1989): unbiased.

    With S the symmetric part of A its variance is `2 (‖S‖² - Σ S_ii²) / num_matvecs` for Rademacher vectors and
    `2 ‖S‖² / num_matvecs` for normal ones; it is exact for diagonal matrices and Rademacher vectors.

    Args:
        A: Square operator or matrix.
        num_matvecs: Products with A, fewer than its dimension.
        distribution: Of the vectors' entries, `"rademacher"` or `"normal"`.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        A number, as a tensor without axes.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> hutchinson_trace(torch.diag(torch.tensor([1.0, 2.0, 3.0])), num_matvecs=1)
    tensor(6.)
    """
    number = checked_budget(A, num_matvecs)
    vectors = probes(number, A.shape[1], distribution, A, generator)
    return (vectors * (A @ vectors)).sum() / number


def hutchpp_trace(
    A: Matrix, num_matvecs: int, distribution: Distribution = "rademacher", *, generator: torch.Generator | None = None
) -> Tensor:
    """Hutch++ (Meyer et al. 2021): the exact trace on a random range of A, Hutchinson's on what is left. Unbiased.

    A third of the products each finds the range, takes the trace there and estimates the rest. It is exact where A's
    rank is at most `num_matvecs / 3`.

    Args:
        A: Square operator or matrix.
        num_matvecs: Products with A; a multiple of 3 and fewer than its dimension.
        distribution: Of the vectors' entries, `"rademacher"` or `"normal"`.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        A number, as a tensor without axes.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> ones = torch.ones(4, 4)
    >>> round(hutchpp_trace(ones, num_matvecs=3, generator=torch.Generator().manual_seed(1)).item(), 4)
    4.0
    """
    number = checked_budget(A, num_matvecs, divisor=3)
    sketch = A @ probes(number, A.shape[1], distribution, A, generator)
    basis: Tensor = torch.linalg.qr(sketch)[0]
    inside = (basis * (A @ basis)).sum()
    vectors = probes(number, A.shape[1], distribution, A, generator)
    vectors = vectors - basis @ (basis.T @ vectors)
    return inside + (vectors * (A @ vectors)).sum() / number


def xtrace(
    A: Matrix, num_matvecs: int, distribution: Distribution = "rademacher", *, generator: torch.Generator | None = None
) -> Tensor:
    """XTrace (Epperly, Tropp & Webber 2024): Hutch++ that uses each vector both for the range and for the rest.

    For each of the `num_matvecs / 2` vectors, the range is that of A times the *other* vectors: exact there, with one
    sample for the rest; the mean of these estimates is unbiased. It is exact where A times the other vectors spans A's
    range: for normal vectors where the rank is below `num_matvecs / 2`. (There curvlinops 3.0.1 inverts a factor that
    is singular, and fails if rounding does not hide it.)

    Args:
        A: Square operator or matrix.
        num_matvecs: Products with A; even and fewer than its dimension.
        distribution: Of the vectors' entries, `"rademacher"` or `"normal"`.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        A number, as a tensor without axes.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> ones = torch.ones(5, 5)
    >>> round(xtrace(ones, num_matvecs=4, generator=torch.Generator().manual_seed(1)).item(), 4)
    5.0
    """
    number = checked_budget(A, num_matvecs, divisor=2)
    vectors = probes(number, A.shape[1], distribution, A, generator)
    sketch = A @ vectors
    basis, left_out = range_of(sketch)
    product = A @ basis
    inner = basis.T @ product
    inside = inner.trace() - (left_out * (inner @ left_out)).sum(dim=0)
    # P_i = I - Q (I - s sᵀ) Qᵀ takes away the range without vector i: v_iᵀ P_i A P_i v_i.
    outer = sketch - product @ without_own_column(basis.T @ vectors, left_out)
    rest = vectors - basis @ without_own_column(basis.T @ vectors, left_out)
    return (inside + (rest * outer).sum(dim=0)).mean()
