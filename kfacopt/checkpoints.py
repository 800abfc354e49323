"""Checkpoints that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save`, but what was at `path` stays until the new file is whole and on the disk.

    The file is written as `.<name>.part` in the same folder, flushed to the disk, and renamed, which file systems do as
    a whole. A process that is killed at any moment leaves the old checkpoint or the new one at `path`; at most a part
    file beside it, which the next save overwrites. (`torch.save` to a path empties the old file first. Lightning writes
    to the folder for temporary files, and from there copies if that is another disk: `kfacopt.lightning` has a plugin.)

    One process writes a path at a time; of several processes of one training, let the first.

    Args:
        state: What to save, such as a dict of `state_dict()`s.
        path: Of the file; its folder must exist.

    Raises:
        OSError: The disk is full, say. The error names `path`; what was there stays, and nothing new is left.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint({"step": 3}, Path(folder) / "last.pt")
    ...     print(torch.load(Path(folder) / "last.pt", weights_only=True), os.listdir(folder))
    {'step': 3} ['last.pt']
    """
    target = Path(path)
    part, ambient = target.with_name(f".{target.name}.part"), sys.exception()
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        cause = _of_the_system(error, ambient)
        if cause is None:
            raise
        said = f"{cause.strerror}: this checkpoint could not be written; an older one at its place is untouched"
        raise OSError(cause.errno, said, str(target)) from error
    _flush_folder(target.parent)


def _of_the_system(error: BaseException, ambient: BaseException | None) -> OSError | None:
    """The system's error behind one: torch closes its archive all the same, which fails with an error of its own."""
    found: BaseException | None = error
    while found is not None and found is not ambient:
        if isinstance(found, OSError):
            return found
        found = found.__context__
    return None


def _flush_folder(folder: Path) -> None:
    """Have the renaming itself on the disk: else a power failure may bring the old file back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
