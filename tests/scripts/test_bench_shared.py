"""The table of what sharing the curvature's work takes."""

from __future__ import annotations

import io

import bench_shared
import pytest
from rich.console import Console


def printed(found: list[bench_shared.Times]) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=120).print(bench_shared.table(found))
    return [line.split() for line in out.getvalue().splitlines()[1:]]


def test_the_slower_process_is_waited_for() -> None:
    """Refresh and step by the clock, of the slower one; of the processor's time both."""
    found: list[bench_shared.Times] = [
        {"alone": [[0.1, 0.4, 0.1, 0.2]], "DDP": [[0.05, 0.1, 0.1, 0.1]]},
        {"alone": [[0.2, 0.3, 0.1, 0.2]], "DDP": [[0.01, 0.2, 0.1, 0.2]]},
    ]
    assert printed(found) == [
        ["alone", "200.0", "1.00", "400.0", "1.00", "1.00", "1.00"],
        ["DDP", "50.0", "0.25", "200.0", "0.50", "1.00", "0.75"],
    ]


@pytest.mark.slow
def test_every_way_is_in_the_table() -> None:
    options = bench_shared.parser().parse_args(["--width", "8", "--layers", "2", "--turns", "1"])
    found = bench_shared.run(options)
    assert len(found) == 2
    for of_rank in found:
        assert [len(turns) for turns in of_rank.values()] == [1] * 7
        assert all(0.0 < refresh < step for turns in of_rank.values() for refresh, step, _, _ in turns)
    assert len(printed(found)) == 7
