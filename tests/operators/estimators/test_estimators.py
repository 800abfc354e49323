"""Estimators of trace, diagonal and norm: against curvlinops, their known variances, and where they are exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfacopt.operators import (
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from kfacopt.operators.estimators.probes import range_of
from tests.operators.matrices import SHAPES, Matrix, curvlinops, randn, symmetric, theirs

# Name, what it estimates, products a share.
TRUTH: dict[Any, tuple[Callable[[Tensor], Tensor], int]] = {
    hutchinson_trace: (torch.trace, 1),
    hutchpp_trace: (torch.trace, 3),
    xtrace: (torch.trace, 2),
    hutchinson_diag: (torch.diagonal, 1),
    xdiag: (torch.diagonal, 2),
    hutchinson_squared_fro: (lambda a: a.square().sum(), 1),
}
estimators = pytest.mark.parametrize("estimate", list(TRUTH), ids=lambda e: e.__name__)
distributions = pytest.mark.parametrize("distribution", ["rademacher", "normal"])
REPEATS = 1500


def options_of(estimate: Any, distribution: str) -> dict[str, Any]:
    return {} if estimate is xdiag else {"distribution": distribution}


def repeated(estimate: Any, A: Any, number: int, distribution: str, repeats: int = REPEATS) -> Tensor:
    """Independent estimates, `[repeats ...]`."""
    generator = torch.Generator().manual_seed(0)
    options = options_of(estimate, distribution)
    return torch.stack([estimate(A, number, generator=generator, **options) for _ in range(repeats)])


def decaying(size: int = 11) -> Tensor:
    """Neither symmetric nor definite."""
    return symmetric(torch.tensor([(-2.0) ** -k for k in range(size)])) + 0.03 * randn(size, size)


@estimators
@distributions
@given(shares=st.integers(1, 3), seed=st.integers(0, 20), wrapped=st.booleans())
def test_the_same_seed_gives_what_curvlinops_gives(
    estimate: Any, distribution: str, shares: int, seed: int, wrapped: bool
) -> None:
    matrix, options = decaying(), options_of(estimate, distribution)
    number = shares * TRUTH[estimate][1]
    torch.manual_seed(seed)
    ours = estimate(Matrix(matrix, SHAPES, SHAPES) if wrapped else matrix, number, **options)
    torch.manual_seed(seed)
    there = getattr(curvlinops, estimate.__name__)(theirs(matrix) if wrapped else matrix, number, **options)
    torch.testing.assert_close(ours, there, rtol=1e-9, atol=1e-11)
    generated = estimate(matrix, number, generator=torch.Generator().manual_seed(seed), **options)
    torch.testing.assert_close(ours, generated, rtol=1e-12, atol=1e-13)


@estimators
@distributions
def test_unbiased(estimate: Any, distribution: str) -> None:
    """The mean of many lies within five standard errors of the truth, in every entry (of at most eleven)."""
    truth, shares = TRUTH[estimate]
    matrix = decaying()
    found = repeated(estimate, matrix, 2 * shares, distribution)
    error = (found.mean(0) - truth(matrix)).abs()
    assert (error <= 5 * found.std(0) / math.sqrt(REPEATS) + 1e-12).all()


@distributions
@pytest.mark.parametrize("estimate", [hutchinson_trace, hutchinson_diag, hutchinson_squared_fro])
def test_the_variance_is_the_known_one(estimate: Any, distribution: str) -> None:
    matrix, number = decaying(), 5
    found = repeated(estimate, matrix, number, distribution).var(0)
    # Fourth moments: 1 and 3.
    normal = distribution == "normal"
    square = matrix.T @ matrix if estimate is hutchinson_squared_fro else matrix
    if estimate is hutchinson_diag:
        own = square.diagonal().square()
        wanted = square.square().sum(1) + (own if normal else -own)
    else:
        part = (square + square.T) / 2
        wanted = 2 * (part.square().sum() - (0.0 if normal else part.diagonal().square().sum()))
    # A sample variance of n has relative error sqrt((kurtosis - 1) / n), here below sqrt(5 / 1500) = 0.06.
    torch.testing.assert_close(found, wanted / number, rtol=0.3, atol=1e-6)


@distributions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("estimate", "rank"), [(hutchpp_trace, 3), (xtrace, 3), (xdiag, 3), (xtrace, 1), (xdiag, 0)])
def test_exact_for_low_rank(estimate: Any, rank: int, dtype: torch.dtype, distribution: str) -> None:
    """Where the range is found whole, the estimate is the truth to rounding."""
    matrix = (randn(30, rank) @ randn(rank, 30, seed=2)).to(dtype)
    truth, shares = TRUTH[estimate]
    for per_share in (rank + 1, rank + 5):
        found = estimate(matrix, per_share * shares, **options_of(estimate, distribution))
        close = 200 * torch.finfo(dtype).eps * max(1.0, float(matrix.abs().max()))
        torch.testing.assert_close(found, truth(matrix), rtol=close, atol=close)


def test_a_sketch_of_low_rank_leaves_the_estimate_unbiased() -> None:
    """Rank above half the budget, but dependent columns: a block that only some of the vectors see."""
    matrix = torch.block_diag(torch.ones(1, 1), torch.zeros(10, 10)).double() + torch.diag(
        torch.tensor([0.0] * 9 + [1e-3, 1e-3], dtype=torch.float64)
    )
    found = repeated(xtrace, matrix, 4, "normal", 400)
    assert abs(float(found.mean() - matrix.trace())) <= 5 * float(found.std()) / 20 + 1e-12
    assert found.isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_the_range_without_each_column(rank: int) -> None:
    columns = randn(9, rank) @ randn(rank, 4, seed=2)
    if rank == 2:  # one column is needed, the others stand for each other
        columns = torch.stack([columns[:, 0], columns[:, 1], 2 * columns[:, 1], -columns[:, 1]], dim=1)
    basis, left_out = range_of(columns)
    assert basis.shape == (9, rank)
    for i in range(4):
        others = columns[:, [j for j in range(4) if j != i]]
        projector = basis @ (torch.eye(rank, dtype=basis.dtype) - left_out[:, [i]] @ left_out[:, [i]].T) @ basis.T
        wanted = others @ torch.linalg.pinv(others, rtol=1e-10)
        torch.testing.assert_close(projector, wanted, rtol=1e-9, atol=1e-9)


def test_better_methods_are_better() -> None:
    """Of a decaying spectrum, at the same budget."""
    matrix = symmetric(torch.tensor([2.0**-k for k in range(30)]))
    deviation = {
        e.__name__: float((repeated(e, matrix, 12, "normal", 200) - matrix.trace()).square().mean().sqrt())
        for e in (hutchinson_trace, hutchpp_trace, xtrace)
    }
    assert 1.5 * deviation["xtrace"] < deviation["hutchpp_trace"] < deviation["hutchinson_trace"] / 3, deviation


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_norm_of_a_matrix_that_is_not_square(shape: tuple[int, int]) -> None:
    matrix = randn(*shape)
    torch.manual_seed(3)
    ours = hutchinson_squared_fro(Matrix(matrix), 4)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, curvlinops.hutchinson_squared_fro(matrix, 4))


@estimators
def test_bad_arguments_are_refused(estimate: Any) -> None:
    shares = TRUTH[estimate][1]
    matrix = torch.eye(12)
    for number in (12, 18):
        with pytest.raises(ValueError, match=f"less than the dimension 12, got {number}"):
            estimate(matrix, number)
    with pytest.raises(ValueError, match="num_matvecs must be a positive"):
        estimate(matrix, 0)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        estimate(torch.ones(12, 12, dtype=torch.int64), shares)
    with pytest.raises(ValueError, match="matrix, got Tensor of shape"):
        estimate(torch.ones(12), shares)
    if shares > 1:
        with pytest.raises(ValueError, match=f"positive multiple of {shares}, got 7"):
            estimate(matrix, 7)
    if estimate is not hutchinson_squared_fro:
        with pytest.raises(ValueError, match="square matrix, got Matrix of shape"):
            estimate(Matrix(randn(4, 5)), shares)
    if estimate is not xdiag:
        with pytest.raises(ValueError, match="'rademacher' or 'normal', got 'cauchy'"):
            estimate(matrix, shares, "cauchy")
