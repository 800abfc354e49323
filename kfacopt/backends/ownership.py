"""Work on blocks that is done by one process each, and what comes of it brought to all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacopt.blocks.base import Block
from kfacopt.linalg.triangles import pack_triangle, packed_shape, unpack_triangle
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
            told[name] = _kinds(block), block.retries, seconds[name]
    if processes.size == 1 or not any(name in owner_of for name in blocks):
        if failure is not None:
            raise failure
        return seconds
    everybody = processes.gathered((None if failure is None else repr(failure), told))
    for rank, (failed, _) in enumerate(everybody):
        if failed is not None:
            raise failure or RuntimeError(f"process {rank} could not renew the curvature's cache: {failed}")
    return seconds | _receive(blocks, [of_rank for _, of_rank in everybody], processes)


_Kind = tuple[tuple[int, ...], torch.dtype] | None


class _Sent(NamedTuple):
    """One tensor of a block's cache: its half where it is symmetric."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_half: bool

    def packed(self, tensor: Tensor) -> Tensor:
        return pack_triangle(tensor) if self.is_half else tensor

    def empty(self, device: torch.device) -> Tensor:
        shape = packed_shape(self.shape) if self.is_half else self.shape
        return torch.empty(shape, dtype=self.dtype, device=device)

    def unpacked(self, arrived: Tensor) -> Tensor:
        # A view would keep, and save, all that came with it.
        return unpack_triangle(arrived) if self.is_half else arrived.clone()


def message_bytes(block: Block) -> int:
    """Bytes that a block's owner sends to each other process when it has renewed the block."""
    return sum(part.empty(torch.device("meta")).nbytes for part in _parts({"": block}, {"": _kinds(block)}))


def _kinds(block: Block) -> dict[str, _Kind]:
    return {key: None if t is None else (tuple(t.shape), t.dtype) for key, t in block.renewed().items()}


def _parts(blocks: Mapping[str, Block], kinds: Mapping[str, Mapping[str, _Kind]]) -> list[_Sent]:
    return [
        _Sent(name, key, *kind, key in blocks[name].symmetric_cache and len(kind[0]) > 1)
        for name, of_block in kinds.items()
        for key, kind in of_block.items()
        if kind is not None
    ]


def _receive(blocks: Mapping[str, Block], told: Sequence[Mapping[str, Any]], processes: Processes) -> dict[str, float]:
    """Take over what each process has told of and sends now."""
    parts = [_parts(blocks, {name: kinds for name, (kinds, _, _) in of_rank.items()}) for of_rank in told]
    held = {name: blocks[name].renewed() for name in told[processes.rank]}
    tensors = [[part.empty(processes.device) for part in of_rank] for of_rank in parts]
    tensors[processes.rank] = [part.packed(_there(held[part.name][part.key])) for part in parts[processes.rank]]
    seconds: dict[str, float] = {}
    for of_rank, sent, arrived in zip(told, parts, processes.sent(tensors), strict=True):
        values: dict[str, dict[str, Tensor | None]] = {n: dict.fromkeys(kinds) for n, (kinds, _, _) in of_rank.items()}
        for part, tensor in zip(sent, arrived, strict=True):
            values[part.name][part.key] = part.unpacked(tensor)
        for name, (_, retries, took) in of_rank.items():
            blocks[name].take_renewed(values[name])
            blocks[name].retries = retries
            seconds[name] = took
    return seconds


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def decomposition_cost(block: Block) -> float:
    """Products that a block's refresh takes, up to a constant; 0: there is nothing to decompose."""
    values = [average.value for name, average in block.averages().items() if name in block.symmetric]
    return float(sum(v.shape[:-1].numel() * v.shape[-1] ** 2 for v in values if v is not None and v.ndim > 1))
