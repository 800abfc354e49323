"""Conjugate gradients for several right-hand sides at once, each a run of its own (Hestenes & Stiefel 1952).

One product with the matrix serves all columns that have not converged: with an operator over data, one pass over it.
For one right-hand side made of tensors, or other rules of when to stop, see `cg`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""`[D k] -> [D k]`; what it is given is not to be written to."""


class ColumnResult(NamedTuple):
    """How one column ended: iterations, whether within the tolerance, whether for want of positive curvature."""

    iterations: int
    converged: bool
    negative_curvature: bool


@torch.no_grad()
def conjugate_gradient_columns(
    multiply: Product,
    right: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: Product | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> tuple[Tensor, list[ColumnResult]]:
    """Solve `A X = B` for a symmetric positive definite `A` known by its products.

    Args:
        multiply: `V -> A V`.
        right: B, `[D k]`.
        x0: Where to start, `[D k]`; default: zero, which saves a product.
        preconditioner: `R -> M⁻¹ R`, M symmetric positive definite and near to A.
        max_iterations: Of each column.
        tolerance: A column is done when `‖b - A x‖ ≤ tolerance ‖b‖`, as the recurrence has it.

    Returns:
        X, `[D k]`, and how each column ended.

    Raises:
        FloatingPointError: If the right-hand side or a product is not finite.

    >>> a = torch.diag(torch.tensor([1.0, 4.0]))
    >>> x, columns = conjugate_gradient_columns(lambda v: a @ v, torch.ones(2, 1))
    >>> x.flatten().tolist(), columns[0].iterations
    ([1.0, 0.25], 2)
    """
    state = {"x": torch.zeros_like(right) if x0 is None else x0.clone()}
    state["r"] = right.clone() if x0 is None else right - multiply(x0)
    state["column"] = torch.arange(right.shape[1])
    state["target"] = tolerance * _dot(right, right).sqrt()
    if not bool(state["target"].isfinite().all()):
        raise FloatingPointError("the right-hand side of conjugate gradients is not finite")
    solution = torch.zeros_like(right)
    results: list[ColumnResult | None] = [None] * right.shape[1]

    def finish(which: Tensor, iteration: int, converged: bool, negative: bool) -> None:
        """Write these columns down and take them out of the state."""
        for place in which.nonzero().flatten().tolist():
            column = int(state["column"][place])
            solution[:, column] = state["x"][:, place]
            results[column] = ColumnResult(iteration, converged, negative)
        if bool(which.any()):
            left = (~which).nonzero().flatten()
            state.update({name: t.index_select(-1, left.to(t.device)) for name, t in state.items()})

    for iteration in range(max_iterations + 1):
        finish(_dot(state["r"], state["r"]).sqrt() <= state["target"], iteration, True, False)
        if iteration == max_iterations:
            finish(torch.ones_like(state["column"], dtype=torch.bool), iteration, False, False)
        if not len(state["column"]):
            break
        z = state["r"] if preconditioner is None else preconditioner(state["r"])
        rz = _dot(state["r"], z)
        state["p"] = z + (rz / state["rz"]).to(z) * state["p"] if "p" in state else z
        state["rz"], state["ap"] = rz, multiply(state["p"])
        state["curvature"] = _dot(state["p"], state["ap"])
        if not bool((state["curvature"] + rz).isfinite().all()):
            raise FloatingPointError(f"conjugate gradients met a number that is not finite at iteration {iteration}")
        finish((state["curvature"] <= 0.0) | (rz <= 0.0), iteration, False, True)
        step = (state["rz"] / state["curvature"]).to(right)
        state["x"] = state["x"] + step * state["p"]
        state["r"] = state["r"] - step * state["ap"]
    return solution, [r for r in results if r is not None]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of columns, as float64 on the CPU, where the scalars of the recurrence are."""
    return (left * right).sum(dim=0).double().cpu()
