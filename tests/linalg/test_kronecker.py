"""Kronecker algebra against matrices written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfacopt.linalg import kronecker

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
leads = pytest.mark.parametrize("leading", [(), (2,)])
diagonals = pytest.mark.parametrize("diagonal", [False, True])
OUTPUTS, INPUTS = 3, 4


def positive(size: int, leading: tuple[int, ...] = ()) -> Tensor:
    rows = torch.randn(*leading, 2 * size, size, dtype=torch.float64)
    return rows.mT @ rows


def dense(left: Tensor, right: Tensor) -> Tensor:
    """`[*k (o i) (o i)]`."""
    product = torch.einsum("...ab,...ij->...aibj", left, right)
    return product.flatten(-4, -3).flatten(-2, -1)


def setup(leading: tuple[int, ...], diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, A as it is kept, A as a matrix, and a matrix to multiply."""
    left = positive(OUTPUTS, leading)
    right = torch.rand(INPUTS, dtype=torch.float64) if diagonal else positive(INPUTS, leading)
    return left, right, right.diag() if diagonal else right, torch.randn(*leading, OUTPUTS, INPUTS).double()


def vec(matrix: Tensor) -> Tensor:
    return matrix.flatten(-2).unsqueeze(-1)


@leads
@diagonals
def test_products(leading: tuple[int, ...], diagonal: bool) -> None:
    left, right, whole, matrix = setup(leading, diagonal)
    truth = dense(left, whole.expand(*leading, INPUTS, INPUTS))
    torch.testing.assert_close(vec(kronecker.multiply(left, matrix, right)), truth @ vec(matrix), **CLOSE)
    trace = kronecker.trace(left) * kronecker.trace(right)
    torch.testing.assert_close(trace, truth.diagonal(dim1=-2, dim2=-1).sum(-1), **CLOSE)
    norm = kronecker.squared_norm(left) * kronecker.squared_norm(right)
    torch.testing.assert_close(norm, truth.square().sum((-2, -1)), **CLOSE)
    mean = truth.diagonal(dim1=-2, dim2=-1).mean()
    torch.testing.assert_close(kronecker.mean_eigenvalue(left, right), mean, **CLOSE)


@leads
@diagonals
def test_spectra(leading: tuple[int, ...], diagonal: bool) -> None:
    left, right, whole, matrix = setup(leading, diagonal)
    values_left, basis_left, _ = kronecker.spectrum(left)
    values_right, basis_right, _ = kronecker.spectrum(right)
    assert basis_left is not None
    assert (basis_right is None) == diagonal
    coordinates = kronecker.rotate(basis_left, matrix, basis_right)
    back = kronecker.rotate_back(basis_left, coordinates, basis_right)
    torch.testing.assert_close(back, matrix, **CLOSE)
    product = kronecker.rotate_back(basis_left, coordinates * kronecker.outer(values_left, values_right), basis_right)
    torch.testing.assert_close(product, kronecker.multiply(left, matrix, right), rtol=1e-9, atol=1e-10)
    assert whole.shape[-1] == INPUTS


@pytest.mark.parametrize(("leading", "diagonal"), [((), False), ((), True), ((2,), False)])
@pytest.mark.parametrize("damping", [1e-4, 0.3, 50.0])
def test_the_pi_split_in_both_its_forms(leading: tuple[int, ...], diagonal: bool, damping: float) -> None:
    """Damped factors inverted, and their eigenvalues damped, are the same operator."""
    left, right, _, matrix = setup(leading, diagonal)
    on_left, on_right = kronecker.pi_split(left, right, damping)
    inverses = kronecker.inverse(left, on_left).value, kronecker.inverse(right, on_right).value
    by_factors = kronecker.multiply(inverses[0], matrix, inverses[1])
    values_left, basis_left, _ = kronecker.spectrum(left)
    values_right, basis_right, _ = kronecker.spectrum(right)
    assert basis_left is not None
    damped = kronecker.damp_factored(kronecker.outer(values_left, values_right), values_left, values_right, damping)
    coordinates = kronecker.rotate(basis_left, matrix, basis_right) / damped
    by_values = kronecker.rotate_back(basis_left, coordinates, basis_right)
    torch.testing.assert_close(by_factors, by_values, rtol=1e-8, atol=1e-10)
    # The split's product is the damping, whatever the balance.
    torch.testing.assert_close(on_left * on_right, torch.full_like(on_left * on_right, damping))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_factor_is_damped_all_the_same(dtype: torch.dtype) -> None:
    dead, alive = torch.zeros(3, 3, dtype=dtype), torch.eye(4, dtype=dtype)
    for left, right in ((dead, alive), (alive, dead), (dead, dead)):
        on_left, on_right = kronecker.pi_split(left, right, 0.04)
        torch.testing.assert_close(on_left, torch.tensor(0.2, dtype=dtype))
        torch.testing.assert_close(on_right, torch.tensor(0.2, dtype=dtype))
        assert kronecker.inverse(left, on_left).value.isfinite().all()


def test_factors_of_very_different_scale_are_balanced() -> None:
    left, right = 1e-6 * positive(3), 1e4 * positive(4)
    on_left, on_right = kronecker.pi_split(left, right, 1e-3)
    ratio_left = on_left / (kronecker.trace(left) / 3)
    ratio_right = on_right / (kronecker.trace(right) / 4)
    torch.testing.assert_close(ratio_left, ratio_right, rtol=1e-9, atol=0.0)


def test_the_product_of_a_sum_has_its_partial_traces() -> None:
    def factor(size: int) -> Tensor:
        root = torch.randn(size, size + 1, dtype=torch.float64)
        return root @ root.mT

    pairs = [(factor(3), factor(4)) for _ in range(3)]
    whole = sum((torch.einsum("or,ij->oirj", *pair) for pair in pairs), start=torch.zeros(3, 4, 3, 4).double())
    left, right = kronecker.product_of_sum(pairs)
    product = torch.einsum("or,ij->oirj", left, right)
    for traced in ("oioj->ij", "oiri->or", "oioi->"):
        torch.testing.assert_close(torch.einsum(traced, product), torch.einsum(traced, whole))
    torch.testing.assert_close(left.trace(), right.trace())
    proportional = [(left, right), (2 * left, factor(4))]
    truth = sum((torch.kron(*pair) for pair in proportional), start=torch.zeros(12, 12).double())
    torch.testing.assert_close(torch.kron(*kronecker.product_of_sum(proportional)), truth)


def test_the_product_of_a_sum_of_nothing_is_nothing() -> None:
    nothing = kronecker.product_of_sum([(torch.zeros(2, 2), 100 * torch.eye(3)), (torch.eye(2), torch.zeros(3, 3))])
    assert bool((torch.kron(*nothing) == 0).all())
