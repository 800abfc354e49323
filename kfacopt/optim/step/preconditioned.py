"""The natural gradient of the momentum."""

from __future__ import annotations

from kfacopt.optim.checks import check_number
from kfacopt.optim.step.base import Direction, Step, Updates


class Preconditioned(Direction):
    """`u = (C + damping I)⁻¹ m` with `m` the gradient's Nesterov momentum, bias-corrected.

    The average is taken before preconditioning, so that a trust region measures the step that is taken. It is the
    steepest descent direction in the norm `uᵀ (C + damping I) u` (Amari 1998).

    Args:
        momentum: Decay of the running average, a param group's `momentum` from then on; None: the gradient as it is,
            whatever the groups say.

    >>> Preconditioned(momentum=0.5).defaults()
    {'momentum': 0.5}
    """

    def __init__(self, momentum: float | None = 0.9) -> None:
        if momentum is not None:
            check_number("momentum", momentum)
        self._momentum = momentum

    def __repr__(self) -> str:
        return f"Preconditioned(momentum={self._momentum})"

    def defaults(self) -> dict[str, float]:
        return {} if self._momentum is None else {"momentum": self._momentum}

    def by_layers(self, step: Step) -> bool:
        return self._momentum is not None

    def updates(self, step: Step) -> Updates:
        averaged = step.gradients if self._momentum is None else step.averaged()
        solved = step.solve(averaged)
        # A backend whose solve is another power of the curvature (`EKFACBackend(exponent=0.5)`) is no Newton step.
        newton = step.backend is not None and step.backend.newton
        return Updates(solved, image={p: averaged[p] for p in solved} if newton else None)
