"""A checkpoint is whole or not there, whatever happens to process or disk; and what resumes, resumes exactly."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kfacopt import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STATE = {"weight": torch.arange(1000.0), "step": 3}


@contextmanager
def small_files() -> Iterator[None]:
    """No file grows beyond a thousand bytes, as on a disk that is full; nor does the log that pytest writes to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def kill(kind: str, folder: Path, kills: int, longest: float) -> None:
    """`tests/kills.py` in a fresh process, which has computed nothing before it forks."""
    command = [sys.executable, "-m", "tests.kills", kind, str(folder), str(kills), "0", str(longest)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "held", done.stdout + done.stderr


# The longest time until a kill is about what a start takes and some steps.
kinds = pytest.mark.parametrize(("kind", "longest"), [("plain", 0.15), ("lightning", 0.4)])


@kinds
def test_a_killed_run_goes_on_as_if_nothing_had_been(kind: str, longest: float, tmp_path: Path) -> None:
    """Killed at three moments within a save, on a full disk, and at random; see `tests/kills.py`."""
    kill(kind, tmp_path / "runs", kills=3, longest=longest)


@pytest.mark.slow
@kinds
def test_a_hundred_kills(kind: str, longest: float, tmp_path: Path) -> None:
    kill(kind, tmp_path / "runs", kills=100, longest=longest)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"step": 1}, path)
    old = path.read_bytes()
    said = r"File too large: .*older one at its place is untouched: '.*/last\.pt'"
    with small_files(), pytest.raises(OSError, match=said):
        save_checkpoint(STATE, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/last\.pt"):
        save_checkpoint(STATE, tmp_path / "nowhere" / "last.pt")


def test_what_cannot_be_pickled_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """An error that is not the disk's stays as it is, even where one of the disk is being handled."""
    path = tmp_path / "last.pt"
    save_checkpoint({"step": 1}, path)
    try:
        raise OSError("of before")
    except OSError:
        with pytest.raises(Exception, match="pickle") as caught:
            save_checkpoint({"step": lambda: 2}, path)
    assert not isinstance(caught.value, OSError)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_left_by_a_kill_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.part").write_bytes(b"half" * 10_000)
    save_checkpoint(STATE, tmp_path / "last.pt")
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["weight"], STATE["weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
