"""Lightning's ddp strategy: two processes train one model, stop, go on and log as one does."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

import kfacopt
from kfacopt.lightning import CurvatureCallback
from tests.lightning.harness import Module, Toy, Trace, adam, hooks, network, regression, trainer, weights
from tests.processes import Found, alone, run_together

kfac = partial(kfacopt.KFAC, lr=0.1, curvature="ggn", factor_every=1, refresh_every=1)


class Whole(LightningModule):
    """Its own forward is called, or a module in it; the optimizer is over all of it."""

    def __init__(self, through_self: bool) -> None:
        super().__init__()
        self.net, self.through_self = network(), through_self

    def forward(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.net(x)
        return prediction

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        prediction = self(batch[0]) if self.through_self else self.net(batch[0])
        return nn.functional.mse_loss(prediction, batch[1])

    def configure_optimizers(self) -> Optimizer:
        return kfac(self, loss_func=nn.MSELoss())


def ddp(folder: Path | str, *callbacks: Any, strategy: Any = "ddp", **arguments: Any) -> Trainer:
    """A trainer in a process that is one of two already."""
    os.environ |= {"LOCAL_RANK": str(distributed.get_rank()), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return trainer(Path(folder), *callbacks, devices=2, strategy=strategy, **arguments)


def one_process() -> Tensor:
    """What an epoch of the same task comes to in one process, with twice the batch, in a plain loop."""
    task = regression(kfac)
    wrapped = nn.parallel.DistributedDataParallel(task.model, process_group=alone())
    made = kfac(wrapped, loss_func=nn.MSELoss())
    for x, y in Toy(batch_size=8).train_dataloader():
        made.zero_grad()
        nn.functional.mse_loss(wrapped(x), y).backward()
        made.step()
    return weights(task.model)


def same_everywhere(tensor: Tensor) -> bool:
    others = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(others, tensor)
    return torch.equal(*others)


def a_fit_is_that_of_one_process() -> None:
    want = one_process()
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("ddp", DDPStrategy(static_graph=True), DDPStrategy(find_unused_parameters=True)):
            task = regression(kfac)
            ddp(folder, strategy=strategy, max_epochs=1).fit(task, datamodule=Toy(batch_size=4))
            assert same_everywhere(weights(task))
            torch.testing.assert_close(weights(task), want, rtol=1e-4, atol=1e-5)  # float32


def the_whole_lightning_module_is_the_model() -> None:
    """Under ddp its forward is the training step, and what that returns is the loss."""
    want = one_process()
    with tempfile.TemporaryDirectory() as folder:
        for through_self in (False, True):
            task = Whole(through_self)
            ddp(folder, max_epochs=1).fit(task, datamodule=Toy(batch_size=4))
            torch.testing.assert_close(weights(task), want, rtol=1e-4, atol=1e-5)


MADE: dict[str, Any] = {
    "ekfac": partial(kfacopt.EKFAC, lr=0.1, factor_every=1, refresh_every=3),
    "kfac-owner": partial(kfacopt.KFAC, lr=0.1, factor_every=1, refresh_every=3, sharding=kfacopt.Sharding(replicas=1)),
}


def a_resumed_fit_is_the_uninterrupted_one(name: str) -> None:
    with tempfile.TemporaryDirectory() as own:
        place: list[Any] = [own]
        distributed.broadcast_object_list(place, src=0)
        folder = Path(place[0])
        whole = regression(MADE[name])
        ddp(folder, max_epochs=4).fit(whole, datamodule=Toy())
        half = regression(MADE[name])
        saved = ModelCheckpoint(folder, "half")
        ddp(folder, saved, max_epochs=2).fit(half, datamodule=Toy())
        assert not torch.equal(weights(whole), weights(half))
        again = regression(MADE[name])
        path = folder / "half.ckpt"
        ddp(folder, max_epochs=4).fit(again, datamodule=Toy(), ckpt_path=path, weights_only=True)
        assert torch.equal(weights(again), weights(whole))
        distributed.barrier()


def the_callback_swaps_and_logs_once() -> None:
    with tempfile.TemporaryDirectory() as folder:
        task, log = Module(adam), Trace()
        callback = CurvatureCallback(optimizer=partial(kfac, loss_func=nn.MSELoss()))
        ddp(folder, callback, max_epochs=1, logger=log).fit(task, datamodule=Toy())
        steps = [step for step, _ in log.series("curvature/damping")]
        assert steps == (sorted(set(steps)) if distributed.get_rank() == 0 else [])
        assert (len(steps) > 0) == (distributed.get_rank() == 0)
        assert same_everywhere(weights(task))
        assert hooks(task) == 0


pytestmark = pytest.mark.slow

CHECKS: Mapping[str, Callable[[], None]] = {
    **{
        check.__name__: check
        for check in (
            a_fit_is_that_of_one_process,
            the_whole_lightning_module_is_the_model,
            the_callback_swaps_and_logs_once,
        )
    },
    **{f"resumed: {name}": partial(a_resumed_fit_is_the_uninterrupted_one, name) for name in MADE},
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"
