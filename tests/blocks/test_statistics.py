"""The running average."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kfacopt.blocks.statistics import RunningAverage

numbers = st.floats(-10, 10)
steps = st.lists(st.lists(st.tuples(numbers, st.integers(1, 5)), min_size=0, max_size=3), min_size=1, max_size=8)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@given(steps=steps, decay=st.floats(0, 0.99))
def test_it_is_the_bias_corrected_average_of_the_steps_that_brought_something(
    steps: list[list[tuple[float, int]]], decay: float
) -> None:
    average, means = RunningAverage(), []
    for batches in steps:
        for total, count in batches:
            average.add(scalar(total), float(count))
        if batches:
            means.append(sum(t for t, _ in batches) / sum(c for _, c in batches))
        average.fold(decay)
    weights = [decay ** (len(means) - 1 - i) for i in range(len(means))]
    if not means:
        assert average.value is None
        return
    expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    assert average.value is not None
    torch.testing.assert_close(average.value, scalar(expected), rtol=1e-9, atol=1e-9)


@given(steps=steps, cut=st.integers(0, 8), decay=st.floats(0, 0.99))
def test_it_resumes(steps: list[list[tuple[float, int]]], cut: int, decay: float) -> None:
    one, two = RunningAverage(), RunningAverage()
    for index, batches in enumerate(steps):
        for total, count in batches:
            one.add(scalar(total), float(count))
            if index > cut:
                two.add(scalar(total), float(count))
        if index == cut:  # in the middle of the step: what waits goes along
            two.load_state_dict(one.state_dict())
        one.fold(decay)
        if index >= cut:
            two.fold(decay)
    if len(steps) > cut:
        assert (one.value is None and two.value is None) or torch.equal(one.value, two.value)


def test_a_discarded_batch_leaves_nothing() -> None:
    average = RunningAverage()
    average.add(scalar(1.0), 1.0)
    average.fold(0.5)
    average.add(scalar(float("nan")), 1.0)
    average.discard()
    average.fold(0.5)
    assert average.pending is None
    assert average.value is not None
    assert average.value.item() == 1.0
