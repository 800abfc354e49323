"""A training by Lightning for `tests/kills.py`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from kfacopt.experiments.learning_rates import linear_decay
from kfacopt.lightning import AtomicCheckpointIO, CurvatureCallback, InterruptCheckpoint
from tests.kills import FILE
from tests.lightning.harness import Toy, regression, trainer


class Curve(Callback):
    """The losses of all steps so far, kept in every checkpoint; stops the run after so many."""

    state_key = "Curve"

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop = len(self.losses) >= self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = state_dict["losses"]


def lightning(folder: Path, steps: int) -> None:
    """A checkpoint after each step, by Lightning's own callback."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(5)
    task = regression(dropout=0.3, schedule=linear_decay)
    each = ModelCheckpoint(folder, Path(FILE).stem, every_n_train_steps=1, save_top_k=1, enable_version_counter=False)
    fitted = trainer(
        folder.parent,
        *(each, InterruptCheckpoint(folder), CurvatureCallback(), Curve(steps)),
        max_epochs=-1,
        max_steps=10_000,  # by which the rate is zero
        limit_val_batches=0,
        plugins=[AtomicCheckpointIO()],
    )
    start = str(folder / FILE) if (folder / FILE).exists() else None
    fitted.fit(task, Toy(), ckpt_path=start, weights_only=True)
