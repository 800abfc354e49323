"""The Lightning callback: curvature in the logs, a swap of optimizers, and no hook left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from kfacopt.lightning.rebind import rebind_schedulers
from kfacopt.optim.capturing import CapturingOptimizer


class CurvatureCallback(Callback):
    """Logs the health of second-order optimizers, and takes their hooks off when a run ends.

    The first way to train with Lightning is to return `kfacopt.EKFAC` (or any other optimizer of kfacopt) from
    `configure_optimizers`, over the LightningModule itself or over a module in it. Nothing else is needed to train;
    this callback adds what `health()` knows, as `curvature/<name>` and `curvature/<name>/<layer>`, to every logger, on
    the steps on which Lightning logs (`log_every_n_steps`), shows some of it in the progress bar, and closes the
    optimizers at the end of the fit or when an exception stops it, so that the model is a plain one again.

    The second way is for a LightningModule that knows nothing of kfacopt: given `optimizer`, the callback replaces what
    `configure_optimizers` returned, before a checkpoint's state is restored. The learning-rate scheduler stays, with
    its class, progress and shape: the learning rate in `optimizer` takes the place of the replaced optimizer's (see
    `kfacopt.lightning.rebind.rebind_schedulers`).

    Sanity check and validation need no pause: an optimizer's capture acts only in a backward pass.

    Args:
        optimizer: Builds the optimizer that replaces the LightningModule's, e.g. a partial of `kfacopt.EKFAC` with all
            but the model. Any torch optimizer will do.
        module: Dotted name of the module within the LightningModule that `optimizer` is called with; default: the
            LightningModule itself.
        progress_bar: Which of `health()`'s numbers to show there.

    Raises:
        ValueError: `optimizer` is to replace more or less than one optimizer, or an optimizer holds parameters that the
            LightningModule does not.
        AttributeError: The LightningModule has no such `module`.
        TypeError: The trainer's strategy shards optimizers, so that they cannot be replaced.

    >>> from functools import partial
    >>> import torch, kfacopt
    >>> callback = CurvatureCallback()
    >>> ekfac = partial(kfacopt.EKFAC, loss_func=torch.nn.CrossEntropyLoss())
    >>> swapping = CurvatureCallback(optimizer=ekfac, module="network")
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] | None = None,
        module: str = "",
        progress_bar: Sequence[str] = ("damping", "kl", "overhead"),
    ) -> None:
        super().__init__()
        self.optimizer_factory = optimizer
        self.module = module
        self.progress_bar = tuple(progress_bar)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the optimizer if asked to, and check whose parameters the optimizers hold."""
        # Lightning has configured the optimizers by now, on the model's final device, and restores their state from a
        # checkpoint next.
        if self.optimizer_factory is not None:
            self._replace_optimizer(trainer, pl_module, self.optimizer_factory)
        own = {id(parameter) for parameter in pl_module.parameters()}
        for optimizer in second_order_optimizers(trainer):
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            strange = sum(id(parameter) not in own for parameter in held)
            if strange:
                raise ValueError(
                    f"{strange} of the {len(held)} parameters of {type(optimizer).__name__} are not those of "
                    f"{type(pl_module).__name__}, so training would not move it: build the optimizer in "
                    "configure_optimizers, over the LightningModule or a module that is part of it, not over a copy"
                )

    def _replace_optimizer(
        self, trainer: Trainer, pl_module: LightningModule, optimizer_factory: Callable[..., Optimizer]
    ) -> None:
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise TypeError(
                f"CurvatureCallback(optimizer=...) cannot replace an optimizer of {type(trainer.strategy).__name__}, "
                "which has already taken it over: return the optimizer from configure_optimizers instead"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(
                "CurvatureCallback(optimizer=...) replaces the one optimizer of a LightningModule, but "
                f"configure_optimizers of {type(pl_module).__name__} returned {len(trainer.optimizers)}: build them "
                "there instead"
            )
        (old,) = trainer.optimizers
        new = optimizer_factory(pl_module.get_submodule(self.module))
        configs = trainer.lr_scheduler_configs
        try:
            schedulers = rebind_schedulers([config.scheduler for config in configs], old, new)
        except ValueError:
            close(new)
            raise
        for config, scheduler in zip(configs, schedulers, strict=True):
            config.scheduler = scheduler
        close(old)
        # Only now, and through the setter: it makes the wrappers that Lightning steps.
        trainer.optimizers = [new]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the optimizers' health on the steps on which Lightning logs."""
        # Asked first, and only then the optimizers: their health may cost a device synchronization. All processes have
        # the same health, and it asks none of the others.
        if trainer.barebones or not trainer.is_global_zero or not trainer._logger_connector.should_update_logs:
            return
        optimizers = second_order_optimizers(trainer)
        for number, optimizer in enumerate(optimizers):
            place = f"{number}/" if len(optimizers) > 1 else ""
            health = optimizer.health()
            pl_module.log_dict(
                {f"curvature/{place}{name}": value for name, value in health.items()},
                on_step=True,
                on_epoch=False,
                rank_zero_only=True,
            )
            pl_module.log_dict(
                {place + name: health[name] for name in self.progress_bar if name in health},
                on_step=True,
                on_epoch=False,
                prog_bar=True,
                logger=False,
                rank_zero_only=True,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off at the end of a fit."""
        if stage == "fit":
            self._close_all(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off when an exception stops the fit."""
        self._close_all(trainer)

    def _close_all(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            close(optimizer)


def second_order_optimizers(trainer: Trainer) -> list[CapturingOptimizer]:
    """The trainer's optimizers that are kfacopt's, without Lightning's wrapping.

    Args:
        trainer: One whose optimizers are configured, else there are none.
    """
    optimizers = [_unwrapped(optimizer) for optimizer in trainer.optimizers]
    return [optimizer for optimizer in optimizers if isinstance(optimizer, CapturingOptimizer)]


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    # `configure_optimizers` may return Lightning's wrapper, which imitates the class it wraps.
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def close(optimizer: Optimizer) -> None:
    """Remove an optimizer's hooks if it is a kfacopt optimizer."""
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, CapturingOptimizer):
        optimizer.close()
