"""One page on a training run: its loss, and what curvature did meanwhile, from what was logged.

A run folder is what `scripts/train` or a `CSVLogger` of Lightning writes, with the columns of
`kfacopt.lightning.CurvatureCallback`: `curvature/<name>`, or `curvature/<n>/<name>` of the n-th of several optimizers;
`curvature/<name>/<layer>` of a layer.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kfacopt.optional import required

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.axes import Axes

_CURVATURE = re.compile(r"curvature/(?:(\d+)/)?([A-Za-z_]\w*)(?:/(.+))?$")

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Panel(NamedTuple):
    """Some columns of one unit, drawn over each other.

    Attributes:
        title: Of the vertical axis.
        names: What is drawn: numbers of `health()`, or "loss".
        logarithmic: The vertical axis.
        marked: A number of `health()` whose positive values are marked by dots on the first curve.
        layers: Whether it is of every layer; those that end highest are told apart, the others are grey.
    """

    title: str
    names: tuple[str, ...]
    logarithmic: bool = True
    marked: str | None = None
    layers: bool = False


PANELS = (
    Panel("loss", ("loss",)),
    Panel("step, ms (dots: refreshes)", ("step_ms", "factor_ms"), marked="refresh_ms"),
    Panel("worst condition", ("condition",)),
    Panel("condition of each layer", ("condition",), layers=True),
    Panel("damping", ("damping", "model_damping")),
    Panel("KL divergence of a step", ("kl",)),
    Panel("shortened by", ("kl_scale", "step_size"), logarithmic=False),
    Panel("overhead", ("overhead",), logarithmic=False),
    Panel("reduction ratio ρ", ("rho",), logarithmic=False),
)
"""What a report draws, each panel only where something of it was logged."""

Curve = list[tuple[int, float]]


def report(run_folder: str | Path, path: str | Path | None = None) -> Path:
    """Draw a training run on one page: loss, step times with refreshes, conditions, damping, divergence, overhead.

    Args:
        run_folder: With a `metrics.csv` in it or below it; of several the newest counts.
        path: The picture to write, PNG or whatever else matplotlib knows; default: `report.png` in the folder.

    Returns:
        Where the picture is.

    Raises:
        FileNotFoundError: There is no `metrics.csv`.
        ValueError: Nothing in it can be drawn.
        ImportError: If matplotlib is not installed.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "metrics.csv").write_text("step,train/loss,curvature/damping\\n0,2.0,1.0\\n1,1.5,0.9\\n")
    >>> report(folder).name
    'report.png'
    """
    source = _metrics(Path(run_folder))
    curves = curves_of(source)
    panels = [(panel, _chosen(panel, curves)) for panel in PANELS]
    panels = [(panel, chosen) for panel, chosen in panels if chosen]
    if not panels:
        raise ValueError(
            f"{source} has nothing to draw: no column ends in 'loss' or begins with 'curvature/' "
            "(kfacopt.lightning.CurvatureCallback logs those)"
        )
    figures = required("matplotlib.figure", "train")
    figure = figures.Figure(figsize=(8.0, 0.8 + 1.7 * len(panels)), layout="constrained")
    every_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for (panel, chosen), axes in zip(panels, every_axes, strict=True):
        _draw(panel, chosen, curves, axes)
    every_axes[-1].set_xlabel("step")
    every_axes[0].set_title(str(Path(run_folder)), fontsize=9)
    target = Path(run_folder) / "report.png" if path is None else Path(path)
    figure.savefig(target, dpi=110)
    return target


def curves_of(source: Path) -> dict[str, Curve]:
    """The columns of a `metrics.csv` by name, as (step, value); values that are no numbers are left out."""
    curves: dict[str, Curve] = {}
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                value = _number(text)
                if name not in (None, "step", "epoch") and row.get("step") and math.isfinite(value):
                    curves.setdefault(name, []).append((int(row["step"]), value))
    return curves


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _metrics(folder: Path) -> Path:
    direct = folder / "metrics.csv"
    found = [direct] if direct.is_file() else sorted(folder.rglob("metrics.csv"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"there is no metrics.csv in {folder} or below it: name a folder that scripts/train or a CSVLogger of "
            "Lightning wrote"
        )
    return found[-1]


def _chosen(panel: Panel, columns: Iterable[str]) -> list[str]:
    """The columns that belong on a panel."""
    named = {name: _name(name) for name in columns}
    return [name for name, (what, layer) in named.items() if what in panel.names and bool(layer) == panel.layers]


def _name(column: str) -> tuple[str, str]:
    """What a column is of: a number of `health()` by its name, any loss by "loss"; and of which layer ("": of all)."""
    match = _CURVATURE.match(column)
    if match is not None:
        return match[2], match[3] or ""
    return "loss" if column.endswith("loss") else "", ""


def _draw(panel: Panel, chosen: list[str], curves: dict[str, Curve], axes: Axes) -> None:
    positive = all(value > 0.0 for name in chosen for _, value in curves[name])
    if panel.layers:
        ranked = sorted(chosen, key=lambda name: curves[name][-1][1], reverse=True)
        chosen, others = ranked[: len(_COLOURS)], ranked[len(_COLOURS) :]
        for name in others:
            axes.plot(*zip(*curves[name], strict=True), color="#bbbbbb", linewidth=0.6)
    for name, colour in zip(chosen, _COLOURS * len(chosen), strict=False):
        label = name.removeprefix("curvature/").removeprefix(f"{panel.names[0]}/" if panel.layers else "")
        axes.plot(*zip(*curves[name], strict=True), color=colour, linewidth=1.0, label=label)
        if panel.marked is not None and _name(name)[0] == panel.names[0]:
            times = dict(curves.get(name.replace(panel.names[0], panel.marked), []))
            marks = [(step, value) for step, value in curves[name] if times.get(step, 0.0) > 0.0]
            if marks:
                axes.plot(*zip(*marks, strict=True), ".", color=colour, markersize=4)
    if panel.logarithmic and positive:
        axes.set_yscale("log")
    axes.set_ylabel(panel.title, fontsize=8)
    axes.grid(alpha=0.25)
    if len(chosen) > 1 or panel.layers:
        axes.legend(fontsize=7, loc="upper right")
