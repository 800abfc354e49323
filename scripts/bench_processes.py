"""Prints, as a table in Markdown, what a step takes in each of many processes: planned on paper, nothing is run.

    scripts/bench processes [--sizes 8 64 512] [--tokens 8192] [--factor-every 40] [--refresh-every 100]
        [--sharding least]

The model has the matrices of a transformer of a billion parameters. Received gigabytes and flops are those of one
process and step, averaged over the intervals; all numbers have four bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from kfacopt.backends import KFACBackend, OneSidedKFACBackend
from kfacopt.experiments.on_paper import Plan, language_model, plan
from kfacopt.optim.step import Spectral
from kfacopt.replicas import Sharding

TITLES = (
    "processes",
    "optimizer",
    "engine",
    "GB, engine",
    "GB, curvature",
    "Tflop, training",
    "Tflop, curvature",
    "of it the direction",
    "Gflop, inverses",
    "GB held",
)


SHARDING = {
    "owners": Sharding(),
    "all": Sharding(replicas=None),
    "least": Sharding(statistics="holders"),
}
"""Who holds what: inverses in a layer's owner, as by default; in all; statistics in the owner, too."""


def natural(size: int, tokens: int, sharding: Sharding, sharded: bool) -> Plan:
    """KFAC with the natural gradient."""
    return plan(language_model(), KFACBackend(), tokens, size, sharding=sharding, sharded=sharded)


def spectral(size: int, tokens: int, sharding: Sharding, sharded: bool) -> Plan:
    """SpectralDescent."""
    own, backend = Spectral().refusal, OneSidedKFACBackend()
    return plan(language_model(), backend, tokens, size, own, spectral=True, sharding=sharding, sharded=sharded)


OPTIMIZERS: dict[str, Callable[[int, int, Sharding, bool], Plan]] = {
    "KFAC, natural gradient": natural,
    "SpectralDescent": spectral,
}


def table(sizes: Sequence[int], tokens: int, factor_every: int, refresh_every: int, sharding: str = "owners") -> str:
    """The rows, as Markdown."""
    lines = [TITLES, ("---:", "---", "---", *["---:"] * (len(TITLES) - 3))]
    for size in sizes:
        for name, make in OPTIMIZERS.items():
            for engine in ("DDP", "fully_shard"):
                planned = make(size, tokens, SHARDING[sharding], engine == "fully_shard")
                numbers = (
                    planned.engine_traffic / 1e9,
                    planned.traffic(factor_every, refresh_every) / 1e9,
                    planned.training / 1e12,
                    planned.flops(factor_every, refresh_every) / 1e12,
                    planned.solve / 1e12,
                    planned.inverses / 1e9,
                    planned.held / 1e9,
                )
                lines.append((str(size), name, engine, *(f"{number:.2f}" for number in numbers)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser() -> argparse.ArgumentParser:
    """The options, with what the documentation's table is made of for defaults."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 512], help="numbers of processes")
    found.add_argument("--tokens", type=int, default=8192, help="in one process's batch")
    found.add_argument("--factor-every", type=int, default=40, help="steps between two updates of the statistics")
    found.add_argument("--refresh-every", type=int, default=100, help="steps between two refreshes of a layer")
    found.add_argument("--sharding", choices=list(SHARDING), default="owners", help="who holds what of a layer")
    return found


def main() -> None:
    """Print the table."""
    options = parser().parse_args()
    print(table(options.sizes, options.tokens, options.factor_every, options.refresh_every, options.sharding))


if __name__ == "__main__":
    main()
