"""Pictures of spectra. matplotlib is imported when a picture is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from kfacopt.optional import required

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.axes import Axes


def plot_spectral_density(
    densities: Mapping[str, tuple[Tensor, Tensor]],
    *,
    axes: Axes | None = None,
    floor: float = 1e-5,
    xscale: str = "linear",
) -> Axes:
    """Draw spectral densities over each other, on a logarithmic axis.

    Args:
        densities: Label to grid and density, `[num_points]` each, as the functions of `spectrum` return them.
        axes: Where to draw; default: a new figure (`axes.figure.savefig(...)`), of which pyplot knows nothing.
        floor: Densities below this fraction of the largest are not drawn.
        xscale: matplotlib's name of the scale of the eigenvalues: `"log"` for a logarithmic grid.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or a grid and its density differ in shape.

    >>> import torch
    >>> grid = torch.linspace(0.0, 1.0, 5)
    >>> plot_spectral_density({"Hessian": (grid, grid), "GGN": (grid, 2 * grid)}).get_xlabel()
    'eigenvalue'
    """
    figures = required("matplotlib.figure", "operators")
    if not densities:
        raise ValueError("densities is empty: give at least one label with a grid and a density")
    for label, (grid, density) in densities.items():
        if grid.ndim != 1 or grid.shape != density.shape:
            raise ValueError(
                f"densities[{label!r}] must be a grid and a density of the same shape [num_points], got "
                f"{list(grid.shape)} and {list(density.shape)}"
            )
    if axes is None:
        axes = figures.Figure(figsize=(6.0, 4.0), layout="constrained").subplots()
    highest = 0.0
    for label, (grid, density) in densities.items():
        axes.plot(*(x.detach().double().cpu().numpy() for x in (grid, density)), label=label)
        highest = max(highest, float(density.max()))
    axes.set_xscale(xscale)
    if highest > 0.0:
        axes.set_yscale("log")
        axes.set_ylim(floor * highest, 2.0 * highest)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("spectral density")
    axes.legend()
    return axes
