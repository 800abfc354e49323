"""The comparison: its fairness, its arithmetic and what it writes."""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path

import compare
import pytest
import torch
from report import Comparison, Point, Record
from rich.console import Console
from train import build_data

QUICK = ["task=regression", "budget=0.2s", "turns=2", "device=cpu"]


@pytest.fixture
def comparison() -> Comparison:
    adamw = Record("adamw", [Point(0, 0, 10.0), Point(1, 10, 6.0), Point(2, 20, 4.0)], [0.1] * 20)
    sgd = Record("sgd", [Point(0, 0, 10.0), Point(1, 20, 9.0), Point(2, 40, 8.0)], [0.05] * 40)
    ekfac = Record("ekfac", [Point(0, 0, 10.0), Point(1, 5, 3.0), Point(2, 10, 1.0)], [0.2] * 10)
    wild = Record("wild", [Point(0, 0, 10.0), Point(1, 10, math.nan)], [0.1] * 10)
    return Comparison([sgd, wild, adamw, ekfac], budget=2.0)


def test_table(comparison: Comparison) -> None:
    rows = {row.optimizer: row for row in comparison.rows()}
    assert list(rows) == ["ekfac", "adamw", "sgd", "wild"]
    assert [row.loss_at_equal_time for row in rows.values()][:3] == [1.0, 4.0, 8.0]
    assert [row.loss_at_equal_steps for row in rows.values()][:3] == [1.0, 6.0, 9.5]
    assert rows["ekfac"].seconds_to_final == pytest.approx(6 / 7)
    assert rows["adamw"].seconds_to_best == 2.0
    assert math.isnan(rows["sgd"].seconds_to_final)
    assert (rows["ekfac"].mean_step, rows["adamw"].median_step) == pytest.approx((4.0, 2.0))


def test_without_reference_or_unit_the_table_says_nothing_there(comparison: Comparison) -> None:
    alone = Comparison(comparison.records[-1:], 2.0)
    (row,) = alone.rows()
    assert math.isnan(row.seconds_to_final)
    assert math.isnan(row.mean_step)
    console = Console(file=io.StringIO(), width=120)
    console.print(alone.table())


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    comparison.write(tmp_path)
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["optimizer"] for row in csv.DictReader(file)] == ["ekfac", "adamw", "sgd", "wild"]
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["optimizer"] == "sgd"]
    assert [float(row["loss"]) for row in rows] == [10.0, 9.0, 8.0]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("duration", ["", "fast", "-3s", "0", "inf"])
def test_a_budget_that_is_no_duration_is_refused(duration: str) -> None:
    with pytest.raises(ValueError, match="budget="):
        compare.seconds(duration)


def test_all_start_from_the_same_weights_and_see_the_same_batches() -> None:
    configs = compare.entries([*QUICK, "optimizers=[adamw,sgd,ekfac]"])
    data = build_data(configs["sgd"])
    first, *others = compare.lanes(configs, data, torch.device("cpu"))
    batches = [next(first.batches) for _ in range(12)]  # more than an epoch
    for lane in others:
        for name, weight in first.task.state_dict().items():
            torch.testing.assert_close(lane.task.state_dict()[name], weight, rtol=0, atol=0)
        assert torch.equal(lane.randomness, first.randomness)
        for batch in batches:
            assert all(map(torch.equal, batch, next(lane.batches)))


def test_a_lane_does_not_see_the_others_random_numbers() -> None:
    overrides = ["task=language_model", "model.width=16", "model.layers=1", "model.heads=2"]
    overrides += ["model.dropout=0.5", "data.context=8", "data.batch_size=2", "optimizers=[sgd]"]
    configs = compare.entries(overrides)
    data = build_data(configs["sgd"])
    weights = []
    for disturbed in (False, True):
        (lane,) = compare.lanes(configs, data, torch.device("cpu"))
        for _ in range(4):
            lane.train(until=lane.seconds + 1e-9, budget=1.0, decay=0.0)  # one step
            if disturbed:
                torch.rand(5)
        weights.append(lane.task.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=0)


def test_the_clock_stands_still_while_the_loss_is_measured() -> None:
    configs = compare.entries([*QUICK, "optimizers=[sgd]"])
    data = build_data(configs["sgd"])
    (lane,) = compare.lanes(configs, data, torch.device("cpu"))
    rows = compare.measured_rows(configs["sgd"], data, torch.device("cpu"))
    assert sum(len(batch[0]) for batch in rows) == len(data.training_rows)
    weights = {name: tensor.clone() for name, tensor in lane.task.state_dict().items()}
    lane.measure(rows)
    assert lane.seconds == 0.0
    for name, weight in weights.items():
        torch.testing.assert_close(lane.task.state_dict()[name], weight, rtol=0, atol=0)


def test_learning_rates_decay_over_the_last_part_of_the_budget() -> None:
    configs = compare.entries([*QUICK, "optimizers=[muon]"])
    (lane,) = compare.lanes(configs, build_data(configs["muon"]), torch.device("cpu"))
    first = [group["lr"] for group in lane.optimizer.param_groups]
    lane.seconds = 0.75
    lane.train(until=0.75 + 1e-9, budget=1.0, decay=0.5)
    assert [group["lr"] for group in lane.optimizer.param_groups] == pytest.approx([rate / 2 for rate in first])


def test_the_command_writes_table_curves_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", *QUICK, "optimizers=[adamw,sgd]", f"folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()
    printed = capsys.readouterr().out
    assert "Training loss at equal wall-clock" in printed
    names = {"table.csv", "curves.csv", "comparison.png", "config.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_ctrl_c_reports_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = compare.entries([*QUICK, "optimizers=[adamw,sgd]", "turns=50"])
    config = configs["sgd"]
    data = build_data(config)
    racing = compare.lanes(configs, data, torch.device("cpu"))
    rows = compare.measured_rows(config, data, torch.device("cpu"))
    original = racing[1].measure

    def measure(rows: list[compare.Batch]) -> float:
        if len(racing[1].record.curve) == 3:
            raise KeyboardInterrupt
        return original(rows)

    monkeypatch.setattr(racing[1], "measure", measure)
    made = compare.race(config, racing, rows, Console(file=io.StringIO()))
    assert 0 < made.seconds < made.budget
    assert all(math.isfinite(row.loss_at_equal_time) for row in made.rows())
