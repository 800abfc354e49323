"""A gradient that is made when it is asked for: of a vocabulary it is as large as the logits, and rows may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeferredRows:
    """Rows `[m c]` that are made when they are asked for, some of them by `[start:stop]`.

    Attributes:
        count: How many there are.
        dtype: Theirs.
        of: Makes some of them, as a tensor of its own.

    >>> rows = DeferredRows(3, torch.float32, lambda some: torch.arange(3.0)[some, None])
    >>> rows[1:], rows.times(torch.full((3,), 2.0)).whole().flatten()
    (tensor([[1.],
            [2.]]), tensor([0., 2., 4.]))
    """

    count: int
    dtype: torch.dtype
    of: Callable[[slice], Tensor]

    def __getitem__(self, some: slice) -> Tensor:
        return self.of(some)

    def whole(self) -> Tensor:
        """All of them."""
        return self.of(slice(0, self.count))

    def times(self, factors: Tensor) -> DeferredRows:
        """Each row multiplied by its own factor, `[m]`."""
        return DeferredRows(self.count, self.dtype, lambda some: self.of(some).mul_(factors[some, None]))


class GradientField:
    """`LossTerms.gradient`: a tensor or None to all who read it, made at the first time where it was deferred."""

    def __get__(self, terms: Any, owner: type | None = None) -> Tensor | None:
        if terms is None:
            raise AttributeError("gradient has no default")  # which is how a dataclass asks for one
        held: Tensor | DeferredRows | None = terms.__dict__["gradient"]
        if isinstance(held, DeferredRows):
            held = terms.__dict__["gradient"] = held.whole()
        return held

    def __set__(self, terms: Any, value: Tensor | DeferredRows | None) -> None:
        terms.__dict__["gradient"] = value
