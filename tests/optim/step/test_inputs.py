"""Large inputs: a step in units of their own is that of a model whose inputs have an ordinary size."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.optim.step.inputs import LARGE
from tests.optim.test_state import Pair, ways

UNITS = torch.tensor([1.0, 300.0, 0.01, 2000.0, 2.0], dtype=torch.float64)
"""What five features are measured in."""
KINDS = [kfacopt.SpectralDescent, kfacopt.KFAC, kfacopt.EKFAC]


def made(scales: Tensor) -> nn.Module:
    """A network for inputs that were multiplied by `scales`: the same function, whatever these are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(0.01).div_(scales)
    return model


def train(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    optimizer = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(), curvature="ggn", **options)
    for _ in range(12):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_the_step_is_that_of_inputs_of_an_ordinary_size() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(16, 5, dtype=torch.float64) * UNITS, torch.randint(3, (16,))
    model = made(torch.ones(5))
    # Gradients' norms have units, so that what is clipped by them would differ.
    optimizer = train(model, x, y, direction=kfacopt.Spectral())
    scales = optimizer._reached.large["0"][:-1]
    torch.testing.assert_close(scales, (LARGE / x.square().mean(0).sqrt()).clamp_max(1.0))
    other = made(scales)
    train(other, x * scales, y, direction=kfacopt.Spectral())
    torch.testing.assert_close(model(x), other(x * scales), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(next(model.parameters()), next(other.parameters()) * scales, rtol=1e-8, atol=1e-12)


def test_ordinary_inputs_change_nothing() -> None:
    torch.manual_seed(1)
    x, y = 3.0 * torch.rand(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    optimizer = train(made(torch.ones(5)), x, y)
    assert optimizer._reached.squares
    assert not optimizer._reached.large


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("when", [0, 3])
def test_one_bad_batch_is_not_remembered(bad: float, when: int) -> None:
    torch.manual_seed(1)
    model, loss_func = made(torch.ones(5)), nn.CrossEntropyLoss()
    optimizer = kfacopt.SpectralDescent(model, loss_func)
    for step in range(6):
        x, y = torch.rand(16, 5, dtype=torch.float64), torch.randint(3, (16,))
        x[0, 1] = bad if step == when else 1.0
        optimizer.zero_grad()
        loss_func(model(x), y).backward()
        optimizer.step()
    assert all(squares.isfinite().all() and squares.max() <= 1.0 for squares in optimizer._reached.squares.values())
    assert not optimizer._reached.large


@pytest.mark.parametrize("kind", KINDS)
def test_raw_features_are_learned(kind: Callable[..., Any]) -> None:
    """With steps as long as those of ordinary inputs, SpectralDescent ends at 1.00 of the variance, KFAC at 0.12."""
    torch.manual_seed(2)
    z = torch.randn(400, 5)
    x, y = (z + 1.0) * torch.tensor([1.0, 30.0, 0.1, 300.0, 2.0]), (z[:, 1].abs() + z[:, 3]).unsqueeze(-1)
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = kind(model, nn.MSELoss())
    scheduler = kfacopt.schedules.to_zero(optimizer, steps=200)
    for _ in range(200):
        some = torch.randint(400, (64,))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[some]), y[some]).backward()
        optimizer.step()
        scheduler.step()
    assert nn.functional.mse_loss(model(x), y) < 0.08 * y.var()


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_with_large_inputs(way: Callable[..., Pair], kind: Any) -> None:
    torch.manual_seed(3)
    data = [(100.0 * torch.rand(8, 5), torch.randint(3, (8,))) for _ in range(8)]
    loss = nn.CrossEntropyLoss()
    case: Any = SimpleNamespace(make=lambda seed: (made(torch.ones(5)).float(), loss, None, None))
    model, *_ = case.make(seed=0)
    options = {"factor_every": 3, "curvature": kfacopt.Fisher("mc", seed=3)}
    optimizer = kind(model, loss, **options)

    def go_on(optimizer: Any, model: nn.Module, batches: Any) -> None:
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    go_on(optimizer, model, data[:4])
    copied, other = way(case, kind, model, optimizer, **options)
    go_on(optimizer, model, data[4:])
    go_on(other, copied, data[4:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True))


def test_a_state_from_before_inputs_were_measured() -> None:
    torch.manual_seed(1)
    x, y = 100.0 * torch.rand(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    model = made(torch.ones(5))
    optimizer = train(model, x, y)
    state = optimizer.state_dict()
    for name in ("input_squares", "pending_squares"):
        del state["curvature"][name]
    optimizer.load_state_dict(state)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
