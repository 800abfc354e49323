"""Prints what curvature operators cost, in gradients of the same model on the same mini-batch.

    scripts/environment chrt -r 1 python scripts/bench_operators.py [--seconds 8] [--only KFAC]
    scripts/bench operators --growth growth.png [--largest 1e7]
    scripts/bench operators --floor --threads 1

The first way measures construction and one product, of ours and of curvlinops if it is installed. Gradient, ours and
theirs take turns, so that noise of the machine hits all alike; the table gives medians. The second measures time and
memory of matrix-free products while the parameters grow, prints them and draws them. The third counts the products
that EKFAC of the MLP cannot do without and measures how fast they and its eigendecompositions can be.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from floor import floor_table, measured
from progress import counted, output
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kfacopt import operators

Action = Callable[[], object]


@dataclass(frozen=True)
class Problem:
    """A model with one mini-batch of random data.

    Attributes:
        name: What the table shows.
        model: Makes the model.
        shape: Of one datum.
        batch_size: Data in the mini-batch.
        classes: Outputs of the model.
    """

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    classes: int = 10

    def make(self) -> Instance:
        """The same for every call."""
        torch.manual_seed(0)
        model = self.model()
        y = torch.randint(self.classes, (self.batch_size,))
        return Instance(model, torch.rand(self.batch_size, *self.shape), y)


@dataclass(frozen=True)
class Instance:
    """A problem with its tensors."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    @property
    def params(self) -> list[nn.Parameter]:
        """All that the operators act on."""
        return list(self.model.parameters())

    def gradient(self) -> Action:
        """The unit of all numbers."""
        params = self.params
        return lambda: torch.autograd.grad(self.loss(self.model(self.x), self.y), params)

    def product(self, kind: Any, **options: Any) -> Action:
        """Construction of an operator and a product with a vector."""
        params = self.params
        vector = [torch.randn_like(p) for p in params]
        data, size = [(self.x, self.y)], len(self.x)

        def run() -> object:
            operator = kind(self.model, self.loss, params, data, check_deterministic=False, num_data=size, **options)
            return operator @ vector

        return run


@dataclass(frozen=True)
class Work:
    """A row of the table.

    Attributes:
        operator: Name of the class, ours and theirs, less LinearOperator.
        problem: What it is built for.
        fisher_type: Of the Kronecker operators.
        at_most: The number of gradients it may cost; None: no more than curvlinops.
    """

    operator: str
    problem: Problem
    fisher_type: str | None = None
    at_most: float | None = None

    @property
    def name(self) -> str:
        """What the table shows."""
        return f"{self.operator}{f', {self.fisher_type}' if self.fisher_type else ''}, {self.problem.name}"

    def contestants(self) -> dict[str, Action]:
        """The gradient, ours and, if it is installed, curvlinops'."""
        instance = self.problem.make()
        options = {} if self.fisher_type is None else {"fisher_type": self.fisher_type}
        found = {"gradient": instance.gradient()}
        for name, package in {"ours": operators, "curvlinops": theirs()}.items():
            if package is not None:
                kind = getattr(package, f"{self.operator}LinearOperator")
                found[name] = instance.product(kind, **options)
        return found


def theirs() -> Any:
    """The package curvlinops, or None."""
    try:
        return import_module("curvlinops")
    except ImportError:
        return None


def mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLU between."""
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*list(chain.from_iterable(layers))[:-1])


def cnn() -> nn.Module:
    """Three convolutions, each followed by pooling, and a linear layer, for 3 x 32 x 32."""
    channels = (3, 16, 32, 32)
    stages = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for a, b in pairwise(channels)]
    return nn.Sequential(*chain.from_iterable(stages), nn.Flatten(), nn.Linear(512, 10))


MLP = Problem("MLP", lambda: mlp(784, 512, 256, 10), (784,), 512)
CNN = Problem("CNN", cnn, (3, 32, 32), 128)

WORKS = (
    Work("EKFAC", MLP, "mc", 9.0),  # 6.1 is the floor of one thread, five eigendecompositions and the products
    Work("EKFAC", MLP, "type-2", 15.0),  # 9.7
    Work("EKFAC", CNN, "mc", 4.5),
    Work("EKFAC", CNN, "type-2", 12.0),
    Work("KFAC", MLP, "mc", 2.8),
    Work("KFAC", CNN, "mc", 3.5),
    Work("Hessian", MLP),
    Work("GGN", MLP),
    Work("FisherMC", MLP),
)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""On a machine that others use, the processor's time at one thread is the one that repeats."""


def race(
    contestants: dict[str, Action], seconds: float, at_least: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every turn; one turn of each warms up and is not counted, the gradient comes before every other.

    Args:
        contestants: The gradient and others.
        seconds: They take turns for so long.
        at_least: So many turns in any case.
        clock: Of the turns.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = [name for other in contestants if other != "gradient" for name in ("gradient", other)]
    for name in order:
        contestants[name]()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[order[-1]]) < at_least:
        for name in order:
            start = clock()
            contestants[name]()
            times[name].append(clock() - start)
    return times


def costs(times: dict[str, list[float]]) -> dict[str, float]:
    """Median of each in medians of the gradient."""
    unit = statistics.median(times["gradient"])
    return {name: statistics.median(own) / unit for name, own in times.items() if name != "gradient"}


def table(results: dict[Work, dict[str, list[float]]]) -> Table:
    """Cost in gradients, ours beside theirs."""
    made = Table(title="Construction and one product, in gradients")
    for heading in ("work", "theirs", "ours", "at most", "ours/theirs", "faster", "gradient"):
        made.add_column(heading, justify="left" if heading == "work" else "right")
    for work, times in results.items():
        found = costs(times)
        ratio = faster = other = ""
        if "curvlinops" in found:
            pairs = [a / b for a, b in zip(times["ours"], times["curvlinops"], strict=True)]
            ratio, other = f"{statistics.median(pairs):.2f}", f"{found['curvlinops']:.2f}"
            faster = f"{sum(pair < 1 for pair in pairs)} of {len(pairs)}"
        limit = "theirs" if work.at_most is None else f"{work.at_most:.1f}"
        unit = f"{1e3 * statistics.median(times['gradient']):.1f} ms"
        made.add_row(work.name, other, f"{found['ours']:.2f}", limit, ratio, faster, unit)
    return made


# -- growth ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What products cost at one number of parameters, in gradients, by the operator's name."""

    parameters: int
    seconds: dict[str, float]
    memory: dict[str, float]


GROWING = ("Hessian", "GGN", "FisherMC")


def grow(widths: Sequence[int], seconds: float, batch_size: int = 8) -> list[Size]:
    """Products of MLPs with two hidden layers of each width."""
    sizes = []
    for width in counted(widths, lambda width: f"two hidden layers of {width}", output()):
        instance = Problem("", lambda w=width: mlp(w, w, w, 10), (width,), batch_size).make()  # type: ignore[misc]
        actions = {name: instance.product(getattr(operators, f"{name}LinearOperator")) for name in GROWING}
        contestants = {"gradient": instance.gradient(), **actions}
        times = race(contestants, seconds)
        unit = peak_bytes(contestants["gradient"])
        memory = {name: peak_bytes(action) / unit for name, action in actions.items()}
        sizes.append(Size(sum(p.numel() for p in instance.params), costs(times), memory))
    return sizes


def peak_bytes(action: Action) -> int:
    """Most bytes of tensors on the CPU at once, less those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def growth_table(sizes: Sequence[Size]) -> Table:
    """Time and memory in gradients, a row a size."""
    made = Table(title="One product, in gradients")
    for heading in ("parameters", *(f"{name}, {what}" for name in GROWING for what in ("time", "memory"))):
        made.add_column(heading, justify="right")
    for size in sizes:
        cells = [f"{part[name]:.2f}" for name in GROWING for part in (size.seconds, size.memory)]
        made.add_row(f"{size.parameters:,}", *cells)
    return made


def draw(sizes: Sequence[Size], path: Path) -> None:
    """Time and memory against the number of parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2, sharex=True)
    parameters = [size.parameters for size in sizes]
    for name in GROWING:
        time_axes.plot(parameters, [size.seconds[name] for size in sizes], "o-", label=name)
        memory_axes.plot(parameters, [size.memory[name] for size in sizes], "o-", label=name)
    for axes, what in ((time_axes, "time"), (memory_axes, "memory")):
        axes.set(xscale="log", xlabel="parameters", ylabel=f"{what} of one product, in gradients")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    time_axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row of the table, at least five turns")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of rows' names")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: with one thread, on a busy machine")
    parser.add_argument("--growth", type=Path, help="measure growing models instead, and draw them to this file")
    parser.add_argument("--largest", type=float, default=1e7, help="parameters of the largest of them")
    parser.add_argument("--floor", action="store_true", help="measure what EKFAC of the MLP takes at least, instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = output()
    if arguments.growth:
        steps = 7
        widths = [round((0.5 * 1e4 * (arguments.largest / 1e4) ** (i / (steps - 1))) ** 0.5) for i in range(steps)]
        sizes = grow(widths, arguments.seconds)
        console.print(growth_table(sizes))
        draw(sizes, arguments.growth)
        return
    if arguments.floor:
        kinds = counted(("mc", "type-2"), str, console)
        floors = {kind: measured(MLP.make(), kind, arguments.seconds) for kind in kinds}
        console.print(floor_table(floors))
        console.print(f"Shortest of alternate turns, processor time, {arguments.threads} thread(s).")
        return
    works = [work for work in WORKS if work.name.startswith(tuple(arguments.only))]
    races = counted(works, lambda work: f"{work.name}, {arguments.seconds:g} s", console)
    results = {work: race(work.contestants(), arguments.seconds, clock=CLOCKS[arguments.clock]) for work in races}
    console.print(table(results))
    console.print(
        f"Theirs: curvlinops. {arguments.threads} thread(s), {arguments.clock} time, medians of alternate turns, "
        f"{arguments.seconds:g} s a row."
    )


if __name__ == "__main__":
    main()
