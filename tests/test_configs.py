"""Every config of every group composes and can be instantiated."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from compare import entries
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger
from torch.optim import Optimizer
from train import CONFIGS, build_data, build_task, compose


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture
def own_data(tmp_path: Path) -> dict[str, list[str]]:
    """Overrides that name a user's files, for the configs that need some."""
    rng = torch.Generator().manual_seed(0)
    for name, shape in (("images-idx3", (20, 28, 28)), ("labels-idx1", (20,))):
        values = torch.randint(0, 10, shape, generator=rng, dtype=torch.uint8)
        header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(header + values.numpy().tobytes())
    (tmp_path / "text.txt").write_text("second order, " * 200)
    return {
        "idx": [f"data.root={tmp_path}", "task=autoencoder", "data.batch_size=8"],
        "text": [f"data.path={tmp_path / 'text.txt'}", "task=language_model", "data.batch_size=2"],
        "topics": ["task=language_model"],
        "diabetes": ["task=regression"],
    }


def test_every_group_is_tested_here() -> None:
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    tested = {"data", "experiment", "logger", "model", "optimizer", "schedule", "suite", "task", "trainer"}
    assert groups == tested


@pytest.mark.parametrize("task", names("task"))
def test_a_task_brings_what_trains(task: str) -> None:
    config = compose("train", [f"task={task}"])
    made = build_task(config)
    batch = next(iter(build_data(config).train_dataloader()))
    assert made.loss(tuple(part[:2] for part in batch)).isfinite()


@pytest.mark.parametrize("task", names("task"))
@pytest.mark.parametrize("optimizer", names("optimizer"))
def test_every_optimizer_for_every_task(optimizer: str, task: str) -> None:
    config = compose("train", [f"task={task}", f"optimizer={optimizer}"])
    made = build_task(config)
    built = made.optimizer_factory(made.model, loss_func=made.loss_func)
    assert isinstance(built, Optimizer)
    # Muon is for matrices: the ResNet has none, so that AdamW trains all of it.
    expected = "muon_adamw" if (optimizer, task) == ("muon", "classification") else optimizer
    assert built.param_groups[0]["lr"] == pytest.approx(config.learning_rates[expected])


@pytest.mark.parametrize("model", names("model"))
def test_models(model: str) -> None:
    task = "language_model" if model == "transformer" else "autoencoder"
    made = instantiate(compose("train", [f"task={task}", f"model={model}"]).model)
    assert any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("data", names("data"))
def test_data_yields_batches(data: str, own_data: dict[str, list[str]]) -> None:
    overrides = own_data.get(data, ["task=autoencoder"])
    made = build_data(compose("train", [f"data={data}", *overrides]))
    inputs, targets = next(iter(made.train_dataloader()))
    assert len(inputs) == len(targets) == made.batch_size


@pytest.mark.parametrize("trainer", names("trainer"))
def test_trainers(trainer: str, tmp_path: Path) -> None:
    config = compose("train", [f"trainer={trainer}", f"folder={tmp_path}"])
    assert isinstance(instantiate(config.trainer, logger=False), Trainer)


@pytest.mark.parametrize("logger", names("logger"))
def test_loggers(logger: str, tmp_path: Path) -> None:
    config = compose("train", [f"logger={logger}", f"folder={tmp_path}"])
    assert "csv" in config.logger
    assert all(isinstance(instantiate(each), Logger) for each in config.logger.values())


def test_wandb_is_offline_unless_told_otherwise() -> None:
    assert compose("train", ["logger=wandb", "folder=."]).logger.wandb.offline is True


@pytest.mark.parametrize("schedule", names("schedule"))
def test_schedules(schedule: str) -> None:
    config = compose("train", [f"schedule={schedule}", "optimizer=sgd"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = instantiate(config.schedule)(optimizer, total_steps=4)
    optimizer.step()
    scheduler.step()
    assert 0 < optimizer.param_groups[0]["lr"] < 1
    assert build_task(config).schedule_factory is not None


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiments(experiment: str) -> None:
    found = {config.optimizer["_target_"]: config for config in entries([f"experiment={experiment}"]).values()}
    assert found
    for config in found.values():
        OmegaConf.resolve(config)
        build_task(config)


def test_each_combination_of_a_grid_is_an_entry() -> None:
    found = entries(["optimizers=[sgd,muon]", "+grid.muon={lr:[0.01,0.02],adamw_lr:[0.001]}"])
    assert list(found) == ["sgd", "muon lr=0.01 adamw_lr=0.001", "muon lr=0.02 adamw_lr=0.001"]
    assert [config.optimizer.lr for config in found.values()][1:] == [0.01, 0.02]


def test_settings_replace_values_of_one_optimizer() -> None:
    found = entries(["optimizers=[sgd,adamw]", "+settings.adamw.lr=0.5"])
    assert found["adamw"].optimizer.lr == 0.5
    assert found["sgd"].optimizer.lr == found["sgd"].learning_rates.sgd
