"""Report 34: AdamW's rate follows the learning rate, under whatever changes it.

AdamW's rate is `adamw_lr` where a group's learning rate is the largest that the group has had or declares (`max_lr` of
torch's schedulers, `initial_lr`), less in proportion where it is lower, and nothing where it is zero. A parameter with
the constant gradient one shows it: AdamW moves it by its rate in each step.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import kfacopt
from tests.reports.reports import near

ADAMW = 1e-3
STEPS = 20


class Offset(nn.Module):
    """A covered layer, and a parameter that only AdamW can train."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.free = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def made(lr: float = 0.3, make: Any = kfacopt.KFAC, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Offset().double()
    return model, make(model, nn.MSELoss(), lr=lr, adamw_lr=ADAMW, **options)


def step(model: nn.Module, optimizer: Any) -> float:
    """One step; how far AdamW's parameter went."""
    x = torch.randn(8, 3, dtype=torch.float64)
    before = model.free.item()
    optimizer.zero_grad()
    (F.mse_loss(model(x), torch.zeros(8, 2, dtype=torch.float64)) + model.free).backward()
    optimizer.step()
    return before - model.free.item()


Scheduler = Callable[[Any], Any]

SCHEDULERS: dict[str, tuple[float, Scheduler]] = {
    "one cycle from below": (1e-3, lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=STEPS)),
    "one cycle from above": (0.3, lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=STEPS)),
    "one cycle beyond": (0.3, lambda o: lr_scheduler.OneCycleLR(o, max_lr=3.0, total_steps=STEPS)),
    "cyclic": (1e-3, lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.3, step_size_up=5, cycle_momentum=False)),
    "linear warm-up": (0.3, lambda o: lr_scheduler.LinearLR(o, start_factor=1e-3, total_iters=10)),
    "cosine": (0.3, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "cosine from below to above": (1e-3, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.3)),
    "warm restarts": (0.3, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5)),
    "lambda": (0.3, lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 5))),
    "lambda up": (1e-3, lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 + 20.0 * t)),
    "multiplicative up": (1e-4, lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 1.5)),
    "exponential up": (1e-5, lambda o: lr_scheduler.ExponentialLR(o, 1.8)),
    "polynomial": (0.3, lambda o: lr_scheduler.PolynomialLR(o, STEPS)),
    "steps": (0.3, lambda o: lr_scheduler.StepLR(o, 5, 0.1)),
    "sequence": (
        0.3,
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 5), lr_scheduler.ExponentialLR(o, 0.9)], [5]
        ),
    ),
}


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_adamws_rate_is_that_part_of_it_which_lr_is_of_the_largest(name: str, make: Any) -> None:
    lr, scheduler_of = SCHEDULERS[name]
    model, optimizer = made(lr, make)
    scheduler = scheduler_of(optimizer)
    largest = 0.0
    for _ in range(STEPS):
        group = optimizer.param_groups[0]
        largest = max(largest, group["lr"], group.get("max_lr", 0.0), group.get("initial_lr", 0.0))
        rate, bound = step(model, optimizer), ADAMW * group["lr"] / largest
        assert rate <= bound * (1.0 + 1e-6) + 1e-12, f"at lr={group['lr']:.3g} of {largest:.3g}"
        scheduler.step()


def test_a_schedule_that_only_lowers_leaves_the_proportion() -> None:
    """From the learning rate it was made with, downwards and back: exactly in proportion."""
    model, optimizer = made(0.3)
    for factor in (1.0, 0.5, 0.1, 0.0, 0.1, 1.0):
        optimizer.param_groups[0]["lr"] = 0.3 * factor
        assert near(step(model, optimizer), ADAMW * factor)


def test_reduce_on_plateau() -> None:
    model, optimizer = made(0.3)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    rates = []
    for _ in range(6):
        rates.append((step(model, optimizer), optimizer.param_groups[0]["lr"]))
        scheduler.step(1.0)
    assert rates[-1][1] < 1e-3
    assert all(near(rate, ADAMW * lr / 0.3) for rate, lr in rates)


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_made_with_lr_zero_nothing_moves(make: Any) -> None:
    model, optimizer = made(0.0, make)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_raised_by_hand(lr: float) -> None:
    """What the learning rate is raised to is the largest it has had."""
    model, optimizer = made(lr)
    step(model, optimizer)
    for now, part in ((0.3, 1.0), (0.15, 0.5), (0.0, 0.0), (0.6, 1.0), (0.3, 0.5)):
        optimizer.param_groups[0]["lr"] = now
        assert near(step(model, optimizer), ADAMW * part)


def test_a_range_test_of_learning_rates() -> None:
    """Lightning's `lr_find`: from a tiny learning rate exponentially beyond the one it was made with."""
    model, optimizer = made(0.01)
    for power in range(-8, 1):
        optimizer.param_groups[0]["lr"] = 10.0**power
        assert step(model, optimizer) <= ADAMW * min(1.0, 10.0**power / 0.01) * (1.0 + 1e-6)


def test_the_largest_learning_rate_is_resumed() -> None:
    model, optimizer = made(1e-3)
    for lr in (0.3, 0.03):
        optimizer.param_groups[0]["lr"] = lr
        step(model, optimizer)
    other, again = made(1e-3)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    assert near(step(other, again), ADAMW * 0.1)
    again.param_groups[0]["lr"] = 0.3
    assert near(step(other, again), ADAMW)


def test_groups_that_unfreezing_adds_follow_their_own_learning_rate() -> None:
    """Lightning's `BaseFinetuning` adds a group with its own lr, which `BackboneFinetuning` then raises each epoch."""
    torch.manual_seed(0)
    model = Offset().double()
    optimizer = kfacopt.KFAC(model, nn.MSELoss(), [model.layer.weight, model.layer.bias], lr=0.3, adamw_lr=ADAMW)
    step(model, optimizer)
    optimizer.add_param_group({"params": [model.free], "lr": 0.003})
    rates = []
    for lr in (0.003, 0.006, 0.012, 0.006):
        optimizer.param_groups[1]["lr"] = lr
        rates.append(step(model, optimizer))
    assert max(rates) <= ADAMW * (1.0 + 1e-6)
    assert near(rates[3], ADAMW * 0.5)


def test_one_group_under_a_schedule_leaves_the_others() -> None:
    torch.manual_seed(0)
    model = Offset().double()
    groups = [{"params": model.layer.parameters(), "lr": 0.3}, {"params": [model.free], "lr": 1e-3}]
    optimizer = kfacopt.KFAC(model, nn.MSELoss(), groups, adamw_lr=ADAMW)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.3, 0.1], total_steps=STEPS)
    for _ in range(STEPS):
        lr = optimizer.param_groups[1]["lr"]
        assert step(model, optimizer) <= ADAMW * lr / 0.1 * (1.0 + 1e-6)
        scheduler.step()


def test_a_group_without_curvature_takes_its_own_lr() -> None:
    torch.manual_seed(0)
    model = Offset().double()
    groups = [{"params": model.layer.parameters()}, {"params": [model.free], "curvature": False, "lr": 0.02}]
    optimizer = kfacopt.KFAC(model, nn.MSELoss(), groups, lr=0.3, adamw_lr=ADAMW)
    for lr in (0.02, 0.04, 0.01, 0.0):
        optimizer.param_groups[1]["lr"] = lr
        assert near(step(model, optimizer), lr)


def test_a_tensor_as_learning_rate() -> None:
    model, optimizer = made(torch.tensor(0.3))
    scheduler = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    rates = []
    for _ in range(6):
        rates.append(step(model, optimizer))
        scheduler.step()
    assert rates[0] == pytest.approx(0.1 * ADAMW, rel=1e-4)
    assert rates[-1] == pytest.approx(ADAMW, rel=1e-4)


def test_with_lr_auto_a_schedule_lowers_adamws_rate_too() -> None:
    model, optimizer = made("auto")  # type: ignore[arg-type]
    for factor in (1.0, 0.1, 0.0):
        optimizer.param_groups[0]["lr"] = factor
        assert near(step(model, optimizer), ADAMW * factor)
