"""The documentation's table of many processes is what the command prints."""

from __future__ import annotations

import bench_processes
import pytest

from tests.test_readme import ROOT

PAGE = ROOT / "kfacopt" / "docs" / "pages" / "project" / "on_paper.md"


def test_the_pages_table_is_the_commands() -> None:
    options = bench_processes.parser().parse_args([])
    text = PAGE.read_text()
    heading, dashes, *rows = bench_processes.table(
        [64], options.tokens, options.factor_every, options.refresh_every
    ).splitlines()
    assert f"{heading}\n{dashes}\n" in text
    assert len(rows) == 4
    assert "\n".join(rows) in text
    assert all(f"\n| {size} | " in text for size in options.sizes)


@pytest.mark.parametrize("way", [way for way in bench_processes.SHARDING if way != "owners"])
def test_so_are_the_others(way: str) -> None:
    options = bench_processes.parser().parse_args(["--sharding", way, "--sizes", "64"])
    rows = bench_processes.table(
        options.sizes, options.tokens, options.factor_every, options.refresh_every, options.sharding
    ).splitlines()[2:]
    assert len(rows) == 4
    assert "\n".join(rows) in PAGE.read_text()
