"""Data in memory: the data module that all of ours are, the split, and windows of a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from kfacopt.experiments.batches import BatchStream, Rows, epoch_order


class InMemoryData(LightningDataModule, ABC):
    """Training and validation rows in memory, with the place in them part of every checkpoint.

    Args:
        batch_size: Rows in a training batch (of each process).
        seed: Decides the order of every epoch and, where there is one, the split.
        drop_last: Whether an epoch leaves out the rows that do not fill a batch, so that every step sees as many rows;
            the order changes with the epoch, so they are others each time.
        validation_batch_size: Rows in a validation batch; None: as `batch_size`.
    """

    training_rows: Rows
    validation_rows: Rows

    def __init__(
        self, batch_size: int, seed: int = 0, drop_last: bool = True, validation_batch_size: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.validation_batch_size = validation_batch_size or batch_size
        self._loaded = False
        self._stream: BatchStream | None = None
        self._place: dict[str, int] | None = None

    @abstractmethod
    def load(self) -> tuple[Rows, Rows]:
        """Read the data: training rows and validation rows."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data once; later calls do nothing."""
        if not self._loaded:
            self.training_rows, self.validation_rows = self.load()
            self._loaded = True

    def train_dataloader(self) -> BatchStream:
        """The resumable training batches."""
        self.setup()
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        self._stream = BatchStream(
            self.training_rows,
            self.batch_size,
            shuffle=not overfit,
            seed=self.seed,
            drop_last=self.drop_last,
            rank=self._rank,
            world_size=self._world_size,
        )
        if self._place is not None:
            self._stream.load_state_dict(self._place)
            self._place = None
        return self._stream

    def state_dict(self) -> dict[str, Any]:
        """The place in the training batches, for every checkpoint."""
        return {} if self._stream is None else {"train": self._stream.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for the training batches that are asked for next."""
        # Lightning also restores a loader's own state, but not once the length of the run has been asked for in
        # `configure_optimizers` (`estimated_stepping_batches` makes the loader before the loops are restored). A data
        # module is always restored before that.
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._place = state_dict.get("train")

    def val_dataloader(self) -> BatchStream:
        """The validation batches, always in the same order, none left out."""
        self.setup()
        return BatchStream(
            self.validation_rows,
            self.validation_batch_size,
            shuffle=False,
            rank=self._rank,
            world_size=self._world_size,
        )

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def split_rows(
    *tensors: Tensor, validation_fraction: float, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Set a random part of the rows aside for validation.

    Args:
        tensors: Arrays of the same length.
        validation_fraction: The part to set aside, strictly between 0 and 1; at least one row.
        seed: Decides which.

    Returns:
        The training rows and the validation rows of each tensor.

    Raises:
        ValueError: The fraction leaves no row for one of the two.

    >>> (train,), (validation,) = split_rows(torch.arange(10), validation_fraction=0.2, seed=0)
    >>> len(train), len(validation)
    (8, 2)
    """
    count = len(tensors[0])
    validation = max(1, round(count * validation_fraction))
    if not 0.0 < validation_fraction < 1.0 or validation >= count:
        raise ValueError(
            f"validation_fraction must be between 0 and 1 and leave rows to train on, got {validation_fraction} of "
            f"{count} rows"
        )
    # An order of its own, not that of a training epoch.
    order = epoch_order(count, seed, epoch=2**32)
    first, rest = order[:validation], order[validation:]
    return tuple(tensor[rest] for tensor in tensors), tuple(tensor[first] for tensor in tensors)


def standardised(train: Tensor, validation: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of both parts `[n ...]` in units of the training rows: their mean is zero there, their deviation one.

    >>> standardised(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0]]))[1]
    tensor([[0.]])
    """
    mean, deviation = train.mean(0), train.std(0)
    return (train - mean) / deviation, (validation - mean) / deviation


@dataclass(frozen=True)
class Windows:
    """Windows of a text, a row each, and the same window one character later.

    Args:
        text: The characters' numbers, int64 `[length]`.
        context: Characters in a window.
        stride: Characters from the beginning of one window to that of the next.

    >>> windows = Windows(torch.arange(7), context=3, stride=3)
    >>> windows[torch.tensor([1])]
    (tensor([[3, 4, 5]]), tensor([[4, 5, 6]]))
    """

    text: Tensor
    context: int
    stride: int

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1 - self.context) // self.stride + 1)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        places = (indices * self.stride)[:, None] + torch.arange(self.context + 1)
        window = self.text[places]
        return window[:, :-1], window[:, 1:]
