"""Lightning's ModelParallelStrategy (FSDP2): two processes that hold half of a model each train it as one does."""

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
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import kfacopt
from kfacopt.experiments.tasks import Regression
from kfacopt.lightning import CurvatureCallback
from tests.lightning.harness import Toy, Trace, network, trainer
from tests.lightning.test_processes import kfac, one_process
from tests.optim.test_fully_shard import whole_weights
from tests.processes import Found, run_together


class Whole(LightningModule):
    """Shards itself; the optimizer is over all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.net(x)
        return prediction

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Optimizer:
        return kfac(self, loss_func=nn.MSELoss())


def sharded(folder: Path | str, *callbacks: Any, apart: bool = True, **arguments: Any) -> Trainer:
    """A trainer in a process that is one of two already."""
    os.environ |= {"LOCAL_RANK": str(distributed.get_rank()), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=apart)
    return trainer(Path(folder), *callbacks, devices=2, strategy=strategy, **arguments)


def fits_are_those_of_one_process() -> None:
    """A task of ours, and a module of a user's that is its own model."""
    want = one_process()
    with tempfile.TemporaryDirectory() as folder:
        for task in (Regression(network(), kfac), Whole()):
            sharded(folder, max_epochs=1).fit(task, datamodule=Toy(batch_size=4))
            torch.testing.assert_close(whole_weights(task), want, rtol=1e-4, atol=1e-5)  # float32


def a_resumed_fit_is_the_uninterrupted_one(apart: bool) -> None:
    """From a checkpoint with a file for each process, or of one file."""
    with tempfile.TemporaryDirectory() as own:
        place: list[Any] = [own]
        distributed.broadcast_object_list(place, src=0)
        folder = Path(place[0])
        made = partial(kfacopt.EKFAC, lr=0.1, factor_every=1, refresh_every=3)
        whole = Regression(network(), made)
        sharded(folder, max_epochs=4).fit(whole, datamodule=Toy())
        half = Regression(network(), made)
        saved = ModelCheckpoint(folder, "half")
        sharded(folder, saved, apart=apart, max_epochs=2).fit(half, datamodule=Toy())
        path = folder / "half.ckpt"
        assert path.is_dir() == apart
        assert not torch.equal(whole_weights(whole), whole_weights(half))
        again = Regression(network(), made)
        fitting = sharded(folder, apart=apart, max_epochs=4)
        fitting.fit(again, datamodule=Toy(), ckpt_path=path, weights_only=True)
        assert torch.equal(whole_weights(again), whole_weights(whole))
        distributed.barrier()


def the_callback_logs_once() -> None:
    with tempfile.TemporaryDirectory() as folder:
        task, log = Regression(network(), kfac), Trace()
        sharded(folder, CurvatureCallback(), max_epochs=1, logger=log).fit(task, datamodule=Toy())
        steps = [step for step, _ in log.series("curvature/damping")]
        assert (len(steps) > 0) == (distributed.get_rank() == 0)


pytestmark = pytest.mark.slow

CHECKS: Mapping[str, Callable[[], None]] = {
    "fits_are_those_of_one_process": fits_are_those_of_one_process,
    "resumed, a file each": partial(a_resumed_fit_is_the_uninterrupted_one, True),
    "resumed, one file": partial(a_resumed_fit_is_the_uninterrupted_one, False),
    "the_callback_logs_once": the_callback_logs_once,
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS, seconds=200.0)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"
