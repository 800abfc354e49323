"""The documentation's table of many processes is what the command prints."""

from __future__ import annotations

import bench_processes

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


def test_so_is_the_one_with_owners() -> None:
    options = bench_processes.parser().parse_args(["--replicas", "1", "--sizes", "64"])
    rows = bench_processes.table(
        options.sizes, options.tokens, options.factor_every, options.refresh_every, options.replicas
    ).splitlines()[2:]
    assert len(rows) == 4
    assert "\n".join(rows) in PAGE.read_text()
