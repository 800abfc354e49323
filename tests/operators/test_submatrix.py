"""Sub-matrices against dense indexing and curvlinops."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfacopt.operators import SubmatrixLinearOperator
from tests.operators.matrices import SHAPES, Matrix, curvlinops, randn, spd, theirs

indices = st.lists(st.integers(0, 10), unique=True)


@given(rows=indices, columns=indices, number=st.integers(0, 2))
def test_it_is_the_dense_submatrix(rows: list[int], columns: list[int], number: int) -> None:
    matrix = randn(11, 11)
    sub = SubmatrixLinearOperator(Matrix(matrix, SHAPES, SHAPES), rows, columns)
    dense = matrix[rows][:, columns]
    x, y = randn(len(columns), number), randn(len(rows), number)
    assert sub.shape == tuple(dense.shape)
    assert not sub.SELF_ADJOINT
    torch.testing.assert_close(sub @ x, dense @ x)
    torch.testing.assert_close(sub.adjoint() @ y, dense.T @ y)
    if number and rows and columns:
        torch.testing.assert_close(sub @ [x], [dense @ x])
        torch.testing.assert_close(sub @ x[:, 0], dense @ x[:, 0])
        there = curvlinops.SubmatrixLinearOperator(theirs(matrix), rows, columns)
        torch.testing.assert_close(sub @ x, there @ x)


def test_other_rows_and_columns_later() -> None:
    matrix = randn(5, 7)
    sub = SubmatrixLinearOperator(Matrix(matrix), [0, 1], range(7))
    sub.set_submatrix(torch.tensor([3]), numpy.array([6, 0]))
    torch.testing.assert_close(sub @ torch.eye(2, dtype=torch.float64), matrix[3:4][:, [6, 0]])
    with pytest.raises(ValueError, match="row_idxs"):
        sub.set_submatrix([9], [0])
    assert sub.shape == (1, 2)


def test_a_principal_submatrix_of_a_symmetric_operator_is_symmetric() -> None:
    operator = Matrix(spd(6))
    assert SubmatrixLinearOperator(operator, [1, 4], [1, 4]).SELF_ADJOINT
    assert not SubmatrixLinearOperator(operator, [1, 4], [4, 1]).SELF_ADJOINT


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0.0], [0], "row_idxs must contain integers, got 0.0"),
        ([0], ["a"], "col_idxs must contain integers, got 'a'"),
        ([True, False], [0], "row_idxs must contain integers, got True"),
        ([0], torch.tensor([True, False]), "col_idxs must contain integers"),
        ([0], numpy.array([True, False]), "col_idxs must contain integers"),
        ([0, 1, 0], [0], r"row_idxs must not contain duplicates, got \[0\] twice"),
        ([0], [-1], r"col_idxs must lie between 0 and 3, got \[-1\]"),
        ([5], [0], r"row_idxs must lie between 0 and 4, got \[5\]"),
    ],
)
def test_bad_indices_are_refused(rows: Any, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubmatrixLinearOperator(Matrix(randn(5, 4)), rows, columns)
