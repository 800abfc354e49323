"""Trains a model with Lightning, as configs/train.yaml and its groups say.

    scripts/train task=classification optimizer=kfac
    scripts/train -m optimizer=sgd,adamw,ekfac     (a sweep)
    scripts/train trainer=ddp trainer.devices=2     (several processes)
    scripts/train trainer=fsdp2 trainer.devices=2   (several that hold a part of the model each)
    scripts/train resume=runs/train/<folder>

Everything goes to one run folder: the resolved config, metrics.csv, loss.png, report.png (curvature) and checkpoints.
Ctrl-C ends a run between two steps and leaves a checkpoint from which `resume` goes on bit for bit.

This is the only file that knows Hydra; scripts/compare.py composes its config through it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from progress import Epochs, output, told
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from report import draw_losses

from kfacopt import report
from kfacopt.experiments.in_memory import InMemoryData
from kfacopt.experiments.tasks import Task
from kfacopt.lightning import AtomicCheckpointIO, CurvatureCallback, InterruptCheckpoint

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """A config of configs/, composed with overrides as on the command line."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def build_data(config: DictConfig) -> InMemoryData:
    """The data module that a composed config describes, with its data read."""
    data: InMemoryData = instantiate(config.data, _convert_="all")
    data.setup()
    return data


def build_task(config: DictConfig) -> Task:
    """The model, as drawn from `config.seed`, and what it is trained for and by."""
    seed_everything(config.seed, verbose=False)
    task: Task = instantiate(
        config.task, model=config.model, optimizer=config.optimizer, schedule=config.get("schedule"), _convert_="all"
    )
    return task


def collect_metrics(folder: Path) -> list[dict[str, str]]:
    """One table of all that the run logged, also across resumes; written to `metrics.csv`.

    Lightning's logger begins a new file whenever a run is resumed. What an earlier one logged beyond the checkpoint
    that the next began from was not part of the run that went on.
    """
    rows: list[dict[str, str]] = []
    parts = sorted(folder.glob("metrics/version_*"), key=lambda part: int(part.name.split("_")[1]))
    for part in parts:
        if (part / "metrics.csv").exists():
            with (part / "metrics.csv").open(newline="") as file:
                new = list(csv.DictReader(file))
            first = min((int(row["step"]) for row in new), default=0)
            rows = [row for row in rows if int(row["step"]) < first] + new
    names = dict.fromkeys(name for row in rows for name in row)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def train(config: DictConfig, callbacks: Sequence[Callback] = ()) -> float | None:
    """Train as the config says, from the start or, where `config.resume` is set, from there.

    Args:
        config: configs/train.yaml, composed.
        callbacks: More of Lightning's callbacks.

    Returns:
        The last validation loss, which Hydra's sweepers can minimise.

    Raises:
        SystemExit: The run was ended by Ctrl-C.
    """
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    task, data = build_task(config), build_data(config)
    checkpoints, console, epochs = folder / "checkpoints", output(), Epochs()
    trainer: Trainer = instantiate(
        config.trainer,
        enable_progress_bar=config.trainer.enable_progress_bar and console.is_terminal,
        logger=[instantiate(logger, _convert_="all") for logger in config.logger.values()],
        callbacks=[
            CurvatureCallback(),
            ModelCheckpoint(checkpoints, "best", monitor="val/loss", save_last=True),
            InterruptCheckpoint(checkpoints),
            epochs,
            *callbacks,
        ],
        plugins=[AtomicCheckpointIO()],
        _convert_="all",
    )
    if trainer.is_global_zero:
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
    start = checkpoint_of(config.resume) if config.resume else None
    try:
        with told(epochs, console):
            trainer.fit(task, datamodule=data, ckpt_path=start, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        print(f"Interrupted. Go on with: scripts/train resume={folder}")
        raise
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # else a sweep's next job would write to the same run
        if trainer.is_global_zero and (metrics := collect_metrics(folder)):
            draw_losses(metrics, folder / "loss.png")
            if any(name.startswith("curvature/") for name in metrics[-1]):
                report(folder)
    loss = trainer.callback_metrics.get("val/loss")
    return None if loss is None else float(loss)


def checkpoint_of(resume: str) -> Path:
    """The checkpoint that `resume` names: a file, or the newest in a run folder.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(resume)
    is_one = path.is_file() or (path / ".metadata").exists()  # the latter: a file of each process
    found = [path] if is_one else sorted(path.glob("checkpoints/*.ckpt"), key=_written)
    if not found:
        raise FileNotFoundError(
            f"resume={resume} must name a checkpoint or a run folder with one: there is none in {path / 'checkpoints'}."
        )
    return found[-1]


def _written(path: Path) -> tuple[float, str]:
    # best.ckpt and last.ckpt may be written in the same tick; of these, last.
    return path.stat().st_mtime, path.name


def run_folder(resume: str | None, new: str) -> str:
    """The folder of the run to go on with, else a new one."""
    return str(checkpoint_of(resume).absolute().parent.parent) if resume else new


def resumed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of the run that `config.resume` names, with single values overridden.

    Raises:
        FileNotFoundError: There is no such run.
        ValueError: An override would make it another run (`optimizer=adamw`).
    """
    stored = Path(run_folder(config.resume, "")) / "config.yaml"
    if not stored.is_file():
        raise FileNotFoundError(f"resume={config.resume} lies in no run folder: there is no {stored}.")
    merged = OmegaConf.load(stored)
    assert isinstance(merged, DictConfig)
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if OmegaConf.is_dict(OmegaConf.select(merged, key)):
            raise ValueError(
                f"{override} cannot be given with resume: the run goes on with its own {key}. Override single values "
                f"({key}.<name>=<value>), or begin a new run."
            )
    changes = OmegaConf.from_dotlist([override.lstrip("+") for override in overrides])
    merged = OmegaConf.merge(merged, changes, {"folder": str(stored.parent)})
    assert isinstance(merged, DictConfig)
    return merged


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> float | None:
    """Train, or go on training."""
    if config.resume:
        config = resumed(config, HydraConfig.get().overrides.task)
    return train(config)


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)

if __name__ == "__main__":
    main()
