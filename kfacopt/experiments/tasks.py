"""What a network is trained for: LightningModules that own loss, likelihood and optimizer."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from kfacopt.likelihoods import Bernoulli, Likelihood

OptimizerFactory = Callable[..., Optimizer]
"""`(model, loss_func=...) -> Optimizer`, e.g. a partial of `kfacopt.EKFAC` or a rival."""

ScheduleFactory = Callable[..., LRScheduler | ReduceLROnPlateau]
"""`(optimizer) -> scheduler`, or `(optimizer, total_steps=...)`, e.g. a partial."""


class Task(LightningModule, ABC):
    """A network, its loss, and the optimizer that a factory builds for them.

    Optimization is Lightning's automatic one; nothing here knows which optimizer it is. Logged are `train/loss` (every
    `log_every_n_steps` steps) and `val/loss` (mean over validation rows).

    Args:
        model: The network; it gets a batch's first tensor.
        optimizer: Builds the optimizer: `optimizer(model, loss_func=loss_func)`.
        schedule: Builds a learning-rate schedule, stepped after every optimizer step: `schedule(optimizer)`; if it has
            an argument `total_steps` that is not yet given, it gets the number of optimizer steps in the run
            (`trainer.estimated_stepping_batches`). A `ReduceLROnPlateau` is stepped after every validation, on
            `val/loss`.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerFactory, schedule: ScheduleFactory | None = None) -> None:
        super().__init__()
        self.model = model
        self.optimizer_factory = optimizer
        self.schedule_factory = schedule

    @property
    @abstractmethod
    def loss_func(self) -> nn.Module | Likelihood:
        """The loss as the optimizer is to read it: a loss module of torch's or a likelihood."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of one batch, differentiable, a mean over the data, no dimensions."""

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy shard the network by `fully_shard`: blocks in a row, and the rest."""
        mesh = self.device_mesh
        if mesh is None or isinstance(self.model, FSDPModule):
            return
        rows = [module for module in self.model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        for block in (block for row in reversed(rows) for block in row if [*block.children()]):
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's prediction."""
        prediction: Tensor = self.model(inputs)
        return prediction

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Loss of a batch, logged as `train/loss`."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Loss of a batch, logged as `val/loss`."""
        loss = self.loss(batch)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and, where there is one, its schedule."""
        optimizer = self.optimizer_factory(self.model, loss_func=self.loss_func)
        if self.schedule_factory is None:
            return optimizer
        scheduler = self._build_schedule(self.schedule_factory, optimizer)
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val/loss"},
        }

    def _build_schedule(self, schedule: ScheduleFactory, optimizer: Optimizer) -> LRScheduler | ReduceLROnPlateau:
        wanted = inspect.signature(schedule).parameters.get("total_steps")
        if wanted is None or wanted.default not in (None, inspect.Parameter.empty):
            return schedule(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "the learning-rate schedule spans the whole run, but the trainer has no limit in steps or epochs: "
                "give the Trainer max_steps or max_epochs, or the schedule total_steps"
            )
        return schedule(optimizer, total_steps=int(steps))


class Autoencoding(Task):
    """Reproduce the input: cross-entropy of every pixel, summed over pixels, mean over the data.

    A batch is a tuple that begins with images, floats in [0, 1], `[n ...]`; the rest is ignored. The network's output,
    shaped as its input, is taken as logits.
    """

    @property
    def loss_func(self) -> Likelihood:
        """Bernoulli pixels with grey targets."""
        return Bernoulli(soft_targets=True)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy in nats per image."""
        images = batch[0]
        logits = self.model(images)
        return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


class Classification(Task):
    """Name the class: cross-entropy. Also logs `val/accuracy`.

    A batch is (inputs, labels): labels int64 `[n]`; the network's output is `[n classes]`.
    """

    @property
    def loss_func(self) -> nn.Module:
        """Cross-entropy, mean over the data."""
        return nn.CrossEntropyLoss()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats per datum."""
        inputs, labels = batch
        return F.cross_entropy(self.model(inputs), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Loss and accuracy of a batch."""
        inputs, labels = batch
        logits = self.model(inputs)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("val/loss", loss, prog_bar=True, batch_size=len(labels), sync_dist=True)
        self.log("val/accuracy", accuracy, prog_bar=True, batch_size=len(labels), sync_dist=True)


class LanguageModeling(Task):
    """Predict each next character: cross-entropy, mean over all characters of the batch.

    A batch is (characters, next characters), both int64 `[n t]`; the network's output is `[n t vocabulary]`.
    """

    @property
    def loss_func(self) -> nn.Module:
        """Cross-entropy, mean over the characters."""
        return nn.CrossEntropyLoss()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy in nats per character."""
        characters, targets = batch
        logits = self.model(characters)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Regression(Task):
    """Predict numbers: mean-squared error.

    A batch is (inputs, targets): targets `[n c]`, as the network's output.
    """

    @property
    def loss_func(self) -> nn.Module:
        """Mean-squared error, mean over data and columns."""
        return nn.MSELoss()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean-squared error."""
        inputs, targets = batch
        return F.mse_loss(self.model(inputs), targets)


class Supervised(Task):
    """Predict targets, as well as any loss of torch's sees it.

    A batch is (inputs, targets), which the loss takes beside the network's output as it is.

    Args:
        model: See `Task`.
        optimizer: See `Task`.
        criterion: The loss, a mean over the data, e.g. `torch.nn.HuberLoss()`.
        schedule: See `Task`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        criterion: nn.Module,
        schedule: ScheduleFactory | None = None,
    ) -> None:
        super().__init__(model, optimizer, schedule)
        self.criterion = criterion

    @property
    def loss_func(self) -> nn.Module:
        """The criterion."""
        return self.criterion

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """What the criterion says."""
        inputs, targets = batch
        loss: Tensor = self.criterion(self.model(inputs), targets)
        return loss


class VariationalAutoencoding(Autoencoding):
    """Reproduce the input from a code that is drawn: the negative evidence lower bound, in nats per image.

    Batches are those of `Autoencoding`. The network keeps the divergence of its last call's codes as `divergence`, see
    `kfacopt.experiments.unseen_models.VariationalAutoencoder`; the loss as the optimizer is to read it is that of the
    pixels.
    """

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross-entropy of the pixels and divergence of the codes."""
        pixels = super().loss(batch)
        divergence: Tensor = self.model.divergence  # type: ignore[assignment]
        return pixels + divergence
