"""What a comparison of optimizers comes to: one table, its CSV files and one picture."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

import matplotlib.pyplot as plt
import numpy
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator
from rich.table import Table
from torch import Tensor

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#d55e00", "#e69f00", "#0072b2", "#009e73", "#555555", "#cc79a7", "#56b4e9")


class Point(NamedTuple):
    """The training loss after so many seconds of training and so many steps."""

    seconds: float
    steps: int
    loss: float


@dataclass
class Record:
    """What one optimizer did.

    Args:
        name: What the table calls it.
        curve: The loss at rising times, the first before any step.
        step_seconds: How long each step took.
        losses: What each step's batch had lost before it.
    """

    name: str
    curve: list[Point] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being a number."""
        return not math.isfinite(self.curve[-1].loss)

    def loss_at(self, axis: Literal["seconds", "steps"], value: float) -> float:
        """The loss at a time or a step, on the straight line between the two points around it.

        >>> Record("sgd", [Point(0.0, 0, 9.0), Point(2.0, 10, 5.0)]).loss_at("seconds", 1.0)
        7.0
        """
        places = [getattr(point, axis) for point in self.curve]
        if value > places[-1]:
            return math.nan
        return float(numpy.interp(value, places, [point.loss for point in self.curve]))

    def seconds_to(self, loss: float) -> float:
        """When the loss first came down to a value; nan if it never did.

        >>> Record("sgd", [Point(0.0, 0, 9.0), Point(2.0, 10, 5.0)]).seconds_to(7.0)
        1.0
        """
        for before, after in zip(self.curve, self.curve[1:], strict=False):
            if after.loss <= loss < before.loss:
                part = (before.loss - loss) / (before.loss - after.loss)
                return before.seconds + part * (after.seconds - before.seconds)
        return 0.0 if self.curve[0].loss <= loss else math.nan


@dataclass(frozen=True)
class Row:
    """One optimizer's line of the table; nan where there is nothing to say."""

    optimizer: str
    loss_at_equal_time: float
    loss_at_equal_steps: float
    seconds_to_final: float
    seconds_to_best: float
    steps: int
    mean_step: float
    median_step: float


@dataclass(frozen=True)
class Comparison:
    """The records of all optimizers and how they compare.

    Args:
        records: One of each optimizer.
        budget: The seconds of training that each had.
        reference: The optimizer whose final and best loss the others are timed against.
        unit: The optimizer whose step is the unit of the step times.
    """

    records: Sequence[Record]
    budget: float
    reference: str = "adamw"
    unit: str = "sgd"

    def _named(self, name: str) -> Record | None:
        return next((record for record in self.records if record.name == name), None)

    @property
    def seconds(self) -> float:
        """The equal time: the budget, or what all had had when the comparison was broken off."""
        return min([self.budget, *(r.curve[-1].seconds for r in self.records if not r.diverged)])

    @property
    def steps(self) -> int:
        """The equal number of steps: what the slowest had done at the end."""
        return min((r.curve[-1].steps for r in self.records if not r.diverged), default=0)

    def rows(self) -> list[Row]:
        """The table, the lowest loss at equal time first."""
        final = best = mean_unit = median_unit = math.nan
        if (reference := self._named(self.reference)) and not reference.diverged:
            final = reference.loss_at("seconds", self.seconds)
            best = min(point.loss for point in reference.curve)
        if (unit := self._named(self.unit)) and unit.step_seconds:
            mean_unit = statistics.fmean(unit.step_seconds)
            median_unit = statistics.median(unit.step_seconds)
        rows = [
            Row(
                optimizer=record.name,
                loss_at_equal_time=record.loss_at("seconds", self.seconds),
                loss_at_equal_steps=record.loss_at("steps", self.steps),
                seconds_to_final=record.seconds_to(final),
                seconds_to_best=record.seconds_to(best),
                steps=record.curve[-1].steps,
                mean_step=statistics.fmean(record.step_seconds or [math.nan]) / mean_unit,
                median_step=statistics.median(record.step_seconds or [math.nan]) / median_unit,
            )
            for record in self.records
        ]
        return sorted(rows, key=lambda row: (math.isnan(row.loss_at_equal_time), row.loss_at_equal_time))

    def headings(self) -> tuple[str, ...]:
        """What the columns of `rows` are called."""
        return (
            "optimizer",
            f"loss after {self.seconds:.0f} s",
            f"loss after {self.steps} steps",
            f"s to {self.reference}'s final loss",
            f"s to {self.reference}'s best loss",
            "steps",
            f"mean step / {self.unit}'s",
            f"median step / {self.unit}'s",
        )

    def table(self) -> Table:
        """The table, to be printed."""
        table = Table(title="Training loss at equal wall-clock")
        for number, heading in enumerate(self.headings()):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for row in self.rows():
            table.add_row(
                row.optimizer,
                _figures(row.loss_at_equal_time, "diverged"),
                _figures(row.loss_at_equal_steps),
                _tenths(row.seconds_to_final),
                _tenths(row.seconds_to_best),
                str(row.steps),
                _tenths(row.mean_step, 2),
                _tenths(row.median_step, 2),
            )
        return table

    def write(self, folder: Path) -> None:
        """Write `table.csv`, `curves.csv` and `comparison.png`."""
        with (folder / "table.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.headings())
            writer.writerows(vars(row).values() for row in self.rows())
        with (folder / "curves.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("optimizer", *Point._fields))
            writer.writerows((r.name, *point) for r in self.records for point in r.curve)
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
        self._draw(left, "seconds", "seconds of training (wall-clock)")
        self._draw(right, "steps", "steps")
        left.set_ylabel("training loss")
        figure.tight_layout()
        figure.savefig(folder / "comparison.png", dpi=150)
        plt.close(figure)

    def _draw(self, axes: Axes, axis: Literal["seconds", "steps"], label: str) -> None:
        losses = [p.loss for r in self.records for p in r.curve if math.isfinite(p.loss)]
        # The first moments, when every loss falls from the same height, would squeeze the rest.
        early = [r.loss_at("seconds", self.seconds / 20) for r in self.records]
        top = max([loss for loss in early if math.isfinite(loss)], default=max(losses))
        log_axes(axes, 0.96 * min(losses), top)
        ends = []
        for record, colour in zip(self.records, COLOURS * len(self.records), strict=False):
            points = [p for p in record.curve if math.isfinite(p.loss)]
            places = [getattr(point, axis) for point in points]
            axes.plot(places, [point.loss for point in points], color=colour, linewidth=1.8)
            ends.append((places[-1], points[-1].loss, record.name, colour))
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.18 * max(end[0] for end in ends))
        label_ends(axes, ends)


def draw_losses(metrics: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw the losses that a training run logged, against steps.

    Args:
        metrics: Rows with `step`, `train/loss` and `val/loss`, empty where not logged.
        path: The picture to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.6))
    for (name, label), colour in zip((("train/loss", "training"), ("val/loss", "validation")), COLOURS, strict=False):
        points = [(int(row["step"]), float(row[name])) for row in metrics if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.5)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def log_axes(axes: Axes, bottom: float, top: float) -> None:
    """A logarithmic loss axis with plain numbers, also where it spans less than a decade."""
    axes.set_yscale("log")
    axes.set_ylim(bottom, max(top, 1.05 * bottom))
    subs = (1, 1.5, 2, 3, 5, 7) if top / bottom > 3 else tuple(numpy.arange(1, 10, 0.5))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each curve's name where it ends, the names moved apart where they would overlap.

    Args:
        axes: A panel with a logarithmic y axis and its limits set.
        ends: Of each curve (x, y, name, colour).
    """
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    gap, height = 0.055 * (top - bottom), bottom - math.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        height = max(math.log(y), height + gap)
        axes.annotate(
            name,
            (x, math.exp(min(height, top))),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            verticalalignment="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _figures(value: float, missing: str = "-") -> str:
    return missing if math.isnan(value) else f"{value:.4g}"


def _tenths(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
