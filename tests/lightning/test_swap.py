"""The callback puts a second-order optimizer into a LightningModule that knows nothing of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import kfacopt
from kfacopt.experiments.rivals import muon
from kfacopt.lightning import CurvatureCallback
from tests.lightning.harness import (
    Module,
    Toy,
    adam,
    by_hand,
    fit,
    hooks,
    mean_squared,
    over_itself,
    trainer,
    weights,
)


@pytest.mark.parametrize("module", ["", "net"])
def test_a_swapped_optimizer_trains_as_an_own_one(tmp_path: Path, module: str) -> None:
    swap = CurvatureCallback(optimizer=mean_squared, module=module)
    fitted, found = fit(Module(adam), tmp_path, swap)
    assert torch.equal(found, by_hand())
    assert len(fitted.logger.series("curvature/kl")) == 18
    assert isinstance(fitted.lightning_module.optimizers(), kfacopt.EKFAC)


def scheduled(module: LightningModule) -> OptimizerLRScheduler:
    optimizer = adam(module)
    scheduler = {"scheduler": ExponentialLR(optimizer, 0.8), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def test_a_schedule_stays_and_drives_the_new_optimizer(tmp_path: Path) -> None:
    fitted, found = fit(Module(scheduled), tmp_path, CurvatureCallback(mean_squared))
    (optimizer,) = fitted.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8**18)
    assert fitted.lr_scheduler_configs[0].scheduler.optimizer is optimizer

    def own(module: LightningModule) -> OptimizerLRScheduler:
        optimizer = over_itself(module)
        scheduler = {"scheduler": ExponentialLR(optimizer, 0.8), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    _, expected = fit(Module(own), tmp_path, CurvatureCallback())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("step", [3, 6, 10])
def test_a_swapped_optimizer_resumes_exactly(tmp_path: Path, step: int) -> None:
    def build() -> tuple[Trainer, LightningModule]:
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
        fitted = trainer(tmp_path, CurvatureCallback(mean_squared), every)
        return fitted, Module(scheduled)

    whole, module = build()
    whole.fit(module, Toy())
    path = tmp_path / f"step={step}.ckpt"
    assert "curvature" in torch.load(path, weights_only=True)["optimizer_states"][0]
    resumed, other = build()
    resumed.fit(other, Toy(), ckpt_path=path, weights_only=True)
    for name in ("train/loss", "curvature/kl", "curvature/condition", "curvature/staleness"):
        assert resumed.logger.series(name) == whole.logger.series(name)[step:]
    assert torch.equal(weights(other), weights(module))


def test_any_optimizer_can_be_swapped_in(tmp_path: Path) -> None:
    fitted, _ = fit(Module(scheduled), tmp_path, CurvatureCallback(partial(muon, lr=0.5)))
    rates = [group["lr"] / 0.8**18 for group in fitted.optimizers[0].param_groups]
    assert rates == pytest.approx([0.5, 1e-3])


def test_a_kfacopt_optimizer_that_is_swapped_out_lets_go(tmp_path: Path) -> None:
    module = Module(lambda module: kfacopt.KFAC(module, nn.MSELoss(), kl_clip=0.03))
    _, found = fit(module, tmp_path, CurvatureCallback(mean_squared))
    assert torch.equal(found, by_hand())
    assert hooks(module) == 0


def test_what_cannot_be_swapped_is_refused(tmp_path: Path) -> None:
    def two(module: LightningModule) -> list[Optimizer]:
        module.automatic_optimization = False
        return [adam(module), adam(module)]

    with pytest.raises(ValueError, match="Module returned 2"):
        fit(Module(two), tmp_path, CurvatureCallback(mean_squared))
    with pytest.raises(AttributeError, match="nothing"):
        fit(Module(adam), tmp_path, CurvatureCallback(mean_squared, module="nothing"))

    def groups(module: LightningModule) -> OptimizerLRScheduler:
        optimizer = Adam([{"params": [p], "lr": 0.1**place} for place, p in enumerate(module.parameters())])
        return {"optimizer": optimizer, "lr_scheduler": ExponentialLR(optimizer, 0.5)}

    module = Module(groups)
    with pytest.raises(ValueError, match="which follows which"):
        fit(module, tmp_path, CurvatureCallback(mean_squared))
    assert hooks(module) == 0
