"""The suite: what it plans, what it counts, that it goes on where it was cut, and its table."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import compare
import pytest
import suite
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scores import Finished, Run, Scores
from torch.optim import Optimizer
from train import CONFIGS, build_task, compose

SUITES = sorted(path.stem for path in (CONFIGS / "suite").glob("*.yaml"))
SHORT = ["suite=untuned", "only=[table]", "seeds=1", "points=1", "scale=0.02"]


def run(task: str, optimizer: str, setting: str, *losses: float) -> list[Run]:
    return [
        Run(task, optimizer, setting, seed, f"{task} {optimizer} {setting} {seed}", loss, loss, loss, 10 * (seed + 1))
        for seed, loss in enumerate(losses)
    ]


RUNS = [
    *run("a", "ours", "", 1.0, 3.0),
    *run("a", "adamw", "lr=1", 2.0, 6.0),
    *run("a", "adamw", "lr=2", 1.0, math.nan),  # one seed diverged: never the best
    *run("a", "muon", "lr=1", 5.0, 5.0),
    *run("b", "ours", "", 2.0, 2.0),
    *run("b", "adamw", "lr=1", 1.0, 1.0),
    *run("b", "muon", "lr=1", 4.0, 4.0),
    *run("c", "ours", "", 2.0, math.nan),
    *run("c", "adamw", "lr=1", 1.0, 1.0),
    *run("c", "muon", "lr=1", 4.0, 4.0),
    *run("d", "ours", "", 1.0),  # its rivals have not ended yet
]


def test_scores(tmp_path: Path) -> None:
    scores = Scores(RUNS, "ours", ["adamw", "muon"])
    assert [row.task for row in scores.rows] == ["a", "b", "c"]
    assert scores.ratios == [0.5, 2.0, math.inf]
    assert (scores.median, scores.wins, scores.worst) == (2.0, 1, math.inf)
    assert scores.rows[0].rivals["adamw"].setting == "lr=1"
    assert scores.rows[0].ours.steps == 15
    scores.write(tmp_path)
    lines = (tmp_path / "ours.md").read_text().splitlines()
    assert lines[2] == "| a | 2 | 4 (lr=1) | 5 (lr=1) | 0.500 | 15 | 15 |"
    assert lines[-1] == "ours: median ratio 2.000, wins 1 of 3, worst case inf"
    assert len((tmp_path / "ours.csv").read_text().splitlines()) == 4
    assert scores.table().row_count == 3


def test_without_runs_there_is_no_score() -> None:
    empty = Scores([], "ours", ["adamw"])
    assert math.isnan(empty.median)
    assert math.isnan(empty.worst)


def test_finished_runs_are_found_by_all_that_decides_them(tmp_path: Path) -> None:
    finished = Finished(tmp_path / "runs.jsonl")
    for one in RUNS[:3]:
        finished.add(one)
    with finished.path.open("a") as file:
        file.write('{"task": "a", "optim')  # cut short
    again = Finished(finished.path)
    assert again.find(replace(RUNS[0], loss=math.nan)) == RUNS[0]
    assert again.find(replace(RUNS[0], spec="another")) is None
    assert again.find(RUNS[4]) is None
    again.drop(["ours"])
    assert [Finished(finished.path).find(one) for one in RUNS[:3]] == [None, None, RUNS[2]]


def test_a_suite_chooses_its_tasks_and_the_command_line_others() -> None:
    chosen = {run.task for run in suite.planned(compose("suite", ["suite=batch_size"]))}
    assert chosen == {f"batch {size}" for size in (8, 16, 32, 64, 128)}
    chosen = {run.task for run in suite.planned(compose("suite", ["suite=batch_size", "only=[table]"]))}
    assert chosen == {"table"}


@pytest.mark.parametrize("name", SUITES)
def test_every_task_and_optimizer_of_a_suite_can_be_made(name: str) -> None:
    config = compose("suite", [f"suite={name}"])
    first = next(iter(config.tasks)) if config.only is None else config.only[0]
    for task in config.tasks.values() if config.only is None else [config.tasks[each] for each in config.only]:
        spec = OmegaConf.create({"seed": 0, "optimizer": config.optimizers.adamw, **suite.container(task)})
        made = build_task(spec)
        assert any(parameter.requires_grad for parameter in made.model.parameters())
        assert instantiate(spec.data, _convert_="all").batch_size > 0
        assert task.seconds > 0
    spec = OmegaConf.create({"seed": 0, "optimizer": None, **suite.container(config.tasks[first])})
    for optimizer in config.optimizers.values():
        spec.optimizer = optimizer
        made = build_task(spec)
        assert isinstance(made.optimizer_factory(made.model, loss_func=made.loss_func), Optimizer)


def test_the_plan_is_every_task_optimizer_point_and_seed() -> None:
    config = compose("suite", ["suite=untuned"])
    runs = suite.planned(config)
    assert len(runs) == len({one.spec for one in runs}) == 3 * 10 * (1 + 3 * 5)
    assert {one.setting for one in runs if one.optimizer == "spectral"} == {""}
    few = suite.planned(compose("suite", [*SHORT, "only=[table,digits]", "rivals=[adamw]", "points=2"]))
    assert [(one.task, one.optimizer, one.setting) for one in few[:3]] == [
        ("table", "spectral", ""),
        ("table", "adamw", "lr=0.001"),
        ("table", "adamw", "lr=0.003"),
    ]
    assert json.loads(few[0].spec)["seconds"] == pytest.approx(0.1)


@pytest.mark.parametrize("override", ["only=[chess]", "ours=[newton]", "rivals=[newton]"])
def test_what_the_suite_does_not_have_is_refused_by_name(override: str) -> None:
    with pytest.raises(ValueError, match=r"chess|newton"):
        suite.planned(compose("suite", ["suite=untuned", override]))


def test_a_run_ends_with_its_time_and_says_how() -> None:
    (planned, *_) = suite.planned(compose("suite", SHORT))
    ended = suite.trained(planned)
    assert (ended.task, ended.optimizer, ended.spec) == (planned.task, planned.optimizer, planned.spec)
    assert ended.steps > 0
    assert ended.seconds >= 0.1
    assert 0.0 < ended.loss < 2.0
    assert ended.highest >= ended.training_loss > 0.0


def test_a_run_that_diverges_is_not_a_number() -> None:
    (planned, *_) = suite.planned(compose("suite", [*SHORT, "ours=[soap]", "rivals=[]", "grid.soap.lr=[1e30]"]))
    ended = suite.trained(planned)
    assert math.isnan(ended.loss)
    assert ended.steps > 0


def test_the_command_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *SHORT, f"folder={tmp_path}"])
    original, count = suite.trained, []

    def interrupted(planned: Run) -> Run:
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(planned)
        return original(planned)

    monkeypatch.setattr(suite, "trained", interrupted)
    compare.main()
    assert "goes on from here" in capsys.readouterr().out
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    monkeypatch.setattr(suite, "trained", lambda planned: count.append(planned) or original(planned))
    compare.main()
    assert len(count) == len({one.spec for one in count}) == 4
    assert "median ratio" in (tmp_path / "spectral.md").read_text()
    monkeypatch.setattr(sys, "argv", ["compare", *SHORT, f"folder={tmp_path}", "again=[spectral]"])
    compare.main()
    assert [one.optimizer for one in count[4:]] == ["spectral"]


@pytest.mark.slow
def test_runs_in_processes_of_their_own(tmp_path: Path) -> None:
    (scores,) = suite.main([*SHORT, "rivals=[adamw]", "jobs=2", f"folder={tmp_path}"])
    assert [row.task for row in scores.rows] == ["table"]


@pytest.mark.parametrize("name", SUITES)
def test_quick_is_a_few_of_the_tasks(name: str) -> None:
    config = compose("suite", [*suite.QUICK, f"suite={name}"])
    runs = suite.planned(config)
    assert {one.task for one in runs} == set(config.quick)
    assert sum(json.loads(one.spec)["seconds"] for one in runs) < 20.0
    assert {one.seed for one in runs} == {0}


def test_quick_may_have_other_tasks() -> None:
    config = compose("suite", [*suite.QUICK, "suite=untuned", "only=[convnet]"])
    assert {one.task for one in suite.planned(config)} == {"convnet"}
