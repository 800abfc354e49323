"""Several processes as one: what they sum up, agree on, and divide among themselves.

Each process runs the model on its own data, and an engine of torch's (`DistributedDataParallel`, `fully_shard`)
averages the gradients. What is said here is only what a second-order step needs beside that. One process takes the same
path; it has nobody to ask, and nothing is sent.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kfacopt.fsdp import ShardedModel, is_sharded
from kfacopt.linalg.tensors import flat, split_like

T = TypeVar("T")

BUCKET = 2**23
"""Elements that travel at once: 32 MiB in float32. Long enough to run at the network's speed, little memory."""

_UNDER_WAY = 4
"""Buckets that are under way at once: enough to keep both ends busy."""


class Processes:
    """The processes that train together: their number is looked up whenever it is asked for.

    Every method that communicates must be called by all of them, in the same order.

    Args:
        group: torch's process group; None: the default group, if there is one.
        wrapper: The `DistributedDataParallel` around the model, if the optimizer was given that.

    Attributes:
        device: Where what is sent must lie; the owner sets it.
        replicas: How many of them hold each layer's cache, if there are as many (`kfacopt.Sharding`); None: all.
        divides_statistics: Whether these alone hold its statistics, too.
        quiet: Whether all know that in none of them rows wait for the step that is under way; the owner sets it.

    >>> Processes().size, Processes().rank, Processes().mean([3.0])
    (1, 0, [3.0])
    """

    def __init__(self, group: Any = None, wrapper: DistributedDataParallel | None = None) -> None:
        self._group = group
        self._wrapper = None if wrapper is None else weakref.ref(wrapper)
        self.device = torch.device("cpu")
        self.replicas: int | None = None
        self.divides_statistics = self.quiet = False

    @property
    def group(self) -> Any:
        """torch's process group; None: the default one."""
        return self._group

    @property
    def size(self) -> int:
        """How many train together."""
        return distributed.get_world_size(self._group) if self.is_open else 1

    @property
    def is_open(self) -> bool:
        """Whether there is a process group, be it of one process."""
        return distributed.is_available() and distributed.is_initialized()

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return 0 if self.size == 1 else distributed.get_rank(self._group)

    @property
    def joins(self) -> bool:
        """Whether the engine goes on without those processes that have run out of data (`Join`)."""
        wrapper = None if self._wrapper is None else self._wrapper()
        return wrapper is not None and bool(wrapper._join_config.enable)

    def table(self, numbers: Sequence[float]) -> list[list[float]]:
        """Everybody's numbers, in the order of the ranks; all must give as many."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(rows, own, group=self._group)
        result: list[list[float]] = torch.stack(rows).tolist()
        return result

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The means over the processes."""
        size = self.size
        return [sum(column) / size for column in zip(*self.table(numbers), strict=True)]

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """The largest over the processes."""
        return [max(column) for column in zip(*self.table(numbers), strict=True)]

    def sum_vector(self, numbers: Sequence[Tensor | float]) -> list[float]:
        """The sums over the processes; for long lists."""
        own = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=self.device) for n in numbers])
        if self.size > 1:
            distributed.all_reduce(own, group=self._group)
        result: list[float] = own.tolist()
        return result

    def gathered(self, value: T) -> list[T]:
        """Everybody's value, any plain Python, in the order of the ranks; for what is rare or short."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over the processes of contiguous tensors, which all must have in the same shapes."""
        if self.size == 1:
            return list(tensors)
        result: dict[int, Tensor] = {}
        for bucket in buckets(tensors):
            members = [tensors[place] for place in bucket]
            whole = flat(members)
            distributed.all_reduce(whole, group=self._group)
            result |= dict(zip(bucket, split_like(whole, members), strict=True))
        return [result[place] for place in range(len(tensors))]

    def rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """Everybody's rows below each other, in the order of the ranks; `counts` says how many each has."""
        if self.size == 1:
            return own
        padded = torch.cat([own, own.new_zeros(max(counts) - len(own), *own.shape[1:])])
        found = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(found, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the processes of tensors, which all must have in the same shapes; the same in all."""
        if self.size == 1:
            return list(tensors)
        sums = self.sum([tensor.contiguous() for tensor in tensors])
        return [total.div_(self.size) for total in sums]

    def together(self, work: Callable[[], T]) -> T:
        """What some work returns that each process does alone; if it fails in one, all raise.

        >>> Processes().together(lambda: 3)
        3
        """
        if self.size == 1:
            return work()
        failure, found = None, list[T]()
        try:
            found.append(work())
        except Exception as error:  # the others wait for this one
            failure = error
        self.raise_together(failure)
        return found[0]

    def raise_together(self, failure: Exception | None) -> None:
        """Raise what hinders a process: its own in it, and in those without one that of the first."""
        said = self.gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text is not None:
                raise RuntimeError(f"process {rank} cannot take this step, so that none does: {text}")

    def sent(self, tensors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """What every rank sends to all: `tensors[rank]`, contiguous, of which the others need only have the shapes.

        What comes back are views of messages, for the sender too, with the same strides for all: products may round
        otherwise with others.
        """
        return in_messages(tensors, self._launched)

    def exchanged(self, outgoing: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """What each rank sends to this one.

        Args:
            outgoing: Vectors, one to each rank, all of one dtype.
            counts: How many elements come from each rank.
        """
        arrived = outgoing[0].new_empty(sum(counts))
        lengths = [vector.numel() for vector in outgoing]
        distributed.all_to_all_single(arrived, torch.cat(list(outgoing)), list(counts), lengths, group=self._group)
        return list(arrived.split(list(counts)))

    def _launched(self, source: int, bucket: list[int], members: list[Tensor]) -> Message:
        own = source == self.rank
        whole = flat(members) if own else members[0].new_empty(sum(tensor.numel() for tensor in members))
        alone = self.size == 1
        work = None if alone else distributed.broadcast(whole, group=self._group, group_src=source, async_op=True)
        return Message(source, bucket, members, whole, work)

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled: where this is read again there is another.
        return {"device": self.device, "replicas": self.replicas, "divides_statistics": self.divides_statistics}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._group, self._wrapper = None, None
        self.device, self.replicas = state["device"], state.get("replicas")
        self.divides_statistics, self.quiet = state.get("divides_statistics", False), False

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self


class Message(NamedTuple):
    """Tensors of one rank on their way, from it to all or the other way."""

    source: int
    places: list[int]
    members: list[Tensor]
    whole: Tensor
    work: Any

    def arrive(self, arrived: list[list[Tensor]]) -> None:
        """Wait for it, and write down what came in the places of what was sent."""
        if self.work is not None:
            self.work.wait()
        for place, tensor in zip(self.places, split_like(self.whole, self.members), strict=True):
            arrived[self.source][place] = tensor


def in_messages(
    tensors: Sequence[Sequence[Tensor]], launched: Callable[[int, list[int], list[Tensor]], Message]
) -> list[list[Tensor]]:
    """What comes of `launched(rank, places, members)` for `tensors[rank]`; several are under way at a time."""
    arrived = [list(of_rank) for of_rank in tensors]
    under_way: deque[Message] = deque()
    for source, of_rank in enumerate(tensors):
        for bucket in buckets(of_rank):
            under_way.append(launched(source, bucket, [of_rank[place] for place in bucket]))
            if len(under_way) == _UNDER_WAY:
                under_way.popleft().arrive(arrived)
    for message in under_way:
        message.arrive(arrived)
    return arrived


def unwrapped(model: Any) -> tuple[Any, Processes]:
    """The module that an engine of torch's wraps, and the processes that train it; any other model as it is.

    What the wrapper adds to a forward would be run again with it: one of `DistributedDataParallel`'s nodes counts how
    often a backward passes it. `fully_shard` wraps nothing: its processes are those of the parameters' mesh.

    >>> model = nn.Linear(2, 1)
    >>> unwrapped(model)[0] is model
    True
    """
    inner = model
    while isinstance(compiled := getattr(inner, "_orig_mod", None), nn.Module):
        inner = compiled
    if isinstance(inner, DistributedDataParallel):
        return inner.module, Processes(inner.process_group, inner)
    return model, Processes(ShardedModel(inner).group if isinstance(inner, nn.Module) else None)


def shard_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard, or the whole of one that is not sharded; nobody is asked.

    >>> shard_of(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a whole tensor that is laid out as a parameter; nobody is asked."""
    if is_sharded(whole):
        return shard_of(whole)
    return shard_of(laid_out_as(whole, parameter)) if is_sharded(parameter) else whole


def laid_out_as(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded as a parameter is; nobody is asked."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


class Whole(Mapping[nn.Parameter, Tensor]):
    """Sharded tensors by parameter, each gathered when it is first asked for: all processes must ask for the same.

    Args:
        shards: Tensors as the engine lays them out, or whole ones.

    Attributes:
        shards: Those, for who needs no more than what this process holds.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> Whole({weight: torch.zeros(2)})[weight]
    tensor([0., 0.])
    """

    def __init__(self, shards: Mapping[nn.Parameter, Tensor]) -> None:
        self.shards = shards
        self._gathered: dict[nn.Parameter, Tensor] = {}

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self._gathered:
            held = self.shards[parameter]
            self._gathered[parameter] = held.full_tensor() if is_sharded(held) else held  # type: ignore[attr-defined]
        return self._gathered[parameter]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.shards


def wholes(tensors: Mapping[nn.Parameter, Tensor]) -> Mapping[nn.Parameter, Tensor]:
    """Tensors by parameter that can be read as wholes; where none is sharded, the very same."""
    return Whole(tensors) if any(map(is_sharded, tensors.values())) else tensors


def shards(tensors: Mapping[nn.Parameter, Tensor], parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter's tensor; nobody is asked."""
    held = tensors.shards if type(tensors) is Whole else tensors  # `isinstance` asks a Mapping's own question of a dict
    return shard_like(held[parameter], parameter)


def buckets(tensors: Sequence[Tensor], most: int = BUCKET) -> Iterator[list[int]]:
    """Places of tensors that travel together: of one dtype, and no more than `most` elements unless one has more."""
    open_: dict[torch.dtype, list[int]] = {}
    filled: dict[torch.dtype, int] = {}
    for place, tensor in enumerate(tensors):
        bucket = open_.setdefault(tensor.dtype, [])
        if bucket and filled[tensor.dtype] + tensor.numel() > most:
            yield bucket
            bucket = open_[tensor.dtype] = []
            filled[tensor.dtype] = 0
        bucket.append(place)
        filled[tensor.dtype] = filled.get(tensor.dtype, 0) + tensor.numel()
    yield from open_.values()
