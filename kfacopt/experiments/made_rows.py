"""Data made by a seeded generator, row by row: tables of several kinds, ratings, sets of points, graphs."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from kfacopt.experiments.batches import Rows
from kfacopt.experiments.in_memory import InMemoryData


class MadeRows(InMemoryData):
    """Rows drawn independently, so that those of validation are others than those of training.

    Args:
        batch_size: Rows in a training batch.
        rows: How many there are to train on.
        seed: Decides the rows and the order of every epoch.
        validation_rows: How many there are to validate on.
    """

    def __init__(self, batch_size: int, rows: int, seed: int = 0, validation_rows: int = 2000) -> None:
        super().__init__(batch_size, seed, validation_batch_size=500)
        self.row_count = rows
        self.validation_row_count = validation_rows

    @abstractmethod
    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """So many rows of inputs and targets."""

    def recorded(self, targets: Tensor, generator: Generator) -> Tensor:
        """What the training rows have in place of their targets: here, these."""
        return targets

    def load(self) -> tuple[Rows, Rows]:
        """Draw all rows, of which the last are for validation."""
        generator = Generator().manual_seed(self.seed)
        inputs, targets = self.draw(self.row_count + self.validation_row_count, generator)
        train = inputs[: self.row_count], self.recorded(targets[: self.row_count], generator)
        validation = inputs[self.row_count :], targets[self.row_count :]
        return TensorDataset(*train), TensorDataset(*validation)


def _standardised(column: Tensor) -> Tensor:
    return (column - column.mean()) / column.std()


def _surface(hidden: Tensor, generator: Generator) -> Tensor:
    """A smooth function of all hidden variables `[n h]` to `[n]`, standardised: sums of waves and of products."""
    directions = torch.randn(hidden.shape[1], 6, generator=generator) / math.sqrt(hidden.shape[1])
    first, second, third, *rest = (hidden @ directions).unbind(1)
    value = torch.sin(2.0 * first) + second * third + sum(part.tanh() for part in rest)
    return _standardised(value)


class RareEvents(MadeRows):
    """A table with one row in fifty positive: inputs `[n 16]` and targets 0.0 or 1.0 `[n 1]`.

    >>> data = RareEvents(batch_size=100, rows=8000)
    >>> data.setup()
    >>> float((data.training_rows[:][1].sum() + data.validation_rows[:][1].sum()) / 10_000)
    0.019999...
    """

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """The positive ones are those of the greatest value of a smooth function, up to some noise."""
        inputs = torch.randn(count, 16, generator=generator)
        value = _surface(inputs, generator) + 0.1 * torch.randn(count, generator=generator)
        positive = torch.zeros(count, 1)
        positive[value.topk(count // 50).indices] = 1.0
        return inputs, positive


class RawColumns(MadeRows):
    """A table as it is found, each column in a unit of its own: inputs `[n 12]` and standardised targets `[n 1]`.

    Deviations of the columns go from a tenth to hundreds; a third of them are far from zero, as years are, and a
    third are never negative and skewed, as prices are.

    >>> data = RawColumns(batch_size=100, rows=1000)
    >>> data.setup()
    >>> [tuple(column.shape) for column in data.training_rows[torch.arange(3)]]
    [(3, 12), (3, 1)]
    """

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """A smooth function of hidden variables, of which the columns are units."""
        hidden = torch.randn(count, 12, generator=generator)
        target = _surface(hidden, generator) + 0.1 * torch.randn(count, generator=generator)
        plain, far, skewed = hidden.split(4, dim=1)
        unit = torch.logspace(-1, 2, 4)
        return torch.cat([unit * plain, unit * (far + 5), unit * skewed.exp()], dim=1), target[:, None]


class HeavyTails(MadeRows):
    """A table whose training targets have errors without a variance: inputs `[n 10]`, targets `[n 1]`.

    The errors are of Cauchy's distribution, a tenth of the targets' deviation wide; validation targets have none, so
    that what is measured is what can be known.

    >>> data = HeavyTails(batch_size=100, rows=1000)
    >>> data.setup()
    >>> bool(data.training_rows[:][1].abs().max() > 3 * data.validation_rows[:][1].abs().max())
    True
    """

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """A smooth function."""
        inputs = torch.randn(count, 10, generator=generator)
        return inputs, _surface(inputs, generator)[:, None]

    def recorded(self, targets: Tensor, generator: Generator) -> Tensor:
        """The targets with their errors."""
        return targets + torch.empty_like(targets).cauchy_(sigma=0.1, generator=generator)


class Regions(MadeRows):
    """Columns that mix six hidden variables, and which of some points these are nearest to: `[n columns]`, int64 `[n]`.

    Args:
        columns: How many.
        classes: How many points there are.
        noise: Deviation of what is added to each column, which has a deviation of about one without.

    The rest is as in `MadeRows`.

    >>> data = Regions(batch_size=10, rows=100, columns=50)
    >>> data.setup()
    >>> [tuple(column.shape) for column in data.training_rows[torch.arange(3)]]
    [(3, 50), (3,)]
    """

    def __init__(
        self,
        batch_size: int,
        rows: int,
        columns: int = 6,
        classes: int = 8,
        noise: float = 0.0,
        seed: int = 0,
        validation_rows: int = 2000,
    ) -> None:
        super().__init__(batch_size, rows, seed, validation_rows)
        self.columns = columns
        self.classes = classes
        self.noise = noise

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """The hidden variables, the points, and the mixture."""
        hidden = torch.randn(count, 6, generator=generator)
        points = torch.randn(self.classes, 6, generator=generator)
        labels = torch.cdist(hidden, points).argmin(1)
        mixture = torch.randn(6, self.columns, generator=generator) / math.sqrt(6)
        noise = self.noise * torch.randn(count, self.columns, generator=generator)
        return hidden @ mixture + noise, labels


class Taught(MadeRows):
    """What a teacher says: inputs `[n 16]`, and as targets probabilities of ten classes, `[n 10]`.

    >>> data = Taught(batch_size=100, rows=1000)
    >>> data.setup()
    >>> bool((data.training_rows[:][1].sum(1) - 1).abs().max() < 1e-5)
    True
    """

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """The teacher is a perceptron with random weights, sure enough that its entropy does not drown all else."""
        inputs = torch.randn(count, 16, generator=generator)
        first = torch.randn(16, 64, generator=generator) / 4
        second = 2 * torch.randn(64, 10, generator=generator)
        return inputs, (torch.tanh(inputs @ first) @ second).softmax(1)


class MadeRatings(MadeRows):
    """What some users think of some items: numbers of user and item, int64 `[n 2]`, and standardised ratings `[n 1]`.

    Every pair is rated once at most.

    Args:
        users: How many.
        items: How many.

    The rest is as in `MadeRows`.

    >>> data = MadeRatings(batch_size=10, rows=1000, users=80, items=50)
    >>> data.setup()
    >>> len({tuple(pair) for rows in (data.training_rows, data.validation_rows) for pair in rows[:][0].tolist()})
    3000
    """

    def __init__(
        self,
        batch_size: int,
        rows: int,
        users: int,
        items: int,
        seed: int = 0,
        validation_rows: int = 2000,
    ) -> None:
        super().__init__(batch_size, rows, seed, validation_rows)
        self.users = users
        self.items = items

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """How kind a user is, how good an item, how their four tastes and properties agree, and a mood."""
        pairs = torch.randperm(self.users * self.items, generator=generator)[:count]
        user, item = pairs // self.items, pairs % self.items
        kind, good = (torch.randn(many, generator=generator) for many in (self.users, self.items))
        tastes, properties = (torch.randn(many, 4, generator=generator) for many in (self.users, self.items))
        agreement = (tastes[user] * properties[item]).sum(1) / 2
        mood = 0.3 * torch.randn(count, generator=generator)
        ratings = 0.5 * kind[user] + 0.5 * good[item] + agreement + mood
        return torch.stack([user, item], dim=1), _standardised(ratings)[:, None]


class SampledShapes(MadeRows):
    """Points of a shape in space, turned and not exact: `[n 24 3]`, and which of five it is, int64 `[n]`.

    Sphere, cube, ring, cylinder and helix.

    >>> data = SampledShapes(batch_size=10, rows=100)
    >>> data.setup()
    >>> [tuple(column.shape) for column in data.training_rows[torch.arange(3)]]
    [(3, 24, 3), (3,)]
    """

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """All five for every row, of which one is chosen; then its size, its place in space and the error."""
        shape = (count, 24)
        normal = torch.randn(*shape, 3, generator=generator)
        angle = 2 * math.pi * torch.rand(shape, generator=generator)
        height = 2 * torch.rand(shape, generator=generator) - 1
        cosine, sine = angle.cos(), angle.sin()
        turn = 2 * math.pi * height
        wide = 0.7 + 0.3 * turn.cos()
        shapes = [
            normal / normal.norm(dim=2, keepdim=True),
            normal / normal.abs().amax(2, keepdim=True),
            torch.stack([wide * cosine, wide * sine, 0.3 * turn.sin()], dim=2),
            torch.stack([0.7 * cosine, 0.7 * sine, height], dim=2),
            torch.stack([0.7 * turn.cos(), 0.7 * turn.sin(), height], dim=2),
        ]
        labels = torch.randint(5, (count,), generator=generator)
        points = torch.stack(shapes)[labels, torch.arange(count)]
        points = points / points.square().mean((1, 2), keepdim=True).sqrt()
        turned = points @ torch.linalg.qr(torch.randn(count, 3, 3, generator=generator))[0]
        return turned + 0.1 * torch.randn(*shape, 3, generator=generator), labels


class NearGraphs(MadeRows):
    """Graphs of sixteen points of a square, those near each other joined, and a number for every node.

    Inputs `[n 16 16+8]` are the adjacency, a node its own neighbour, divided by the roots of both nodes' neighbours,
    and beside it eight features of each node. Targets `[n 16 1]` are standardised: products of what a node is with what
    its neighbours are, and with what theirs are.

    >>> data = NearGraphs(batch_size=10, rows=100)
    >>> data.setup()
    >>> [tuple(column.shape) for column in data.training_rows[torch.arange(3)]]
    [(3, 16, 24), (3, 16, 1)]
    """

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """The points, their graph, the features, and the numbers."""
        places = torch.rand(count, 16, 2, generator=generator)
        joined = (torch.cdist(places, places) < 0.35).float()
        roots = joined.sum(2, keepdim=True).sqrt()
        adjacency = joined / (roots * roots.mT)
        features = torch.randn(count, 16, 8, generator=generator)
        own, near, far = torch.randn(3, 8, 1, generator=generator)
        neighbours = adjacency @ torch.sin(features @ near)
        theirs = adjacency @ adjacency @ torch.tanh(features @ far)
        value = torch.tanh(features @ own) * neighbours + theirs
        return torch.cat([adjacency, features], dim=2), _standardised(value)
