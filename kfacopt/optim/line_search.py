"""How long a step along a given direction is: the best of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class GridLineSearch:
    """The step size with the lowest loss on the step's own batches, among `longest · ratio^i` (Müller & Zeinhofer 2023).

    Each size costs a forward. If none lowers the loss, the step is not taken.

    Args:
        points: Number of step sizes.
        ratio: Of one step size to the one before it.
        longest: The first step size, over the learning rate.

    >>> GridLineSearch(points=5).best(lambda size: (size - 0.3) ** 2 - 0.09)
    0.25
    """

    points: int = 31
    ratio: float = 0.5
    longest: float = 1.0

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points must be at least 1 step size, got {self.points}")
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")
        if not self.longest > 0.0:
            raise ValueError(f"longest must be positive, got {self.longest}")

    def best(self, loss_change: Callable[[float], float]) -> float:
        """The step size with the lowest loss change, or 0 where none is negative."""
        best, lowest = 0.0, 0.0
        for point in range(self.points):
            size = self.longest * self.ratio**point
            change = loss_change(size)
            if math.isfinite(change) and change < lowest:
                best, lowest = size, change
        return best
