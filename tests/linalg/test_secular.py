"""The trust-region subproblem against its solution in the eigenbasis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfacopt.linalg.lanczos import lanczos
from kfacopt.linalg.secular import trust_region_step


class Dense:
    """A symmetric matrix with given eigenvalues, which counts its factorisations."""

    def __init__(self, eigenvalues: Tensor, seed: int) -> None:
        size = len(eigenvalues)
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.eigenvalues, self.vectors = eigenvalues.double().sort().values, torch.linalg.qr(random)[0]

    def positive_definite(self, damping: float) -> bool:
        return bool((self.eigenvalues + damping > 0).all())

    def solve(self, v: Tensor, damping: float) -> Tensor:
        inverse = (self.vectors / (self.eigenvalues + damping)) @ self.vectors.mT
        return inverse @ v

    def model(self, gradient: Tensor, step: Tensor) -> float:
        inside = self.vectors.mT @ step
        return float(gradient @ step + 0.5 * (inside.square() * self.eigenvalues).sum())

    def best(self, gradient: Tensor, radius: float) -> float:
        """The least value within the radius, by bisection of the secular equation."""
        inside, lowest = self.vectors.mT @ gradient, float(self.eigenvalues[0])

        def step(shift: float) -> Tensor:
            return -inside / (self.eigenvalues + shift)

        def value(d: Tensor) -> float:
            return float(inside @ d + 0.5 * (d.square() * self.eigenvalues).sum())

        low = max(0.0, -lowest) + 1e-12 * max(1.0, abs(lowest))
        if float(step(low).norm()) <= radius:  # inside the region, or the hard case
            d = step(low)
            if lowest < 0:
                d[0] = (
                    d[0].sign() * (radius**2 - d[1:].square().sum()).clamp_min(0.0).sqrt()
                    if d[0] != 0
                    else (radius**2 - d[1:].square().sum()).clamp_min(0.0).sqrt()
                )
            return value(d)
        high = low + float(gradient.norm()) / radius + float(self.eigenvalues.abs().max())
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if float(step(middle).norm()) > radius else (low, middle)
        return value(step(high))


SPECTRA = {
    "indefinite": lambda g: torch.randn(12, generator=g),
    "positive": lambda g: torch.rand(12, generator=g) + 0.1,
    "semi-definite": lambda g: torch.cat([torch.zeros(6), torch.rand(6, generator=g)]),
    "wide": lambda g: torch.randn(12, generator=g) * torch.logspace(-5, 3, 12),
    "negative": lambda g: -torch.rand(12, generator=g),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@given(
    seed=st.integers(0, 10_000),
    radius=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    shift=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
    hard=st.booleans(),
)
def test_step_is_next_to_the_best(spectrum: str, seed: int, radius: float, shift: float, hard: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    system = Dense(SPECTRA[spectrum](generator), seed)
    gradient = torch.randn(12, generator=generator, dtype=torch.float64)
    if hard:  # nothing of the lowest eigenvector
        gradient -= (gradient @ system.vectors[:, 0]) * system.vectors[:, 0]
    found = trust_region_step(system, gradient, radius, shift=shift, tolerance=0.1)
    assert float(found.step.norm()) <= 1.1 * radius * (1 + 1e-9)
    best = system.best(gradient, radius)
    # A share of 1 - (1 - tolerance)² may be missed; a step up to a tenth too long may gain.
    assert system.model(gradient, found.step) <= (0.81 - 1e-3) * best
    assert system.positive_definite(found.shift)


def test_an_interior_minimum_is_newtons_step() -> None:
    system = Dense(torch.tensor([1.0, 2.0, 5.0]), 0)
    gradient = torch.ones(3, dtype=torch.float64)
    found = trust_region_step(system, gradient, 100.0, shift=1.0, smallest_shift=1e-12)
    torch.testing.assert_close(found.step, -system.solve(gradient, 0.0), rtol=1e-9, atol=0.0)
    assert not found.hard_case


def test_the_hard_case_goes_to_the_boundary() -> None:
    """At a saddle point the gradient does not see the way down."""
    system = Dense(torch.tensor([-1.0, 1.0, 2.0]), 0)
    gradient = 0.1 * system.vectors[:, 2]
    found = trust_region_step(system, gradient, 1.0, shift=1e-3)
    assert found.hard_case
    assert float(found.step.norm()) == pytest.approx(1.0)
    assert abs(float(found.step @ system.vectors[:, 0])) > 0.9


def test_a_good_first_shift_saves_factorisations() -> None:
    system = Dense(torch.linspace(-1.0, 3.0, 12), 0)
    gradient = torch.ones(12, dtype=torch.float64)
    cold = trust_region_step(system, gradient, 0.5, shift=1e-6)
    warm = trust_region_step(system, gradient, 0.5, shift=cold.shift)
    assert warm.factorizations == 1 < cold.factorizations


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match="radius and gradient norm must be positive and finite"):
        trust_region_step(Dense(torch.ones(2), 0), torch.ones(2).double(), radius, shift=1.0)


@given(size=st.integers(1, 12), rank=st.integers(1, 15), seed=st.integers(0, 1000))
def test_krylov_basis_and_image(size: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    space = lanczos(matrix.__matmul__, start, rank, reorthogonalize=True)
    assert space.basis is not None
    width = space.basis.shape[1]
    assert width == min(size, rank)
    torch.testing.assert_close(space.basis.mT @ space.basis, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(space.dense(), space.basis.mT @ matrix @ space.basis, rtol=0, atol=1e-11)


def test_krylov_stops_where_the_space_is_exhausted() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, 2.0]))
    space = lanczos(lambda v: matrix @ v, torch.ones(3), num_steps=3, reorthogonalize=True)
    assert space.basis is not None
    assert space.basis.shape == (3, 2)
