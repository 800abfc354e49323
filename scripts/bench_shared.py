"""Prints what two processes that share the curvature's work take, over each of them doing all of it.

    scripts/bench shared [--width 512] [--layers 8] [--turns 20] [--every 1] [--optimizer kfac] [--natural]

Two gloo processes on this machine. A turn of each way after the other: a backward, and a step that updates statistics,
refreshes all layers (neither with `--every 1000`) and moves them. Medians over the turns of the slower process, by the
clock, and the seconds of processor time of both together; ratios are to "alone", of which nothing is shared or sent.
"whole" gathers all momentum in both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from progress import output
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfacopt

OPTIMIZERS: dict[str, Any] = {"kfac": kfacopt.KFAC, "ekfac": kfacopt.EKFAC, "spectral": kfacopt.SpectralDescent}
Times = dict[str, list[list[float]]]
"""By way, for each turn the seconds of refresh and step by the clock, and of both by processor time."""


class Whole(kfacopt.Direction):
    """A direction that does not go by layers: all processes gather all momentum.

    Args:
        direction: What it does with that.
    """

    def __init__(self, direction: kfacopt.Direction) -> None:
        self.direction, self.plain_treatment = direction, direction.plain_treatment

    def defaults(self) -> dict[str, float]:
        """The other's."""
        return self.direction.defaults()

    def refusal(self, layer: Any) -> str | None:
        """The other's."""
        return self.direction.refusal(layer)

    def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
        """The other's."""
        return self.direction.updates(step)


class Way:
    """One way to train the same model.

    Args:
        options: Of the command.
        wrapped: Puts an engine around the model.
        whole: Whether all momentum is gathered.
        sharding: As optimizers take it.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        wrapped: Callable[[nn.Module], nn.Module],
        whole: bool = False,
        sharding: kfacopt.Sharding | None = None,
    ) -> None:
        torch.manual_seed(0)
        hidden = [nn.Sequential(nn.Linear(options.width, options.width), nn.Tanh()) for _ in range(options.layers)]
        self.model = wrapped(nn.Sequential(*hidden))
        given: dict[str, Any] = {"kl_clip": 0.03} if options.natural else {}
        kind = OPTIMIZERS[options.optimizer]
        given |= {"factor_every": options.every, "refresh_every": options.every, "sharding": sharding}
        self.made = kind(self.model, nn.MSELoss(), **given)
        if whole:
            self.made.direction = Whole(self.made.direction)
        self._refresh = self.made.backend.refresh
        self.made.backend.refresh = self._timed
        self._took = [0.0, 0.0]

    def _timed(self, *arguments: Any) -> None:
        began = time.perf_counter(), time.process_time()
        self._refresh(*arguments)
        self._took = [time.perf_counter() - began[0], time.process_time() - began[1]]

    def turn(self, x: Tensor) -> list[float]:
        """A backward and a step; what refresh and step took, by the clock and of the processor."""
        self.made.zero_grad()
        nn.functional.mse_loss(self.model(x), x.sin()).backward()
        distributed.barrier()
        began = time.perf_counter(), time.process_time()
        self.made.step()
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        return [self._took[0], took[0], self._took[1], took[1]]


def sharded(model: Any) -> Any:
    """By layers."""
    for layer in model.children():
        fully_shard(layer)
    return fully_shard(model)


def measured(options: argparse.Namespace) -> Times:
    """What each way takes in this process, one of several; the first turn warms up."""
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    alone, everybody = groups[distributed.get_rank()], kfacopt.Sharding(replicas=None)
    least = kfacopt.Sharding(statistics="holders")
    ways = {
        "alone": Way(options, lambda model: DistributedDataParallel(model, process_group=alone)),
        "DDP": Way(options, DistributedDataParallel),
        "DDP, all hold all": Way(options, DistributedDataParallel, sharding=everybody),
        "DDP, least memory": Way(options, DistributedDataParallel, sharding=least),
        "fully_shard": Way(options, sharded),
        "fully_shard, all hold all": Way(options, sharded, sharding=everybody),
        "fully_shard, all, whole": Way(options, sharded, whole=True, sharding=everybody),
    }
    found: Times = {name: [] for name in ways}
    generator = torch.Generator().manual_seed(distributed.get_rank())
    for number in range(1 + options.turns):
        x = torch.randn(64, options.width, generator=generator)
        for name, way in ways.items():
            took = way.turn(x)
            found[name] += [took] if number else []
    return found


def _work(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(measured(options), Path(folder) / str(rank))
    distributed.barrier()
    os._exit(0)  # gloo's threads may abort within Python's own end


def run(options: argparse.Namespace, world: int = 2) -> list[Times]:
    """`measured` in new processes, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        work = [
            get_context("spawn").Process(target=_work, args=(rank, world, folder, options)) for rank in range(world)
        ]
        for process in work:
            process.start()
        for process in work:
            process.join()
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world)]


def table(found: list[Times]) -> Table:
    """Milliseconds, and ratios to "alone"."""
    result = Table("way", "refresh, ms", "ratio", "step, ms", "ratio", "processor: refresh", "step", box=None)
    first: list[float] = []
    for name in found[0]:
        turns = list(zip(*(of_rank[name] for of_rank in found), strict=True))
        clocks = [statistics.median(max(rank[kind] for rank in turn) for turn in turns) for kind in (0, 1)]
        spent = [statistics.median(sum(rank[kind] for rank in turn) for turn in turns) for kind in (2, 3)]
        first = first or [*clocks, *spent]
        ratios = [f"{now / then:.2f}" for now, then in zip((*clocks, *spent), first, strict=True)]
        refresh, step = (f"{1e3 * seconds:.1f}" for seconds in clocks)
        result.add_row(name, refresh, ratios[0], step, ratios[1], ratios[2], ratios[3])
    return result


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--width", type=int, default=512, help="of each layer")
    found.add_argument("--layers", type=int, default=8, help="how many")
    found.add_argument("--every", type=int, default=1, help="steps between two updates of statistics, and refreshes")
    found.add_argument("--turns", type=int, default=20, help="of each way")
    found.add_argument("--optimizer", choices=list(OPTIMIZERS), default="kfac", help="which")
    found.add_argument("--natural", action="store_true", help="the natural gradient, in place of the spectral step")
    return found


def main() -> None:
    """Print the table."""
    output().print(table(run(parser().parse_args())))


if __name__ == "__main__":
    main()
