"""Compares optimizers at equal wall-clock: same model, same first weights, same batches.

    scripts/compare                         spectral descent, EKFAC, KFAC, AdamW, Muon and SGD on the autoencoder
    scripts/compare --quick                 the same in under a minute
    scripts/compare task=language_model optimizers=[ekfac,muon] budget=120s
    scripts/compare learning_rates.adamw=3e-3 second_order.kl_clip=0.03
    scripts/compare experiment=tune         the grid that gave the rivals' learning rates
    scripts/compare suite=untuned           ten tasks, rivals at the best of a grid: see scripts/suite.py

Each optimizer has its own copy of the model, its own random numbers and its own clock. They take turns of a second or
two, so that whatever else the machine is doing slows them all alike. The clock runs while they train (fetching batches
included) and stands still while the loss is measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from progress import output, told
from report import Comparison, Point, Record
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer
from train import build_data, build_task, compose

from kfacopt.experiments.in_memory import InMemoryData
from kfacopt.experiments.tasks import Task

Batch = tuple[Tensor, ...]


@dataclass
class Lane:
    """One optimizer's run: model, optimizer, batches, random numbers and clock of its own."""

    record: Record
    task: Task
    optimizer: Optimizer
    batches: Iterator[Batch]
    randomness: Tensor
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    seconds: float = 0.0
    first_rates: list[dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.first_rates = [
            {name: value for name, value in group.items() if name in scheduled(group)}
            for group in self.optimizer.param_groups
        ]

    def train(self, until: float, budget: float, decay: float) -> None:
        """Take steps until the lane's clock shows `until` seconds."""
        torch.set_rng_state(self.randomness)
        self.task.train()
        while self.seconds < until:
            begin = self.clock()
            factor = learning_rate_factor(self.seconds / budget, decay)
            for group, rates in zip(self.optimizer.param_groups, self.first_rates, strict=True):
                group.update({name: rate * factor for name, rate in rates.items()})
            batch = to_device(next(self.batches), self.device)
            loss = self.task.loss(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            synchronize(self.device)
            self.record.step_seconds.append(self.clock() - begin)
            self.record.losses.append(loss.detach())
            self.seconds += self.record.step_seconds[-1]
        self.randomness = torch.get_rng_state()

    def measure(self, rows: list[Batch]) -> float:
        """Put the mean loss over the rows on the curve, and return it."""
        self.task.eval()
        with torch.no_grad():
            losses = [float(self.task.loss(batch)) * len(batch[0]) for batch in rows]
        loss = sum(losses) / sum(len(batch[0]) for batch in rows)
        self.record.curve.append(Point(self.seconds, len(self.record.step_seconds), loss))
        return loss


def scheduled(group: dict[str, Any]) -> list[str]:
    """The learning rates of a param group; those of kfacopt follow `lr` by themselves."""
    return ["lr"] if "base_lr" in group else [name for name in group if name == "lr" or name.endswith("_lr")]


def learning_rate_factor(part: float, decay: float) -> float:
    """What the learning rates are multiplied by when a part of the budget is used up.

    Args:
        part: The part used up, from 0 to 1.
        decay: The last part of the budget, over which the rates go down to zero on a straight line.

    >>> learning_rate_factor(0.5, decay=0.0), learning_rate_factor(0.9, decay=0.2)
    (1.0, 0.5)
    """
    return 1.0 if decay == 0.0 else min(1.0, round((1.0 - min(part, 1.0)) / decay, 12))


def seconds(duration: str | float) -> float:
    """Seconds, from a number or a text like "80s" or "2m".

    >>> seconds("80s"), seconds("1.5m"), seconds(10)
    (80.0, 90.0, 10.0)

    Raises:
        ValueError: The text is not a positive duration.
    """
    text = str(duration)
    unit = {"s": 1.0, "m": 60.0}.get(text[-1:])
    try:
        value = float(text) if unit is None else float(text[:-1]) * unit
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise ValueError(f"budget={text} is not a duration; write it as 80s, 2m or a number of seconds.")
    return value


def to_device(batch: Any, device: torch.device) -> Batch:
    """The batch's tensors, on the device."""
    return tuple(tensor.to(device) for tensor in batch)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forever(loader: Any) -> Iterator[Batch]:
    """Epoch after epoch; the loader shuffles each in its own way, the same for every lane."""
    while True:
        yield from loader


def entries(overrides: list[str]) -> dict[str, DictConfig]:
    """Of each lane its name and its config: configs/compare.yaml with its optimizer and settings.

    There is one for each of `optimizers`; where these have a grid, one for each combination in it.
    """
    config = compose("compare", overrides)
    found: dict[str, DictConfig] = {}
    for name in config.optimizers:
        own = compose("compare", [*overrides, f"optimizer={name}"])
        own.merge_with({"optimizer": config.settings.get(name, {})})
        grid = config.grid.get(name, {})
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            label = " ".join([name, *(f"{key}={value:g}" for key, value in chosen.items())])
            found[label] = own.copy()
            found[label].merge_with({"optimizer": chosen})
    return found


def lanes(configs: dict[str, DictConfig], data: InMemoryData, device: torch.device) -> list[Lane]:
    """What trains, each with the same first weights and at the start of the same batches."""
    made = []
    for name, config in configs.items():
        task = build_task(config).to(device)
        warm_up(task, to_device(next(iter(data.train_dataloader())), device))
        lane = Lane(
            record=Record(name),
            task=task,
            optimizer=task.optimizer_factory(task.model, loss_func=task.loss_func),
            batches=forever(data.train_dataloader()),
            randomness=torch.get_rng_state(),
            device=device,
        )
        made.append(lane)
    return made


def warm_up(task: Task, batch: Batch) -> None:
    """Let torch set up its threads and buffers before any clock runs."""
    state = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    task.loss(batch).backward()
    task.zero_grad()
    task.load_state_dict(state)


def measured_rows(config: DictConfig, data: InMemoryData, device: torch.device) -> list[Batch]:
    """The training rows to measure the loss on: all, or `measured_rows` of them spread evenly."""
    rows = data.training_rows
    count = min(config.measured_rows, len(rows))
    chosen = torch.linspace(0, len(rows) - 1, count).long()
    return [to_device(rows[part], device) for part in chosen.split(config.measured_batch_size)]


def race(config: DictConfig, racing: list[Lane], rows: list[Batch], console: Console) -> Comparison:
    """Train all optimizers in turns; Ctrl-C ends it early with what there is."""
    budget = seconds(config.budget)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:5.0f} s {task.fields[steps]:6d} steps  loss {task.fields[loss]:.4g}"),
        TimeRemainingColumn(),
    )
    with told(lambda: standings(racing, budget), console), Progress(*columns, console=console) as progress:
        bars = {
            lane.record.name: progress.add_task(lane.record.name, total=budget, steps=0, loss=lane.measure(rows))
            for lane in racing
        }
        try:
            for turn in range(1, config.turns + 1):
                for lane in racing:
                    if lane.record.diverged:
                        continue
                    lane.train(budget * turn / config.turns, budget, config.decay)
                    loss = lane.measure(rows)
                    steps = len(lane.record.step_seconds)
                    progress.update(bars[lane.record.name], completed=lane.seconds, steps=steps, loss=loss)
        except KeyboardInterrupt:
            console.print("Interrupted: the comparison goes as far as every optimizer got.")
    return Comparison([lane.record for lane in racing], budget, config.reference, config.unit)


def standings(racing: list[Lane], budget: float) -> str:
    """How far everybody is: the seconds trained, and each one's last loss."""
    trained = sum(lane.seconds for lane in racing) / max(1, len(racing))
    losses = [f"{lane.record.name} {lane.record.curve[-1].loss:.4g}" for lane in racing if lane.record.curve]
    return f"{trained:.0f} of {budget:.0f} s each, loss: {', '.join(losses) or 'not measured yet'}"


def main() -> None:
    """Compose the config, race, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short comparison, under a minute")
    parser.add_argument("overrides", nargs="*", help="what differs from configs/compare.yaml, as key=value")
    arguments = parser.parse_intermixed_args()
    if any(override.startswith("suite=") for override in arguments.overrides):
        import suite  # it builds on this file

        suite.main(arguments.overrides, arguments.quick)
        return
    overrides = [*(["experiment=quick"] if arguments.quick else []), *arguments.overrides]
    config, configs = compose("compare", overrides), entries(overrides)
    folder = Path(config.folder or f"runs/compare/{config.name}-{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {name: OmegaConf.to_container(own, resolve=True) for name, own in configs.items()}
    OmegaConf.save(OmegaConf.create(resolved), folder / "config.yaml")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data, console = build_data(config), output()
    rows, racing = measured_rows(config, data, device), lanes(configs, data, device)
    comparison = race(config, racing, rows, console)
    comparison.write(folder)
    console.print(comparison.table())
    console.print(f"Table, curves and picture: {folder}")


if __name__ == "__main__":
    main()
