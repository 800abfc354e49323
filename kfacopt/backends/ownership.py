"""Work on blocks that is done by one process each, and what comes of it brought to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kfacopt.backends.parts import Kind, Part, kind_of, sent
from kfacopt.blocks.base import Block
from kfacopt.replicas import Readers, Teams, owners
from kfacopt.sharding import Processes

Work = Callable[[str, Block], None]
"""Renews a block's cache; what else it changes is in `Block.renewed`."""


def owners_of(
    blocks: Mapping[str, Block], processes: Processes, known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Which process decomposes which block, the most expensive first; those with nothing to decompose are left out.

    An eigendecomposition or inverse of a `[d d]` factor takes `d³`; all processes have the same statistics, and so come
    to the same answer. Owners that are known stay.
    """
    costs = {name: decomposition_cost(block) for name, block in blocks.items()}
    return owners({name: cost for name, cost in costs.items() if cost > 0.0}, processes.size, known)


class Done(NamedTuple):
    """What the work on each block took, in seconds, and the blocks whose cache is in other processes now."""

    seconds: dict[str, float]
    elsewhere: set[str]


def done_by_owners(blocks: Mapping[str, Block], owner_of: Mapping[str, int], processes: Processes, work: Work) -> Done:
    """Let each block's owner work on it, and bring the results to its team; where there is no owner, all work.

    All who hold a cache hold the very same numbers in the same layout afterwards, the owner too: products would round
    otherwise with others.

    Args:
        blocks: By layer name, the same in all processes.
        owner_of: The rank of each block's owner.
        processes: Those that train together.
        work: Of one block.

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
            told[name] = kinds_of(block), block.retries, seconds[name]
    if processes.size == 1 or not any(name in owner_of for name in blocks):
        if failure is not None:
            raise failure
        return Done(seconds, set())
    everybody = processes.gathered((None if failure is None else repr(failure), told))
    for rank, (failed, _) in enumerate(everybody):
        if failed is not None:
            raise failure or RuntimeError(f"process {rank} could not renew the curvature's cache: {failed}")
    found = _receive(blocks, [of_rank for _, of_rank in everybody], processes)
    return Done(seconds | found.seconds, found.elsewhere)


def message_bytes(block: Block) -> int:
    """Bytes that a block's owner sends to each other process when it has renewed the block."""
    return sum(part.nbytes for part in _parts({"": block}, {"": kinds_of(block)}))


def kinds_of(block: Block) -> dict[str, Kind | None]:
    """Shape and dtype of each tensor that a block's refresh writes; None where there is none."""
    return {key: None if t is None else kind_of(t) for key, t in block.renewed().items()}


def _parts(blocks: Mapping[str, Block], kinds: Mapping[str, Mapping[str, Kind | None]]) -> list[Part]:
    return [
        Part.of(name, key, kind, blocks[name].symmetric_cache)
        for name, of_block in kinds.items()
        for key, kind in of_block.items()
        if kind is not None
    ]


def _receive(blocks: Mapping[str, Block], told: Sequence[Mapping[str, Any]], processes: Processes) -> Done:
    """Take over what each process has told of and sends now, where this one needs it."""
    teams = Teams.of(processes)
    arrived: dict[str, dict[str, Tensor | None]] = {}
    for of_teams in (False, True) if teams.apart else (False,):
        kinds = [
            {name: kind for name, (kind, _, _) in of_rank.items() if in_teams(blocks[name], teams) is of_teams}
            for of_rank in told
        ]
        arrived |= sent_caches(blocks, kinds, processes, teams.holders if of_teams else None)
    done = Done({}, set())
    for of_rank in told:
        for name, (kinds_of_block, retries, took) in of_rank.items():
            blocks[name].retries = retries
            done.seconds[name] = took
            if name in arrived:
                blocks[name].take_renewed(arrived[name])
            elif any(kind is not None for kind in kinds_of_block.values()):
                done.elsewhere.add(name)
    return done


def in_teams(block: Block, teams: Teams) -> bool:
    """Whether a block's cache is in its owner's team alone."""
    return teams.apart and not block.rows_need_cache


def sent_caches(
    blocks: Mapping[str, Block],
    kinds: Sequence[Mapping[str, Mapping[str, Kind | None]]],
    processes: Processes,
    readers: Readers | None,
) -> dict[str, dict[str, Tensor | None]]:
    """What `Block.renewed` returns in the processes that have it, by layer name: of this process, and what it is sent.

    Args:
        blocks: By layer name.
        kinds: By rank, what it sends of which layer: shapes and dtypes.
        processes: Those that train together.
        readers: By rank, to whom it sends; None: to all.
    """
    parts = [_parts(blocks, of_rank) for of_rank in kinds]
    held = {name: blocks[name].renewed() for name in kinds[processes.rank]}
    own = [tensor for part in parts[processes.rank] if (tensor := held[part.layer][part.key]) is not None]
    values: dict[str, dict[str, Tensor | None]] = {}
    for of_rank, of_parts, got in zip(kinds, parts, sent(parts, own, processes, readers), strict=True):
        if got is not None:
            values |= {name: dict.fromkeys(kind) for name, kind in of_rank.items()}
            for part, tensor in zip(of_parts, got, strict=True):
                values[part.layer][part.key] = tensor
    return values


def decomposition_cost(block: Block) -> float:
    """Products that a block's refresh takes, up to a constant; 0: there is nothing to decompose."""
    factors = [average for name, average in block.averages().items() if name in block.symmetric]
    values = [average.value if average.known else average.pending for average in factors]
    return float(sum(v.shape[:-1].numel() * v.shape[-1] ** 2 for v in values if v is not None and v.ndim > 1))
