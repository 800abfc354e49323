"""Several processes as one: what they sum up, agree on, and divide among themselves.

Each process runs the model on its own data, and an engine of torch's (`DistributedDataParallel`) averages the
gradients. What is said here is only what a second-order step needs beside that. One process takes the same path; it has
nobody to ask, and nothing is sent.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kfacopt.linalg.tensors import flat, split_like

T = TypeVar("T")

_BUCKET = 2**23
"""Elements that travel at once: 32 MiB in float32. Long enough to run at the network's speed, little memory."""


class Processes:
    """The processes that train together: their number is looked up whenever it is asked for.

    Every method that communicates must be called by all of them, in the same order.

    Args:
        group: torch's process group; None: the default group, if there is one.
        wrapper: The `DistributedDataParallel` around the model, if the optimizer was given that.

    Attributes:
        device: Where what is sent must lie; the owner sets it.

    >>> Processes().size, Processes().rank, Processes().mean([3.0])
    (1, 0, [3.0])
    """

    def __init__(self, group: Any = None, wrapper: DistributedDataParallel | None = None) -> None:
        self._group = group
        self._wrapper = None if wrapper is None else weakref.ref(wrapper)
        self.device = torch.device("cpu")

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
        for bucket in _buckets(tensors):
            members = [tensors[place] for place in bucket]
            whole = flat(members)
            distributed.all_reduce(whole, group=self._group)
            result |= dict(zip(bucket, split_like(whole, members), strict=True))
        return [result[place] for place in range(len(tensors))]

    def sent(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """The tensors of rank `source`; the others' are only of the same shapes. They are new, and contiguous, for all.

        Everybody gets the same strides: products may round otherwise with others.
        """
        result: dict[int, Tensor] = {}
        for bucket in _buckets(tensors):
            members = [tensors[place] for place in bucket]
            whole = flat(members)
            if self.size > 1:
                distributed.broadcast(whole, group=self._group, group_src=source)
            result |= {p: t.clone() for p, t in zip(bucket, split_like(whole, members), strict=True)}
        return [result[place] for place in range(len(tensors))]

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled: where this is read again there is another.
        return {"device": self.device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._group, self._wrapper, self.device = None, None, state["device"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self


def unwrapped(model: Any) -> tuple[Any, Processes]:
    """The module that an engine of torch's wraps, and the processes that train it; any other model as it is.

    What the wrapper adds to a forward would be run again with it: one of `DistributedDataParallel`'s nodes counts how
    often a backward passes it.

    >>> model = nn.Linear(2, 1)
    >>> unwrapped(model)[0] is model
    True
    """
    inner = model
    while isinstance(compiled := getattr(inner, "_orig_mod", None), nn.Module):
        inner = compiled
    if not isinstance(inner, DistributedDataParallel):
        return model, Processes()
    return inner.module, Processes(inner.process_group, inner)


def owners(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Which of `size` processes does which work: the longest first, each to whoever has least (LPT; Graham 1969).

    The busiest has at most 4/3 of what the best assignment gives it.

    >>> owners({"a": 1.0, "b": 5.0, "c": 2.0, "d": 3.0}, 2)
    {'b': 0, 'd': 1, 'c': 1, 'a': 0}
    """
    loads, result = [0.0] * size, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = loads.index(min(loads))
        result[name] = rank
        loads[rank] += costs[name]
    return result


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of tensors that travel together: of one dtype, and no more than `_BUCKET` elements unless one has more."""
    open_: dict[torch.dtype, list[int]] = {}
    filled: dict[torch.dtype, int] = {}
    for place, tensor in enumerate(tensors):
        bucket = open_.setdefault(tensor.dtype, [])
        if bucket and filled[tensor.dtype] + tensor.numel() > _BUCKET:
            yield bucket
            bucket = open_[tensor.dtype] = []
            filled[tensor.dtype] = 0
        bucket.append(place)
        filled[tensor.dtype] = filled.get(tensor.dtype, 0) + tensor.numel()
    yield from open_.values()
