"""What the exact inverse of a deep chain's Hessian costs: CPU-seconds, memory and residual for each size.

    python scripts/bench_chain.py
    python scripts/bench_chain.py --only 8,64,16 --repeats 5

A chain of `Linear` and `Tanh` with orthogonal weights of gain 1.2 and biases of zero, mean squared error against normal
targets, float64, damping 0.1, the loss's gradient g on the right-hand side. Counted are the CPU-seconds (of all
threads) from the model to the solution `(H + 0.1 I)⁻¹ g`: derivatives, factorisation, solve and refinement. Each size
is measured in a process of its own, after a tiny chain has warmed torch up; memory is the process's peak above what it
was before. The published code (of arXiv 2601.06096) is not run: its figures were measured elsewhere and are quoted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from kfacopt.operators import ChainHessian

DAMPING = 0.1


class Size(NamedTuple):
    """Of a chain; and of the published code, and what ours may take at most."""

    batch: int
    width: int
    depth: int
    published: str = "–"
    limit: float | None = None

    @property
    def key(self) -> str:
        """As on the command line."""
        return f"{self.batch},{self.width},{self.depth}"


SIZES = (
    Size(1, 64, 16, "115 / 8276", 0.1),
    Size(8, 64, 16, "173 / 11293", 1.0),
    Size(8, 32, 64, "27 / 4322", 0.7),
    Size(32, 32, 16, "34 / 3723", 4.0),
    Size(32, 8, 64),
    Size(32, 8, 256, "15.7 / 2103", 2.5),
    Size(8, 8, 1000, "–", 1.5),
)
LINEAR = (("32,8,64", "32,8,256"),)
"""Pairs of which the second is four times as deep."""


def chain(batch: int, width: int, depth: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The model, its inputs and its targets."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.orthogonal_(linear.weight, gain=1.2)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    x, y = torch.randn(2, batch, width, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x, y


def invert(model: nn.Module, x: Tensor, y: Tensor) -> ChainHessian:
    """From the model to the solution; what it reached stands in the result's `stats`."""
    hessian = ChainHessian(model, nn.MSELoss(), x, y)
    hessian.solve(hessian.gradient, damping=DAMPING)
    return hessian


def measure(size: Size) -> dict[str, float]:
    """In this process, which has done nothing else."""
    invert(*chain(2, 4, 3))
    model, x, y = chain(size.batch, size.width, size.depth)
    before, start = _peak(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a residual that is too large stands in the table
        hessian = invert(model, x, y)
    seconds = time.process_time() - start
    assert hessian.stats is not None
    return {
        "seconds": seconds,
        "megabytes": _peak() - before,
        "residual": hessian.stats.residual,
        "steps": hessian.stats.refinement_steps,
        "negative": hessian.inertia(DAMPING),
        "parameters": hessian.shape[0],
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(size: Size, threads: int) -> dict[str, float]:
    """`measure` in a fresh one."""
    command = [sys.executable, __file__, "--only", size.key, "--threads", str(threads), "--here"]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def table(found: dict[str, list[dict[str, float]]], of_two: dict[str, list[float]] | None = None) -> Table:
    """One row a size: medians of time and memory, the worst residual.

    Args:
        found: What `measure` returned, by size.
        of_two: CPU-seconds at twice the threads over those at once, by size, run after run.
    """
    made = Table(title="(H + 0.1 I)⁻¹ g of a deep chain, float64")
    for heading in ("batch, width, depth", "parameters", "published CPU-s / MB", "at most", "CPU-s",
                    "of twice the threads", "MB", "residual", "corrections", "negative eigenvalues"):  # fmt: skip
        made.add_column(heading, justify="right")
    for size in SIZES:
        runs = found.get(size.key)
        if not runs:
            continue

        def median(name: str, of: list[dict[str, float]] = runs) -> float:
            return statistics.median(run[name] for run in of)

        made.add_row(
            f"{size.batch}, {size.width}, {size.depth}",
            f"{median('parameters'):.0f}",
            size.published,
            "–" if size.limit is None else f"{size.limit:g}",
            f"{median('seconds'):.3f}",
            f"{statistics.median(of_two[size.key]):.2f}" if of_two else "–",
            f"{median('megabytes'):.0f}",
            f"{max(run['residual'] for run in runs):.0e}",
            f"{median('steps'):.0f}",
            f"{median('negative'):.0f}",
        )
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="sizes batch,width,depth of the table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="measured again with twice as many")
    parser.add_argument("--here", action="store_true", help="measure one size in this process and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = [size for size in SIZES if not arguments.only or size.key in arguments.only]
    if arguments.here:
        sys.stdout.write(json.dumps(measure(sizes[0])))
        return
    found: dict[str, list[dict[str, Any]]] = {size.key: [] for size in sizes}
    of_two: dict[str, list[float]] = {size.key: [] for size in sizes}
    # Not in a process that is measured, whose memory it would be part of.
    from progress import counted, output

    console = output()
    for size in counted(sizes * arguments.repeats, lambda size: f"batch, width, depth {size.key}", console):
        found[size.key].append(in_a_process(size, arguments.threads))
        of_two[size.key].append(in_a_process(size, 2 * arguments.threads)["seconds"] / found[size.key][-1]["seconds"])
    console.print(table(found, of_two))
    for short, long in LINEAR:
        if short in found and long in found:
            ratios = [
                statistics.median(one[name] for one in found[long])
                / statistics.median(one[name] for one in found[short])
                for name in ("seconds", "megabytes")
            ]
            console.print(f"{long} against {short}: time {ratios[0]:.2f}, memory {ratios[1]:.2f}")
    console.print(f"{arguments.threads} thread(s), median of {arguments.repeats} repeats.")


if __name__ == "__main__":
    main()
