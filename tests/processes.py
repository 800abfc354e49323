"""New processes, and checks that several run together: one start for a whole table of them, as each costs seconds."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

ROOT = Path(__file__).parents[1]
forkserver.set_forkserver_preload(["tests.imported"])

Check = Callable[[], None]
Found = dict[str, list[str]]
"""By check, what each process says: "" if it held, else the error."""


def started() -> None:
    """Start the process that new ones are forked from; it finds this kfacopt, whatever else is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()


def forked(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A new process, not yet started."""
    started()
    return get_context("forkserver").Process(target=target, args=arguments)


def run_together(checks: Mapping[str, Check], world: int = 2, seconds: float = 100.0) -> Found:
    """Run each check in every one of `world` gloo processes; checks must be functions of a module.

    A check that fails in one process only may hang the others: what comes after it is then not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = list(checks)
        started()
        context = multiprocessing.start_processes(
            _work, (world, folder, dict(checks)), nprocs=world, join=False, start_method="forkserver"
        )
        assert context is not None
        deadline = seconds
        while deadline > 0 and any(process.is_alive() for process in context.processes):
            for process in context.processes:
                process.join(0.1)
                deadline -= 0.1
        hung = [process for process in context.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        found: Found = {name: ["not run"] * world for name in names}
        for rank in range(world):
            for name in names:
                said = Path(folder) / f"{names.index(name)}-{rank}"
                if said.exists():
                    found[name][rank] = said.read_text()
        return found


def _work(rank: int, world: int, folder: str, checks: Mapping[str, Check]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    for number, (_, check) in enumerate(checks.items()):
        torch.manual_seed(0)
        try:
            check()
            text = ""
        except BaseException:
            text = traceback.format_exc()
        (Path(folder) / f"{number}-{rank}").write_text(text)
        if "gloo" in text.lower():
            break
    os._exit(0)  # a group whose other members are gone may hang on its way out


def alone() -> distributed.ProcessGroup:
    """A process group of this process alone, for what one process would do."""
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    return groups[distributed.get_rank()]
