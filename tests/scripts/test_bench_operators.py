"""The table of what operators cost, its plot, and what they must say."""

from __future__ import annotations

import io
from pathlib import Path

import bench_operators
import pytest
import torch
from bench_operators import Problem, Work
from rich.console import Console

TINY = Problem("tiny", lambda: bench_operators.mlp(4, 3, 2), (4,), 5, classes=2)


def written(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's forward mode, of torch's own jit
def test_every_kind_of_work_is_done_and_printed() -> None:
    kinds = {(work.operator, work.fisher_type): work for work in bench_operators.WORKS}
    works = [Work(work.operator, TINY, work.fisher_type, work.at_most) for work in kinds.values()]
    results = {work: bench_operators.race(work.contestants(), seconds=0.0, at_least=2) for work in works}
    for times in results.values():
        assert {name: len(own) for name, own in times.items()} == {"gradient": 4, "ours": 2, "curvlinops": 2}
    text = written(bench_operators.table(results))
    assert all(work.name in text for work in works)


def test_growing_models_are_measured_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = bench_operators.grow([3, 30], seconds=0.0)
    assert [size.parameters for size in sizes] == [12 + 12 + 40, 930 + 930 + 310]
    assert all(cost > 0 for size in sizes for part in (size.seconds, size.memory) for cost in part.values())
    assert "2,170" in written(bench_operators.growth_table(sizes))
    bench_operators.draw(sizes, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_memory_is_that_of_tensors_at_once() -> None:
    kept = torch.zeros(1000)
    assert bench_operators.peak_bytes(lambda: [kept + 1, kept + 2]) == pytest.approx(8000, abs=256)
    assert bench_operators.peak_bytes(lambda: [(kept + 1).sum(), (kept + 2).sum()]) == pytest.approx(4000, abs=256)


@pytest.mark.benchmark
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("work", [pytest.param(work, id=work.name) for work in bench_operators.WORKS])
def test_work_costs_at_most_what_was_promised(work: Work) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # by the processor's time, which repeats on a machine that others use
    clock = bench_operators.CLOCKS["processor"]
    try:
        found = bench_operators.costs(bench_operators.race(work.contestants(), seconds=8.0, clock=clock))
    finally:
        torch.set_num_threads(threads)
    assert found["ours"] <= (found["curvlinops"] if work.at_most is None else work.at_most)
