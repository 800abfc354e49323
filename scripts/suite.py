"""Trains many tasks with ours at their defaults and every rival at each point of its grid, for equal time.

    scripts/compare suite=untuned                     ten tasks, three seeds: some hours of one core
    scripts/compare suite=untuned jobs=16             as many runs at a time, a process and a thread each
    scripts/compare suite=untuned --quick             four tasks and a tenth of it, in under a minute
    scripts/compare suite=untuned only=[table,digits] seeds=1
    scripts/compare suite=untuned ours=[spectral,kfac] again=[spectral]
    scripts/compare suite=batch_size jobs=16          the transformer over batch sizes
    scripts/compare suite=unseen jobs=2               eighteen tasks unlike those ten

Every finished run is a line in runs.jsonl of the suite's folder; an interrupted suite goes on from there. All learning
rates go to zero on a straight line over a run's time, ours and the rivals'. Time is the processor's, which neither the
other runs nor the rest of the machine lengthens; for runs of one thread it is that of a clock on the wall.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare import Lane, forever, to_device, warm_up
from omegaconf import DictConfig, OmegaConf
from progress import output, told
from report import Record
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scores import Finished, Run, Scores
from train import build_data, build_task, compose

from kfacopt.experiments.in_memory import InMemoryData

QUICK = ("scale=0.06", "seeds=1", "points=2", "only=${quick}")
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}
CPU = torch.device("cpu")


def planned(config: DictConfig) -> list[Run]:
    """All runs of a suite, those that share their data next to each other.

    Raises:
        ValueError: `only`, `ours` or `rivals` names what the suite does not have.
    """
    tasks = list(config.tasks) if config.only is None else list(config.only)
    for option, names, known in (
        ("only", tasks, config.tasks),
        ("ours and rivals", [*config.ours, *config.rivals], config.optimizers),
    ):
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"{option} names {', '.join(unknown)}, but the suite has {', '.join(known)}")
    runs = []
    for seed, task, name in itertools.product(range(config.seeds), tasks, [*config.ours, *config.rivals]):
        for values in points(config.grid.get(name, {}), config.points):
            spec = {
                "seed": seed,
                **container(config.tasks[task]),
                "seconds": config.tasks[task].seconds * config.scale,
                "optimizer": container(config.optimizers[name]) | values,
                "clock": config.clock,
            }
            setting = " ".join(f"{key}={value:g}" for key, value in values.items())
            runs.append(Run(task, name, setting, seed, json.dumps(spec, sort_keys=True)))
    return runs


def points(grid: Any, count: int | None) -> list[dict[str, float]]:
    """The points of a grid: all, or `count` of each setting from its middle.

    >>> points({"lr": [1, 2, 3, 4, 5]}, 1), points({}, None)
    ([{'lr': 3}], [{}])
    """
    chosen = {}
    for key, values in grid.items():
        kept = len(values) if count is None else min(count, len(values))
        first = (len(values) - kept) // 2
        chosen[key] = list(values)[first : first + kept]
    return [dict(zip(chosen, combination, strict=True)) for combination in itertools.product(*chosen.values())]


def container(config: Any) -> dict[str, Any]:
    """A part of a config as plain Python."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return dict(plain)


@functools.lru_cache(maxsize=2)
def data_of(spec: str) -> InMemoryData:
    """The data of a task and seed, read or made once for the runs that follow each other."""
    return build_data(OmegaConf.create(json.loads(spec)))


def trained(run: Run) -> Run:
    """Train as planned, by one thread, and say how it ended. A run that fails by an error is one that diverged."""
    torch.set_num_threads(1)
    spec = json.loads(run.spec)
    config = OmegaConf.create(spec)
    data = data_of(json.dumps({"data": spec["data"] | {"seed": run.seed}}, sort_keys=True))
    task = build_task(config)
    warm_up(task, to_device(next(iter(data.train_dataloader())), CPU))
    optimizer = task.optimizer_factory(task.model, loss_func=task.loss_func)
    clock = CLOCKS[config.clock]
    lane = Lane(Record(run.task), task, optimizer, forever(data.train_dataloader()), torch.get_rng_state(), CPU, clock)
    try:
        lane.train(config.seconds, config.seconds, decay=1.0)
        loss = lane.measure(list(data.val_dataloader()))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # SOAP's decompositions of what is not finite
        return replace(run, steps=len(lane.record.losses), seconds=lane.seconds)
    losses = torch.stack(lane.record.losses).double().tolist()
    last, later = losses[-max(1, len(losses) // 20) :], losses[len(losses) // 4 :]
    scale = math.sqrt if config.get("root", False) else float
    values = (loss, statistics.fmean(last), max(later))
    loss, training, highest = (scale(value) if math.isfinite(value) else math.nan for value in values)
    steps = len(losses)
    return replace(run, loss=loss, training_loss=training, highest=highest, steps=steps, seconds=lane.seconds)


def train_all(runs: Sequence[Run], finished: Finished, jobs: int, console: Console) -> None:
    """Train those that have not ended, `jobs` at a time; Ctrl-C leaves what has ended."""
    left = [run for run in runs if finished.find(run) is None]
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=len(runs), completed=len(runs) - len(left))

    def text() -> str:
        (task,) = progress.tasks
        return f"{task.completed:.0f} of {len(runs)} runs, the last: {task.description or '-'}"

    with told(text, console), progress:

        def note(run: Run) -> None:
            finished.add(run)
            named = f"{run.task}, {run.optimizer} {run.setting}: {run.loss:.4g}"
            progress.update(bar, advance=1, description=named)

        if jobs <= 1:
            for run in left:
                note(trained(run))
            return
        # Fresh processes: a fork would share torch's threads with this one.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(trained, run) for run in left]
            try:
                for future in as_completed(futures):
                    note(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def main(overrides: Sequence[str], quick: bool = False) -> list[Scores]:
    """Compose the config, train what is left, and report; a table for each of ours."""
    config = compose("suite", [*(QUICK if quick else ()), *overrides])
    folder, console = Path(config.folder), output()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    finished = Finished(folder / "runs.jsonl")
    finished.drop(config.again)
    runs = planned(config)
    try:
        train_all(runs, finished, config.jobs, console)
    except KeyboardInterrupt:
        console.print("Interrupted: the same command goes on from here. What there is:")
    ended = [found for run in runs if (found := finished.find(run)) is not None]
    made = [Scores(ended, name, list(config.rivals)) for name in config.ours]
    for scores in made:
        if scores.rows and config.rivals:  # of ours alone there is nothing to compare
            scores.write(folder)
            console.print(scores.table())
    console.print(f"Tables and all runs: {folder}")
    return made


if __name__ == "__main__":
    raise SystemExit("this is part of scripts/compare: scripts/compare suite=untuned")
