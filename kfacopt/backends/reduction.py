"""What several processes added to the statistics of their blocks, as though it were of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.backends.divided import averages_of_team
from kfacopt.blocks.base import Block
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.linalg.triangles import pack_triangle, unpack_triangle
from kfacopt.replicas import Teams, delivered, summed_at
from kfacopt.sharding import Processes

Destinations = Callable[[Mapping[str, Block]], Mapping[str, int]]
"""By layer name, a rank whose team alone is to have a block's statistics; of others all have them.

Asked when everybody knows the shapes of all that waits.
"""


class _Entry(NamedTuple):
    """One running average of one block, and whether it goes to its layer's team alone, if there is one."""

    layer: str
    average: RunningAverage
    symmetric: bool
    of_inputs: bool
    of_team: bool

    def packed(self) -> Tensor:
        total = self._pending
        return pack_triangle(total) if self._half(total) else total.contiguous()

    def take(self, total: Tensor, count: Tensor | float) -> None:
        """Put a sum over the processes, packed, in the place of what waits here."""
        if self._half(self._pending):
            total = unpack_triangle(total)
        elif not self.average.known:
            total = total.clone()  # the average would keep all that came with it
        self.average.replace(total, count)

    def _half(self, total: Tensor) -> bool:
        return self.symmetric and total.ndim > 1  # a diagonal one has one axis

    @property
    def _pending(self) -> Tensor:
        assert self.average.pending is not None
        return self.average.pending


class _Waiting(NamedTuple):
    """An entry of which something waits in all processes, and what their sum is to be divided by."""

    entry: _Entry
    divisor: float


def reduce_pending(
    blocks: Mapping[str, Block], processes: Processes, averaged: bool, destinations: Destinations | None = None
) -> list[str]:
    """Bring what waits to be folded, of every process, together: afterwards all who are to have it have the same.

    The loss that the gradients are of is the mean of the processes' losses. Where these are means, so is the curvature
    the mean of theirs, each divided by its own count; where they are sums, and for averages of inputs, sums and counts
    are added up.

    Args:
        blocks: By layer name, the same layers in all processes.
        processes: Those that train together.
        averaged: Whether each process's loss is a mean over its terms.
        destinations: Where statistics go; None: to all.

    Returns:
        The names of the layers of which something waited in any process.
    """
    if processes.size == 1:
        return [name for name, block in blocks.items() if any(a.pending is not None for a in block.averages().values())]
    if processes.quiet:
        return []
    entries = [
        _Entry(layer, average, name in block.symmetric, name in block.of_inputs, name in of_team)
        for layer, block in blocks.items()
        for of_team in (averages_of_team(block),)
        for name, average in block.averages().items()
    ]
    if not entries:
        return []
    for entry in entries:
        if averaged and not entry.of_inputs and entry.average.pending is not None:
            _divide(entry.average)
    here = [float(entry.average.pending is not None) for entry in entries]
    sums = processes.sum_vector([*here, *(entry.average.count for entry in entries)])
    present, counts = sums[: len(entries)], sums[len(entries) :]
    # A layer that some processes did not use: they have to add zeros, of a shape that the others know.
    if any(0 < number < processes.size for number in present):
        _fill([entry.average for entry in entries], processes)
    waiting = []
    for entry, count in zip(entries, counts, strict=True):
        if entry.average.pending is not None:
            shared = averaged and not entry.of_inputs
            waiting.append(_Waiting(entry, float(processes.size) if shared else count))
    owner_of = {} if destinations is None else destinations(blocks)
    to_all = [one for one in waiting if not (one.entry.of_team and one.entry.layer in owner_of)]
    for (entry, divisor), total in zip(to_all, processes.sum([one.entry.packed() for one in to_all]), strict=True):
        entry.take(total, divisor)
    if owner_of:
        to_teams = [one for one in waiting if one.entry.of_team and one.entry.layer in owner_of]
        _bring_to_teams(to_teams, [owner_of[one.entry.layer] for one in to_teams], processes)
    return list(dict.fromkeys(one.entry.layer for one in waiting))


def _bring_to_teams(waiting: Sequence[_Waiting], owners: Sequence[int], processes: Processes) -> None:
    """The sums to each owner, and from it to its team; the others are left with nothing to fold."""
    teams = Teams.of(processes)
    of_rank = [[w for w, owner in zip(waiting, owners, strict=True) if owner == rank] for rank in range(teams.size)]
    found = summed_at(processes, [[one.entry.packed() for one in own] for own in of_rank])
    if teams.members > 1:
        nowhere = torch.device("meta")
        held = [own if teams.holds(rank) else [t.to(nowhere) for t in own] for rank, own in enumerate(found)]
        found = delivered(processes, held, teams.holders)
    for rank, (own, totals) in enumerate(zip(of_rank, found, strict=True)):
        for (entry, divisor), total in zip(own, totals, strict=True):
            if teams.holds(rank):
                entry.take(total, divisor)
            else:
                entry.average.discard()


def _divide(average: RunningAverage) -> None:
    total, count = average.pending, average.count
    assert total is not None
    average.replace(total.div_(count) if isinstance(count, Tensor) or count else total, 1.0)


def _fill(averages: Sequence[RunningAverage], processes: Processes) -> None:
    """Zeros in the place of what is missing here and there elsewhere."""
    told = processes.gathered([None if (t := a.pending) is None else (tuple(t.shape), t.dtype) for a in averages])
    for average, *described in zip(averages, *told, strict=True):
        known = next((one for one in described if one is not None), None)
        if average.pending is None and known is not None:
            average.replace(torch.zeros(known[0], dtype=known[1], device=processes.device), 0.0)
