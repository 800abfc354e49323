"""Made data: the same for the same seed, of the shape and size that it says, and learnable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfacopt.experiments.in_memory import InMemoryData
from kfacopt.experiments.made import MadeTable, NoisyDigits, ShiftedDigits, UnitSquare, WrongDigits
from kfacopt.experiments.models import DeepChain, HeatResiduals, Perceptron, SmallConvNet

MADE: dict[str, Callable[[int], InMemoryData]] = {
    "table": lambda seed: MadeTable(False, rows=500, batch_size=50, seed=seed),
    "outliers": lambda seed: MadeTable(True, rows=500, batch_size=50, seed=seed),
    "digits": lambda seed: ShiftedDigits(20, True, seed),
    "wrong digits": lambda seed: WrongDigits(20, True, seed),
    "noisy digits": lambda seed: NoisyDigits(20, True, seed),
    "square": lambda seed: UnitSquare(50, seed),
}


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_seed_decides(make: Callable[[int], InMemoryData]) -> None:
    first, same, other = (next(iter(make(seed).train_dataloader())) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


def columns(outliers: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    data = MadeTable(outliers, rows=20_000)
    data.setup()
    parts = [rows[torch.arange(len(rows))] for rows in (data.training_rows, data.validation_rows)]
    return parts[0], parts[1]


@pytest.mark.parametrize("outliers", [False, True])
def test_tables_are_standardised_by_their_training_rows(outliers: bool) -> None:
    (inputs, targets), (_, kept) = columns(outliers)
    assert (inputs.shape, targets.shape, kept.shape) == ((18_000, 8), (18_000, 1), (2_000, 1))
    for column in (inputs, targets):
        torch.testing.assert_close(column.mean(0), torch.zeros(column.shape[1]), rtol=0, atol=1e-4)
        torch.testing.assert_close(column.std(0), torch.ones(column.shape[1]), rtol=1e-3, atol=0)


def test_outliers_are_far_out_and_not_among_validation_targets() -> None:
    (inputs, targets), (_, kept) = columns(True)
    (plain, _), _ = columns(False)
    assert inputs.abs().max() > 3 * plain.abs().max()
    assert targets.abs().max() > 1.5 * kept.abs().max()


@pytest.mark.usefixtures("few_digits")
def test_digits_are_shifted_each_in_several_places() -> None:
    data = ShiftedDigits(20, flatten=False, copies=5)
    data.setup()
    assert (len(data.training_rows), len(data.validation_rows)) == (200, 50)
    images, labels = data.training_rows[torch.arange(200)]
    assert images.shape == (200, 1, 28, 28)
    torch.testing.assert_close(images.sum((1, 2, 3)), torch.ones(200))  # nothing is lost or added
    places = images.flatten(1).argmax(1)
    copies = places.reshape(5, 40)
    assert ((copies - copies[0]).abs().amax(0) > 0).float().mean() > 0.9
    assert torch.equal(labels[:40], labels[40:80])


@pytest.mark.usefixtures("few_digits")
def test_some_training_digits_are_called_wrong() -> None:
    right, wrong = ShiftedDigits(20, flatten=True), WrongDigits(20, flatten=True, wrong=0.3)
    for data in (right, wrong):
        data.setup()
    (images, labels), (same, called) = (data.training_rows[torch.arange(200)] for data in (right, wrong))
    assert torch.equal(images, same)
    assert 0.2 < (labels != called).float().mean() < 0.4
    assert set(called.tolist()) == set(range(10))
    assert torch.equal(right.validation_rows[torch.arange(50)][1], wrong.validation_rows[torch.arange(50)][1])


@pytest.mark.usefixtures("few_digits")
def test_noisy_digits_are_to_be_made_clean() -> None:
    clean, noisy = ShiftedDigits(20, flatten=False), NoisyDigits(20, flatten=False, noise=0.5)
    for data in (clean, noisy):
        data.setup()
    for rows, same in ((clean.training_rows, noisy.training_rows), (clean.validation_rows, noisy.validation_rows)):
        everything = torch.arange(len(rows))
        inputs, targets = same[everything]
        assert torch.equal(targets, rows[everything][0])
        assert (inputs - targets).std().item() == pytest.approx(0.5, rel=0.05)


def test_networks_of_the_suite() -> None:
    assert SmallConvNet()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    chain = DeepChain(784, width=24, depth=16)
    assert sum(isinstance(module, nn.Linear) for module in chain) == 17
    assert not any(module.bias.any() for module in chain if isinstance(module, nn.Linear))
    assert isinstance(Perceptron([3, 4, 2], nn.GELU)[-1], nn.Linear)


def test_the_heat_equation_is_solved_by_its_solution() -> None:
    class Solution(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            x, t = points.unbind(1)
            return (torch.sin(torch.pi * x) * torch.exp(-0.25 * torch.pi**2 * t)).unsqueeze(1)

    residuals = HeatResiduals(width=4).double()
    points = torch.rand(20, 2, dtype=torch.float64)
    assert residuals(points).abs().max() > 0.1
    residuals.network = Solution()  # type: ignore[assignment]
    with torch.no_grad():
        assert residuals(points).abs().max() < 1e-12
