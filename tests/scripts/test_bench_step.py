"""The table of step times, and what it must say."""

from __future__ import annotations

import io
import statistics

import bench_step
import pytest
import torch
from rich.console import Console


def test_everything_in_the_table_takes_steps() -> None:
    batches = bench_step.batches_of(8)
    racing = bench_step.race(bench_step.contestants(), batches, steps=2, turn=1)
    assert {"SGD", "AdamW", "Muon", "KFAC", "EKFAC"} <= set(racing)
    assert all(len(contestant.totals()) == 2 for contestant in racing.values())
    out = io.StringIO()
    Console(file=out, width=120).print(bench_step.table([racing]))
    assert "EKFAC" in out.getvalue()


@pytest.mark.benchmark
def test_a_step_of_kfac_takes_at_most_2_3_times_sgds() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        factories = {name: bench_step.contestants()[name] for name in ("SGD", "KFAC")}
        batches = bench_step.batches_of(512)
        repeats = [bench_step.race(factories, batches, steps=200, turn=10) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    means = [{name: statistics.fmean(run.totals()) for name, run in repeat.items()} for repeat in repeats]
    assert statistics.median(mean["KFAC"] / mean["SGD"] for mean in means) <= 2.3
