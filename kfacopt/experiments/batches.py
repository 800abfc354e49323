"""Batches cut from tensors in memory, in an order that a resumed run continues exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor


class Rows(Protocol):
    """What a `BatchStream` reads: rows that a tensor of indices picks out in one go.

    A `torch.utils.data.TensorDataset` is one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Any: ...


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The shuffled order of one epoch: a pure function of its arguments.

    Args:
        count: How many rows there are.
        seed: The run's seed.
        epoch: The number of the epoch, from 0.

    Returns:
        A permutation of 0 .. count - 1, shape `[count]`, int64.

    >>> bool((epoch_order(50, seed=1, epoch=3) == epoch_order(50, seed=1, epoch=3)).all())
    True
    >>> bool((epoch_order(50, seed=1, epoch=3) == epoch_order(50, seed=1, epoch=4)).all())
    False
    """
    # SeedSequence mixes the two numbers, so that (seed 0, epoch 1) and (seed 1, epoch 0) differ.
    mixed = int(numpy.random.SeedSequence((seed, epoch)).generate_state(1, numpy.uint64)[0])
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


class BatchStream:
    """A data loader over rows in memory whose place is part of the checkpoint.

    Batch k of epoch e is a pure function of (seed, e, k): no worker, no global random generator and no item-by-item
    collation takes part. `state_dict` holds the place, and Lightning's trainer stores it with the loops and gives it
    back on resume, so that a run cut in the middle of an epoch goes on with the very next batch.

    Outside Lightning the stream counts its own epochs: each pass that runs to its end advances `epoch` by one, and a
    pass that is broken off does not. Lightning sets the epoch by `set_epoch`.

    Args:
        rows: What to cut, indexed by an int64 tensor of row numbers, e.g. a `TensorDataset`.
        batch_size: Rows in a batch, of one process.
        shuffle: Whether each epoch has its own order; otherwise the order of the rows.
        seed: Decides all orders.
        drop_last: Leave out the rows that do not fill a batch (others, next epoch). Otherwise the last batch is
            smaller.
        rank: The number of this process, from 0; each process gets its own part of every batch.
        world_size: The number of processes.

    Raises:
        ValueError: No batch could be made (the batch size is not positive or, with `drop_last`, larger than the rows),
            or the rank is not one of the world.

    >>> from torch.utils.data import TensorDataset
    >>> stream = BatchStream(TensorDataset(torch.arange(5)), batch_size=2, shuffle=False)
    >>> [batch.tolist() for (batch,) in stream]
    [[0, 1], [2, 3], [4]]
    >>> stream.set_epoch(0)
    >>> passage = iter(stream)
    >>> _ = next(passage)
    >>> place = stream.state_dict()
    >>> resumed = BatchStream(TensorDataset(torch.arange(5)), batch_size=2, shuffle=False)
    >>> resumed.load_state_dict(place)
    >>> [batch.tolist() for (batch,) in resumed]
    [[2, 3], [4]]
    """

    # Lightning reads both: `set_epoch` is looked for on the sampler. There must be no `dataset` attribute, from which
    # Lightning would build a loader of its own under `overfit_batches`.
    batch_sampler = None

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        count = len(rows)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be one of a world of {world_size} processes, got {rank}")
        if count == 0 or (drop_last and batch_size * world_size > count):
            raise ValueError(
                f"batch_size {batch_size} x {world_size} processes is more than the {count} rows there are, so that an "
                "epoch would have no batch: lower batch_size"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._batch = 0
        self._resume: dict[str, int] | None = None

    @property
    def sampler(self) -> BatchStream:
        """Itself: the object that Lightning tells the number of the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next batch belongs to."""
        if epoch != self.epoch:
            self._batch = 0
        self.epoch = epoch

    def __len__(self) -> int:
        """The batches of a whole epoch, wherever the stream stands."""
        batches = len(self.rows) / (self.batch_size * self.world_size)
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[Any]:
        # A generator starts at its first `next`. That matters: Lightning makes the iterator before it sets the epoch.
        first = self._take_resumed_batch()
        epoch = self.epoch
        order = self._order()
        for batch in range(first, len(self)):
            start = batch * self.batch_size * self.world_size
            indices = order[start : start + self.batch_size * self.world_size]
            self._batch = batch + 1
            yield self.rows[indices[self.rank :: self.world_size]]
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream and what it depends on, as plain numbers."""
        if self._resume is not None:
            return dict(self._resume)
        return {"epoch": self.epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a stored place: the next pass begins there if its epoch is the stored one."""
        self._resume = dict(state_dict)
        self.epoch = state_dict["epoch"]

    def _identity(self) -> dict[str, int]:
        return {
            "rows": len(self.rows),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
        }

    def _take_resumed_batch(self) -> int:
        resume, self._resume = self._resume, None
        # Lightning also hands back the place of an epoch that had ended.
        if resume is None or resume["epoch"] != self.epoch or resume["batch"] == 0:
            return 0
        for name, value in self._identity().items():
            if resume.get(name) != value:
                raise ValueError(
                    f"the checkpoint stands at batch {resume['batch']} of epoch {resume['epoch']} of data with "
                    f"{name}={resume.get(name)}, but the data now has {name}={value}: it cannot go on in the middle of "
                    f"that epoch; resume with the same {name}, or from a checkpoint that was written at the end of an "
                    "epoch"
                )
        return resume["batch"]

    def _order(self) -> Tensor:
        count = len(self.rows)
        order = epoch_order(count, self.seed, self.epoch) if self.shuffle else torch.arange(count)
        missing = -count % self.world_size
        if missing and not self.drop_last:
            # Every process must see the same number of batches; some rows are seen twice.
            order = torch.cat([order, order[:missing]])
        return order
