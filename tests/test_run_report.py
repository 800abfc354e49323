"""The page on a training run: what is on it, and what is said where there is nothing to draw."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import kfacopt
from kfacopt.run_report import PANELS, _chosen, curves_of

COLUMNS = "step,epoch,train/loss,val/loss,curvature/condition,curvature/0/step_ms,curvature/0/refresh_ms,other"


def written(folder: Path, *rows: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    return folder


def test_columns_find_their_panels(tmp_path: Path) -> None:
    rows = ("0,0,2.0,,10.0,3.0,1.0,7", "1,0,1.0,nan,,2.0,0.0,7", "2,1,,1.5,,,,7")
    curves = curves_of(written(tmp_path, *rows) / "metrics.csv")
    assert curves["train/loss"] == [(0, 2.0), (1, 1.0)]
    assert curves["val/loss"] == [(2, 1.5)]  # what is no number is left out
    chosen = {panel.title.split(",")[0]: _chosen(panel, curves) for panel in PANELS}
    assert {title: names for title, names in chosen.items() if names} == {
        "loss": ["train/loss", "val/loss"],
        "step": ["curvature/0/step_ms"],
        "worst condition": ["curvature/condition"],
    }


def test_the_newest_metrics_below_a_folder_count(tmp_path: Path) -> None:
    old, new = written(tmp_path / "version_0", "0,0,9.0,,,,,"), written(tmp_path / "version_1", "0,0,1.0,,,,,")
    os.utime(old / "metrics.csv", (1, 1))
    picture = kfacopt.report(tmp_path, tmp_path / "page.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert kfacopt.report(new) == new / "report.png"


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no metrics\.csv in .*scripts/train"):
        kfacopt.report(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,accuracy\n0,0.5\n")
    with pytest.raises(ValueError, match="CurvatureCallback logs those"):
        kfacopt.report(tmp_path)
