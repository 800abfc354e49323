"""What is said of the steps' evenness."""

from __future__ import annotations

import doctest

import bench_trace


def test_steps_are_compared_with_their_own_kind() -> None:
    assert doctest.testmod(bench_trace).failed == 0
    seconds = [1.0] * 30
    seconds[10], seconds[13] = 2.0, 1.5
    found = bench_trace.evenness(seconds, first=0)
    assert (found["longest"], found["with statistics"]) == (1.5, 2.0)
    # Shifted by one, a step without statistics is the longest.
    assert bench_trace.evenness(seconds, first=1)["longest"] == 2.0


def test_each_optimizer_comes_with_a_background_and_without() -> None:
    assert list(bench_trace.contestants(delay=5)) == ["KFAC", "KFAC, background", "EKFAC", "EKFAC, background"]
