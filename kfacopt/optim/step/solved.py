"""The solution of the step's own linear system, by a solver; its path may bend."""

from __future__ import annotations

import math

from torch import Tensor

from kfacopt.likelihoods.fisher import Curvature
from kfacopt.optim.step.acceleration import GeodesicAcceleration
from kfacopt.optim.step.base import Direction, Step, Updates
from kfacopt.optim.step.line_search import GridLineSearch
from kfacopt.replay import path
from kfacopt.replay.linearization import BatchLinearization
from kfacopt.solvers.base import Problem, Solved, Solver
from kfacopt.solvers.preconditioner import Preconditioner


class Solves(Direction):
    """`(C + damping I)⁻¹ g`, `C` the curvature of the step's own batches.

    Args:
        solver: Solves; it may remember earlier solutions.
        curvature: Which C.
        acceleration: Bends the path; None: it is straight.
        line_search: What will choose the step's length, if anything: it also judges accelerations, however large, and
            its last step is the unit of `acceleration.probe`.

    Attributes:
        damping: With which the last step was solved: the group's, or what the solver had to raise it to.
    """

    def __init__(
        self,
        solver: Solver,
        curvature: Curvature,
        acceleration: GeodesicAcceleration | None,
        line_search: GridLineSearch | None,
    ) -> None:
        self.solver, self.curvature = solver, curvature
        self.acceleration, self._line_search = acceleration, line_search
        self.damping = 0.0
        self._report: dict[str, float] = {}

    def wants_replays(self, step: int) -> bool:
        return True

    def updates(self, step: Step) -> Updates:
        parameters, damping = list(step.gradients), float(step.groups[0]["damping"])
        gradient = [step.gradients[p] for p in parameters]
        problem = Problem(step.metric(parameters, self.curvature), gradient, damping, _preconditioner(step))
        solved = self.solver.solve(problem)
        self.damping = damping if solved.damping is None else solved.damping
        self._report = dict(solved.stats)
        found = [Updates(dict(zip(parameters, x, strict=True))) for x in (*solved.earlier, solved.direction)]
        steps = [step.displacement(one) for one in found]
        chosen = path.backtracked(step.linearization(parameters), steps, self._report)
        found[chosen].bend = self._bend(step.linearization(parameters), steps[chosen], solved)
        return found[chosen]

    def _bend(self, linearization: BatchLinearization, step: list[Tensor], solved: Solved) -> list[Tensor] | None:
        if self.acceleration is None or solved.again is None:
            return None
        unit, limit = 1.0, self.acceleration.limit
        if self._line_search is not None:
            unit, limit = self._line_search.last or 1.0, math.inf
        return path.bend(linearization, step, solved.again, unit * self.acceleration.probe, limit)

    def health(self) -> dict[str, float]:
        return dict(self._report)


def _preconditioner(step: Step) -> Preconditioner | None:
    """The backend's solve with what this step's batches told it, or None."""
    if step.backend is None:
        return None
    step.backend.fold(step.number, step.settings)
    step.backend.refresh(step.number, step.settings)
    return Preconditioner(step.backend, step.settings, list(step.gradients))
