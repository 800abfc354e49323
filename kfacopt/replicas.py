"""Which of several processes hold what of each layer, and how it comes to the others.

Ranks are cut into teams of `replicas`. A layer belongs to a team: its owner there decomposes, each member holds what
comes of it and solves, and sends what it solved to the ranks that have its place in the other teams. One team of all
ranks is nothing to be sent at a step; teams of one, the default, are nothing to be sent at a refresh, and the least to
be computed (KAISA: Pauloski et al. 2021, arXiv:2107.01739).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

from kfacopt.fsdp import ShardedModel
from kfacopt.linalg.tensors import flat, split_like
from kfacopt.sharding import BUCKET, Message, Processes, buckets, in_messages, unwrapped


@dataclass(frozen=True)
class Sharding:
    """Which processes train together, how many of them hold what was decomposed of each layer, and who statistics.

    Work and memory against communication: by default a layer has one owner, which alone holds its inverse, takes its
    step, and sends that to the others: as many numbers in a step as the layers with curvature have parameters, and none
    at a refresh. With `replicas=None` every process holds the inverses of all layers, which a refresh sends, takes the
    whole step by itself, and sends nothing for it. EKFAC's eigenbases are in every process either way, which needs them
    for the rows of its own data.

    Statistics are in every process, so that what any of them saves goes on anywhere, or where the inverse is.

    Args:
        group: torch's process group, of those whose gradients are averaged; None: that of the engine around the model,
            else the default one.
        replicas: How many processes hold the inverse of each layer; a divisor of their number (1: its owner alone), or
            more than there are: all. None: all.
        statistics: Who holds Kronecker factors. `"all"`: every process; `"holders"`: those that hold the inverse, which
            is least memory; a state dict then has them only after `consolidate_state_dict()`. With
            `kfacopt.schedules.Background` all do either way.

    Raises:
        TypeError: If `replicas` is no number.
        ValueError: If it is none of processes, or `statistics` is neither.

    >>> Sharding(replicas=2)
    Sharding(group=None, replicas=2, statistics='all')
    """

    group: Any = None
    replicas: int | None = 1
    statistics: Literal["all", "holders"] = "all"

    def __post_init__(self) -> None:
        if self.statistics not in ("all", "holders"):
            raise ValueError(f"statistics must be 'all' or 'holders' of a layer's inverse, got {self.statistics!r}")
        if self.replicas is None:
            return
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int):
            raise TypeError(f"replicas must be a number of processes, or None for all, got {self.replicas!r}")
        if self.replicas < 1:
            raise ValueError(f"replicas must be at least 1, the owner of a layer, got {self.replicas}")


def joined(model: Any, sharding: Sharding | None) -> tuple[Any, Processes]:
    """`unwrapped`, and the processes that train the model as its user wants them.

    Raises:
        TypeError: If `sharding` is none.
        ValueError: If its group is not the engine's.
    """
    inner, processes = unwrapped(model)
    sharding = Sharding() if sharding is None else sharding
    if not isinstance(sharding, Sharding):
        raise TypeError(f"sharding must be a kfacopt.Sharding, got {sharding!r}")
    if sharding.group is not None and processes.is_open:
        if processes.group is None and not ShardedModel(inner):
            processes = Processes(sharding.group)
        elif (wanted := _ranks(sharding.group)) != (averaged := _ranks(processes.group)):
            raise ValueError(
                f"Sharding(group=...) has the processes {wanted}, but the engine around the model averages gradients "
                f"over {averaged}: weights would drift apart. Leave group out, or give the engine the same"
            )
    processes.replicas, processes.divides_statistics = sharding.replicas, sharding.statistics == "holders"
    Teams.of(processes)
    return inner, processes


def _ranks(group: Any) -> list[int]:
    return distributed.get_process_group_ranks(distributed.group.WORLD if group is None else group)


@dataclass(frozen=True)
class Teams:
    """Ranks in teams of equal size, those of a team next to each other.

    Attributes:
        size: How many ranks there are.
        members: How many a team has.
        rank: Of this process.

    >>> teams = Teams(size=4, members=2, rank=1)
    >>> teams.holders(owner=3), teams.holds(owner=3), teams.readers(3)
    (range(2, 4), False, [1])
    """

    size: int
    members: int
    rank: int

    @classmethod
    def of(cls, processes: Processes) -> Teams:
        """As `Processes.replicas` says.

        Raises:
            ValueError: If teams of so many leave some over.
        """
        size = processes.size
        members = min(processes.replicas or size, size)
        if size % members:
            fitting = [number for number in range(1, size + 1) if size % number == 0]
            raise ValueError(
                f"replicas={members} does not divide the {size} processes that train together: some would hold more "
                f"layers than others. Pass one of {fitting}"
            )
        return cls(size, members, processes.rank)

    @property
    def apart(self) -> bool:
        """Whether there are several teams, so that some ranks do not hold what others do."""
        return self.members < self.size

    def holders(self, owner: int) -> range:
        """The team of a rank."""
        first = owner - owner % self.members
        return range(first, first + self.members)

    def holds(self, owner: int) -> bool:
        """Whether this process is in the team of a rank."""
        return self.rank in self.holders(owner)

    def readers(self, source: int) -> list[int]:
        """Whom a rank sends what its team solved: those with its place in the other teams."""
        return [rank for rank in range(source % self.members, self.size, self.members) if rank != source]


Readers = Callable[[int], Collection[int]]
"""By rank, the ranks that it sends to."""


def delivered(processes: Processes, tensors: Sequence[Sequence[Tensor]], readers: Readers) -> list[list[Tensor]]:
    """What every rank sends to some others: `tensors[rank]`, of which those need only have shapes and dtypes.

    All ranks must know the shapes of everybody's tensors; of others' they may be on the meta device. What comes back
    are views with the same strides for all, the sender too; what is not for this rank comes back as it was given.

    Args:
        processes: Those that train together.
        tensors: By rank.
        readers: By rank, those that it sends to; whether itself is among them does not matter.
    """
    rank, ranks = processes.rank, range(processes.size)
    arrived = [list(of_rank) for of_rank in tensors]
    for dtype in sorted({t.dtype for of_rank in tensors for t in of_rank}, key=str):
        for places in zip_longest(*(_places(of_rank, dtype, processes.size) for of_rank in tensors), fillvalue=()):
            members = [[tensors[source][place] for place in places[source]] for source in ranks]
            own = flat(members[rank]) if members[rank] else torch.empty(0, dtype=dtype, device=processes.device)
            found = {rank: own}
            if any(members[source] and set(readers(source)) - {source} for source in ranks):
                counts = [
                    sum(t.numel() for t in members[source]) if source != rank and rank in readers(source) else 0
                    for source in ranks
                ]
                outgoing = [own if other != rank and other in readers(rank) else own[:0] for other in ranks]
                parts = processes.exchanged(outgoing, counts)
                found |= {source: part for source, part in enumerate(parts) if counts[source]}
            for source, whole in found.items():
                for place, tensor in zip(places[source], split_like(whole, members[source]), strict=True):
                    arrived[source][place] = tensor
    return arrived


def summed_at(processes: Processes, tensors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The sums of `tensors[rank]` over all processes, in process `rank` alone; what others get of them is nothing.

    Args:
        processes: Several, which all give contiguous tensors of the same shapes for every rank.
        tensors: By rank.
    """

    def launched(owner: int, places: list[int], members: list[Tensor]) -> Message:
        whole = flat(members)
        work = distributed.reduce(whole, group=processes.group, group_dst=owner, async_op=True)
        return Message(owner, places, members, whole, work)

    return in_messages(tensors, launched)


def _places(tensors: Sequence[Tensor], dtype: torch.dtype, size: int) -> list[tuple[int, ...]]:
    """Places of the tensors of a dtype that go at once: what all ranks send together fills a bucket."""
    places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
    return [
        tuple(places[index] for index in bucket)
        for bucket in buckets([tensors[place] for place in places], BUCKET // size)
    ]


K = TypeVar("K", bound=Hashable)


def owners(
    costs: Mapping[K, float],
    size: int,
    known: Mapping[K, int] | None = None,
    among: Mapping[K, Collection[int]] | None = None,
) -> dict[K, int]:
    """Which of `size` processes does which work: the longest first, each to whoever has least (LPT; Graham 1969).

    The busiest has at most 4/3 of what the best assignment gives it, if nothing is known before.

    Args:
        costs: By name.
        size: How many processes there are.
        known: Whose some of the work is already, and stays.
        among: Which processes can do some of it; of what is not named all can.

    >>> owners({"a": 1.0, "b": 5.0, "c": 2.0, "d": 3.0}, 2)
    {'b': 0, 'd': 1, 'c': 1, 'a': 0}
    >>> owners({"a": 1.0, "b": 5.0}, 2, known={"a": 0})
    {'b': 1, 'a': 0}
    >>> owners({"a": 1.0, "b": 5.0, "c": 4.0}, 3, among={"b": [1, 2], "c": [1, 2]})
    {'b': 1, 'c': 2, 'a': 0}
    """
    loads, result, known, among = [0.0] * size, dict[K, int](), known or {}, among or {}
    for name, rank in known.items():
        loads[rank] += costs.get(name, 0.0)
    for name in sorted(costs, key=lambda name: -costs[name]):
        if name in known:
            result[name] = known[name]
            continue
        rank = min(among.get(name, range(size)), key=loads.__getitem__)
        result[name] = rank
        loads[rank] += costs[name]
    return result
