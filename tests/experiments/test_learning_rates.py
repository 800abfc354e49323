"""Learning-rate schedules, and their move from one optimizer to another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from kfacopt.experiments.learning_rates import cosine_decay, linear_decay
from kfacopt.lightning.rebind import Scheduler, rebind_schedulers


def adam(*rates: float) -> Adam:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return Adam(groups)


def sgd(*rates: float) -> SGD:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]
    return SGD(groups, momentum=0.9)


def course(optimizer: Optimizer, scheduler: Scheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return rates


def test_decays_rise_then_fall_to_their_floor() -> None:
    for decay, middle in ((linear_decay, 0.55), (cosine_decay, 0.55)):
        optimizer = sgd(2.0)
        rates = course(optimizer, decay(optimizer, 10, warmup=0.2, floor=0.1), 14)
        assert rates[:3] == pytest.approx([1.0, 2.0, 2.0])
        assert rates[6] == pytest.approx(2 * middle)
        assert rates[10:] == pytest.approx([0.2] * 4)


@pytest.mark.parametrize("arguments", [{"total_steps": 0}, {"warmup": 1.0}, {"warmup": -0.1}, {"floor": 1.5}])
def test_impossible_decays_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        cosine_decay(sgd(0.1), **{"total_steps": 10} | arguments)  # type: ignore[arg-type]


SCHEDULES: dict[str, Callable[[Optimizer], Scheduler]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: StepLR(o, 3, gamma=0.5),
    "exponential": lambda o: ExponentialLR(o, 0.9),
    "linear": lambda o: LinearLR(o, 0.1, total_iters=5),
    "polynomial": lambda o: PolynomialLR(o, 8, power=2.0),
    "cosine": lambda o: CosineAnnealingLR(o, 8, eta_min=1e-5),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, 4, eta_min=1e-5),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=2e-4),
    "one cycle": lambda o: OneCycleLR(o, 1e-3, total_steps=12),
    "cyclic": lambda o: CyclicLR(o, 1e-4, 1e-3, step_size_up=3, cycle_momentum=False),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=3), CosineAnnealingLR(o, 6)], [3]),
    "chained": lambda o: ChainedScheduler([LinearLR(o, 0.5, total_iters=2), ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("after", [0, 2])
def test_a_moved_schedule_keeps_its_shape_and_place(name: str, after: int) -> None:
    reference, old = adam(1e-3), adam(1e-3)
    whole = course(reference, SCHEDULES[name](reference), 10)
    scheduler = SCHEDULES[name](old)
    course(old, scheduler, after)
    new = sgd(0.5)
    (moved,) = rebind_schedulers([scheduler], old, new)
    assert type(moved) is type(scheduler)
    assert moved.optimizer is new
    assert course(new, moved, 10 - after) == pytest.approx([500 * r for r in whole[after:]])
    assert new.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_moved_schedule_is_checkpointed(name: str) -> None:
    def build() -> tuple[Optimizer, Scheduler]:
        old, new = adam(1e-3), sgd(0.5)
        (moved,) = rebind_schedulers([SCHEDULES[name](old)], old, new)
        return new, moved

    optimizer, scheduler = build()
    whole = course(optimizer, scheduler, 10)
    optimizer, scheduler = build()
    course(optimizer, scheduler, 4)
    resumed, moved = build()
    resumed.load_state_dict(optimizer.state_dict())
    moved.load_state_dict(scheduler.state_dict())
    assert course(resumed, moved, 6) == whole[4:]


def test_groups_follow_their_own_schedules() -> None:
    old, new = adam(1e-3, 1e-2), sgd(0.5, 0.1)
    scheduler = LambdaLR(old, [lambda step: 0.5**step, lambda step: 0.1**step])
    course(old, scheduler, 1)
    (moved,) = rebind_schedulers([scheduler], old, new)
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.25, 0.01])
    course(new, moved, 1)
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.125, 0.001])


def test_more_or_fewer_groups_follow_a_common_schedule() -> None:
    old, new = adam(1e-3, 1e-3), sgd(0.5, 0.1, 0.2)
    (moved,) = rebind_schedulers([ExponentialLR(old, 0.5)], old, new)
    course(new, moved, 1)
    assert [group["lr"] for group in new.param_groups] == pytest.approx([0.25, 0.05, 0.1])


def test_what_cannot_be_moved_is_refused() -> None:
    old = adam(1e-3, 1e-2)
    with pytest.raises(ValueError, match=r"2 param groups .* the new one has 1"):
        rebind_schedulers([ExponentialLR(old, 0.5)], old, sgd(0.5))
    old = adam(1e-3, 1e-3)
    schedule = LambdaLR(old, [lambda step: 1.0, lambda step: 0.5])
    with pytest.raises(ValueError, match="which follows which"):
        rebind_schedulers([schedule], old, sgd(0.5))
    old = adam(0.0)
    with pytest.raises(ValueError, match="is 0"):
        rebind_schedulers([ExponentialLR(old, 0.5)], old, sgd(0.5))


def test_a_tensor_learning_rate_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.5)
    new = SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    old = adam(1e-3)
    (moved,) = rebind_schedulers([ExponentialLR(old, 0.5)], old, new)
    course(new, moved, 1)
    assert new.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25


def test_momentum_that_the_schedule_cycled_is_left_to_the_new_optimizer() -> None:
    old, new = adam(1e-3), sgd(0.5)
    (moved,) = rebind_schedulers([OneCycleLR(old, 1e-3, total_steps=12)], old, new)
    course(new, moved, 5)
    assert new.param_groups[0]["momentum"] == 0.9


def test_no_schedulers_leave_the_optimizer_as_it_is() -> None:
    new = sgd(0.5)
    assert rebind_schedulers([], adam(0.0), new) == []
    assert "initial_lr" not in new.param_groups[0]
