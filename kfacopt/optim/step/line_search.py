"""How long a step along a given direction is: the best of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kfacopt.optim.step.base import Step, StepLength, Updates
from kfacopt.replay import path


@dataclass
class GridLineSearch(StepLength):
    """The step size with the lowest loss on the step's own batches, of a grid (Müller & Zeinhofer 2023).

    The grid is `longest · ratio^i`; each size costs a forward. The whole grid is searched at first and every
    `scan_every` steps; in between the search goes from the last step's size to a neighbour as long as that is better,
    mostly three forwards. If no size lowers the loss, the step is not taken.

    Args:
        points: Number of step sizes.
        ratio: Of one step size to the one before it.
        longest: The first step size, over the learning rate.
        scan_every: Steps between two searches of the whole grid; 1: always.

    >>> GridLineSearch(points=5).best(lambda size: (size - 0.3) ** 2 - 0.09)
    0.25
    """

    shares_replays = True

    points: int = 31
    ratio: float = 0.5
    longest: float = 1.0
    scan_every: int = 50
    last: float = field(default=0.0, init=False, repr=False, compare=False)
    """The step size that was chosen last; 0: none yet, or no size lowered the loss."""

    def __post_init__(self) -> None:
        for name in ("points", "scan_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")
        if not self.longest > 0.0:
            raise ValueError(f"longest must be positive, got {self.longest}")

    def wants_replays(self, step: int) -> bool:
        return True

    def scaled(self, step: Step, updates: Updates) -> Updates:
        linearization = step.linearization(list(updates.tensors))

        def loss_change(size: float) -> float:
            return path.loss_change(linearization, step.displacement(updates.scaled(size)))

        self.last = self.best(loss_change, self.last, step.number)
        return updates.scaled(self.last)

    def health(self) -> dict[str, float]:
        """`step_size`, the one that was chosen."""
        return {"step_size": self.last}

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last = float(state["last"])

    def best(self, loss_change: Callable[[float], float], near: float = 0.0, step: int = 0) -> float:
        """The step size with the lowest loss change, or 0 where none is negative.

        Args:
            loss_change: `step size -> change of the loss`; what is not finite is no candidate.
            near: The size that the last step had; 0: none is known.
            step: Number of the step.
        """
        changes: dict[int, float] = {}

        def change(point: int) -> float:
            if point not in changes:
                value = loss_change(self.longest * self.ratio**point)
                changes[point] = value if math.isfinite(value) else math.inf
            return changes[point]

        chosen = self._nearest(near)
        if near == 0.0 or step % self.scan_every == 0:
            chosen = min(range(self.points), key=change)
        else:
            while (better := min(self._around(chosen), key=change)) != chosen:
                chosen = better
            if not change(chosen) < 0.0:
                chosen = min(range(self.points), key=change)
        return self.longest * self.ratio**chosen if change(chosen) < 0.0 else 0.0

    def _nearest(self, size: float) -> int:
        if size <= 0.0:
            return 0
        return min(self.points - 1, max(0, round(math.log(size / self.longest) / math.log(self.ratio))))

    def _around(self, point: int) -> list[int]:
        # The point itself comes first: of equals it is kept.
        return [p for p in (point, point - 1, point + 1) if 0 <= p < self.points]
