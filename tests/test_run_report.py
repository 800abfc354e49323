"""The page on a training run: what is on it, and what is said where there is nothing to draw."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import kfacopt
from kfacopt.run_report import PANELS, _chosen, _draw, curves_of

COLUMNS = "step,epoch,train/loss,val/loss,curvature/condition,curvature/0/step_ms,curvature/0/refresh_ms,other"
LAYERS = "step,curvature/condition,curvature/condition/0.head,curvature/condition/1,curvature/1/condition/enc.layers.0"


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


def test_every_layer_has_its_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(LAYERS + "\n0,9.0,9.0,2.0,1.0\n1,8.0,8.0,3.0,1.5\n")
    curves = curves_of(tmp_path / "metrics.csv")
    chosen = {panel.title: _chosen(panel, curves) for panel in PANELS}
    assert chosen["worst condition"] == ["curvature/condition"]
    assert chosen["condition of each layer"] == LAYERS.split(",")[2:]
    assert kfacopt.report(tmp_path).stat().st_size > 0


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_worst_layers_are_named(count: int) -> None:
    panel = next(panel for panel in PANELS if panel.layers)
    curves = {f"curvature/condition/{n}": [(0, 1.0), (5, 10.0 + n)] for n in range(count)}
    axes = Figure().subplots()
    _draw(panel, list(curves), curves, axes)
    assert len(axes.lines) == count
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == [str(n) for n in range(count)][::-1][:6]
    assert axes.get_yscale() == "log"


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
