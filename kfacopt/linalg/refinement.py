"""Iterative refinement: an approximate inverse made exact by residuals of the exact operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-13
"""Relative size of a correction that is not made: it would move the solution by less than float64's sums of a few
hundred terms round it. Larger: the last digits are left out; smaller: products that change nothing."""

Map = Callable[[Tensor], Tensor]
"""A linear map of columns `[p m]`."""


class Refined(NamedTuple):
    """A solution `[p m]`; the largest relative residual of its columns; corrections made."""

    solution: Tensor
    residual: float
    steps: int


def refine(multiply: Map, precondition: Map, right: Tensor, *, tolerance: float, max_steps: int = 60) -> Refined:
    """Solve `A x = b` with an approximate inverse, to the accuracy that the residuals allow.

    Plain refinement (Wilkinson; Higham 2002, chapter 12) goes on as long as it halves the residual; a rounding error
    more or less costs one cheap product. Columns that are still above `tolerance` then go to restarted flexible GMRES
    (Saad 1993), which converges where the approximate inverse is too poor for plain refinement.

    Args:
        multiply: A, exact.
        precondition: Approximate inverse.
        right: b, `[p m]`.
        tolerance: Relative residual above which GMRES is used.
        max_steps: Bound on the corrections, each a product and a preconditioning.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> crude = lambda r: r / matrix.diagonal().unsqueeze(-1)
    >>> result = refine(lambda x: matrix @ x, crude, torch.ones(2, 1, dtype=torch.float64), tolerance=1e-12)
    >>> [round(x, 12) for x in result.solution.flatten().tolist()], result.residual < 1e-12
    ([0.4, 0.2], True)
    """
    scale = right.norm(dim=0).clamp_min(torch.finfo(right.dtype).tiny)
    solution = precondition(right)
    residual = right - multiply(solution)
    size, steps = residual.norm(dim=0) / scale, 0
    floor, moved = 2.0 * torch.finfo(right.dtype).eps, 1.0
    size = size.nan_to_num(nan=torch.inf)
    while steps < max_steps and bool((size > floor).any()):
        correction = precondition(residual)
        corrected = solution + correction
        left = right - multiply(corrected)
        now = (left.norm(dim=0) / scale).nan_to_num(nan=torch.inf)
        better, steps = now < size, steps + 1
        halved = bool((now < 0.5 * size)[size > floor].any())
        solution, residual = torch.where(better, corrected, solution), torch.where(better, left, residual)
        size = torch.where(better, now, size)
        # Corrections shrink geometrically: the next would be about moves² / moved, and is not worth its product.
        moves = float((correction.norm(dim=0) / solution.norm(dim=0)).max())
        if not halved or (moves**2 < _NEGLIGIBLE * moved and bool((size <= tolerance).all())):
            break
        moved = moves
    for column in (size > tolerance).nonzero().flatten().tolist():
        chosen = slice(column, column + 1)
        found, reached, more = _gmres(
            multiply, precondition, right[:, chosen], solution[:, chosen], tolerance, max(0, max_steps - steps)
        )
        if reached < float(size[column]):
            solution[:, chosen], size[column] = found, reached
        steps += more
    return Refined(solution, float(size.max()) if size.numel() else 0.0, steps)


def _gmres(
    multiply: Map, precondition: Map, right: Tensor, start: Tensor, tolerance: float, budget: int, restart: int = 20
) -> tuple[Tensor, float, int]:
    """Restarted flexible GMRES for one column; returns the solution, its relative residual and the steps taken.

    It keeps two vectors a step, so `restart` bounds the memory: 40 vectors of the parameters' size. With a
    preconditioner near the inverse a cycle is rarely used up; without one, fewer steps a cycle converge later.
    """
    scale = float(right.norm().clamp_min(torch.finfo(right.dtype).tiny))
    solution = start if bool(start.isfinite().all()) else torch.zeros_like(right)
    residual = right - multiply(solution)
    size, steps = float(residual.norm()) / scale, 0
    while size > tolerance and steps < budget:
        basis, directions = [residual / residual.norm()], []
        columns = right.new_zeros(restart + 1, restart)
        for j in range(min(restart, budget - steps)):
            directions.append(precondition(basis[j]))
            product = multiply(directions[j])
            for _ in range(2):  # twice is enough (Giraud, Langou & Rozloznik 2005)
                for i, vector in enumerate(basis):
                    weight = (vector * product).sum()
                    columns[i, j] += weight
                    product = product - weight * vector
            columns[j + 1, j] = product.norm()
            steps += 1
            target = right.new_zeros(j + 2, 1)
            target[0] = residual.norm()
            weights = torch.linalg.lstsq(columns[: j + 2, : j + 1], target).solution
            missed = float((columns[: j + 2, : j + 1] @ weights - target).norm()) / scale
            # A tenth: `missed` is a recurrence, and the residual that is judged in the end a little larger than it. Any
            # smaller share pays for digits that nobody asked for, and 1 would often need another cycle.
            if missed < 0.1 * tolerance or float(columns[j + 1, j]) == 0.0:
                break
            basis.append(product / columns[j + 1, j])
        candidate = solution + torch.cat(directions, dim=1) @ weights
        left = right - multiply(candidate)
        now = float(left.norm()) / scale
        # A cycle of `restart` steps that gains less than a tenth has stagnated (restarted GMRES may do so for ever).
        if not now < 0.9 * size:
            return (candidate, now, steps) if now < size else (solution, size, steps)
        solution, residual, size = candidate, left, now
    return solution, size, steps
