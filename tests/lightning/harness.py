"""What the Lightning tests share: small data and tasks, a quiet trainer, a logger to compare."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import TensorDataset

import kfacopt
from kfacopt.experiments.batches import Rows
from kfacopt.experiments.in_memory import InMemoryData
from kfacopt.experiments.tasks import Regression

ekfac = partial(kfacopt.EKFAC, lr=0.1, damping=0.1, factor_every=2, refresh_every=3, kl_clip=0.03)


mean_squared = partial(ekfac, loss_func=nn.MSELoss())


class Toy(InMemoryData):
    """24 rows to train on and 10 to validate on, of a noisy linear map from 3 numbers to 2."""

    def __init__(self, batch_size: int = 4, **arguments: Any) -> None:
        super().__init__(batch_size, **arguments)

    def load(self) -> tuple[Rows, Rows]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(34, 3, generator=generator)
        targets = inputs[:, :2] - inputs[:, 1:] + 0.1 * torch.randn(34, 2, generator=generator)
        return TensorDataset(inputs[:24], targets[:24]), TensorDataset(inputs[24:], targets[24:])


def network(dropout: float = 0.0) -> nn.Sequential:
    """Always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(6), nn.Linear(6, 2))


def regression(
    optimizer: Callable[..., torch.optim.Optimizer] = ekfac, dropout: float = 0.0, **arguments: Any
) -> Regression:
    return Regression(network(dropout), optimizer, **arguments)


class Trace(Logger):
    """Keeps what is logged, in memory."""

    name = "trace"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        pass

    def series(self, name: str) -> list[tuple[int | None, float]]:
        return [(step, metrics[name]) for step, metrics in self.rows if name in metrics]


class RaiseSignal(Callback):
    """Sends this process a signal in the middle of a training batch, counted over the whole run."""

    def __init__(self, batch: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.batch = batch
        self.number = number
        self.times = times

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def trainer(tmp_path: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    """A trainer that says nothing, on one CPU process."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": Trace(),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "default_root_dir": tmp_path,
    }
    return Trainer(callbacks=list(callbacks), **defaults | arguments)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def hooks(module: nn.Module) -> int:
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks) for part in module.modules()
    )


class Module(LightningModule):
    """A LightningModule of a user's, whose own `forward` is never called."""

    def __init__(self, configure: Callable[[Any], OptimizerLRScheduler]) -> None:
        super().__init__()
        self.net = network()
        self.configure = configure

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs, targets = batch
        loss = F.mse_loss(self.net(inputs), targets)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        inputs, targets = batch
        self.log("val/loss", F.mse_loss(self.net(inputs), targets))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.configure(self)


def adam(module: LightningModule) -> Adam:
    return Adam(module.parameters(), lr=1e-3)


def over_itself(module: LightningModule) -> Optimizer:
    return mean_squared(module)


def fit(module: LightningModule, folder: Path, *callbacks: Callback, **arguments: Any) -> tuple[Trainer, Tensor]:
    torch.manual_seed(0)
    fitted = trainer(folder, *callbacks, **arguments)
    fitted.fit(module, Toy())
    return fitted, weights(module)


def by_hand(steps: int = 18, accumulate: int = 1, clip: float | None = None) -> Tensor:
    """The same training in a plain loop."""
    model, data = network(), Toy()
    optimizer = mean_squared(model)
    batches = data.train_dataloader()
    done, number = 0, 0
    while done < steps:
        for inputs, targets in batches:
            number += 1
            (F.mse_loss(model(inputs), targets) / accumulate).backward()
            if number % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
    optimizer.close()
    return weights(model)
