"""The table of what the exact inverse of a deep chain costs."""

from __future__ import annotations

import io

import bench_chain
import pytest
from rich.console import Console


def test_a_size_is_measured_in_a_process_of_its_own_and_printed() -> None:
    size = bench_chain.SIZES[0]
    found = bench_chain.in_a_process(size, threads=1)
    assert found["parameters"] == 16 * 64 * 65
    assert found["residual"] < 1e-10
    out = io.StringIO()
    Console(file=out, width=160).print(bench_chain.table({size.key: [found]}, {size.key: [1.25, 7.0, 1.05]}))
    assert "115 / 8276" in out.getvalue()
    assert "1.25" in out.getvalue()


@pytest.mark.benchmark
@pytest.mark.parametrize("size", [s for s in bench_chain.SIZES if s.limit is not None], ids=lambda s: s.key)
def test_cpu_seconds_and_residual(size: bench_chain.Size) -> None:
    found = min((bench_chain.in_a_process(size, threads=1) for _ in range(3)), key=lambda run: run["seconds"])
    assert size.limit is not None
    assert found["seconds"] <= size.limit
    assert found["residual"] <= (1e-10 if size.depth <= 64 else 1e-8)


@pytest.mark.benchmark
def test_cost_is_linear_in_depth() -> None:
    by_key = {size.key: size for size in bench_chain.SIZES}
    for short, long in bench_chain.LINEAR:
        few, many = (
            min(bench_chain.in_a_process(by_key[key], threads=1)["seconds"] for _ in range(3)) for key in (short, long)
        )
        assert 3.0 <= many / few <= 5.0


@pytest.mark.benchmark
@pytest.mark.parametrize("key", ["8,64,16", "32,32,16"])
def test_two_threads_waste_no_processor_time(key: str) -> None:
    size = next(size for size in bench_chain.SIZES if size.key == key)
    one, two = (min(bench_chain.in_a_process(size, n)["seconds"] for _ in range(3)) for n in (1, 2))
    assert two <= 1.2 * one
