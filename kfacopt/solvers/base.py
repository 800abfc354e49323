"""The seam between a natural gradient step and how its linear system is solved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from kfacopt.backends.base import CurvatureBackend
from kfacopt.likelihoods.fisher import Curvature
from kfacopt.replay.linearization import BatchLinearization
from kfacopt.replay.metric import Metric


@dataclass(eq=False)
class Problem:
    """`(C + damping I) x = gradient` at one step.

    Attributes:
        metric: Products with `C`.
        gradient: Of the mean loss, shaped as the parameters; not to be written to.
        damping: Positive.
        precondition: `r -> M⁻¹ r`, where the solver has a backend for it.
    """

    metric: Metric
    gradient: list[Tensor]
    damping: float
    precondition: Callable[[list[Tensor]], Sequence[Tensor]] | None = None

    @property
    def linearization(self) -> BatchLinearization:
        """The step's forwards."""
        return self.metric.linearization


@dataclass(eq=False)
class Solved:
    """What a solver found.

    Attributes:
        direction: `x`.
        stats: Numbers worth logging.
        earlier: Solutions of earlier iterations, the last of them last.
        damping: If it could not be solved with that of the problem: the one it was solved with.
        again: `w -> (C + damping I)⁻¹ Jᵀ S Sᵀ w` for rows `w` `[m c]` of each piece.
    """

    direction: list[Tensor]
    stats: dict[str, float] = field(default_factory=dict)
    earlier: list[list[Tensor]] = field(default_factory=list)
    damping: float | None = None
    again: Callable[[list[Tensor]], list[Tensor]] | None = None


class Solver(ABC):
    """Solves a step's linear system; it may remember earlier solutions."""

    records: ClassVar[bool] = False
    """Whether the forwards are to be run again with recorded products."""

    shares_replays: ClassVar[bool] = False
    """Whether of several processes, each with forwards of its own, it finds the solution for all their data."""

    backend: CurvatureBackend | None = None
    """Fed with rows as a layer-wise optimizer's, if the solver has one: its preconditioner."""

    def check(self, curvature: Curvature) -> None:  # noqa: B027 - most solvers do with any
        """Refuse a curvature that it cannot do, with a ValueError."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solved:
        """The natural gradient."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over a state."""
