"""The tasks: their losses, the optimizers they build, and every one trained for an epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

import kfacopt
from kfacopt.experiments.batches import Rows
from kfacopt.experiments.in_memory import InMemoryData
from kfacopt.experiments.learning_rates import cosine_decay
from kfacopt.experiments.models import CharacterTransformer, DeepAutoencoder, SmallResNet, TabularMLP
from kfacopt.experiments.rivals import adamw, muon, sgd
from kfacopt.experiments.tasks import (
    Autoencoding,
    Classification,
    LanguageModeling,
    Regression,
    Task,
)
from tests.lightning.harness import Toy, regression, trainer, weights


class Random(InMemoryData):
    """Rows of noise."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(batch_size=4)
        self.tensors = tensors

    def load(self) -> tuple[Rows, Rows]:
        return TensorDataset(*self.tensors), TensorDataset(*(part[:6] for part in self.tensors))


def cases() -> dict[str, tuple[type[Task], Callable[[], nn.Module], tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (16,), generator=generator)
    characters = torch.randint(0, 9, (16, 6), generator=generator)
    return {
        "autoencoding": (
            Autoencoding,
            lambda: DeepAutoencoder(input_size=8, hidden=(6,), code=3),
            (torch.rand(16, 8, generator=generator), labels),
        ),
        "classification": (
            Classification,
            lambda: SmallResNet(classes=3, widths=(2, 4)),
            (torch.rand(16, 1, 6, 6, generator=generator), labels),
        ),
        "language": (
            LanguageModeling,
            lambda: CharacterTransformer(9, context=6, width=8, layers=1, heads=2),
            (characters, characters.roll(-1, 1)),
        ),
        "regression": (
            Regression,
            lambda: TabularMLP(input_size=4, hidden=(5,)),
            (
                torch.randn(16, 4, generator=generator),
                torch.randn(16, 1, generator=generator),
            ),
        ),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize(
    "optimizer",
    [adamw, sgd, muon, partial(kfacopt.KFAC, damping=1.0), partial(kfacopt.EKFAC, damping=1.0)],
    ids=["adamw", "sgd", "muon", "kfac", "ekfac"],
)
def test_every_optimizer_trains_every_task(tmp_path: Path, name: str, optimizer: Callable[..., Optimizer]) -> None:
    task_type, model, tensors = cases()[name]
    task = task_type(model(), partial(optimizer, lr=0.01))
    before = weights(task)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(task, Random(*tensors))
    losses = [loss for _, loss in run.logger.series("train/loss")]
    assert len(losses) == 8
    assert all(torch.tensor(losses).isfinite())
    assert len(run.logger.series("val/loss")) == 2
    assert not torch.equal(weights(task), before)
    if name == "classification":
        assert all(0.0 <= value <= 1.0 for _, value in run.logger.series("val/accuracy"))


def test_losses_are_means_over_the_data() -> None:
    for task_type, model, tensors in cases().values():
        task = task_type(model().eval(), adamw)
        doubled = tuple(torch.cat([part, part]) for part in tensors)
        torch.testing.assert_close(task.loss(doubled), task.loss(tensors))
        assert task(tensors[0]).shape[0] == 16


def test_losses_are_those_that_the_likelihood_reads() -> None:
    for task_type, model, (inputs, targets) in cases().values():
        task = task_type(model(), adamw)
        prediction, loss_func = task.model(inputs), task.loss_func
        if isinstance(loss_func, nn.CrossEntropyLoss) and prediction.ndim == 3:
            expected = loss_func(prediction.transpose(1, 2), targets)
        elif isinstance(loss_func, nn.Module):
            expected = loss_func(prediction, targets)
        else:
            assert isinstance(loss_func, kfacopt.Bernoulli)
            expected = F.binary_cross_entropy_with_logits(prediction, inputs) * inputs.shape[1]
        torch.testing.assert_close(task.loss((inputs, targets)), expected)


def test_autoencoding_takes_images_with_axes_and_nothing_else() -> None:
    task = Autoencoding(nn.Conv2d(1, 1, 3, padding=1), adamw)
    images = torch.rand(5, 1, 4, 4)
    expected = F.binary_cross_entropy_with_logits(task.model(images), images) * 16
    torch.testing.assert_close(task.loss((images,)), expected)


def test_factories_get_the_network_and_its_loss() -> None:
    given: list[tuple[Any, Any]] = []

    def factory(model: nn.Module, loss_func: Any = None) -> Optimizer:
        given.append((model, loss_func))
        return SGD(model.parameters(), 0.1)

    task = regression(factory)
    assert isinstance(task.configure_optimizers(), SGD)
    ((model, loss_func),) = given
    assert model is task.model
    assert isinstance(loss_func, nn.MSELoss)


def fit_with(schedule: Any, tmp_path: Path, **arguments: Any) -> tuple[OptimizerLRScheduler, Any]:
    task = regression(partial(sgd, lr=0.1), schedule=schedule)
    run = trainer(tmp_path, **arguments)
    run.fit(task, Toy())
    return run.lr_scheduler_configs[0], run


def test_a_schedule_spans_the_run(tmp_path: Path) -> None:
    config, run = fit_with(partial(cosine_decay, floor=0.5), tmp_path, accumulate_grad_batches=2)
    assert isinstance(config.scheduler, LambdaLR)
    assert run.global_step == config.scheduler.last_epoch == 9
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_schedule_of_torchs_steps_after_every_optimizer_step(tmp_path: Path) -> None:
    _, run = fit_with(partial(StepLR, step_size=9, gamma=0.1), tmp_path)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_total_steps_may_be_given(tmp_path: Path) -> None:
    _, run = fit_with(partial(cosine_decay, total_steps=18), tmp_path, max_epochs=2)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_plateau_schedule_watches_validation(tmp_path: Path) -> None:
    config, run = fit_with(partial(ReduceLROnPlateau, patience=0, threshold=1e9), tmp_path)
    assert config.interval == "epoch"
    assert config.monitor == "val/loss"
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_a_schedule_over_a_run_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps or max_epochs"):
        fit_with(cosine_decay, tmp_path, max_epochs=-1, max_time="00:00:00:05")
