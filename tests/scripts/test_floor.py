"""The floor below EKFAC's cost: its count against what an operator runs, and the table."""

from __future__ import annotations

import bench_operators
import floor
import pytest
from bench_operators import Problem
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from kfacopt.operators import EKFACLinearOperator

DEEP = Problem("deep", lambda: bench_operators.mlp(70, 48, 32, 5), (70,), 60, classes=5)  # fewer data than inputs


@pytest.mark.parametrize(("fisher_type", "cotangents"), [("mc", 1), ("type-2", 4)])
def test_the_floor_is_what_an_operator_runs(fisher_type: str, cotangents: int) -> None:
    """But for products with their own transpose, counted by half, which so small ones are not, and for the biases."""
    instance = DEEP.make()
    run = instance.product(EKFACLinearOperator, fisher_type=fisher_type)
    with FlopCounterMode(display=False) as counter:
        run()
    sizes, ranks = [(48, 70), (32, 48), (5, 32)], [60, 48, 32]
    flops = floor.needed_flops(sizes, ranks, data=60, cotangents=cotangents)
    least = sum(flops.values())
    assert least < counter.get_total_flops() < 1.05 * (least + flops["A"] + flops["G"])


def test_it_is_measured_and_written() -> None:
    found = floor.measured(DEEP.make(), "type-2", seconds=0.0)
    assert sorted(found.decomposed) == [1, 1, 1, 5, 32, 32, 48, 48, 60]
    assert 0 < found.gradients < found.operator / found.gradient
    console = Console(width=200)
    with console.capture() as captured:
        console.print(floor.floor_table({"type-2": found}))
    text = captured.get()
    assert "coordinates of g" in text
    assert f"{found.gradients:.2f}" in text
