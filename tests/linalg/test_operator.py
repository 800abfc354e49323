"""Formats, algebra, adjoints and exports of linear operators, on dense matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch import Tensor

from kfacopt.linalg.operator import TransferredLinearOperator
from kfacopt.operators import IdentityLinearOperator, LinearOperator
from tests.operators.matrices import SHAPES, Matrix, randn, spd, theirs

shape = st.lists(st.integers(0, 3), max_size=3).map(tuple)
shapes = st.lists(shape, min_size=1, max_size=3).map(tuple)


def size(of: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(s) for s in of)


def listed(matrix: Tensor, of: Sequence[Sequence[int]]) -> list[Tensor]:
    """A flat vector or matrix as a list."""
    parts = matrix.split([math.prod(s) for s in of])
    return [p.reshape((*s, *matrix.shape[1:])) for p, s in zip(parts, of, strict=True)]


@given(inputs=shapes, outputs=shapes, columns=st.integers(0, 3), seed=st.integers(0, 10))
def test_every_format_gives_the_same_product(inputs: Any, outputs: Any, columns: int, seed: int) -> None:
    matrix = randn(size(outputs), size(inputs), seed=seed)
    operator = Matrix(matrix, inputs, outputs)
    x = randn(size(inputs), columns, seed=seed + 1)
    before = x.clone()
    wanted = matrix @ x
    assert operator.shape == (size(outputs), size(inputs))
    torch.testing.assert_close(operator @ x, wanted)
    torch.testing.assert_close(operator @ listed(x, inputs), listed(wanted, outputs))
    torch.testing.assert_close(operator.adjoint() @ wanted, matrix.T @ wanted)
    v = randn(size(inputs), seed=seed + 2)
    torch.testing.assert_close(operator @ v, matrix @ v)
    torch.testing.assert_close(operator @ listed(v, inputs), listed(matrix @ v, outputs))
    assert torch.equal(x, before)


# Expressions of operators and of the matrices they stand for; A and B map alike, C takes what they return.
ALGEBRA: dict[str, Any] = {
    "A + B": lambda A, B, C: A + B,
    "A - B": lambda A, B, C: A - B,
    "-A": lambda A, B, C: -A,
    "2 A": lambda A, B, C: 2 * A,
    "A 0.5": lambda A, B, C: A * 0.5,
    "C A": lambda A, B, C: C @ A,
    "C (A - 2 B)": lambda A, B, C: C @ (A - 2 * B),
    "(C A) (C B)": lambda A, B, C: (C @ A) @ (C @ B),
    "-(0.1 (C A))": lambda A, B, C: -(0.1 * (C @ A)),
}


@pytest.mark.parametrize("expression", ALGEBRA.values(), ids=ALGEBRA)
def test_algebra_and_its_adjoints(expression: Any) -> None:
    inputs, outputs = SHAPES, ((3,), (2, 2))
    a, b, c = randn(7, 11), randn(7, 11, seed=2), randn(11, 7, seed=3)
    operator = expression(Matrix(a, inputs, outputs), Matrix(b, inputs, outputs), Matrix(c, outputs, inputs))
    matrix = expression(a, b, c)
    eye = torch.eye(matrix.shape[1], dtype=torch.float64)
    assert operator.shape == tuple(matrix.shape)
    assert (operator.device, operator.dtype) == (a.device, a.dtype)
    torch.testing.assert_close(operator @ eye, matrix)
    torch.testing.assert_close(operator.adjoint() @ torch.eye(len(matrix), dtype=torch.float64), matrix.T)
    torch.testing.assert_close(operator.adjoint().adjoint() @ eye, matrix)
    with pytest.raises(ValueError, match="is applied to a tensor of shape"):
        operator @ randn(5)


def test_what_is_its_own_adjoint() -> None:
    A, B = Matrix(spd(4)), Matrix(spd(4, seed=1))
    for operator in (A, A + B, 3 * A, -A, A - B, A.to("meta")):
        assert operator.SELF_ADJOINT
        assert operator.adjoint() is operator
    assert not (A @ B).SELF_ADJOINT
    assert not (A + Matrix(randn(4, 4))).SELF_ADJOINT


def test_damping_by_the_identity() -> None:
    A = Matrix(spd(11), SHAPES, SHAPES)
    identity = IdentityLinearOperator.like(A)
    damped = A + 0.5 * identity
    v = randn(11)
    torch.testing.assert_close(damped @ v, A.matrix @ v + 0.5 * v)
    same = identity @ v
    assert torch.equal(same, v)
    assert same.data_ptr() != v.data_ptr()
    assert (identity.shape, identity.dtype, identity.device) == ((11, 11), torch.float64, torch.device("cpu"))


A32 = IdentityLinearOperator([(3,)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Matrix(randn(3, 3)) + A32,
            r"Matrix and IdentityLinearOperator differ in dtype \(torch.float32, torch",
        ),
        (
            lambda: A32 + IdentityLinearOperator([(3,)], device="meta"),
            r"differ in device \(cpu, meta\): move one first",
        ),
        (lambda: A32 + IdentityLinearOperator([(3, 1)]), "cannot add operators of different shapes"),
        (lambda: A32 @ IdentityLinearOperator([(1, 3)]), "cannot chain operators: A is applied to"),
        (lambda: A32 @ IdentityLinearOperator([(3,)], dtype=torch.float64), "differ in dtype"),
    ],
)
def test_operators_that_do_not_go_together(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (randn(10), r"Matrix of shape \(11, 11\) is applied to a tensor of shape \[11\] or \[11, K\], got \[10\]"),
        (randn(11, 2, 1), r"got \[11, 2, 1\]"),
        (torch.tensor(1.0), r"got \[\]"),
        ([randn(2, 3), randn(4)], r"list of tensors with shapes \[\[2, 3\], \[4\], \[\]\].*got \[\[2, 3\], \[4\]\]"),
        ([randn(2, 3), randn(4), randn(2)], "with one more axis of the same length"),
        ([randn(2, 3, 5), randn(4, 5), randn(6)], "with one more axis of the same length"),
        ([1.0, 2.0, 3.0], "got list"),
        (numpy.ones(11), "got ndarray"),
        (3.0, "got float"),
    ],
)
def test_what_an_operator_cannot_be_applied_to(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matrix(randn(11, 11), SHAPES, SHAPES) @ x


def test_an_operator_without_an_adjoint_says_so() -> None:
    class Shift(IdentityLinearOperator):
        SELF_ADJOINT = False

    with pytest.raises(NotImplementedError, match="Shift does not define its adjoint"):
        Shift([(3,)]).adjoint()


class TestSciPy:
    """`to_scipy`."""

    def test_products_both_ways(self) -> None:
        matrix = randn(7, 11)
        exported, x, y = Matrix(matrix, SHAPES).to_scipy(), randn(11, 2).numpy(), randn(7, 2).numpy()
        numpy.testing.assert_allclose(exported @ x, matrix.numpy() @ x)
        numpy.testing.assert_allclose(exported @ x[:, 0], matrix.numpy() @ x[:, 0])
        numpy.testing.assert_allclose(exported.T @ y, matrix.numpy().T @ y)
        numpy.testing.assert_allclose(exported.rmatvec(y[:, 0]), matrix.numpy().T @ y[:, 0])
        assert exported.shape == (7, 11)

    @pytest.mark.parametrize("dtype", [None, numpy.float32, numpy.float64])
    def test_its_dtype_is_curvlinops(self, dtype: Any) -> None:
        matrix = spd(4, dtype=torch.float32)
        ours, there = Matrix(matrix).to_scipy(dtype), theirs(matrix).to_scipy(dtype)
        assert ours.dtype == there.dtype
        for given_dtype in (numpy.float32, numpy.float64):
            x = numpy.ones(4, dtype=given_dtype)
            assert (ours @ x).dtype == (there @ x).dtype
            numpy.testing.assert_allclose(ours @ x, there @ x, rtol=1e-6)

    def test_bfloat16_has_no_counterpart_and_is_widened(self) -> None:
        exported = IdentityLinearOperator([(3,)], dtype=torch.bfloat16).to_scipy()
        numpy.testing.assert_array_equal(exported @ numpy.ones(3), numpy.ones(3))

    def test_scipys_own_routines_take_it(self) -> None:
        matrix = spd(12)
        found = eigsh(
            Matrix(matrix, [(3, 4)], [(3, 4)]).to_scipy(), k=2, which="BE", return_eigenvectors=False, v0=numpy.ones(12)
        )
        numpy.testing.assert_allclose(sorted(found), [1.0, 100.0])


class Elsewhere(Matrix):
    """A matrix that pretends to live on another device, and remembers which vectors came."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.came: list[torch.device] = []

    @property
    def device(self) -> torch.device:
        return torch.device("meta")

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        self.came += [m.device for m in M]
        return [torch.empty(self.shape[0], m.shape[-1], dtype=m.dtype, device="meta") for m in M]

    def _adjoint(self) -> LinearOperator:
        return Elsewhere(self.matrix.T)


class TestTransfer:
    """`to(device)`."""

    def test_vectors_travel_there_and_back(self) -> None:
        A = Elsewhere(randn(3, 5))
        moved = A.to("cpu")
        assert isinstance(moved, TransferredLinearOperator)
        assert (moved.device, moved.dtype, moved.shape) == (torch.device("cpu"), torch.float64, (3, 5))
        columns = [randn(5, 2)]
        # Nothing can travel back from "meta"; what came there is seen.
        with pytest.raises(NotImplementedError, match="meta"):
            moved @ columns
        assert A.came == [torch.device("meta")]

    def test_the_result_is_on_the_new_device(self) -> None:
        moved = Matrix(randn(3, 5)).to("meta")
        assert moved.device == torch.device("meta")
        adjoint = moved.adjoint()
        assert (adjoint.device, adjoint.shape) == (torch.device("meta"), (5, 3))

    def test_where_it_is_already_nothing_is_wrapped(self) -> None:
        A = Matrix(randn(3, 3))
        assert A.to("cpu") is A
        assert A.to(torch.device("cpu")) is A

    def test_moved_operators_add_up(self) -> None:
        A = Elsewhere(spd(3)).to("cpu") + Matrix(spd(3))
        assert A.device == torch.device("cpu")
        with pytest.raises(ValueError, match="differ in device"):
            Elsewhere(spd(3)) + Matrix(spd(3))
