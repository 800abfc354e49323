"""Tensors of which every process has a shard, as wholes in all of them, or in one each, and shards of what that made.

To gather the whole of N numbers in each of W processes brings N to each. Where each tensor goes to one of them, a
process sends and receives N / W, and as much on the way back: one `all_to_all_single` a bucket, each way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from kfacopt.fsdp import is_sharded
from kfacopt.linalg.tensors import lengths
from kfacopt.sharding import BUCKET, Processes, buckets, shard_of


def laid(shard: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of which each process has its shard, laid out as a parameter; nobody is asked."""
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole_of(shard: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of which each process has its shard, laid out as a parameter; all processes are asked."""
    return laid(shard, parameter).full_tensor() if is_sharded(parameter) else shard  # type: ignore[attr-defined]


def whole_of_each(shards: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """`whole_of` each, many together where the engine divides them by rows; all processes are asked.

    >>> whole_of_each([torch.ones(1)], [torch.ones(1)])
    [tensor([1.])]
    """
    result = list(shards)
    by_group: dict[Any, list[int]] = {}
    for place, parameter in enumerate(parameters):
        if is_sharded(parameter):
            by_group.setdefault(_dividing(parameter), []).append(place)
    for dividing, places in by_group.items():
        if dividing is None:
            for place in places:
                result[place] = whole_of(shards[place], parameters[place])
            continue
        mesh, axis = dividing
        for bucket in buckets([parameters[place] for place in places]):  # whole sizes: all make the same buckets
            members = [places[index] for index in bucket]
            found = _gathered_rows([shards[p] for p in members], [parameters[p].shape for p in members], mesh, axis)
            for place, whole in zip(members, found, strict=True):
                result[place] = whole
    return result


def _dividing(parameter: Tensor) -> tuple[Any, int] | None:
    """The mesh and its axis along which a sharded parameter's rows are divided; None: it lies otherwise."""
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    axes = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    rows = len(axes) == 1 and placements[axes[0]].is_shard(0) and type(placements[axes[0]]).__name__ == "Shard"
    return (mesh, axes[0]) if rows and parameter.is_contiguous() else None


def _gathered_rows(shards: Sequence[Tensor], shapes: Sequence[torch.Size], mesh: Any, axis: int) -> list[Tensor]:
    """Tensors whose rows are divided as by `torch.chunk`: the first processes have the more, the last may have none."""
    size = mesh.size(axis)
    rows = [-(-shape[0] // size) for shape in shapes]
    lengths = [of_one * shape[1:].numel() for of_one, shape in zip(rows, shapes, strict=True)]
    own = shards[0].new_zeros(sum(lengths))
    for room, shard in zip(own.split(lengths), shards, strict=True):
        room[: shard.numel()] = shard.reshape(-1)
    everybodys = own.new_empty(size, own.numel())
    # Its name until torch 2.13 was another, which warns since.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(everybodys.view(-1), own, group=mesh.get_group(axis))
    found = everybodys.split(lengths, dim=1)
    return [part.reshape(-1)[: shape.numel()].view(shape) for part, shape in zip(found, shapes, strict=True)]


def norms_of_shards(processes: Processes, tensors: Sequence[Tensor], own: Sequence[float] | None = None) -> list[float]:
    """The norms of tensors of which each process has its shards, or the whole; all processes are asked.

    Args:
        processes: Those that train together.
        tensors: Some may be sharded.
        own: The norms of this process's shards, where they are known.

    >>> norms_of_shards(Processes(), [torch.tensor([3.0, 4.0])])
    [5.0]
    """
    known = lengths([shard_of(tensor) for tensor in tensors]) if own is None else own
    if processes.size == 1:
        return list(known)
    squares = [norm * norm if _counts(t, processes) else 0.0 for t, norm in zip(tensors, known, strict=True)]
    [summed] = processes.sum([torch.tensor(squares, dtype=torch.float64, device=processes.device)])
    return [math.sqrt(square) for square in summed.tolist()]


def _counts(tensor: Tensor, processes: Processes) -> bool:
    """Whether this process's part of a tensor is of the copy that counts: of several that are alike one does."""
    if not is_sharded(tensor):
        return processes.rank == 0
    place, placements = tensor.device_mesh.get_coordinate(), tensor.placements  # type: ignore[attr-defined]
    return all(c == 0 for c, placement in zip(place, placements, strict=True) if placement.is_replicate())


class Spread(NamedTuple):
    """How the entries of a tensor, one after the other, lie in the processes.

    Attributes:
        parts: By rank, from where to where those are that it holds.
        copies: By rank, of which copy its part is one: the parts of a copy are the whole.
    """

    parts: tuple[tuple[int, int], ...]
    copies: tuple[int, ...]

    def length(self, rank: int) -> int:
        """How many a rank holds."""
        start, end = self.parts[rank]
        return end - start

    def of_rank(self, rank: int, whole: Tensor) -> Tensor:
        """Those that a rank holds, of all."""
        start, end = self.parts[rank]
        return whole[start:end]

    def others(self, rank: int) -> list[int]:
        """The ranks that hold other parts of a rank's own copy."""
        return [other for other, copy in enumerate(self.copies) if copy == self.copies[rank] and other != rank]


def everywhere(number: int, size: int) -> Spread:
    """A tensor of so many entries, of which each of `size` processes has all.

    >>> everywhere(3, 2)
    Spread(parts=((0, 3), (0, 3)), copies=(0, 1))
    """
    return Spread(((0, number),) * size, tuple(range(size)))


def spread_of(parameter: Tensor, processes: Processes) -> Spread | None:
    """How a parameter's entries lie in the processes; None: not in a piece for each, or not in these processes."""
    if not is_sharded(parameter):
        return everywhere(parameter.numel(), processes.size)
    if (found := _dividing(parameter)) is None:
        return None
    mesh, axis = found
    ranks = distributed.get_process_group_ranks(processes.group or distributed.group.WORLD)
    if sorted(mesh.mesh.flatten().tolist()) != sorted(ranks):
        return None
    copies, size = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist(), mesh.size(axis)
    places = {rank: (copy, place) for copy, row in enumerate(copies) for place, rank in enumerate(row)}
    parts = chunks(parameter.shape[0], size, parameter.shape[1:].numel())
    return Spread(tuple(parts[places[rank][1]] for rank in ranks), tuple(places[rank][0] for rank in ranks))


def chunks(rows: int, size: int, width: int) -> list[tuple[int, int]]:
    """From where to where the entries of `size` pieces are, as `torch.chunk` cuts rows: the last may have none."""
    each = -(-rows // size)
    return [(width * min(rows, each * place), width * min(rows, each * (place + 1))) for place in range(size)]


class Parcel(NamedTuple):
    """A tensor on its way to one process, or from it.

    Attributes:
        owner: The rank that has, or is to have, the whole.
        spread: How it lies in the others.
        dtype: Of what is sent.
    """

    owner: int
    spread: Spread
    dtype: torch.dtype


def to_owners(processes: Processes, parcels: Sequence[Parcel], held: Sequence[Tensor]) -> list[Tensor | None]:
    """Wholes, as vectors, in their owners; None in the others.

    Args:
        processes: All must ask, for the same.
        parcels: What is sent.
        held: This process's part of each.
    """
    here, result = processes.rank, list[Tensor | None]([None] * len(parcels))
    parts = [tensor.reshape(-1) for tensor in held]

    def sent(place: int) -> Iterable[tuple[int, Tensor]]:
        owner, spread, _ = parcels[place]
        return [(owner, parts[place])] if owner != here and spread.copies[owner] == spread.copies[here] else []

    def awaited(place: int) -> Iterable[tuple[int, int]]:
        owner, spread, _ = parcels[place]
        return [(rank, spread.length(rank)) for rank in spread.others(here)] if owner == here else []

    for place, arrived in _exchanged(processes, parcels, sent, awaited):
        owner, spread, _ = parcels[place]
        if owner == here:
            pieces = arrived | {here: parts[place]}
            result[place] = torch.cat([pieces[rank] for rank in sorted(pieces, key=spread.parts.__getitem__)])
    return result


def from_owners(processes: Processes, parcels: Sequence[Parcel], wholes: Sequence[Tensor | None]) -> list[Tensor]:
    """This process's part of each, as a vector.

    Args:
        processes: All must ask, for the same.
        parcels: What is sent.
        wholes: Of those that this process owns; None of the others.
    """
    here, result = processes.rank, dict[int, Tensor]()
    own = [None if whole is None else whole.reshape(-1) for whole in wholes]

    def sent(place: int) -> Iterable[tuple[int, Tensor]]:
        whole, spread = own[place], parcels[place].spread
        ranks = range(processes.size) if whole is not None else ()
        return [(rank, spread.of_rank(rank, whole)) for rank in ranks if rank != here and whole is not None]

    def awaited(place: int) -> Iterable[tuple[int, int]]:
        owner, spread, _ = parcels[place]
        return [(owner, spread.length(here))] if owner != here else []

    for place, arrived in _exchanged(processes, parcels, sent, awaited):
        whole, (owner, spread, _) = own[place], parcels[place]
        result[place] = arrived[owner] if whole is None else spread.of_rank(here, whole)
    return [result[place] for place in range(len(parcels))]


def _exchanged(
    processes: Processes,
    parcels: Sequence[Parcel],
    sent: Callable[[int], Iterable[tuple[int, Tensor]]],
    awaited: Callable[[int], Iterable[tuple[int, int]]],
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Each parcel's place, and what came of it, by rank.

    Args:
        processes: All of them.
        parcels: In one order for all.
        sent: By place, the vectors that go to others, with their rank.
        awaited: By place, how many numbers come from others, with their rank.
    """
    sizes = [torch.empty(max(end for _, end in s.parts), dtype=d, device="meta") for _, s, d in parcels]
    # What all processes send together: each sends about one part in so many of it.
    for places in buckets(sizes, BUCKET * processes.size):
        nothing = torch.empty(0, dtype=parcels[places[0]].dtype, device=processes.device)
        outgoing: list[list[Tensor]] = [[nothing] for _ in range(processes.size)]
        incoming: list[list[tuple[int, int]]] = [[] for _ in range(processes.size)]
        for place in places:
            for rank, vector in sent(place):
                outgoing[rank].append(vector)
            for rank, length in awaited(place):
                incoming[rank].append((place, length))
        found: dict[int, dict[int, Tensor]] = {place: {} for place in places}
        if processes.size > 1:
            counts = [sum(length for _, length in of_rank) for of_rank in incoming]
            arrived = processes.exchanged([torch.cat(of_rank) for of_rank in outgoing], counts)
            for rank, (of_rank, whole) in enumerate(zip(incoming, arrived, strict=True)):
                for (place, _), part in zip(of_rank, whole.split([length for _, length in of_rank]), strict=True):
                    found[place][rank] = part
        yield from found.items()
