"""What is beside a basis, and how far an inverse is off, against dense truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfacopt.linalg.moved import along_basis, inverse_error, largest_beside

LOW = 0.9
"""The power iterations' estimates are from below; on these spectra they reach more than this of the truth."""


def covariance(size: int, *leading: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*leading, 2 * size, size, generator=generator, dtype=torch.float64)
    return rows.mT @ (rows * torch.linspace(0.1, 2.0, size, dtype=torch.float64)) / size


@pytest.mark.parametrize("leading", [(), (3,)])
def test_what_is_beside_a_whole_basis_is_what_its_diagonal_leaves_out(leading: tuple[int, ...]) -> None:
    first, moved = (covariance(9, *leading, seed=seed) for seed in range(2))
    first, moved = first + first.mT, moved + moved.mT
    basis = torch.linalg.eigh(first).eigenvectors
    values, share = along_basis(moved, basis)
    rest = moved - (basis * values.unsqueeze(-2)) @ basis.mT
    torch.testing.assert_close(values, (basis.mT @ moved @ basis).diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(share, (rest.norm(dim=(-2, -1)) / moved.norm(dim=(-2, -1))).amax())
    assert float(along_basis(first, basis)[1]) < 1e-12
    assert float(along_basis(torch.zeros_like(first), basis)[1]) == 0.0


def test_the_largest_eigenvalue_of_what_is_cut() -> None:
    moved = covariance(30)
    moved = moved @ moved.mT
    basis = torch.linalg.qr(covariance(30, seed=1))[0][:, :10]
    beside = torch.eye(30, dtype=torch.float64) - basis @ basis.mT
    truth = torch.linalg.eigvalsh(beside @ moved @ beside)[-1]
    found = largest_beside(moved, basis)
    assert LOW * truth < found <= truth * (1 + 1e-12)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_the_error_of_an_inverse(leading: tuple[int, ...], exponent: float) -> None:
    rows = [torch.randn(*leading, 60, 30, dtype=torch.float64) for _ in range(2)]
    first = rows[0].mT @ rows[0] / 60
    moved = first + 0.1 * rows[1].mT @ rows[1] / 60
    damping = torch.full(leading, 0.5, dtype=torch.float64)
    identity = torch.eye(30, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(first + 0.5 * identity)
    inverse = (vectors * values.pow(-exponent).unsqueeze(-2)) @ vectors.mT
    whole = (vectors / values.unsqueeze(-2)) @ vectors.mT
    truth = torch.linalg.matrix_norm((moved + 0.4 * identity) @ whole - identity, ord=2).amax()
    found = inverse_error(moved, damping - 0.1, inverse, exponent)
    assert found is not None
    assert LOW * truth < found <= truth * (1 + 1e-9)
    own = inverse_error(first, damping, inverse, exponent)
    assert own is not None
    assert float(own) < 1e-10
    torch.testing.assert_close(found, inverse_error(moved, damping - 0.1, inverse, exponent), rtol=0, atol=0)


def test_the_error_of_a_diagonals_inverse() -> None:
    found = inverse_error(torch.tensor([1.0, 3.0]), 1.0, torch.tensor([0.5, 0.2]))
    torch.testing.assert_close(found, torch.tensor(0.2))


def test_products_do_not_tell_of_every_power() -> None:
    assert inverse_error(torch.eye(2), 1.0, torch.eye(2), exponent=0.7) is None
