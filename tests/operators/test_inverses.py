"""Iterative inverses against dense solves, SciPy and curvlinops."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import lsmr as scipy_lsmr
from torch import Tensor

from kfacopt.operators import (
    CGInverseLinearOperator,
    ConvergenceWarning,
    IdentityLinearOperator,
    LinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from tests.operators.matrices import SHAPES, Matrix, curvlinops, randn, spd, symmetric, theirs

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


def cg(A: LinearOperator) -> LinearOperator:
    return CGInverseLinearOperator(A, tolerance=1e-10)


def exact_lsmr(A: LinearOperator) -> LinearOperator:
    return LSMRInverseLinearOperator(A, atol=1e-13, btol=1e-13, maxiter=100)


def neumann(A: LinearOperator) -> LinearOperator:
    return NeumannInverseLinearOperator(A, num_terms=400, scale=0.18)


INVERSES = [cg, exact_lsmr, neumann]


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_it_is_the_dense_inverse_in_every_format(inverse: Any, columns: int) -> None:
    matrix = spd(11, condition=10.0)
    made = inverse(Matrix(matrix, SHAPES, SHAPES))
    b = randn(11, columns)
    before = b.clone()
    x = made @ b
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), **TIGHT)
    assert torch.equal(b, before)
    assert len(made.stats) == columns
    assert all(s.converged for s in made.stats)
    assert made.SELF_ADJOINT
    assert made.adjoint() is made
    parts = [p.reshape(*s, columns) for p, s in zip(b.split([6, 4, 1]), SHAPES, strict=True)]
    listed = made @ parts
    torch.testing.assert_close(torch.cat([p.reshape(n, columns) for p, n in zip(listed, (6, 4, 1), strict=True)]), x)
    if columns:
        torch.testing.assert_close(made @ b[:, 0], x[:, 0], **TIGHT)


@pytest.mark.parametrize("inverse", INVERSES)
def test_only_square_operators_are_inverted(inverse: Any) -> None:
    with pytest.raises(ValueError, match="only a square operator"):
        inverse(Matrix(randn(11, 11), SHAPES, [(11,)]))
    with pytest.raises(ValueError, match="only a square operator"):
        inverse(Matrix(randn(3, 4)))


@pytest.mark.parametrize("inverse", INVERSES[1:])
def test_the_adjoint_of_an_unsymmetric_inverse(inverse: Any) -> None:
    matrix = spd(6, condition=4.0) + 0.3 * randn(6, 6)
    made = inverse(Matrix(matrix))
    assert not made.SELF_ADJOINT
    dense, adjoint = made @ torch.eye(6, dtype=torch.float64), made.adjoint() @ torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(dense, torch.linalg.inv(matrix), **TIGHT)
    torch.testing.assert_close(adjoint, dense.T, **TIGHT)


class TestConjugateGradients:
    """What is particular to them."""

    def test_its_keywords_are_those_of_curvlinops(self) -> None:
        matrix, b = spd(20), randn(20, 4)
        options = {
            "tolerance": 1e-9,
            "eps": 0.0,
            "stop_updating_after": 1e-10,
            "max_iter": 500,
            "initial_guess": randn(20, 4, seed=5),
            "max_tridiag_iter": 20,
            "n_tridiag": 0,
        }
        x = CGInverseLinearOperator(Matrix(matrix), **options) @ b
        truth = torch.linalg.solve(matrix, b)
        torch.testing.assert_close(x, curvlinops.CGInverseLinearOperator(theirs(matrix), **options) @ b, **TIGHT)
        torch.testing.assert_close(x, truth, **TIGHT)

    @given(seed=st.integers(0, 50), tolerance=st.sampled_from([1e-2, 1e-5, 1e-9]), columns=st.integers(1, 3))
    def test_every_column_is_within_the_tolerance(self, seed: int, tolerance: float, columns: int) -> None:
        matrix = spd(15, condition=1e3, seed=seed)
        # Of very different lengths: a mean over them would hide the worst.
        b = randn(15, columns, seed=seed) * torch.logspace(0, -14, columns, dtype=torch.float64)
        inverse = CGInverseLinearOperator(Matrix(matrix), tolerance=tolerance)
        x = inverse @ b
        for k, stats in enumerate(inverse.stats):
            residual = float((b[:, k] - matrix @ x[:, k]).norm() / b[:, k].norm())
            assert residual <= 1.01 * tolerance
            assert stats.residual == pytest.approx(residual, rel=1e-3, abs=1e-13)
            assert stats.converged

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_default_tolerance_is_of_the_dtype(self, dtype: torch.dtype) -> None:
        matrix, b = spd(30, dtype=dtype), randn(30).to(dtype)
        x = CGInverseLinearOperator(Matrix(matrix)) @ b
        assert float((b - matrix @ x).norm() / b.norm()) <= 2 * torch.finfo(dtype).eps ** 0.5
        assert x.dtype == dtype

    @pytest.mark.parametrize("form", ["operator", "function", "KFAC-like"])
    def test_a_preconditioner_saves_products(self, form: str) -> None:
        matrix = spd(11, condition=1e6)
        near = torch.linalg.inv(matrix + 0.01 * torch.eye(11, dtype=torch.float64))
        preconditioner: Any = {
            "operator": Matrix(near, SHAPES, SHAPES),
            "function": lambda r: near @ r,
            "KFAC-like": 2.0 * Matrix(near / 2, SHAPES, SHAPES),
        }[form]
        plain = CGInverseLinearOperator(Matrix(matrix, SHAPES, SHAPES), tolerance=1e-8)
        quick = CGInverseLinearOperator(Matrix(matrix, SHAPES, SHAPES), tolerance=1e-8, preconditioner=preconditioner)
        b = randn(11, 2)
        torch.testing.assert_close(quick @ b, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
        plain @ b
        assert max(s.iterations for s in quick.stats) <= 4 < min(s.iterations for s in plain.stats)

    @pytest.mark.parametrize(
        "guess", [randn(11), randn(11, 1), randn(11, 3), [randn(2, 3), randn(4), randn()]], ids=["1", "2", "3", "list"]
    )
    def test_a_start_for_all_columns_or_each(self, guess: Any) -> None:
        matrix, b = spd(11), randn(11, 3)
        inverse = CGInverseLinearOperator(Matrix(matrix, SHAPES, SHAPES), tolerance=1e-10, initial_guess=guess)
        torch.testing.assert_close(inverse @ b, torch.linalg.solve(matrix, b), **TIGHT)

    def test_a_perfect_start_costs_no_iteration(self) -> None:
        matrix, b = spd(11), randn(11, 2)
        inverse = CGInverseLinearOperator(Matrix(matrix), initial_guess=torch.linalg.solve(matrix, b))
        inverse @ b
        assert [s.iterations for s in inverse.stats] == [0, 0]

    @pytest.mark.parametrize(
        ("matrix", "options", "cause"),
        [
            (spd(20, 1e6), {"max_iter": 3}, "max_iter = 3"),
            (symmetric(torch.linspace(-1.0, 2.0, 10)), {}, "not positive definite"),
            (spd(20), {"tolerance": 1e-11, "stop_updating_after": 1e-4}, "stop_updating_after"),
            (spd(20, 1e2, dtype=torch.float32), {"tolerance": 1e-9}, "rounding in torch.float32"),
        ],
    )
    def test_what_did_not_converge_is_said_with_its_cause(self, matrix: Tensor, options: Any, cause: str) -> None:
        inverse = CGInverseLinearOperator(Matrix(matrix), **options)
        b = randn(len(matrix), 2).to(matrix.dtype)
        with pytest.warns(ConvergenceWarning, match=cause) as caught:
            inverse @ b
        assert caught[0].filename == __file__
        assert not all(s.converged for s in inverse.stats)

    def test_columns_that_converged_are_not_blamed(self) -> None:
        matrix, b = spd(20), randn(20, 3)
        b[:, 1] = 0.0
        inverse = CGInverseLinearOperator(Matrix(matrix), max_iter=2)
        with pytest.warns(ConvergenceWarning, match="2 of 3 columns"):
            x = inverse @ b
        assert torch.equal(x[:, 1], torch.zeros(20, dtype=torch.float64))
        assert [s.converged for s in inverse.stats] == [False, True, False]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_tridiag": 1}, "n_tridiag must be 0"),
            ({"tolerance": -1.0}, "tolerance must not be negative"),
            ({"eps": -1.0}, "eps must not be negative"),
            ({"max_iter": 0}, "max_iter must be at least 1"),
            ({"initial_guess": randn(3)}, r"tensor of shape \[11\]"),
            ({"preconditioner": IdentityLinearOperator([(3,)])}, "differ in in_shape"),
            ({"preconditioner": IdentityLinearOperator([(11,)])}, "differ in dtype"),
        ],
    )
    def test_bad_arguments_are_refused_at_once(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CGInverseLinearOperator(Matrix(spd(11)), **options)

    def test_shapes_that_do_not_fit_in_a_product(self) -> None:
        with pytest.raises(ValueError, match="initial_guess has 2 columns"):
            CGInverseLinearOperator(Matrix(spd(11)), initial_guess=randn(11, 2)) @ randn(11, 3)
        with pytest.raises(ValueError, match="preconditioner turned shape"):
            CGInverseLinearOperator(Matrix(spd(11)), preconditioner=lambda r: r[:5]) @ randn(11)
        with pytest.raises(FloatingPointError):
            CGInverseLinearOperator(Matrix(spd(3))) @ torch.tensor([1.0, torch.nan, 0.0], dtype=torch.float64)

    def test_the_adjoint_of_an_operator_that_does_not_know_it_is_symmetric(self) -> None:
        half = spd(5)
        squared = Matrix(half) @ Matrix(half)
        inverse = CGInverseLinearOperator(squared, tolerance=1e-10)
        assert not inverse.SELF_ADJOINT
        b = randn(5)
        torch.testing.assert_close(inverse.adjoint() @ b, torch.linalg.solve(half @ half, b), **TIGHT)


class TestLSMR:
    """Every figure is SciPy's."""

    @pytest.mark.parametrize("damp", [0.0, 0.3])
    @pytest.mark.parametrize("options", [{}, {"atol": 1e-3, "btol": 1e-2}, {"conlim": 2.0}, {"maxiter": 2}, {"x0": 1}])
    def test_it_stops_where_scipy_does(self, damp: float, options: dict[str, Any]) -> None:
        matrix, b = randn(8, 8) + 4.0 * torch.eye(8, dtype=torch.float64), randn(8, 3, seed=2)
        b[:, 1] = 0.0
        options = {"damp": damp, **options}
        if "x0" in options:
            options["x0"] = randn(8, seed=7)
        inverse = LSMRInverseLinearOperator(Matrix(matrix), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            x = inverse @ b
        if "x0" in options:
            options["x0"] = options["x0"].numpy()
        for k, info in enumerate(inverse.stats):
            if k == 1 and "x0" in options:  # SciPy gives 0 and the figures of x0
                wanted = torch.linalg.solve(
                    matrix.T @ matrix + damp**2 * torch.eye(8, dtype=b.dtype), damp**2 * randn(8, seed=7)
                )
                torch.testing.assert_close(x[:, k], wanted, rtol=1e-5, atol=1e-5)
                continue
            there = scipy_lsmr(matrix.numpy(), b[:, k].numpy(), **options)
            torch.testing.assert_close(x[:, k], torch.from_numpy(there[0]), rtol=1e-9, atol=1e-9)
            assert (info.istop, info.itn) == there[1:3]
            # Residuals that have gone down to rounding differ by rounding.
            assert info[2:] == pytest.approx(there[3:], rel=1e-7, abs=1e-8)

    def test_it_is_curvlinops(self) -> None:
        matrix, b = randn(12, 12), randn(12, 2, seed=2)
        options = {"atol": 1e-12, "btol": 1e-12, "maxiter": 40, "damp": 0.1}
        ours = LSMRInverseLinearOperator(Matrix(matrix), **options) @ b
        torch.testing.assert_close(ours, curvlinops.LSMRInverseLinearOperator(theirs(matrix), **options) @ b, **TIGHT)

    def test_a_singular_operator_has_its_pseudo_inverse(self) -> None:
        matrix, b = symmetric(torch.tensor([0.0, 0.0, 1.0, 2.0, -3.0])), randn(5)
        inverse = LSMRInverseLinearOperator(Matrix(matrix), atol=1e-12, btol=1e-12)
        torch.testing.assert_close(inverse @ b, torch.linalg.pinv(matrix, rtol=1e-10) @ b, **TIGHT)
        assert inverse.stats[0].istop == 2

    def test_a_column_that_is_done_costs_no_more_products(self) -> None:
        matrix = torch.diag(torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
        b = torch.tensor([[1.0, 1.0, 0, 0, 0], [0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64).T
        operator = Matrix(matrix)
        inverse = LSMRInverseLinearOperator(operator)
        torch.testing.assert_close(inverse @ b, b / matrix.diagonal().unsqueeze(-1), rtol=1e-6, atol=1e-6)
        assert [s.itn for s in inverse.stats] == [1, 4]
        # One product to begin with and two in each iteration; A is its own adjoint.
        assert operator.products == (1 + 2 * 1) + (1 + 2 * 4)

    def test_float32(self) -> None:
        matrix, b = spd(10, dtype=torch.float32), randn(10).float()
        x = LSMRInverseLinearOperator(Matrix(matrix), maxiter=100) @ b
        assert x.dtype == torch.float32
        assert float((b - matrix @ x).norm() / b.norm()) < 1e-4  # atol · cond

    @pytest.mark.parametrize(("options", "cause"), [({"maxiter": 2}, "maxiter was"), ({"conlim": 2.0}, "conlim = 2")])
    def test_what_did_not_converge_is_said_with_its_cause(self, options: Any, cause: str) -> None:
        with pytest.warns(ConvergenceWarning, match=cause) as caught:
            LSMRInverseLinearOperator(Matrix(spd(8)), **options) @ randn(8)
        assert caught[0].filename == __file__

    def test_bad_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="show=True"):
            LSMRInverseLinearOperator(Matrix(spd(3)), show=True)
        with pytest.raises(ValueError, match=r"atol = -1.0"):
            LSMRInverseLinearOperator(Matrix(spd(3)), atol=-1.0) @ randn(3)
        with pytest.raises(ValueError, match=r"shape \[3\]"):
            LSMRInverseLinearOperator(Matrix(spd(3)), x0=randn(4))
        with pytest.raises(FloatingPointError):
            LSMRInverseLinearOperator(Matrix(spd(2))) @ torch.tensor([1.0, torch.inf], dtype=torch.float64)

    def test_none_is_scipys_default(self) -> None:
        b = randn(6)
        given = LSMRInverseLinearOperator(Matrix(spd(6)), atol=None, btol=None, conlim=None)
        torch.testing.assert_close(given @ b, LSMRInverseLinearOperator(Matrix(spd(6))) @ b, rtol=0, atol=0)


class TestNeumann:
    """A truncated series, term by term as curvlinops'."""

    @pytest.mark.parametrize(("num_terms", "scale"), [(0, 1.0), (1, 0.5), (20, 0.1)])
    def test_it_is_curvlinops(self, num_terms: int, scale: float) -> None:
        matrix, b = spd(7, 5.0) / 4, randn(7, 2)
        ours = NeumannInverseLinearOperator(Matrix(matrix), num_terms, scale) @ b
        there = curvlinops.NeumannInverseLinearOperator(theirs(matrix), num_terms=num_terms, scale=scale) @ b
        torch.testing.assert_close(ours, there, rtol=1e-13, atol=1e-13)

    def test_its_residual_is_that_without_the_last_term(self) -> None:
        matrix, b = spd(7, 5.0), randn(7)
        shorter = NeumannInverseLinearOperator(Matrix(matrix), 9, 0.2) @ b
        inverse = NeumannInverseLinearOperator(Matrix(matrix), 10, 0.2)
        inverse @ b
        assert inverse.stats[0].residual == pytest.approx(float((b - matrix @ shorter).norm() / b.norm()))

    def test_divergence_is_said(self) -> None:
        inverse = NeumannInverseLinearOperator(Matrix(spd(5, 10.0)), num_terms=20)
        with pytest.warns(ConvergenceWarning, match="the series diverges") as caught:
            inverse @ randn(5)
        assert caught[0].filename == __file__
        with pytest.raises(ValueError, match="NaN after term"):
            NeumannInverseLinearOperator(Matrix(spd(5, 10.0)), num_terms=2000) @ randn(5)
        with pytest.warns(ConvergenceWarning):
            NeumannInverseLinearOperator(Matrix(spd(5, 10.0)), num_terms=2000, check_nan=False) @ randn(5)
        with pytest.raises(ValueError, match="num_terms"):
            NeumannInverseLinearOperator(Matrix(spd(5)), num_terms=-1)
