"""Lightning's checkpoints, written beside their place and renamed. (Kills: `tests/test_checkpoints.py`.)"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kfacopt.lightning import AtomicCheckpointIO
from tests.lightning.harness import Toy, regression, trainer


def test_nothing_is_copied_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move between disks is a copy, which can be cut in two; Lightning's own plugin moves."""

    def moved(*places: Any) -> None:
        raise AssertionError(f"moved {places}")

    monkeypatch.setattr(shutil, "move", moved)
    fitted = trainer(tmp_path, plugins=[AtomicCheckpointIO()], max_epochs=1)
    fitted.fit(regression(), Toy())
    fitted.save_checkpoint(tmp_path / "deep" / "down" / "last.ckpt")
    stored = torch.load(tmp_path / "deep" / "down" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == fitted.global_step == 6
    assert len(list((tmp_path / "deep" / "down").iterdir())) == 1


def test_options_of_remote_storage_are_refused_as_lightning_does(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={})
