"""Spectral densities by Lanczos (Papyan 2020, JMLR 21); the interface is that of curvlinops 3.0.1.

The density of a D x D matrix, `1/D Σ δ(λ - λ_i)`, is estimated by a few Lanczos runs from random vectors, whose Gauss
quadratures give nodes and weights, and drawn with a Gaussian bump at each node.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kfacopt.linalg.lanczos import Quadrature, lanczos
from kfacopt.operators.estimators.boundaries import (
    Boundaries,
    approximate_boundaries,
    approximate_boundaries_abs,
    checked_symmetric,
)
from kfacopt.operators.estimators.probes import Matrix


def lanczos_approximate_spectrum(
    A: Matrix,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Spectral density of a symmetric operator (Papyan 2020, algorithm 2).

    Args:
        A: Symmetric operator or matrix.
        ncv: Lanczos steps, each a product with A: nodes of the quadrature.
        num_points: Points of the grid.
        num_repeats: Runs from independent random vectors, whose densities are averaged.
        kappa: Width of the bumps, above 1: `σ = 2 / ((ncv - 1) sqrt(8 log kappa))` where the spectrum is [-1, 1].
        boundaries: Smallest and largest eigenvalue; what is None is computed by `approximate_boundaries`.
        margin: Of the grid beyond the boundaries, in units of its width.
        boundaries_tol: Accuracy of the boundaries that are computed.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        Grid and density there, each `[num_points]`.

    Raises:
        ValueError: If A is not square or not symmetric, or an argument is out of range.

    >>> A = torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    >>> grid, density = lanczos_approximate_spectrum(A, ncv=2, num_points=5, kappa=1e6)
    >>> grid.round(decimals=4).tolist(), density.argmin().item()
    ([-0.05, 0.225, 0.5, 0.775, 1.05], 2)
    """
    cached = LanczosApproximateSpectrumCached(A, ncv, boundaries, boundaries_tol, generator=generator)
    return cached.approximate_spectrum(num_repeats, num_points, kappa, margin)


def lanczos_approximate_log_spectrum(
    A: Matrix,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: Boundaries = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Density of the magnitudes `|λ| + epsilon` of a symmetric operator on a logarithmic grid (Papyan 2020, C.7).

    The bumps are Gaussian in the logarithm; the density is with respect to `|λ| + epsilon` itself.

    Args:
        A: Symmetric operator or matrix.
        ncv: Lanczos steps, each a product with A: nodes of the quadrature.
        num_points: Points of the grid.
        num_repeats: Runs from independent random vectors, whose densities are averaged.
        kappa: Width of the bumps, above 1.
        boundaries: Smallest and largest magnitude; what is None is computed by `approximate_boundaries_abs`.
        margin: Of the grid beyond the boundaries, in units of its width, in the logarithm.
        boundaries_tol: Accuracy of the boundaries that are computed.
        epsilon: Shift, in the units of eigenvalues.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Returns:
        Grid (geometric) and density there, each `[num_points]`.

    Raises:
        ValueError: If A is not square or not symmetric, or an argument is out of range.

    >>> A = torch.diag(torch.tensor([-1.0, 1.0, 100.0, -100.0], dtype=torch.float64))
    >>> grid, density = lanczos_approximate_log_spectrum(A, ncv=4, num_points=5, epsilon=0.0, margin=0.0)
    >>> grid.round(decimals=2).tolist()
    [1.0, 3.16, 10.0, 31.62, 100.0]
    """
    cached = LanczosApproximateLogSpectrumCached(A, ncv, boundaries, boundaries_tol, generator=generator)
    return cached.approximate_log_spectrum(num_repeats, num_points, kappa, margin, epsilon)


class _LanczosCached:
    """Lanczos runs that are kept, so that densities with other arguments cost no product."""

    def __init__(self, A: Matrix, ncv: int, generator: torch.Generator | None) -> None:
        checked_symmetric(A)
        if ncv < 2:
            raise ValueError(f"ncv must be at least 2 Lanczos steps, got {ncv}")
        self._A, self._ncv, self._generator = A, ncv, generator
        self._runs: list[Quadrature] = []

    def _quadratures(self, number: int) -> list[Quadrature]:
        if number < 1:
            raise ValueError(f"num_repeats must be at least 1, got {number}")
        while len(self._runs) < number:
            A = self._A
            start = torch.randn(A.shape[1], generator=self._generator, device=A.device, dtype=A.dtype)
            self._runs.append(lanczos(lambda v: self._A @ v, start, self._ncv).quadrature())
        return self._runs[:number]

    def _sigma(self, kappa: float) -> float:
        """Width of the bumps on [-1, 1]."""
        if not kappa > 1.0:
            raise ValueError(f"kappa must be greater than 1, got {kappa}")
        return 2.0 / (self._ncv - 1) / math.sqrt(8.0 * math.log(kappa))

    def _mean_bumps(self, runs: list[Quadrature], grid: Tensor, sigma: float) -> Tensor:
        """Average density of quadratures whose nodes have been brought to [-1, 1]."""
        total = torch.zeros_like(grid)
        for nodes, weights in runs:
            distances = (grid - nodes.unsqueeze(-1)) / sigma
            total += weights @ (-0.5 * distances.square()).exp() / (sigma * math.sqrt(2.0 * math.pi))
        return total / len(runs)

    def _unit_grid(self, num_points: int) -> Tensor:
        if num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {num_points}")
        return torch.linspace(-1.0, 1.0, num_points, device=self._A.device, dtype=self._A.dtype)


class LanczosApproximateSpectrumCached(_LanczosCached):
    """Spectral densities of one symmetric operator; runs are shared between calls.

    Args:
        A: Symmetric operator or matrix.
        ncv: Lanczos steps of a run.
        boundaries: Smallest and largest eigenvalue; what is None is computed by `approximate_boundaries`.
        boundaries_tol: Accuracy of the boundaries that are computed.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Raises:
        ValueError: If A is not square or not symmetric, or an argument is out of range.

    >>> cached = LanczosApproximateSpectrumCached(torch.diag(torch.arange(5.0)), ncv=3)
    >>> wide, narrow = cached.approximate_spectrum(kappa=1.1), cached.approximate_spectrum(kappa=10.0)
    >>> bool(narrow[1].max() > wide[1].max())
    True
    """

    def __init__(
        self,
        A: Matrix,
        ncv: int,
        boundaries: Boundaries = None,
        boundaries_tol: float = 1e-2,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(A, ncv, generator)
        self._boundaries = approximate_boundaries(A, boundaries_tol, boundaries)

    def approximate_spectrum(
        self, num_repeats: int = 1, num_points: int = 1024, kappa: float = 3.0, margin: float = 0.05
    ) -> tuple[Tensor, Tensor]:
        """Grid and density, as `lanczos_approximate_spectrum`; only runs that are missing are made."""
        center, half = _padded(*self._boundaries, margin)
        grid, sigma = self._unit_grid(num_points), self._sigma(kappa)
        runs = [Quadrature((nodes - center) / half, w) for nodes, w in self._quadratures(num_repeats)]
        return center + half * grid, self._mean_bumps(runs, grid, sigma) / half


class LanczosApproximateLogSpectrumCached(_LanczosCached):
    """Densities of the magnitudes of one symmetric operator's eigenvalues; runs are shared between calls.

    Args:
        A: Symmetric operator or matrix.
        ncv: Lanczos steps of a run.
        boundaries: Smallest and largest magnitude; what is None is computed by `approximate_boundaries_abs`.
        boundaries_tol: Accuracy of the boundaries that are computed.
        generator: What draws the vectors; default: torch's global generator of A's device.

    Raises:
        ValueError: If A is not square or not symmetric, or an argument is out of range.

    >>> cached = LanczosApproximateLogSpectrumCached(torch.diag(torch.arange(5.0)), ncv=3)
    >>> [x.shape for x in cached.approximate_log_spectrum(num_points=7)]
    [torch.Size([7]), torch.Size([7])]
    """

    def __init__(
        self,
        A: Matrix,
        ncv: int,
        boundaries: Boundaries = None,
        boundaries_tol: float = 1e-2,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(A, ncv, generator)
        self._boundaries = approximate_boundaries_abs(A, boundaries_tol, boundaries)

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """Grid and density, as `lanczos_approximate_log_spectrum` (whose `kappa` is another by default)."""
        low, high = (b + epsilon for b in self._boundaries)
        if not (low > 0.0 and epsilon >= 0.0):
            raise ValueError(f"epsilon must be positive where an eigenvalue may be zero, got {epsilon}")
        center, half = _padded(math.log(low), math.log(high), margin)
        grid, sigma = self._unit_grid(num_points), self._sigma(kappa)
        runs = [
            Quadrature(((nodes.abs() + epsilon).log() - center) / half, w)
            for nodes, w in self._quadratures(num_repeats)
        ]
        shifted = (center + half * grid).exp()
        return shifted, self._mean_bumps(runs, grid, sigma) / (half * shifted)


def _padded(low: float, high: float, margin: float) -> tuple[float, float]:
    """Center and half width of an interval with a margin."""
    if not margin >= 0.0:
        raise ValueError(f"margin must not be negative, got {margin}")
    width = high - low
    half = (0.5 + margin) * width
    if width <= 1e-12 * max(abs(low), abs(high)):  # one eigenvalue: there is no width to take a margin of
        half = 0.5 * max(abs(low), abs(high)) or 0.5
    return (low + high) / 2, half
