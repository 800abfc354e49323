"""What several processes added to the statistics of their blocks, as though it were of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.blocks.base import Block
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.linalg.triangles import pack_triangle, unpack_triangle
from kfacopt.sharding import Processes


class _Entry(NamedTuple):
    """One running average of one block."""

    average: RunningAverage
    symmetric: bool
    of_inputs: bool

    def packed(self, total: Tensor) -> Tensor:
        return pack_triangle(total) if self._half(total.ndim) else total.contiguous()

    def unpacked(self, total: Tensor, shape: torch.Size) -> Tensor:
        return unpack_triangle(total) if self._half(len(shape)) else total

    def _half(self, axes: int) -> bool:
        return self.symmetric and axes > 1  # a diagonal one has one axis


def reduce_pending(blocks: Mapping[str, Block], processes: Processes, averaged: bool) -> None:
    """Bring what waits to be folded, of every process, together: afterwards all have the same.

    The loss that the gradients are of is the mean of the processes' losses. Where these are means, so is the curvature
    the mean of theirs, each divided by its own count; where they are sums, and for averages of inputs, sums and counts
    are added up.

    Args:
        blocks: By layer name, the same layers in all processes.
        processes: Those that train together.
        averaged: Whether each process's loss is a mean over its terms.
    """
    if processes.size == 1:
        return
    entries = [
        _Entry(average, name in block.symmetric, name in block.of_inputs)
        for block in blocks.values()
        for name, average in block.averages().items()
    ]
    if not entries:
        return
    for entry in entries:
        if averaged and not entry.of_inputs and entry.average.pending is not None:
            _divide(entry.average)
    here = [float(entry.average.pending is not None) for entry in entries]
    sums = processes.sum_vector([*here, *(entry.average.count for entry in entries)])
    present, counts = sums[: len(entries)], sums[len(entries) :]
    # A layer that some processes did not use: they have to add zeros, of a shape that the others know.
    partial = any(0 < number < processes.size for number in present)
    pending = [entry.average.pending for entry in entries]
    if partial:
        pending = _filled(pending, processes)
    waiting = [(e, total, count) for e, total, count in zip(entries, pending, counts, strict=True) if total is not None]
    reduced = processes.sum([entry.packed(total) for entry, total, _ in waiting])
    for (entry, total, count), sum_ in zip(waiting, reduced, strict=True):
        shared = averaged and not entry.of_inputs
        entry.average.replace(entry.unpacked(sum_, total.shape), float(processes.size) if shared else count)


def _divide(average: RunningAverage) -> None:
    total, count = average.pending, average.count
    assert total is not None
    average.replace(total.div_(count) if isinstance(count, Tensor) or count else total, 1.0)


def _filled(pending: list[Tensor | None], processes: Processes) -> list[Tensor | None]:
    """Zeros in the place of what is missing here and there elsewhere."""
    told = processes.gathered([None if t is None else (tuple(t.shape), t.dtype) for t in pending])
    result: list[Tensor | None] = []
    for own, *described in zip(pending, *told, strict=True):
        known = next((one for one in described if one is not None), None)
        if own is None and known is not None:
            own = torch.zeros(known[0], dtype=known[1], device=processes.device)
        result.append(own)
    return result
