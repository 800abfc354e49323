"""An average that is filled batch by batch: folded once a step (running), or accumulated over a data set (plain)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfacopt.blocks.storage import Storage


class RunningAverage:
    """A bias-corrected exponential moving average of `sum / count`.

    Micro-batches `add` their sums and counts; `fold` averages what was added and moves the running average towards it.
    The first fold sets the average, later ones weigh as if every past batch had been seen with its own power of the
    decay (Adam's bias correction, kept normalised so that no correction is needed on reading).

    >>> average = RunningAverage()
    >>> average.add(torch.tensor([2.0]), 2.0); average.fold(0.5); average.value.item()
    1.0
    >>> average.add(torch.tensor([4.0]), 1.0); average.fold(0.5); round(average.value.item(), 4)
    3.0
    """

    def __init__(self) -> None:
        self.storage: Storage | None = None
        """How the average is kept; what is read is then brought back, and not the thing itself."""
        self._kept: Tensor | None = None
        self._dtype = torch.float32
        self.weight = 0.0
        self._sum: Tensor | None = None
        self._count: Tensor | float = 0.0

    @property
    def value(self) -> Tensor | None:
        """The average; None before the first fold."""
        if self.storage is None or self._kept is None:
            return self._kept
        return self.storage.restored(self._kept, self._dtype)

    @value.setter
    def value(self, value: Tensor | None) -> None:
        if self.storage is None or value is None:
            self._kept = value
        else:
            self._kept, self._dtype = self.storage.kept(value), value.dtype

    @property
    def known(self) -> bool:
        """Whether there is an average; it is not brought back for the question."""
        return self._kept is not None

    def add(self, total: Tensor, count: Tensor | float) -> None:
        """Add one micro-batch: its sum (taken over, not copied), and what the sum is to be divided by."""
        self._sum = total if self._sum is None else self._sum.add_(total)
        self._count = self._count + count

    @property
    def pending(self) -> Tensor | None:
        """What was added since the last fold, a sum not yet divided by its count."""
        return self._sum

    @property
    def count(self) -> Tensor | float:
        """What `pending` is to be divided by."""
        return self._count

    def replace(self, total: Tensor, count: Tensor | float) -> None:
        """Put another sum and count in the place of what was added since the last fold."""
        self._sum, self._count = total, count

    def rescale(self, factor: float) -> None:
        """Multiply what was added since the last fold."""
        if self._sum is not None:
            self._sum.mul_(factor)

    def fold(self, decay: float) -> None:
        """Average what was added into the running average; a mean over nothing changes nothing.

        >>> average = RunningAverage()
        >>> average.add(torch.zeros(1), 0.0); average.fold(0.5); average.value is None
        True
        """
        if self._sum is None or (isinstance(self._count, float) and self._count == 0.0):
            self.discard()
            return
        batch = self._sum.div_(self._count)
        self.weight = decay * self.weight + (1.0 - decay)
        held = self.value
        self.value = batch if held is None else held.lerp_(batch, (1.0 - decay) / self.weight)
        self.discard()

    def accumulate(self) -> None:
        """Average what was added into the plain average of all that was ever added; `weight` is its count.

        >>> average = RunningAverage()
        >>> average.add(torch.tensor([2.0]), 2.0); average.accumulate()
        >>> average.add(torch.tensor([7.0]), 1.0); average.accumulate(); average.value.item()
        3.0
        """
        if self._sum is None:
            return
        total, count = self._sum, float(self._count)
        self.discard()
        if count > 0.0:
            self._join(total.div_(count), count)

    def merge(self, other: RunningAverage) -> None:
        """Average another plain average in, each with the weight of its count."""
        if other.value is not None:
            self._join(other.value.clone() if self.value is None else other.value, other.weight)

    def _join(self, value: Tensor, weight: float) -> None:
        self.weight += weight
        held = self.value
        self.value = value if held is None else held.lerp_(value.to(held), weight / self.weight)

    def reset(self) -> None:
        """Forget everything."""
        self.value, self.weight = None, 0.0
        self.discard()

    def discard(self) -> None:
        """Forget what was added since the last fold."""
        self._sum, self._count = None, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python: the average, its weight, and what waits to be folded."""
        count = self._count
        return {"value": self.value, "weight": self.weight, "sum": self._sum, "count": count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Take over a state; tensors keep their dtype and move to `device`."""

        def own(value: Any) -> Any:
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        self.value, self.weight = own(state["value"]), float(state["weight"])
        self._sum, self._count = own(state["sum"]), own(state["count"])
