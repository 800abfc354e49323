"""A training run: what it leaves, and that an interrupted one goes on bit for bit."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train
from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningModule, Trainer

REGRESSION = ["task=regression", "data.batch_size=64"]  # 5 steps an epoch
TEXT = [
    "task=language_model",
    *("model.width=16", "model.heads=2", "model.layers=1", "model.dropout=0.2"),
    *("data.context=16", "data.batch_size=4", "data.stride=16384", "data.validation_fraction=0.001"),
]
QUIET = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


class PressCtrlC(Callback):
    """Presses Ctrl-C while a step is taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def config_of(folder: Path, *overrides: str) -> DictConfig:
    return train.compose("train", [f"folder={folder}", *QUIET, *overrides])


def logged(folder: Path, column: str) -> list[tuple[str, str]]:
    """What a run logged, as text: equal only if equal to the last bit."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row[column]) for row in csv.DictReader(file) if row.get(column)]


def interrupted(folder: Path, step: int, *overrides: str) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        train.train(config_of(folder, *overrides), [PressCtrlC(step)])
    signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C without effect


def test_a_run_leaves_config_metrics_picture_and_checkpoints(tmp_path: Path) -> None:
    loss = train.train(config_of(tmp_path, *REGRESSION, "optimizer=sgd", "trainer.max_epochs=2"))
    assert [step for step, _ in logged(tmp_path, "train/loss")] == [str(step) for step in range(10)]
    assert loss == pytest.approx(float(logged(tmp_path, "val/loss")[-1][1]))
    files = ("config.yaml", "loss.png", "checkpoints/last.ckpt", "checkpoints/best.ckpt")
    assert all((tmp_path / name).stat().st_size > 0 for name in files)
    assert "${" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("optimizer", ["adamw", "kfac", "ekfac"])
@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        (REGRESSION, 0),
        (REGRESSION, 6),
        (REGRESSION, 9),  # the last step of an epoch
        ([*REGRESSION, "trainer.accumulate_grad_batches=2"], 4),
        ([*REGRESSION, "schedule=cosine_decay"], 7),
        (TEXT, 7),  # dropout draws random numbers
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: str, overrides: list[str], step: int
) -> None:
    overrides = [*overrides, f"optimizer={optimizer}", "trainer.max_epochs=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(config_of(whole, *overrides))
    interrupted(cut, step, *overrides)
    part = logged(cut, "train/loss")
    assert part == logged(whole, "train/loss")[: len(part)]
    assert len(part) == step + 1
    train.train(train.resumed(train.compose("train", [f"resume={cut}"]), []))
    for column in ("train/loss", "val/loss"):
        assert logged(cut, column) == logged(whole, column)


def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    train.train(config_of(whole, *REGRESSION, "optimizer=adamw", "trainer.max_epochs=4"))
    train.train(config_of(longer, *REGRESSION, "optimizer=adamw", "trainer.max_epochs=2"))
    resume = train.compose("train", [f"resume={longer}"])
    train.train(train.resumed(resume, [f"resume={longer}", "trainer.max_epochs=4"]))
    assert logged(longer, "train/loss") == logged(whole, "train/loss")


def test_resume_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must name a checkpoint or a run folder"):
        train.checkpoint_of(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    config = train.compose("train", [f"resume={tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"there is no .*config\.yaml"):
        train.resumed(config, [])
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 1.0}\n")
    with pytest.raises(ValueError, match="optimizer=adamw cannot be given with resume"):
        train.resumed(config, ["optimizer=adamw"])


def test_metrics_beyond_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    for version, rows in enumerate(("0,1.0\n1,2.0\n2,3.0\n", "1,2.5\n")):
        folder = tmp_path / "metrics" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,train/loss\n" + rows)
    train.collect_metrics(tmp_path)
    assert logged(tmp_path, "train/loss") == [("0", "1.0"), ("1", "2.5")]


@pytest.mark.slow
def test_the_command_line_resumes_and_sweeps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*REGRESSION, "optimizer=adamw", "trainer.max_epochs=2"]
    interrupted(run, 3, *overrides)

    def command(*arguments: str) -> None:
        script = [sys.executable, str(train.CONFIGS.parent / "scripts" / "train.py")]
        subprocess.run([*script, *arguments], cwd=tmp_path, env={**os.environ}, check=True)

    command(f"resume={run}")
    assert len(logged(run, "train/loss")) == 10
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    command("-m", *REGRESSION, *QUIET, "trainer=short", "optimizer=sgd,adamw", sweep)
    assert all((tmp_path / "sweep" / job / "loss.png").exists() for job in ("0", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(strategy: str, tmp_path: Path) -> None:
    """As on the command line; what they leave is one run, which two others go on with."""
    script = Path(train.__file__)
    options = [
        *REGRESSION,
        "optimizer=kfac",
        f"trainer={strategy}",
        "trainer.devices=2",
        *QUIET,
        "trainer.max_epochs=2",
    ]
    environment = os.environ | {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    for more in (["hydra.run.dir=run"], ["resume=run", "trainer.max_epochs=3"]):
        command = [sys.executable, str(script), *([] if "resume=run" in more else options), *more]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stdout + found.stderr
    steps = [int(step) for step, _ in logged(tmp_path / "run", "train/loss")]
    assert steps == list(range(len(steps)))
    assert len(steps) == 3 * 2  # of one process's five batches an epoch two times two
    assert len(logged(tmp_path / "run", "curvature/damping")) == len(steps)
