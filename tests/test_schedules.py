"""Intervals, what they are given as, and how refreshes spread over the steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kfacopt
from kfacopt.schedules import Constant, Growing, MaxOverhead, Timetable, as_interval
from tests.cases import BY_NAME, exact_ekfac, train_step


def run(interval: Any, stagger: bool, parts: int, steps: int) -> dict[str, list[int]]:
    """The steps at which each part is done."""
    timetable = Timetable(as_interval("every", interval), stagger)
    names = [f"part {i}" for i in range(parts)]
    done: dict[str, list[int]] = {name: [] for name in names}
    for step in range(steps):
        due = timetable.due(step, names)
        timetable.done(step, due)
        for name in due:
            done[name].append(step)
    return done


@given(parts=st.integers(1, 40), every=st.integers(1, 40))
def test_staggering_is_even(parts: int, every: int) -> None:
    """After step 0 no step does more than its share, and every part is done once an interval."""
    intervals = 4
    done = run(every, True, parts, intervals * every + 1)
    per_step = [sum(step in steps for steps in done.values()) for step in range(intervals * every + 1)]
    assert per_step[0] == parts
    assert max(per_step[1:]) <= -(-parts // every)
    for steps in done.values():
        later = steps[1:]
        assert later[0] <= every
        assert all(b - a == every for a, b in pairwise(later))
        assert len(later) == intervals


@given(parts=st.integers(1, 10), every=st.integers(1, 20))
def test_without_staggering_all_are_due_at_once(parts: int, every: int) -> None:
    done = run(every, False, parts, 3 * every + 1)
    assert all(steps == [0, every, 2 * every, 3 * every] for steps in done.values())


@given(
    parts=st.integers(1, 8),
    cut=st.integers(0, 60),
    start=st.integers(1, 5),
    end=st.integers(1, 20),
    stagger=st.booleans(),
)
def test_a_timetable_resumes(parts: int, cut: int, start: int, end: int, stagger: bool) -> None:
    interval = Growing(start, end, burn_in=30)
    names = [f"part {i}" for i in range(parts)]
    one, two = Timetable(interval, stagger), Timetable(interval, stagger)
    for step in range(70):
        if step == cut:
            two.load_state_dict(one.state_dict())
        due = one.due(step, names)
        one.done(step, due)
        if step >= cut:
            assert two.due(step, names) == due
            two.done(step, due)
            assert two.staleness(step) == one.staleness(step)


@given(parts=st.integers(2, 8), every=st.integers(2, 20), late=st.integers(1, 50))
def test_a_part_that_comes_later_joins_in(parts: int, every: int, late: int) -> None:
    timetable = Timetable(Constant(every), stagger=True)
    names = [f"part {i}" for i in range(parts)]
    done = []
    for step in range(late + 3 * every):
        present = [*names, "late"] if step >= late else names
        due = timetable.due(step, present)
        timetable.done(step, due)
        if "late" in due:
            done.append(step)
    assert done[0] == late
    assert all(b - a == every for a, b in pairwise(done))


@given(start=st.integers(1, 50), end=st.integers(1, 500), burn_in=st.integers(1, 1000), step=st.integers(0, 2000))
def test_growing_goes_from_start_to_end(start: int, end: int, burn_in: int, step: int) -> None:
    schedule = Growing(start, end, burn_in)
    assert schedule(0) == start
    assert schedule(burn_in + step) == end
    value = schedule(step)
    assert type(value) is int
    assert min(start, end) <= value <= max(start, end)


def test_intervals_of_every_kind() -> None:
    expected = [0, 3, 6, 9]
    for interval in (3, Constant(3), lambda step: 3, Growing(3, 3, 5)):
        assert run(interval, False, 1, 10)["part 0"] == expected


@pytest.mark.parametrize("interval", [0, -1, True, 2.5, "often", None])
def test_nonsense_is_named(interval: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="every_so_often"):
        as_interval("every_so_often", interval)


@pytest.mark.parametrize("returned", [0, -2, 1.5, True, None])
def test_a_callable_that_returns_nonsense_is_named(returned: Any) -> None:
    timetable = Timetable(lambda step: returned, stagger=False)
    with pytest.raises(ValueError, match="at step 7"):
        timetable.due(7, ["a"])


@pytest.mark.parametrize("arguments", [(0, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_growing_refuses_what_is_not_positive(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"start|end|burn_in"):
        Growing(*arguments)


@given(
    share=st.floats(0.01, 1.0),
    cost=st.floats(1e-4, 10.0),
    step_seconds=st.floats(1e-4, 1.0),
)
def test_max_overhead_keeps_its_share(share: float, cost: float, step_seconds: float) -> None:
    schedule = MaxOverhead(share)
    assert schedule.interval("factors") == 1
    schedule.observe("factors", cost, step_seconds)
    every = schedule.interval("factors")
    assert every == schedule.longest or cost / every <= share * step_seconds * (1 + 1e-9)
    assert every == 1 or cost / (every - 1) >= share * step_seconds * (1 - 1e-9)  # and not longer than needed


def test_max_overhead_shared_by_both_kinds_of_work() -> None:
    schedule = MaxOverhead(0.2)
    schedule.observe("factors", 0.01, 0.1)
    schedule.observe("refresh", 0.2, 0.1)
    assert 0.01 / schedule.interval("factors") + 0.2 / schedule.interval("refresh") <= 0.2 * 0.1
    copied = MaxOverhead(0.2)
    copied.load_state_dict(schedule.state_dict())
    assert copied.interval("refresh") == schedule.interval("refresh")
    with pytest.raises(ValueError, match="max_overhead"):
        MaxOverhead(0.0)


class Clock:
    """`time.perf_counter` that only goes on when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("stagger", [True, False])
def test_an_optimizer_with_max_overhead_stays_within_it(
    share: float, stagger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which a step takes 1, a curvature pass 0.5 and a block's refresh 3 seconds."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    _, loss, x, y = BY_NAME["mlp-ce"].make()
    schedule = MaxOverhead(share)
    backend = kfacopt.KFACBackend(schedule, schedule, stagger=stagger)
    made = kfacopt.SecondOrderOptimizer(model, loss, backend=backend, lr=1e-4)
    spent = {"factors": 0.0, "refresh": 0.0}

    def slow(kind: str, inner: Any, seconds: float) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            clock.now += seconds
            spent[kind] += seconds
            return inner(*args, **kwargs)

        return wrapped

    made._estimator.cotangents = slow("factors", made._estimator.cotangents, 0.5)  # type: ignore[method-assign]
    for block in backend.blocks.values():
        block.refresh = slow("refresh", block.refresh, 3.0)  # type: ignore[method-assign]
    for _ in range(100):
        clock.now += 1.0
        train_step(made, model, loss, x, y)
    settled = 300
    start, before = clock.now, dict(spent)
    for _ in range(settled):
        clock.now += 1.0
        train_step(made, model, loss, x, y)
    assert clock.now > start
    used = sum(spent.values()) - sum(before.values())
    # One interval may begin just before the count.
    slack = 0.5 + 3 * 3.0
    assert used <= share * settled + slack
    assert used >= 0.3 * share * settled - slack
    assert spent["factors"] > before["factors"]
    assert spent["refresh"] > before["refresh"]


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("backend", [kfacopt.KFACBackend, kfacopt.EKFACBackend, kfacopt.FullEKFACBackend])
def test_refreshes_in_an_optimizer(backend: Any, stagger: bool) -> None:
    torch.manual_seed(0)
    widths = (4, 5, 6, 5, 4, 3)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers).double()
    _, loss, x, y = BY_NAME["mlp-ce"].make()
    every = 3
    made = kfacopt.SecondOrderOptimizer(model, loss, backend=backend(2, every, stagger=stagger), lr=1e-3)
    counts = []
    for block in made.backend.blocks.values():

        def counted(damping: float, inner: Any = block.refresh) -> None:
            counts[-1] += 1
            inner(damping)

        block.refresh = counted
    for _ in range(13):
        counts.append(0)
        train_step(made, model, loss, x, y)
    assert counts[0] == len(layers)
    if stagger:
        assert max(counts[1:]) <= -(-len(layers) // every)
        for start in range(1, 13, every):
            assert sum(counts[start : start + every]) == len(layers)
    else:
        assert counts == [len(layers) if step % every == 0 else 0 for step in range(13)]
    assert made.health()["staleness"] <= every


@pytest.mark.parametrize("factor_every", [1, 3, lambda step: 3, kfacopt.schedules.Growing(1, 4, 6)])
def test_factors_are_updated_on_schedule(factor_every: Any) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = exact_ekfac(model, loss, factor_every=factor_every, refresh_every=100, lr=1e-3)
    interval, last, passes, expected = as_interval("f", factor_every), -100, [], []
    for step in range(12):
        due = step - last >= interval(step)
        last = step if due else last
        expected.append(int(due))
        made.zero_grad()
        loss(model(x), y).backward()
        assert made._capture is not None
        passes.append(made._capture.tally.passes)
        made.step()
    assert passes == expected
