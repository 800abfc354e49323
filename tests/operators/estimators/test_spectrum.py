"""Lanczos and the densities made of it: exact moments, dense eigenvalues, curvlinops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfacopt.linalg import lanczos as lz
from kfacopt.operators import (
    ConvergenceWarning,
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    approximate_boundaries,
    approximate_boundaries_abs,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
    plot_spectral_density,
)
from tests.operators.matrices import SHAPES, Matrix, curvlinops, randn, symmetric, theirs

SPECTRA = {
    "even": torch.linspace(-1.0, 2.0, 60),
    "decaying": torch.logspace(-3, 1, 60),
    "indefinite": torch.cat([-torch.logspace(-3, -1, 30), torch.logspace(-3, 2, 40)]),
    "low rank": torch.cat([torch.zeros(50), torch.linspace(-1.0, 2.0, 10)]),
    "one value": torch.full((8,), 3.0),
    "zero": torch.zeros(5),
    "one": torch.tensor([2.0]),
}
spectra = pytest.mark.parametrize("eigenvalues", SPECTRA.values(), ids=SPECTRA)
ORDERS = [lz.both_ends, lz.smallest, lz.largest, lz.smallest_magnitude, lz.largest_magnitude]


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: matrix @ v


def integral(grid: Tensor, density: Tensor) -> float:
    return float(torch.trapezoid(density, grid))


class TestLanczos:
    """The quadrature."""

    @given(size=st.integers(1, 12), steps=st.integers(1, 8), seed=st.integers(0, 100), whole=st.booleans())
    def test_moments_are_exact_up_to_twice_the_steps(self, size: int, steps: int, seed: int, whole: bool) -> None:
        matrix, start = symmetric(torch.linspace(-1.0, 1.0, size), seed), randn(size, seed=seed)
        found = lz.lanczos(times(matrix), start, steps, reorthogonalize=whole)
        nodes, weights = found.quadrature()
        v = start / start.norm()
        power = v
        for k in range(2 * steps):
            assert float((weights * nodes**k).sum()) == pytest.approx(float(v @ power), abs=1e-10), k
            power = matrix @ power
        assert len(nodes) == len(found.diagonal) == len(found.off_diagonal) + 1 <= steps

    @spectra
    def test_as_many_steps_as_dimensions_find_every_eigenvalue(self, eigenvalues: Tensor) -> None:
        matrix = symmetric(eigenvalues)
        nodes, weights = lz.lanczos(times(matrix), randn(len(matrix)), 200, reorthogonalize=True).quadrature()
        distinct = eigenvalues.double().unique()
        assert len(nodes) >= len(distinct)
        carrying = nodes[weights > 1e-12]  # the others are rounding
        assert float((carrying.unsqueeze(-1) - distinct).abs().min(-1).values.max()) < 1e-9
        assert float((nodes.unsqueeze(-1) - distinct).abs().min(0).values.max()) < 1e-9

    @spectra
    def test_rounding_does_not_spoil_long_runs(self, eigenvalues: Tensor) -> None:
        """Without reorthogonalisation copies appear, but the quadrature's moments stay."""
        matrix, start = symmetric(eigenvalues), randn(len(eigenvalues))
        nodes, weights = lz.lanczos(times(matrix), start, 150).quadrature()
        v = start / start.norm()
        for function in (torch.ones_like, torch.abs, lambda x: x.square().sqrt().exp2(), torch.cos):
            values, vectors = torch.linalg.eigh(matrix)
            wanted = float(((vectors.T @ v).square() * function(values)).sum())
            assert float((weights * function(nodes)).sum()) == pytest.approx(wanted, rel=2e-3)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_operator_that_is_not_symmetric_is_noticed(self, dtype: torch.dtype) -> None:
        matrix = (symmetric(SPECTRA["even"]) + 0.05 * randn(60, 60)).to(dtype)
        start = randn(60).to(dtype)
        with pytest.raises(ValueError, match="needs a symmetric operator"):
            lz.lanczos(times(matrix), start, 20)
        with pytest.raises(ValueError, match="needs a symmetric operator"):
            lz.extreme_eigenvalues(times(matrix), start, lz.both_ends, 2, lambda wanted, _: 0.0 * wanted)

    @settings(max_examples=20)
    @given(seed=st.integers(0, 30), name=st.sampled_from(list(SPECTRA)))
    def test_rounding_is_not_taken_for_asymmetry(self, seed: int, name: str) -> None:
        matrix = symmetric(SPECTRA[name], seed).float()
        noise = torch.finfo(torch.float32).eps * randn(*matrix.shape, seed=seed).float()
        matrix = matrix + 10.0 * noise * matrix.abs().max()
        lz.lanczos(times(matrix), randn(len(matrix), seed=seed).float(), 100)
        lz.extreme_eigenvalues(
            times(matrix), randn(len(matrix), seed=seed).float(), lz.both_ends, 2, lambda w, _: 0 * w, subspace=6
        )

    def test_bad_arguments_are_refused(self) -> None:
        eye = times(torch.eye(3))
        with pytest.raises(ValueError, match="num_steps"):
            lz.lanczos(eye, torch.ones(3), 0)
        with pytest.raises(ValueError, match="not zero"):
            lz.lanczos(eye, torch.zeros(3), 1)
        with pytest.raises(FloatingPointError, match="at step 0"):
            lz.lanczos(lambda v: v * torch.nan, torch.ones(3), 2)
        with pytest.raises(FloatingPointError, match="at step 0"):
            lz.extreme_eigenvalues(lambda v: v * torch.inf, torch.ones(3), lz.smallest, 1, lambda w, _: w)
        with pytest.raises(ValueError, match="subspace must be at least 4, got 2"):
            lz.extreme_eigenvalues(eye, torch.ones(3), lz.smallest, 1, lambda w, _: w, subspace=2)


class TestExtremes:
    """Boundaries of a spectrum."""

    @spectra
    @pytest.mark.parametrize("order", ORDERS, ids=lambda o: o.__name__)
    def test_they_are_those_of_eigh(self, eigenvalues: Tensor, order: lz.Order) -> None:
        matrix = symmetric(eigenvalues)
        found = lz.extreme_eigenvalues(times(matrix), randn(len(matrix)), order, 1, lambda wanted, _: 0.0 * wanted)
        exact = torch.linalg.eigvalsh(matrix)
        wanted = float(exact[order(exact)[0]])
        assert found.converged
        assert found.products <= len(matrix)
        # Where two are as near, either will do.
        assert abs(found.values[0] - wanted) < 1e-9 or "magnitude" in order.__name__
        assert abs(found.values[0]) == pytest.approx(abs(wanted), abs=1e-9)

    @pytest.mark.parametrize("subspace", [6, 8, 20])
    def test_with_restarts(self, subspace: int) -> None:
        matrix = symmetric(SPECTRA["even"])
        found = lz.extreme_eigenvalues(
            times(matrix), randn(60), lz.both_ends, 2, lambda wanted, _: 1e-6 * wanted.abs(), subspace=subspace
        )
        assert found.converged
        assert found.products > subspace
        assert found.values == pytest.approx([-1.0, 2.0], abs=1e-9)  # the error is the square of the bound

    @given(seed=st.integers(0, 50), products=st.integers(1, 40), subspace=st.integers(4, 12))
    def test_the_bounds_hold_whenever_it_stops(self, seed: int, products: int, subspace: int) -> None:
        eigenvalues = SPECTRA["indefinite"].double()
        found = lz.extreme_eigenvalues(
            times(symmetric(eigenvalues, seed)),
            randn(70, seed=seed),
            lz.smallest_magnitude,
            1,
            lambda wanted, _: 1e-3 * wanted.abs(),
            subspace=subspace,
            max_products=products,
        )
        assert found.products <= products
        for value, bound in zip(found.values, found.bounds, strict=True):
            assert float((eigenvalues - value).abs().min()) <= bound + 1e-10

    @pytest.mark.parametrize("given", [None, (None, 2.5), (-1.5, None), (-3.0, 3.0)])
    def test_boundaries_are_curvlinops(self, given: Any) -> None:
        there = pytest.importorskip("curvlinops.papyan2020traces.spectrum")
        matrix = symmetric(SPECTRA["even"])
        ours = approximate_boundaries(Matrix(matrix), tol=0.0, boundaries=given)
        assert ours == pytest.approx(there.approximate_boundaries(theirs(matrix), tol=0.0, boundaries=given), abs=1e-9)
        ours = approximate_boundaries_abs(Matrix(matrix), tol=0.0, boundaries=given)
        wanted = there.approximate_boundaries_abs(theirs(matrix), tol=0.0, boundaries=given)
        assert ours == pytest.approx(wanted, abs=1e-9)

    @spectra
    def test_the_default_accuracy_is_within_the_margin(self, eigenvalues: Tensor) -> None:
        low, high = approximate_boundaries(symmetric(eigenvalues))
        width = float(eigenvalues.max() - eigenvalues.min())
        assert low == pytest.approx(float(eigenvalues.min()), abs=0.02 * width + 1e-6)
        assert high == pytest.approx(float(eigenvalues.max()), abs=0.02 * width + 1e-6)

    def test_a_smallest_magnitude_that_is_not_found_is_said(self) -> None:
        eigenvalues = torch.cat([-torch.logspace(-8, -1, 300), torch.logspace(-8, 2, 500)])
        with pytest.warns(ConvergenceWarning, match="pass `boundaries`") as caught:
            low, high = approximate_boundaries_abs(Matrix(symmetric(eigenvalues)))
        assert caught[0].filename == __file__
        assert 0.0 <= low <= 1e-8
        assert high == pytest.approx(100.0, rel=0.01)

    def test_bad_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"got 2\.0 and 1\.0"):
            approximate_boundaries(torch.eye(3), boundaries=(2.0, 1.0))
        with pytest.raises(ValueError, match="tolerance"):
            approximate_boundaries(torch.eye(3), tol=-1.0)
        with pytest.raises(ValueError, match="square"):
            approximate_boundaries(torch.ones(3, 4))


CACHED: dict[Any, Any] = {
    lanczos_approximate_spectrum: LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum: LanczosApproximateLogSpectrumCached,
}
functions = pytest.mark.parametrize("function", list(CACHED), ids=lambda f: f.__name__)


def of_cached(function: Any, made: Any, **options: Any) -> tuple[Tensor, Tensor]:
    log = "log" in function.__name__
    found: tuple[Tensor, Tensor] = getattr(made, f"approximate_{'log_' if log else ''}spectrum")(**options)
    return found


@functions
@pytest.mark.parametrize(
    "options",
    [
        {"ncv": 5, "boundaries": (0.01, 2.0)},
        {"ncv": 12, "boundaries": (0.2, 3.0), "num_repeats": 3, "num_points": 100, "kappa": 2.0, "margin": 0.2},
        {"ncv": 4, "boundaries": (0.01, None), "boundaries_tol": 0.0},
        {"ncv": 8, "boundaries": None, "boundaries_tol": 0.0, "num_repeats": 2, "kappa": 1.1},
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_same_seed_gives_what_curvlinops_gives(function: Any, options: dict[str, Any], wrapped: bool) -> None:
    matrix = symmetric(SPECTRA["even"])
    torch.manual_seed(3)
    ours = function(Matrix(matrix) if wrapped else matrix, **options)
    torch.manual_seed(3)
    there = getattr(curvlinops, function.__name__)(theirs(matrix), **options)
    for found, wanted in zip(ours, there, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    generated = function(matrix, **options, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(generated, ours)


@functions
def test_cached_is_curvlinops_and_makes_no_run_twice(function: Any) -> None:
    matrix, name = symmetric(SPECTRA["even"]), CACHED[function].__name__
    operator = Matrix(matrix)
    torch.manual_seed(3)
    ours = CACHED[function](operator, 7, boundaries=(0.01, 2.0))
    first = of_cached(function, ours, num_repeats=2)
    torch.manual_seed(3)
    there = getattr(curvlinops, name)(theirs(matrix), 7, boundaries=(0.01, 2.0))
    torch.testing.assert_close(first, of_cached(function, there, num_repeats=2), rtol=1e-7, atol=1e-9)
    assert operator.products == 14
    again = of_cached(function, ours, num_repeats=2, kappa=1.5, num_points=50)
    torch.testing.assert_close(
        again, of_cached(function, there, num_repeats=2, kappa=1.5, num_points=50), rtol=1e-7, atol=1e-9
    )
    assert operator.products == 14
    of_cached(function, ours, num_repeats=3)
    assert operator.products == 21


@functions
@spectra
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_density_whatever_the_spectrum(function: Any, eigenvalues: Tensor, dtype: torch.dtype) -> None:
    matrix = symmetric(eigenvalues).to(dtype)
    grid, density = function(matrix, ncv=40, margin=0.3, num_points=4000, kappa=50.0)
    assert grid.dtype == density.dtype == dtype
    assert grid.isfinite().all()
    assert density.isfinite().all()
    assert (grid.diff() > 0).all()
    assert integral(grid, density) == pytest.approx(1.0, abs=0.02)


def test_the_mean_density_has_the_spectrums_moments() -> None:
    """The mean of λ under the density is vᵀ A v; its expectation is the mean eigenvalue."""
    eigenvalues = SPECTRA["indefinite"].double()
    matrix, repeats = symmetric(eigenvalues), 200
    grid, density = lanczos_approximate_spectrum(matrix, 30, 8000, repeats, kappa=1e4, margin=0.3)
    # Of v uniform on the sphere vᵀ A v has variance 2 Var(λ) / (D + 2).
    deviation = math.sqrt(2 * float(eigenvalues.var(correction=0)) / (len(matrix) + 2) / repeats)
    assert integral(grid, density * grid) == pytest.approx(float(eigenvalues.mean()), abs=5 * deviation)
    # As many steps as distinct eigenvalues: the density is that of the eigenvalues, each with its own weight.
    count = float((eigenvalues > 30.0).double().mean())
    above = density * (grid > 30.0)
    assert integral(grid, above) == pytest.approx(count, abs=5 * math.sqrt(2 * count / (len(matrix) + 2) / repeats))


def test_an_operator_on_a_list_of_tensors() -> None:
    matrix = symmetric(torch.linspace(0.0, 1.0, 11))
    options = {"ncv": 5, "generator": torch.Generator().manual_seed(0)}
    grid, density = lanczos_approximate_spectrum(Matrix(matrix, SHAPES, SHAPES), **options)
    options["generator"].manual_seed(0)
    torch.testing.assert_close((grid, density), lanczos_approximate_spectrum(matrix, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ncv": 1}, "ncv must be at least 2"),
        ({"kappa": 1.0}, "kappa must be greater than 1"),
        ({"num_points": 0}, "num_points must be at least 1"),
        ({"num_repeats": 0}, "num_repeats must be at least 1"),
        ({"margin": -0.1}, "margin must not be negative"),
        ({"boundaries": (3.0, 1.0)}, "boundaries must be"),
        ({"A": torch.ones(3, 4)}, "A must be a square matrix, got Tensor of shape"),
        ({"A": torch.ones(3, 3, dtype=torch.int64)}, "real floating-point"),
        ({"A": randn(30, 30)}, "needs a symmetric operator"),
    ],
)
@functions
def test_bad_arguments_are_refused(function: Any, options: dict[str, Any], message: str) -> None:
    options = {"A": torch.diag(torch.arange(5.0)), "ncv": 4, **options}
    with pytest.raises(ValueError, match=message):
        function(**options)


def test_a_logarithm_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon must be positive"):
        lanczos_approximate_log_spectrum(torch.diag(torch.arange(5.0)), 4, boundaries=(0.0, 4.0), epsilon=0.0)


class TestPlot:
    """A picture."""

    def test_every_label_is_drawn_on_logarithmic_axes(self) -> None:
        pyplot = pytest.importorskip("matplotlib.pyplot")
        grid, density = lanczos_approximate_log_spectrum(torch.diag(torch.arange(1.0, 9.0)), 4)
        axes = plot_spectral_density({"Hessian": (grid, density), "GGN": (grid, 2 * density)}, xscale="log")
        assert [t.get_text() for t in axes.get_legend().get_texts()] == ["Hessian", "GGN"]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_ylim()[1] == pytest.approx(4 * float(density.max()))
        torch.testing.assert_close(torch.from_numpy(axes.lines[0].get_ydata()), density.double())
        assert plot_spectral_density({"more": (grid, density)}, axes=axes) is axes
        assert len(axes.lines) == 3
        assert pyplot.get_fignums() == []

    def test_what_cannot_be_drawn_is_refused(self) -> None:
        pytest.importorskip("matplotlib")
        with pytest.raises(ValueError, match="densities is empty"):
            plot_spectral_density({})
        with pytest.raises(ValueError, match=r"densities\['a'\] must be .* got \[3\] and \[4\]"):
            plot_spectral_density({"a": (torch.ones(3), torch.ones(4))})
