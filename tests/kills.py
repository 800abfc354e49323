"""Training runs in processes that are killed: what a run left in its folder is all that the next one has.

A run is forked from a process that has imported everything and computed nothing, so that a hundred take seconds.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kfacopt

Run = Callable[[Path, int], None]
"""A training in a folder up to so many steps, from the newest checkpoint there if there is one."""

FILE = "last.ckpt"


def plain_loop(folder: Path, steps: int) -> None:
    """Dropout, a scheduler, schedules of the curvature; a checkpoint after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Dropout(0.2), nn.LayerNorm(24), nn.Linear(24, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(model, criterion, factor_every=2, refresh_every=5)
    scheduler = kfacopt.schedules.to_zero(optimizer, 10_000)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    losses: list[float] = []
    if (folder / FILE).exists():
        stored = torch.load(folder / FILE, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(stored[name])
        torch.set_rng_state(stored["generator"])
        losses = stored["losses"]
    while len(losses) < steps:
        x = torch.randn(16, 8)
        loss = criterion(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        kfacopt.save_checkpoint(state | {"generator": torch.get_rng_state(), "losses": losses}, folder / FILE)


def losses_in(folder: Path) -> list[float]:
    """The curve of a folder's checkpoint, which must be whole if there is one; [] without."""
    if not (folder / FILE).exists():
        return []
    stored = torch.load(folder / FILE, weights_only=True)
    found = stored["losses"] if "losses" in stored else stored["callbacks"]["Curve"]["losses"]
    return list(found)


def forked(work: Callable[[], None]) -> int:
    """Do something in a process of its own; returns the process' number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def ended(child: int) -> int:
    """Wait for a process; what it returned, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- moments within a save ---------------------------------------------------------------------------


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_written() -> None:
    """`torch.save` gets as far as half of the bytes."""
    whole = torch.save

    def half(state: Any, file: Any, *rest: Any) -> None:
        whole(state, file, *rest)
        file.flush()
        os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size // 2)
        _die()

    torch.save = half


def _before_the_rename() -> None:
    os.replace = _die


def _after_the_rename() -> None:
    rename = os.replace

    def last(*places: Any) -> None:
        rename(*places)
        _die()

    os.replace = last


MOMENTS: dict[str, Callable[[], None]] = {
    "half written": _half_written,
    "before the rename": _before_the_rename,
    "after the rename": _after_the_rename,
}


def killed_while_saving(run: Run, folder: Path, prepare: Callable[[], None], steps: int) -> None:
    """Train some steps in peace, and then one whose checkpoint is never done."""

    def work() -> None:
        run(folder, steps)
        prepare()
        run(folder, steps + 1)

    assert ended(forked(work)) == -signal.SIGKILL


# -- random moments ----------------------------------------------------------------------------------


def killed_at_random(run: Run, folder: Path, steps: int, kills: int, longest: float) -> list[float]:
    """Start again and again, kill after up to `longest` seconds; the curve in the end.

    Whoever has trained to the end begins anew in an empty folder, so that all kills hit a run.
    """
    done, curve = 0, []
    while done < kills or len(curve) < steps:
        child = forked(lambda: run(folder, steps))
        if done < kills:
            time.sleep(random.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        assert status in (0, -signal.SIGKILL), f"a run ended with {status}"
        done += status != 0
        before, curve = curve, losses_in(folder)
        assert curve[: len(before)] == before, "a step was lost, or another one taken"
        left = {path.name for path in folder.iterdir()}
        assert left <= {FILE, f".{FILE}.part"}, f"left over: {left}"
        if len(curve) == steps and done < kills:
            (folder / FILE).unlink()
            curve = []
    return curve


# -- a full disk ---------------------------------------------------------------------------------------


def full_disk(run: Run, folder: Path, steps: int) -> str:
    """Train on when no file may grow beyond a thousand bytes: what is said."""
    said = folder.parent / "said"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            run(folder, steps)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.write_text(f"{type(error).__name__}: {error}")

    assert ended(forked(work)) == 0
    return said.read_text()


def check(run: Run, folder: Path, kills: int, longest: float, steps: int = 24) -> None:
    """All of it, against a run that nothing happens to."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    assert ended(forked(lambda: run(whole, steps))) == 0
    expected = losses_in(whole)
    assert len(expected) == steps
    cut = folder / "cut"
    cut.mkdir()
    for name, prepare in MOMENTS.items():
        before = len(losses_in(cut))
        killed_while_saving(run, cut, prepare, before + 3)
        assert len(losses_in(cut)) == before + 3 + (name == "after the rename"), name
    message = full_disk(run, cut, steps)
    assert message.startswith("OSError: [Errno 27]"), message
    assert str(cut / FILE) in message, message
    assert [path.name for path in cut.iterdir()] == [FILE], "the full disk leaves the old file and nothing else"
    found = killed_at_random(run, cut, steps, kills, longest)
    assert found == expected, "the resumed curve is another one"


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen: Run = plain_loop
    if sys.argv[1] == "lightning":
        from tests.lightning.killed import lightning as chosen
    random.seed(int(sys.argv[4]))
    check(chosen, Path(sys.argv[2]), kills=int(sys.argv[3]), longest=float(sys.argv[5]))
    print("held")
