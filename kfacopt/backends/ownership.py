"""Work on blocks that is done by one process each, and what comes of it brought to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfacopt.blocks.base import Block
from kfacopt.sharding import Processes, owners

Work = Callable[[str, Block], None]
"""Renews a block's cache; what else it changes is in `Block.renewed`."""


def owners_of(blocks: Mapping[str, Block], processes: Processes) -> dict[str, int]:
    """Which process decomposes which block, the most expensive first; those with nothing to decompose are left out.

    An eigendecomposition or inverse of a `[d d]` factor takes `d³`; all processes have the same statistics, and so come
    to the same answer.
    """
    costs = {name: decomposition_cost(block) for name, block in blocks.items()}
    return owners({name: cost for name, cost in costs.items() if cost > 0.0}, processes.size)


def done_by_owners(
    blocks: Mapping[str, Block], owner_of: Mapping[str, int], processes: Processes, work: Work
) -> dict[str, float]:
    """Let each block's owner work on it, and bring the results to all; where there is no owner, all work.

    All processes hold the very same numbers in the same layout afterwards, the owner too: products would round
    otherwise with others.

    Args:
        blocks: By layer name, the same in all processes.
        owner_of: The rank of each block's owner.
        processes: Those that train together.
        work: Of one block.

    Returns:
        What the work on each block took, in seconds, where it was done.

    Raises:
        RuntimeError: If the work failed in another process.
    """
    seconds: dict[str, float] = {}
    told: dict[str, Any] = {}
    failure: Exception | None = None
    for name, block in blocks.items():
        owner = owner_of.get(name) if processes.size > 1 else None
        if owner not in (None, processes.rank):
            continue
        start = time.perf_counter()
        try:
            work(name, block)
        except Exception as error:  # the others wait for what comes of it
            if processes.size == 1:
                raise
            failure = failure or error
        seconds[name] = time.perf_counter() - start
        if owner is not None:
            renewed = {key: None if t is None else (tuple(t.shape), t.dtype) for key, t in block.renewed().items()}
            told[name] = renewed, block.retries, seconds[name]
    if processes.size == 1 or not any(name in owner_of for name in blocks):
        if failure is not None:
            raise failure
        return seconds
    for rank, (failed, of_rank) in enumerate(processes.gathered((None if failure is None else repr(failure), told))):
        if failed is not None:
            raise failure or RuntimeError(f"process {rank} could not renew the curvature's cache: {failed}")
        seconds |= _receive(blocks, of_rank, processes, rank)
    return seconds


def _receive(blocks: Mapping[str, Block], told: Mapping[str, Any], processes: Processes, rank: int) -> dict[str, float]:
    """Take over what process `rank` has told of and sends now."""
    places = [(name, key, *kind) for name, (kinds, _, _) in told.items() for key, kind in kinds.items() if kind]
    if rank == processes.rank:
        held = {name: blocks[name].renewed() for name in told}
        tensors = [held[name][key] for name, key, *_ in places]
    else:
        tensors = [torch.empty(shape, dtype=dtype, device=processes.device) for _, _, shape, dtype in places]
    arrived = processes.sent([t for t in tensors if t is not None], rank)
    values: dict[str, dict[str, Tensor | None]] = {name: dict.fromkeys(kinds) for name, (kinds, _, _) in told.items()}
    for (name, key, *_), tensor in zip(places, arrived, strict=True):
        values[name][key] = tensor
    for name, (_, retries, _) in told.items():
        blocks[name].take_renewed(values[name])
        blocks[name].retries = retries
    return {name: took for name, (_, _, took) in told.items()}


def decomposition_cost(block: Block) -> float:
    """Products that a block's refresh takes, up to a constant; 0: there is nothing to decompose."""
    values = [average.value for name, average in block.averages().items() if name in block.symmetric]
    return float(sum(v.shape[:-1].numel() * v.shape[-1] ** 2 for v in values if v is not None and v.ndim > 1))
