"""What evens the rows of a step's matrices and gives each its length: of all at once, whatever their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kfacopt.optim import memory
from kfacopt.optim.step.stacks import Stack

# A row's running mean square is taken for at least this part of the mean over all rows: an output that was idle for
# long, and has a gradient again, is not to take the whole step of its layer.
_LEAST_ROW = 1e-2
# So many arrangements of matrices are remembered: which of them have a gradient may change from step to step.
_KEPT = 8


@dataclass(frozen=True, eq=False)
class Segments:
    """Matrices' rows after each other in one vector `[rows]`.

    Attributes:
        counts: How many rows each matrix has, `[b]`.
        places: Of which matrix each row is, `[rows]`.
        lengths: Of each matrix, `[b]`.
    """

    counts: Tensor
    places: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], lengths: Sequence[float], like: Tensor) -> Segments:
        """Those of matrices with so many rows and of such lengths each."""
        counts = torch.tensor(sizes, device=like.device)
        places = torch.repeat_interleave(torch.arange(len(sizes), device=like.device), counts)
        return cls(counts, places, like.new_tensor(lengths))

    def sums(self, rows: Tensor) -> Tensor:
        """Over the rows of each matrix, `[b]`."""
        return torch.segment_reduce(rows, "sum", lengths=self.counts, unsafe=True)

    def spread(self, numbers: Tensor) -> Tensor:
        """A number of each matrix, `[b]`, for each of its rows."""
        return numbers.index_select(0, self.places)


class Evening:
    """Divides rows by the root of their running mean square, in units of the mean over their matrix's rows.

    What comes of it is known from the rows' squares: the matrices are met twice, to measure and to multiply them.

    Args:
        decay: Of the running averages, which are the optimizer's state; None: rows stay as they are.
    """

    def __init__(self, decay: float | None) -> None:
        self._decay = decay
        self._segments: dict[tuple[Any, ...], Segments] = {}

    def factors(
        self, state: memory.State, stacks: Sequence[Stack], matrices: Sequence[Tensor], length: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What to multiply matrices by, `[b *k o 1]`, and norms that are finite exactly if the matrices are.

        Args:
            state: The optimizer's.
            stacks: Of which the matrices are.
            matrices: `[b *k o i]`, as many as the stacks' each.
            length: Of each matrix, in units of the stack's.
        """
        found, norms = [], []
        # Of a model with parts in half precision, or on several devices, each has its own vector of rows.
        for _, members in groupby(zip(stacks, matrices, strict=True), key=_kind):
            chosen = list(members)
            own, norm = self._of_one_kind(state, [stack for stack, _ in chosen], [m for _, m in chosen], length)
            found += own
            norms.append(norm)
        return found, norms

    def _of_one_kind(
        self, state: memory.State, stacks: Sequence[Stack], matrices: Sequence[Tensor], length: float
    ) -> tuple[list[Tensor], Tensor]:
        rows = [torch.linalg.vector_norm(m, dim=stack.inputs) for stack, m in zip(stacks, matrices, strict=True)]
        segments = self._arranged(stacks, rows)
        squares = torch.cat([row.flatten() for row in rows]).square_()
        tiny = torch.finfo(squares.dtype).tiny
        evening = None
        if self._decay is not None:
            means = segments.sums(squares).div_(segments.counts).clamp_min_(tiny)
            keys = [key for stack in stacks for key in stack.keys]
            shapes = [row.shape[1:] for row in rows for _ in range(len(row))]
            averages = memory.row_squares(state, keys, shapes, squares / segments.spread(means), self._decay)
            averages.clamp_min_(_LEAST_ROW)
            squares, evening = squares.div_(averages), averages.rsqrt_()
        # Squares end at `tiny`, so the norm at its root; of a zero matrix the factor is to be finite.
        norms = segments.sums(squares).sqrt_().clamp_min_(tiny**0.5)
        factors = segments.spread((length * segments.lengths).div_(norms))
        factors = factors if evening is None else factors.mul_(evening)
        parts = factors.split([row.numel() for row in rows])
        shaped = [p.view(row.shape).unsqueeze(s.inputs) for p, row, s in zip(parts, rows, stacks, strict=True)]
        return shaped, norms

    def _arranged(self, stacks: Sequence[Stack], rows: Sequence[Tensor]) -> Segments:
        """How the matrices' rows lie, made once: in a step nothing is to be copied to the device."""
        shapes = tuple((row.shape, stack.length) for row, stack in zip(rows, stacks, strict=True))
        key = shapes, rows[0].device, rows[0].dtype
        if key not in self._segments:
            if len(self._segments) >= _KEPT:
                self._segments.clear()
            sizes = [row[0].numel() for row in rows for _ in range(len(row))]
            lengths = [stack.length for stack in stacks for _ in stack.holders]
            self._segments[key] = Segments.of(sizes, lengths, rows[0])
        return self._segments[key]


def _kind(member: tuple[Stack, Tensor]) -> tuple[Any, ...]:
    stack, matrices = member
    return matrices.device, matrices.dtype, stack.keys[0][0].dtype
