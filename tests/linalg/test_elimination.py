"""Block elimination against dense solves: definite, indefinite, small and large."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfacopt.linalg.elimination import eliminate
from kfacopt.linalg.refinement import refine
from kfacopt.linalg.symmetric import LinAlgError


def symmetric(size: int, definite: bool, seed: int) -> Tensor:
    """Random; the indefinite one begins with zeros on its diagonal, which need pivots of two rows."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    if definite:
        return matrix @ matrix + size * torch.eye(size, dtype=torch.float64)
    matrix.diagonal()[: size // 2] = 0.0
    return matrix


def check(matrix: Tensor, width: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = len(matrix)
    coupling, r, y = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((size, width), (size, 2), (width, 2))
    )
    step = eliminate(matrix, coupling.clone())
    eigenvalues = torch.linalg.eigvalsh(matrix)
    solved = torch.linalg.solve(matrix, coupling)
    # Backward stable: digits go with the condition.
    tolerance = 1e-14 * size * float(eigenvalues.abs().max() / eigenvalues.abs().min())
    assert step.size == size
    assert step.negative == int((eigenvalues < 0).sum())
    assert step.logabsdet == pytest.approx(float(eigenvalues.abs().log().sum()), abs=10 * tolerance)
    for got, want in (
        (step.adjoint(r), solved.mT @ r),
        (step.schur(), coupling.mT @ solved),
        (step.recover(r, y), torch.linalg.solve(matrix, r - coupling @ y)),
        (step.recover(r, None), torch.linalg.solve(matrix, r)),
    ):
        assert float((got - want).norm()) <= tolerance * (1.0 + float(want.norm()))


@given(size=st.integers(1, 12), width=st.integers(1, 8), definite=st.booleans(), seed=st.integers(0, 1000))
def test_small_blocks(size: int, width: int, definite: bool, seed: int) -> None:
    check(symmetric(size, definite, seed) + 0.1 * torch.eye(size, dtype=torch.float64), width, seed)


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize(("size", "width"), [(300, 280), (257, 30), (100, 500)])
def test_large_blocks(size: int, width: int, definite: bool) -> None:
    check(symmetric(size, definite, 0), width)


@pytest.mark.parametrize("size", [3, 300])
def test_singular_and_not_finite_blocks_are_refused(size: int) -> None:
    with pytest.raises(LinAlgError, match=f"a block of {size} unknowns cannot be eliminated: it is singular"):
        eliminate(torch.diag(torch.tensor([0.0] + [-1.0] * (size - 1))))
    with pytest.raises(LinAlgError, match="entries that are not finite"):
        eliminate(torch.full((size, size), torch.nan))


@given(quality=st.sampled_from([1e-12, 1e-3, 0.3, 3.0]), columns=st.integers(1, 3), seed=st.integers(0, 1000))
def test_refinement_repairs_an_approximate_inverse(quality: float, columns: int, seed: int) -> None:
    """Where the inverse is too poor for plain refinement, GMRES takes over."""
    generator = torch.Generator().manual_seed(seed)
    matrix = symmetric(10, definite=False, seed=seed) + 4.0 * torch.eye(10, dtype=torch.float64)
    spoilt = torch.eye(10, dtype=torch.float64) + quality * torch.randn(10, 10, generator=generator).double()
    inverse = torch.linalg.inv(matrix) @ spoilt
    right = torch.randn(10, columns, generator=generator, dtype=torch.float64)
    result = refine(lambda x: matrix @ x, lambda r: inverse @ r, right, tolerance=1e-10)
    residuals = (right - matrix @ result.solution).norm(dim=0) / right.norm(dim=0)
    assert result.residual == pytest.approx(float(residuals.max()), rel=1e-2, abs=1e-13)
    assert result.residual <= 1e-10


def test_refinement_says_when_it_fails() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    result = refine(lambda x: matrix @ x, lambda r: r, torch.ones(2, 1, dtype=torch.float64), tolerance=1e-10)
    assert result.residual == pytest.approx(0.5**0.5)
    assert result.steps <= 60
