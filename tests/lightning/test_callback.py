"""The curvature callback, under everything that Lightning's automatic optimization can do."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

import kfacopt
from kfacopt.experiments.rivals import muon
from kfacopt.lightning import CurvatureCallback
from kfacopt.lightning.callback import second_order_optimizers
from tests.lightning.harness import (
    Module,
    Toy,
    Trace,
    adam,
    by_hand,
    fit,
    hooks,
    mean_squared,
    network,
    over_itself,
    regression,
    weights,
)


class Validated(Module):
    """Validates with gradients on, which Lightning does not by itself."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            inputs, targets = batch
            self.log("val/loss", F.mse_loss(self.net(inputs), targets))


# --- training is what it is without Lightning --------------------------------------------------


@pytest.mark.parametrize(
    "configure",
    [
        over_itself,
        lambda module: mean_squared(module.net),
        lambda module: LightningOptimizer(mean_squared(module)),
        lambda module: {"optimizer": mean_squared(module)},
    ],
    ids=["self", "inner", "wrapped", "dict"],
)
def test_trains_as_a_plain_loop_does(tmp_path: Path, configure: Callable[[Any], OptimizerLRScheduler]) -> None:
    _, found = fit(Module(configure), tmp_path, CurvatureCallback())
    assert torch.equal(found, by_hand())


def test_a_loss_that_is_a_module_of_the_module_is_not_its_network(tmp_path: Path) -> None:
    class WithCriterion(Module):
        def __init__(self) -> None:
            super().__init__(over_itself)
            self.criterion = nn.MSELoss()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
            inputs, targets = batch
            loss: Tensor = self.criterion(self.net(inputs), targets)
            return loss

    _, found = fit(WithCriterion(), tmp_path, CurvatureCallback())
    assert torch.equal(found, by_hand())


def test_accumulation_needs_no_flag(tmp_path: Path) -> None:
    fitted, found = fit(Module(over_itself), tmp_path, CurvatureCallback(), accumulate_grad_batches=2)
    assert fitted.global_step == 9
    assert len(fitted.logger.series("curvature/kl")) == 9
    torch.testing.assert_close(found, by_hand(9, accumulate=2))


def test_clipping_acts_before_the_step(tmp_path: Path) -> None:
    _, found = fit(Module(over_itself), tmp_path, CurvatureCallback(), gradient_clip_val=0.1)
    torch.testing.assert_close(found, by_hand(clip=0.1))
    assert not torch.allclose(found, by_hand())


def test_bfloat16_keeps_statistics_in_float32(tmp_path: Path) -> None:
    fitted, found = fit(Module(over_itself), tmp_path, CurvatureCallback(), precision="bf16-mixed")
    assert found.isfinite().all()
    assert not torch.equal(found, weights(network()))
    (optimizer,) = second_order_optimizers(fitted)
    held: list[Tensor] = []

    def collect(part: Any) -> None:
        if isinstance(part, Tensor):
            held.append(part)
        elif isinstance(part, dict):
            collect(list(part.values()))
        elif isinstance(part, (list, tuple)):
            for inner in part:
                collect(inner)

    collect(optimizer.state_dict()["curvature"]["backend"])
    assert {part.dtype for part in held if part.is_floating_point()} == {torch.float32}


def test_validation_costs_nothing_and_changes_nothing(tmp_path: Path) -> None:
    updates: list[str] = []

    class Count(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            (optimizer,) = second_order_optimizers(trainer)
            update = optimizer.backend.update

            def counted(*arguments: Any, **named: Any) -> Any:
                updates.append(str(trainer.state.stage))
                return update(*arguments, **named)

            optimizer.backend.update = counted  # type: ignore[method-assign]
            optimizer._attach()

    module = Validated(over_itself)
    _, found = fit(module, tmp_path, CurvatureCallback(), Count(), val_check_interval=1)
    assert torch.equal(found, by_hand())
    assert set(updates) == {"RunningStage.TRAINING"}


# --- what is logged ----------------------------------------------------------------------------


def test_health_is_logged_when_lightning_logs(tmp_path: Path) -> None:
    fitted, _ = fit(Module(over_itself), tmp_path, CurvatureCallback(), log_every_n_steps=4)
    steps = [step for step, _ in fitted.logger.series("train/loss")]
    assert steps == [3, 7, 11, 15]
    (optimizer,) = second_order_optimizers(fitted)
    for name in optimizer.health():
        assert [step for step, _ in fitted.logger.series(f"curvature/{name}")] == steps
    assert {"damping", "kl", "condition", "staleness", "refresh_ms"} <= set(optimizer.health())
    # One row holds the loss and the curvature of a step.
    assert all("curvature/kl" in row for _, row in fitted.logger.rows if "train/loss" in row)
    assert not any("damping" in row for _, row in fitted.logger.rows)


def test_some_of_it_is_shown_in_the_progress_bar(tmp_path: Path) -> None:
    shown: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            shown.append(dict(trainer.progress_bar_metrics))

    fit(Module(over_itself), tmp_path, CurvatureCallback(), Watch(), log_every_n_steps=2)
    assert {"damping", "kl", "overhead"} <= set(shown[-1])
    # Between the steps that are logged, the last numbers stay.
    assert {"damping", "kl", "overhead"} <= set(shown[-2])
    assert not any(name.startswith("curvature") for name in shown[-1])
    shown.clear()
    fit(Module(over_itself), tmp_path, CurvatureCallback(progress_bar=["condition"]), Watch())
    assert set(shown[-1]) == {"condition"}


def test_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Module(over_itself), tmp_path, CurvatureCallback())
    assert capsys.readouterr().out == ""


def test_csv_and_wandb_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_SILENT", "true")
    table, online = CSVLogger(tmp_path), WandbLogger(save_dir=tmp_path)
    seen: list[dict[str, float]] = []
    log = online.log_metrics

    def watched(metrics: dict[str, float], step: int | None = None) -> None:
        seen.append(dict(metrics))
        log(metrics, step)

    monkeypatch.setattr(online, "log_metrics", watched)
    fit(Module(over_itself), tmp_path, CurvatureCallback(), logger=[table, online])
    with open(Path(table.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    seen = [metrics for metrics in seen if "train/loss" in metrics]
    assert len(rows) == len(seen) == 18
    for row, metrics in zip(rows, seen, strict=True):
        assert float(row["curvature/kl"]) == pytest.approx(metrics["curvature/kl"])


@pytest.mark.parametrize("arguments", [{"logger": False}, {"barebones": True}])
def test_needs_no_logger(tmp_path: Path, arguments: dict[str, Any]) -> None:
    if "barebones" in arguments:
        barebones = {"logger": None, "log_every_n_steps": None, "default_root_dir": None}
        arguments = arguments | barebones | {"num_sanity_val_steps": None}
        module: LightningModule = Module(over_itself)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
    else:
        module = Module(over_itself)
    _, found = fit(module, tmp_path, CurvatureCallback(), **arguments)
    assert torch.equal(found, by_hand())


def test_rivals_are_left_alone(tmp_path: Path) -> None:
    fitted, _ = fit(regression(partial(muon, lr=0.01)), tmp_path, CurvatureCallback())
    assert not any("curvature" in name for _, row in fitted.logger.rows for name in row)


# --- no hook is left ---------------------------------------------------------------------------


class Fail(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *arguments: Any) -> None:
        raise ArithmeticError("as told")


def test_hooks_are_there_in_a_fit_and_gone_after_it(tmp_path: Path) -> None:
    counts: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
            counts.append(hooks(pl_module))

    module = Module(over_itself)
    fit(module, tmp_path, CurvatureCallback(), Watch())
    assert len(set(counts)) == 1
    assert counts[0] > 0
    assert hooks(module) == 0
    copy.deepcopy(module.net)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_before_optimizer_step"])
@pytest.mark.parametrize("optimizer", [None, mean_squared], ids=["own", "swapped"])
def test_an_exception_leaves_no_hook(tmp_path: Path, hook: str, optimizer: Callable[..., Optimizer] | None) -> None:
    module = Module(adam if optimizer else over_itself)
    for order in (0, 1):
        callbacks = [CurvatureCallback(optimizer), Fail(hook)]
        with pytest.raises(ArithmeticError, match="as told"):
            fit(module, tmp_path, *(callbacks[::-1] if order else callbacks))
        assert hooks(module) == 0


def test_other_runs_of_the_trainer_are_left_alone(tmp_path: Path) -> None:
    module = Validated(over_itself)
    fitted, _ = fit(module, tmp_path, CurvatureCallback(mean_squared))
    fitted.validate(module, Toy(), verbose=False)
    assert hooks(module) == 0


# --- what is refused, and more than one optimizer -----------------------------------------------


def test_optimizers_of_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8 of the 8? ?parameters|not those of Module"):
        fit(Module(lambda module: mean_squared(network())), tmp_path, CurvatureCallback())


def test_manual_optimization_with_two_optimizers_is_logged_by_number(tmp_path: Path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__(lambda module: [mean_squared(module.net), mean_squared(module.other)])
            self.other = network()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
            inputs, targets = batch
            for model, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.mse_loss(model(inputs), targets))
                optimizer.step()

    module = Two()
    fitted, _ = fit(module, tmp_path, CurvatureCallback())
    assert torch.equal(weights(module.net), by_hand())
    for number in (0, 1):
        assert len(fitted.logger.series(f"curvature/{number}/kl")) == 18
    assert isinstance(fitted.logger, Trace)


@pytest.mark.parametrize("make", [kfacopt.NaturalGradient, kfacopt.TrustRegionNewton])
def test_every_optimizer_is_logged_and_closed(make: Any, tmp_path: Path) -> None:
    class Plain(Module):
        def __init__(self) -> None:
            super().__init__(lambda module: make(module.net, nn.MSELoss()))
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    module, trace = Plain(), Trace()
    fit(module, tmp_path, CurvatureCallback(), logger=trace)
    logged = "curvature/damping" if make is kfacopt.NaturalGradient else "curvature/radius"
    assert len(trace.series(logged)) == 18
    assert hooks(module) == 0
