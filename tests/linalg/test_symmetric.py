"""Decompositions that do not give up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfacopt.linalg.symmetric import damped_inverse, eigh, eigh_of_each, refine_basis

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
leads = pytest.mark.parametrize("leading", [(), (1,), (3,)])


def covariance(size: int, rank: int, leading: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(*leading, rank, size, dtype=dtype)
    return rows.mT @ rows / rank


def eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(matrix)


@dtypes
@leads
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_eigh(dtype: torch.dtype, leading: tuple[int, ...], rank: int) -> None:
    matrix = covariance(9, rank, leading, dtype)
    values, vectors, retries = eigh(matrix)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert retries == 0
    assert (values >= 0).all()
    assert (values.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, matrix, **tolerance)
    torch.testing.assert_close(vectors.mT @ vectors, eye_like(matrix), **tolerance)


@given(
    size=st.integers(1, 8),
    rank=st.integers(0, 8),
    scale=st.floats(-12, 12),
    damping=st.floats(-6, 1),
    seed=st.integers(0, 100),
)
def test_the_damped_inverse_is_one(size: int, rank: int, scale: float, damping: float, seed: int) -> None:
    """For any rank and any scale, damping in proportion: the residual is rounding times the condition number."""
    torch.manual_seed(seed)
    rows = torch.randn(rank, size, dtype=torch.float64)
    matrix = 10.0**scale * (rows.mT @ rows)
    added = 10.0 ** (scale + damping)
    value, retries = damped_inverse(matrix, added)
    damped = matrix + added * torch.eye(size, dtype=torch.float64)
    condition = float(torch.linalg.cond(damped))
    torch.testing.assert_close(value @ damped, eye_like(damped), rtol=0, atol=1e-14 * condition * size)
    assert retries == 0


@dtypes
@leads
def test_the_damped_inverse_of_groups(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    matrix = covariance(6, 3, leading, dtype)
    damping = torch.rand(leading, dtype=dtype) + 0.1
    value, _ = damped_inverse(matrix, damping)
    damped = matrix + damping[..., None, None] * eye_like(matrix)
    torch.testing.assert_close(value @ damped, eye_like(matrix), rtol=0, atol=20 * TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("matrix", ["zero", "singular", "tiny", "huge"])
def test_no_damping_is_no_crash(dtype: torch.dtype, matrix: str) -> None:
    given_ = {
        "zero": torch.zeros(4, 4, dtype=dtype),
        "singular": torch.ones(4, 4, dtype=dtype),
        "tiny": 1e-30 * torch.eye(4, dtype=dtype),
        "huge": 1e30 * torch.ones(4, 4, dtype=dtype),
    }[matrix]
    value, _ = damped_inverse(given_, 0.0)
    assert value.isfinite().all()


class Failing:
    """Stands for a LAPACK routine that fails the first few times, as it is told how."""

    def __init__(self, inner: Callable[..., Any], times: int, how: str) -> None:
        self.inner, self.times, self.how, self.calls = inner, times, how, 0

    def __call__(self, matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > self.times:
            return self.inner(matrix, *args, **kwargs)
        if self.how == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        if self.how == "nan":
            values, vectors = self.inner(matrix)
            return values * float("nan"), vectors
        factor, info = self.inner(matrix)
        return factor, torch.ones_like(info)


@dtypes
@leads
@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("times", [1, 2, 3, 6, 1000])
def test_a_failing_eigh_is_tried_again_and_counted(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, leading: tuple[int, ...], how: str, times: int
) -> None:
    """The last resort (it never succeeds) is the singular value decomposition."""
    matrix = covariance(5, 3, leading, dtype)
    failing = Failing(torch.linalg.eigh, times, how)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors, retries = eigh(matrix)
    assert retries == min(times, 6)
    assert values.dtype == vectors.dtype == dtype
    assert (values.diff(dim=-1) >= 0).all()
    rebuilt = vectors * values.unsqueeze(-2) @ vectors.mT
    # Jitter is at most 1e-4 of the mean diagonal.
    torch.testing.assert_close(rebuilt, matrix, rtol=1e-3, atol=1e-3)


@dtypes
@leads
@pytest.mark.parametrize("times", [1, 2, 1000])
def test_a_failing_cholesky_is_tried_again_and_counted(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, leading: tuple[int, ...], times: int
) -> None:
    matrix = covariance(5, 3, leading, dtype)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", Failing(torch.linalg.cholesky_ex, times, "info"))
    value, retries = damped_inverse(matrix, 0.5)
    damped = matrix + 0.5 * eye_like(matrix)
    assert retries == min(times, 2)
    torch.testing.assert_close(value @ damped, eye_like(matrix), rtol=0, atol=20 * TOLERANCE[dtype])


def test_both_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = covariance(5, 3)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", Failing(torch.linalg.cholesky_ex, 1000, "info"))
    monkeypatch.setattr(torch.linalg, "eigh", Failing(torch.linalg.eigh, 1000, "raises"))
    value, retries = damped_inverse(matrix, 0.5)
    damped = matrix + 0.5 * eye_like(matrix)
    assert retries > 2
    torch.testing.assert_close(value @ damped, eye_like(matrix), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_that_says_so(bad: float) -> None:
    matrix = torch.eye(3)
    matrix[0, 0] = bad
    for function in (eigh, lambda m: damped_inverse(m, 0.1)):
        with pytest.raises(torch.linalg.LinAlgError, match=r"\(3, 3\).*not finite"):
            function(matrix)


@given(size=st.integers(1, 8), move=st.floats(0, 0.3), seed=st.integers(0, 100))
def test_a_refined_basis_is_orthonormal(size: int, move: float, seed: int) -> None:
    torch.manual_seed(seed)
    matrix = covariance(size, 2 * size)
    _, vectors, _ = eigh(matrix)
    refined = refine_basis(matrix + move * covariance(size, size), vectors)
    torch.testing.assert_close(refined.mT @ refined, eye_like(matrix), rtol=0, atol=1e-12)


@leads
def test_refining_again_and_again_finds_the_eigenbasis(leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(*leading, 5, 5, dtype=torch.float64))
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    matrix = basis * values @ basis.mT
    start, _ = torch.linalg.qr(basis + 0.2 * torch.randn_like(basis))
    refined = start
    for _ in range(60):
        refined = refine_basis(matrix, refined)
    found = (refined.mT @ matrix @ refined).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, values.expand_as(found), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("silent", [0, 3, 40, 159, 160])
def test_rows_of_zeros_are_eigenvectors(silent: int) -> None:
    matrix = torch.zeros(160, 160, dtype=torch.float64)
    heard = torch.randperm(160)[silent:]
    matrix[heard[:, None], heard] = covariance(160 - silent, 300) if silent < 160 else matrix.new_zeros(0, 0)
    values, vectors, retries = eigh(matrix)
    assert retries == 0
    assert (values.diff() >= 0).all()
    assert int((values < 1e-12).sum()) == silent
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(vectors.mT @ vectors, eye_like(matrix), rtol=0, atol=1e-10)


def test_a_zero_on_the_diagonal_alone_is_no_row_of_zeros() -> None:
    matrix = covariance(160, 300)
    matrix.diagonal()[:20] = 0.0
    values, vectors, _ = eigh(matrix)  # indefinite: what is negative is clamped
    exact = torch.linalg.eigh(matrix)
    torch.testing.assert_close(values, exact.eigenvalues.clamp_min(0.0))
    torch.testing.assert_close(vectors.abs(), exact.eigenvectors.abs())


def test_several_at_once_are_each_as_alone() -> None:
    matrices = [covariance(size, 300) for size in (7, 140, 2, 130)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = eigh_of_each(matrices)
    finally:
        torch.set_num_threads(before)
    for matrix, (values, vectors, retries) in zip(matrices, found, strict=True):
        assert retries == 0
        torch.testing.assert_close(vectors * values @ vectors.mT, matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "size", "leading"), [(torch.float32, 512, ()), (torch.float64, 256, ()), (torch.float64, 256, (2,))]
)
@pytest.mark.parametrize("kind", ["full", "low", "zero", "tiny", "huge", "ones", "indefinite"])
def test_sizes_whose_columns_push_each_other_out_of_the_cache(
    dtype: torch.dtype, size: int, leading: tuple[int, ...], kind: str
) -> None:
    """They are decomposed within a larger matrix, of which nothing may be seen."""
    scale = {"tiny": 1e-30, "huge": 1e30, "zero": 0.0}.get(kind, 1.0)
    matrix = scale * covariance(size, 9 if kind == "low" else 2 * size, leading, dtype)
    if kind == "ones":
        matrix = torch.ones_like(matrix)
    if kind == "indefinite":
        matrix = matrix - 0.9 * scale * eye_like(matrix) * matrix.diagonal(dim1=-2, dim2=-1).amax()
    values, vectors, retries = eigh(matrix)
    truth = torch.linalg.eigvalsh(matrix.double()).clamp_min(0.0)
    rounding = 100 * torch.finfo(dtype).eps * float(matrix.abs().amax()) * size
    assert vectors.shape == matrix.shape
    assert retries == 0
    torch.testing.assert_close(values.double(), truth, rtol=0, atol=rounding)
    identity = vectors.mT.double() @ vectors.double()
    torch.testing.assert_close(identity, eye_like(identity), rtol=0, atol=200 * torch.finfo(dtype).eps)
    if kind != "indefinite":
        torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, matrix, rtol=0, atol=rounding)
