"""What a suite comes to: the loss of ours over that of the best rival, task by task."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.table import Table


@dataclass(frozen=True)
class Run:
    """One training run of a suite: what trained, and how it ended.

    Args:
        task: The task's name.
        optimizer: The optimizer's name.
        setting: Its point of the grid, as `lr=0.01`; empty where there is no grid.
        seed: Of first weights, data and batches.
        spec: Everything that decides the run, as JSON: a finished run counts again only where this is the same.
        loss: On the validation rows at the end; not a number where it diverged.
        training_loss: Mean over the last twentieth of the batches.
        highest: The highest loss of a batch after the first quarter of the time.
        steps: How many.
        seconds: Of training.
    """

    task: str
    optimizer: str
    setting: str
    seed: int
    spec: str
    loss: float = math.nan
    training_loss: float = math.nan
    highest: float = math.nan
    steps: int = 0
    seconds: float = 0.0


class Finished:
    """The finished runs in a file of JSON lines, to which each is added as it ends.

    Args:
        path: The file; made with the first run.

    A line that an interruption cut short does not count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._runs = [Run(**json.loads(line)) for line in lines if line.endswith("}")]

    def find(self, planned: Run) -> Run | None:
        """The run that was planned, if it has ended."""
        return next((run for run in self._runs if run.spec == planned.spec), None)

    def add(self, run: Run) -> None:
        """Write a run down."""
        self._runs.append(run)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")

    def drop(self, optimizers: Iterable[str]) -> None:
        """Forget all runs of some optimizers."""
        dropped = set(optimizers)
        if dropped and self.path.exists():
            self._runs = [run for run in self._runs if run.optimizer not in dropped]
            self.path.write_text("".join(json.dumps(asdict(run)) + "\n" for run in self._runs))


class Best(NamedTuple):
    """An optimizer on a task, at the best of its settings: the mean loss over seeds."""

    setting: str
    loss: float
    training_loss: float
    steps: float


class Row(NamedTuple):
    """A task: ours, every rival at its best, and our loss over the best rival's."""

    task: str
    ours: Best
    rivals: dict[str, Best]
    ratio: float


class Scores:
    """The table of a suite, for one optimizer of ours.

    Args:
        runs: All that have ended.
        ours: Our optimizer's name.
        rivals: The rivals' names.

    >>> runs = [Run("t", "ours", "", 0, "", 1.0)]
    >>> runs += [Run("t", "adamw", f"lr={lr}", 0, "", loss) for lr, loss in ((1, 4.0), (2, 2.0))]
    >>> scores = Scores(runs, "ours", ["adamw"])
    >>> scores.median, scores.wins, scores.worst, scores.rows[0].rivals["adamw"].setting
    (0.5, 1, 0.5, 'lr=2')
    """

    def __init__(self, runs: Sequence[Run], ours: str, rivals: Sequence[str]) -> None:
        self.ours, self.rivals = ours, list(rivals)
        self.rows: list[Row] = []
        for task in dict.fromkeys(run.task for run in runs):
            here = [run for run in runs if run.task == task]
            found = {name: best(here, name) for name in [ours, *rivals]}
            if any(value is None for value in found.values()):
                continue  # not all have ended yet
            complete = {name: value for name, value in found.items() if value is not None}
            mine, others = complete.pop(ours), complete
            least = min((other.loss for other in others.values()), default=math.nan)
            self.rows.append(Row(task, mine, others, mine.loss / least if math.isfinite(mine.loss) else math.inf))

    @property
    def ratios(self) -> list[float]:
        """Our loss over the best rival's, of every task."""
        return [row.ratio for row in self.rows]

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.ratios) if self.rows else math.nan

    @property
    def wins(self) -> int:
        """Tasks on which our loss is the lowest."""
        return sum(ratio < 1.0 for ratio in self.ratios)

    @property
    def worst(self) -> float:
        """The largest ratio."""
        return max(self.ratios, default=math.nan)

    @property
    def summary(self) -> str:
        """The three numbers that count, in a line."""
        return (
            f"{self.ours}: median ratio {self.median:.3f}, wins {self.wins} of {len(self.rows)}, "
            f"worst case {self.worst:.3f}"
        )

    def cells(self) -> list[list[str]]:
        """The table's head and rows as text."""
        head = ["task", self.ours, *self.rivals, "ratio", "steps, ours", f"steps, {self.rivals[0]}"]
        lines = [head]
        for row in self.rows:
            rivals = [f"{other.loss:.4g} ({other.setting})" for other in row.rivals.values()]
            steps = [f"{row.ours.steps:.0f}", f"{row.rivals[self.rivals[0]].steps:.0f}"]
            lines.append([row.task, f"{row.ours.loss:.4g}", *rivals, f"{row.ratio:.3f}", *steps])
        return lines

    def table(self) -> Table:
        """For the terminal."""
        head, *lines = self.cells()
        table = Table(title=f"Validation loss at equal time. {self.summary}")
        for place, name in enumerate(head):
            table.add_column(name, justify="left" if place == 0 else "right")
        for line, row in zip(lines, self.rows, strict=True):
            table.add_row(*line, style="bold" if row.ratio < 1.0 else None)
        return table

    def write(self, folder: Path) -> None:
        """`<ours>.csv`, and `<ours>.md` and `<ours>.png` for a README."""
        head, *lines = self.cells()
        with (folder / f"{self.ours}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
        marked = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]]
        (folder / f"{self.ours}.md").write_text("\n".join([*marked, "", self.summary, ""]))
        self.draw(folder / f"{self.ours}.png")

    def draw(self, path: Path) -> None:
        """Every rival's loss over ours, a row a task: to the right of the line ours is lower."""
        figure = Figure(figsize=(8, 0.6 + 0.34 * len(self.rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(1.0, color="black", linewidth=1.5, label=self.ours)
        for name, marker in zip(self.rivals, itertools.cycle("osD^v")):
            ratios = [row.rivals[name].loss / row.ours.loss for row in self.rows]
            axes.plot(ratios, range(len(ratios)), marker, label=f"{name}, at the best of its rates", alpha=0.8)
        axes.set_yticks(range(len(self.rows)), [row.task for row in self.rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        ticks = [0.1, 0.25, 0.5, 0.75, 1.0, 1.33, 2.0, 3.0, 5.0]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.set_xlabel(f"validation loss over that of {self.ours} at its defaults, at equal time")
        axes.grid(axis="x", alpha=0.3)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
        figure.savefig(path, dpi=120)


def best(runs: Sequence[Run], optimizer: str) -> Best | None:
    """Of an optimizer's settings on one task the one with the lowest mean loss; divergence is infinite."""
    found = []
    for setting in dict.fromkeys(run.setting for run in runs if run.optimizer == optimizer):
        here = [run for run in runs if run.optimizer == optimizer and run.setting == setting]
        losses = [run.loss if math.isfinite(run.loss) else math.inf for run in here]
        means = [statistics.fmean(values) for values in (losses, [run.training_loss for run in here])]
        found.append(Best(setting, means[0], means[1], statistics.fmean(run.steps for run in here)))
    return min(found, key=lambda one: one.loss, default=None)
