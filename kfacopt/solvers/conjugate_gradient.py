"""Hessian-free steps: conjugate gradients on products with the curvature, with the pieces of Martens (2010)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfacopt.backends.base import CurvatureBackend
from kfacopt.linalg.cg import CGResult, RelativeProgress, conjugate_gradient
from kfacopt.linalg.tensors import inner_product
from kfacopt.solvers.base import Problem, Solved, Solver

_RAISE = 4.0
"""Factor of the damping where not even the first direction has positive curvature."""


class CG(Solver):
    """Solves `(C + damping I) x = g` to a tolerance; the curvature is only ever multiplied with.

    Negative curvature (of the Hessian, or of rounding) ends the iterations before that direction is taken; where it is
    the very first one, the damping is raised for this step until it is not. `health()` says `negative_curvature` and
    how often it was `raised`.

    Args:
        max_iterations: At most so many products a step.
        tolerance: Stop when the residual is this small, relative to the gradient; 0: never for that reason.
        progress: Stop also when the quadratic model goes down by little; None: only the two above count.
        warm_start: Factor of the last step's solution, at which the next one starts; 0: at zero. Martens has 0.95.
        backtracking: Keep the solutions of iterations 1, `backtracking`, `backtracking²`, ... and step to an earlier
            one as long as the loss on the batch is lower there; Martens has 1.3. None: the last one counts, and
            nothing is kept.
        preconditioner: A backend whose solve is near to that of the curvature: `kfacopt.KFACBackend()`,
            `kfacopt.EKFACBackend()`, one of your own. Parameters that it leaves out are only scaled.

    Raises:
        TypeError, ValueError: If an argument is out of range, by name.
    """

    shares_replays = True

    def __init__(
        self,
        max_iterations: int = 250,
        tolerance: float = 1e-6,
        progress: RelativeProgress | None = RelativeProgress(),  # noqa: B008 - it is frozen
        warm_start: float = 0.0,
        backtracking: float | None = None,
        preconditioner: CurvatureBackend | None = None,
    ) -> None:
        if max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
        if not tolerance >= 0.0:
            raise ValueError(f"tolerance must not be negative, got {tolerance}")
        if not 0.0 <= warm_start <= 1.0:
            raise ValueError(f"warm_start must lie in [0, 1], got {warm_start}")
        if backtracking is not None and not backtracking > 1.0:
            raise ValueError(f"backtracking must be greater than 1, or None, got {backtracking}")
        if preconditioner is not None and not isinstance(preconditioner, CurvatureBackend):
            raise TypeError(f"preconditioner must be a kfacopt.CurvatureBackend, got {preconditioner!r}")
        self.max_iterations, self.tolerance, self.progress = max_iterations, tolerance, progress
        self.warm_start, self.backtracking = warm_start, backtracking
        self.backend = preconditioner
        self._last: list[Tensor] | None = None

    def __repr__(self) -> str:
        return (
            f"CG(max_iterations={self.max_iterations}, tolerance={self.tolerance}, progress={self.progress}, "
            f"warm_start={self.warm_start}, backtracking={self.backtracking}, preconditioner={self.backend!r})"
        )

    def solve(self, problem: Problem) -> Solved:
        start, damping, raised = self._start(problem), problem.damping, 0
        result, kept = self._iterate(problem, damping, start)
        while (result.negative_curvature and result.iterations == 0) or not _descends(result, problem):
            if start is None:
                raised, damping = raised + 1, _RAISE * damping
            start = None
            if raised > 100:
                break  # the curvature is not finite, or the gradient zero: the step is zero then
            result, kept = self._iterate(problem, damping, None)
        if self.warm_start > 0.0:
            self._last = [x.clone() for x in result.solution]
        stats = {
            "iterations": float(result.iterations),
            "residual": result.residual,
            "negative_curvature": float(result.negative_curvature or raised > 0),
            "raised": float(raised),
        }
        metric = problem.metric

        def again(rows: list[Tensor]) -> list[Tensor]:
            return self._iterate(replace(problem, gradient=metric.pulled_back(rows)), damping, None)[0].solution

        return Solved(result.solution, stats, kept, damping if raised else None, again)

    def _iterate(
        self, problem: Problem, damping: float, start: Sequence[Tensor] | None
    ) -> tuple[CGResult, list[list[Tensor]]]:
        kept: dict[int, list[Tensor]] = {}
        due = 1.0

        def multiply(v: list[Tensor]) -> list[Tensor]:
            product = problem.metric.multiply(v)
            torch._foreach_add_(product, v, alpha=damping)
            return product

        def keep(iteration: int, x: Sequence[Tensor]) -> None:
            nonlocal due
            assert self.backtracking is not None
            if iteration >= due:
                kept[iteration] = [t.clone() for t in x]
                while due <= iteration:
                    due *= self.backtracking

        result = conjugate_gradient(
            multiply,
            problem.gradient,
            x0=start,
            preconditioner=problem.precondition,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            progress=self.progress,
            observe=None if self.backtracking is None else keep,
        )
        kept.pop(result.iterations, None)  # that is the solution itself
        return result, list(kept.values())

    def _start(self, problem: Problem) -> list[Tensor] | None:
        last = self._last
        if self.warm_start == 0.0 or last is None or [t.shape for t in last] != [t.shape for t in problem.gradient]:
            return None
        return list(torch._foreach_mul(last, self.warm_start))

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": None if self._last is None else list(self._last),
            "preconditioner": None if self.backend is None else self.backend.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.backend is not None and state["preconditioner"] is not None:
            self.backend.load_state_dict(state["preconditioner"])
        self._last = None if state["last"] is None else [x.clone() for x in state["last"]]


def _descends(result: CGResult, problem: Problem) -> bool:
    """Whether the solution is a direction along which the loss goes down; of a warm start, it need not be."""
    if result.iterations == 0 and result.converged:
        return True
    return inner_product(result.solution, problem.gradient) > 0.0
