"""Statistics that a layer's team of processes holds, and the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kfacopt.backends.parts import Part, kind_of, sent
from kfacopt.blocks.base import Block
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.replicas import Readers
from kfacopt.sharding import Processes


def averages_of_team(block: Block) -> dict[str, RunningAverage]:
    """The averages that only who decomposes or solves reads; where rows are brought into a basis, its factors.

    >>> from kfacopt.blocks import CorrectedEigenBlock, KroneckerBlock
    >>> list(averages_of_team(KroneckerBlock())), list(averages_of_team(CorrectedEigenBlock()))
    (['input_factor', 'gradient_factor'], ['input_factor', 'gradient_factor'])
    """
    every = block.averages()
    return {name: a for name, a in every.items() if name in block.symmetric} if block.rows_need_cache else every


def means_of(blocks: Mapping[str, Block]) -> dict[str, float]:
    """By layer name the mean eigenvalue, of those that have statistics."""
    able = {name: block.mean_eigenvalue().double() for name, block in blocks.items() if block.estimated}
    return dict(zip(able, torch.stack(list(able.values())).tolist(), strict=True)) if able else {}


def leave(block: Block) -> None:
    """Let go of what is the team's of a block; what waits to be folded stays."""
    for average in averages_of_team(block).values():
        average.value, average.weight = None, 0.0


def fetched_averages(
    blocks: Mapping[str, Block], mine: Mapping[str, Block], processes: Processes, readers: Readers
) -> dict[str, dict[str, dict[str, Any]]]:
    """What `RunningAverage.state_dict` is in the processes that have it, by layer and average, on the CPU.

    Args:
        blocks: By layer name, the same layers in all processes.
        mine: Those that this process sends.
        processes: Those that train together; all must ask.
        readers: By rank, to whom it sends.
    """
    own = {(n, key): a for n, block in mine.items() for key, a in averages_of_team(block).items() if a.known}
    values = {at: value for at, average in own.items() if (value := average.value) is not None}
    kinds = processes.gathered({at: (kind_of(value), own[at].weight) for at, value in values.items()})
    parts = [[Part.of(*at, kind, blocks[at[0]].symmetric) for at, (kind, _) in of_rank.items()] for of_rank in kinds]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for rank, got in enumerate(sent(parts, list(values.values()), processes, readers)):
        if rank == processes.rank or got is None:
            continue
        for ((layer, key), (_, weight)), whole in zip(kinds[rank].items(), got, strict=True):
            found.setdefault(layer, {})[key] = {"value": whole.cpu(), "weight": weight, "sum": None, "count": 0.0}
    return found
