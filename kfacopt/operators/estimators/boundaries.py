"""Where the spectrum of a symmetric operator begins and ends; arguments as of curvlinops 3.0.1's functions."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kfacopt.linalg.lanczos import (
    ExtremeEigenvalues,
    Order,
    both_ends,
    extreme_eigenvalues,
    largest,
    largest_magnitude,
    smallest,
    smallest_magnitude,
)
from kfacopt.operators.convergence import ConvergenceWarning
from kfacopt.operators.estimators.probes import Matrix

Boundaries = tuple[float | None, float | None] | None
"""Smallest and largest eigenvalue, as far as they are known."""


def approximate_boundaries(A: Matrix, tol: float = 1e-2, boundaries: Boundaries = None) -> tuple[float, float]:
    """The smallest and largest eigenvalue of a symmetric operator.

    By Lanczos with restarts, from always the same vector: nothing is drawn from torch's global generator.

    Args:
        A: Symmetric operator or matrix.
        tol: Accuracy in units of the spectrum's width (curvlinops: of each eigenvalue, so that one near zero can cost
            any number of products). 0: rounding.
        boundaries: What is known already is not computed.

    Raises:
        ValueError: If A is not square or not symmetric, or the boundaries given are out of order.

    >>> low, high = approximate_boundaries(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
    >>> round(low, 4), round(high, 4)
    (1.0, 5.0)
    """
    low, high = (None, None) if boundaries is None else boundaries
    if low is None and high is None:
        low, high = _extremes(A, both_ends, 2, tol).values
    if low is None:
        (low,) = _extremes(A, smallest, 1, tol).values
    if high is None:
        (high,) = _extremes(A, largest, 1, tol).values
    return _in_order(low, high)


def approximate_boundaries_abs(A: Matrix, tol: float = 1e-2, boundaries: Boundaries = None) -> tuple[float, float]:
    """The smallest and largest magnitude of a symmetric operator's eigenvalues.

    The smallest may take many products. After 300 a lower bound is returned, 0 if there is no better, with a
    `ConvergenceWarning`.

    Args:
        A: Symmetric operator or matrix.
        tol: Accuracy relative to each of the two, or rounding^(2/3) times the largest. 0: rounding.
        boundaries: What is known already is not computed; signs are dropped.

    Raises:
        ValueError: If A is not square or not symmetric, or the boundaries given are out of order.

    >>> low, high = approximate_boundaries_abs(torch.diag(torch.tensor([1.0, 2.0, -5.0])))
    >>> round(low, 4), round(high, 4)
    (1.0, 5.0)
    """
    low, high = (None, None) if boundaries is None else boundaries
    if high is None:
        (high,) = _extremes(A, largest_magnitude, 1, tol).values
    if low is None:
        found = _extremes(A, smallest_magnitude, 1, tol)
        low = abs(found.values[0])
        low = low if found.converged else max(low - found.bounds[0], 0.0)
    return _in_order(abs(low), abs(high))


def checked_symmetric(A: Matrix) -> int:
    """The dimension of an operator that may be symmetric.

    Raises:
        ValueError: If A is not square or not real.
    """
    if len(A.shape) != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A must be a square matrix, got {type(A).__name__} of shape {list(A.shape)}")
    if not A.dtype.is_floating_point:
        raise ValueError(f"A must have real floating-point entries, got {A.dtype}")
    return A.shape[0]


def _extremes(A: Matrix, order: Order, number: int, tol: float) -> ExtremeEigenvalues:
    if not tol >= 0.0:
        raise ValueError(f"the tolerance of boundaries must not be negative, got {tol}")

    def accuracy(wanted: Tensor, values: Tensor) -> Tensor:
        if order in (smallest_magnitude, largest_magnitude):
            return tol * wanted.abs()
        return tol * (values.max() - values.min())

    # One inside the spectrum may not be found at all, and restarts help little: 300 products, then the bound is
    # reported. Those at the ends converge; 1000 only stops what cannot reach `tol` in its precision.
    limit = 300 if order is smallest_magnitude else 1000
    start = torch.randn(checked_symmetric(A), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = extreme_eigenvalues(
        lambda v: A @ v, start.to(A.device, A.dtype), order, number, accuracy, max_products=limit
    )
    if not found.converged:
        warnings.warn(
            f"after {found.products} products with {type(A).__name__} of shape {tuple(A.shape)} the boundary "
            f"{found.values} of its spectrum is known to within {max(found.bounds):.1e} only: pass `boundaries`, "
            "or raise `boundaries_tol`",
            ConvergenceWarning,
            stacklevel=3,
        )
    # One number stands for both ends where the operator has one eigenvalue.
    return found if len(found.values) == number else found._replace(values=found.values * number)


def _in_order(low: float, high: float) -> tuple[float, float]:
    if not low <= high:
        raise ValueError(f"boundaries must be the smallest and the largest eigenvalue, got {low} and {high}")
    return float(low), float(high)
