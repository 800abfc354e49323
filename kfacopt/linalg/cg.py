"""Conjugate gradients on lists of tensors: preconditioned, stopped at negative curvature (Hestenes & Stiefel 1952).

Besides the right-hand side and one product with the matrix, three vectors are held: the solution, the residual and the
direction; with a preconditioner, for a moment, also what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.tensors import inner_product

Product = Callable[[list[Tensor]], Sequence[Tensor]]
"""`v -> A v` on lists of tensors; it may return tensors that it reuses, but must not write to `v`."""


class CGResult(NamedTuple):
    """What conjugate gradients found.

    Attributes:
        solution: `x`, shaped as the right-hand side.
        iterations: Products that made it longer; computing the residual of `x0` is not counted.
        residual: `‖b - A x‖ / ‖b‖` as the recurrence has it; 0 for `b = 0`.
        converged: Whether the tolerance asked for, or the relative progress, was reached.
        negative_curvature: Whether it stopped because a direction had `pᵀ A p ≤ 0`; that direction was not taken.
        values: The quadratic `½ xᵀ A x - bᵀ x` before each iteration and after the last.
    """

    solution: list[Tensor]
    iterations: int
    residual: float
    converged: bool
    negative_curvature: bool
    values: list[float]


@dataclass(frozen=True)
class RelativeProgress:
    """Stop when the quadratic has gone down by little over the last iterations (Martens 2010, section 4.4).

    With `φ_i` its value after i iterations and `k = max(window, share · i)`: stop when `i > k`, `φ_i < 0` and
    `(φ_i - φ_{i-k}) / φ_i < k · tolerance`.

    Args:
        tolerance: Relative progress for each iteration.
        window: Iterations to look back, at least.
        share: Of the iterations so far to look back.

    >>> RelativeProgress(window=2).reached([0.0, -0.9, -1.0, -1.0, -1.0])
    True
    """

    tolerance: float = 5e-4
    window: int = 10
    share: float = 0.1

    def __post_init__(self) -> None:
        if not self.tolerance > 0.0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 iteration, got {self.window}")

    def reached(self, values: Sequence[float]) -> bool:
        """Whether to stop after these values of the quadratic, the first being that of the start."""
        iteration, now = len(values) - 1, values[-1]
        back = max(self.window, math.ceil(self.share * iteration))
        if iteration <= back or not now < 0.0:
            return False
        return (now - values[iteration - back]) / now < back * self.tolerance


@torch.no_grad()
def conjugate_gradient(
    multiply: Product,
    right: Sequence[Tensor],
    *,
    x0: Sequence[Tensor] | None = None,
    preconditioner: Product | None = None,
    max_iterations: int | None = None,
    tolerance: float = 1e-6,
    progress: RelativeProgress | None = None,
    observe: Callable[[int, Sequence[Tensor]], None] | None = None,
) -> CGResult:
    """Solve `A x = b` for a symmetric positive definite `A` known by its products.

    Args:
        multiply: `v -> A v`.
        right: `b`.
        x0: Where to start; default: zero, which saves a product. It is not written to.
        preconditioner: `r -> M⁻¹ r`, `M` symmetric positive definite and near to `A`.
        max_iterations: Default: the dimension.
        tolerance: Stop when `‖b - A x‖ ≤ tolerance · ‖b‖`; 0: never for that reason.
        progress: Stop also when the quadratic goes down by little.
        observe: Called with the iteration's number and `x` (to be cloned if kept) after each iteration.

    Returns:
        A `CGResult`. Where the matrix, or the preconditioner, shows a direction without positive curvature, the
        solution is the one before that direction, and `negative_curvature` says so.

    Raises:
        ValueError: If `x0` is not shaped as `right`, or an argument is out of range.
        FloatingPointError: If a product or the right-hand side is not finite.

    >>> a = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    >>> result = conjugate_gradient(lambda v: [a @ v[0]], [torch.ones(2, dtype=torch.float64)])
    >>> result.solution[0].tolist(), result.iterations, result.converged
    ([1.0, 0.25], 2, True)
    """
    b = list(right)
    limit = _checked_limit(b, x0, max_iterations, tolerance)
    length = math.sqrt(inner_product(b, b))
    x, r = _start(multiply, b, x0)
    values = [-0.5 * (inner_product(x, b) + inner_product(x, r))]
    rr = inner_product(r, r)
    target = (tolerance * length) ** 2
    p: list[Tensor] = []
    rz_before, iteration, negative = 0.0, 0, False
    converged = rr <= target
    while not converged and iteration < limit:
        rz = rr if preconditioner is None else 0.0
        if preconditioner is None:
            _extend(p, r, rz / rz_before if p else 0.0)
        else:
            z = list(preconditioner(r))
            rz = inner_product(r, z)
            _extend(p, z, rz / rz_before if p else 0.0)
            del z
        ap = list(multiply(p))
        curvature = inner_product(p, ap)
        if not (math.isfinite(curvature) and math.isfinite(rz)):
            raise FloatingPointError(f"conjugate gradients met a number that is not finite at iteration {iteration}")
        if curvature <= 0.0 or rz <= 0.0:
            negative = True
            break
        step = rz / curvature
        torch._foreach_add_(x, p, alpha=step)
        torch._foreach_add_(r, ap, alpha=-step)
        del ap
        values.append(values[-1] - 0.5 * step * rz)
        rz_before, rr, iteration = rz, inner_product(r, r), iteration + 1
        if observe is not None:
            observe(iteration, x)
        converged = rr <= target or (progress is not None and progress.reached(values))
    residual = math.sqrt(rr) / length if length > 0.0 else 0.0
    return CGResult(x, iteration, residual, converged, negative, values)


def _checked_limit(
    b: Sequence[Tensor], x0: Sequence[Tensor] | None, max_iterations: int | None, tolerance: float
) -> int:
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if x0 is not None and [t.shape for t in x0] != [t.shape for t in b]:
        raise ValueError(
            f"x0 has shapes {[tuple(t.shape) for t in x0]}, but the right-hand side {[tuple(t.shape) for t in b]}"
        )
    if not math.isfinite(inner_product(b, b)):
        raise FloatingPointError("the right-hand side of conjugate gradients is not finite")
    return sum(t.numel() for t in b) if max_iterations is None else max_iterations


def _start(multiply: Product, b: Sequence[Tensor], x0: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """The solution at the start and its residual."""
    if x0 is None:
        return [torch.zeros_like(t) for t in b], [t.clone() for t in b]
    x = [t.clone() for t in x0]
    return x, list(torch._foreach_sub(list(b), list(multiply(x))))


def _extend(p: list[Tensor], z: Sequence[Tensor], factor: float) -> None:
    """`p ← z + factor · p`, in place; an empty `p` becomes a copy of `z`."""
    if not p:
        p.extend(t.clone() for t in z)
        return
    torch._foreach_mul_(p, factor)
    torch._foreach_add_(p, list(z))
