"""Squares of per-datum gradients in an eigenbasis, against those gradients written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfacopt.blocks.squares import per_datum, squared_matrices, squared_sums

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
DATA, OUTPUTS, VECTORS, GROUPS = 5, 3, 2, 2


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def bases(leading: tuple[int, ...], columns: int, kind: str) -> tuple[Tensor | None, Tensor | None]:
    left, right = random(*leading, OUTPUTS, OUTPUTS), random(*leading, columns, max(1, columns - 1))
    return None if kind in ("right", "none") else left, None if kind in ("left", "none") else right


def expected(gradients: list[Tensor], left: Tensor | None, right: Tensor | None) -> Tensor:
    """Of per-datum gradients, `[*k n o i]` each."""
    rotated = torch.stack(gradients)
    rotated = rotated if left is None else left.mT.unsqueeze(-3) @ rotated
    rotated = rotated if right is None else rotated @ right.unsqueeze(-3)
    return rotated.square().sum((0, -3))


@pytest.mark.parametrize("leading", [(), (GROUPS,)])
@pytest.mark.parametrize("budget", [1, 40, 2**24])
@pytest.mark.parametrize("kind", ["both", "left", "right", "none"])
@pytest.mark.parametrize(
    ("places", "columns"),
    [(4, 9), (8, 9), (5, 4), (9, 4)],
    ids=["rows-first", "gradients-first", "inputs-first", "per-datum-first"],  # more places than 6 are more than v o
)
def test_sums_of_squares(places: int, columns: int, kind: str, budget: int, leading: tuple[int, ...]) -> None:
    """Whichever side is rotated before the sum over the places, and whichever after."""
    torch.manual_seed(0)
    gradients = [random(*leading, DATA, places, OUTPUTS) for _ in range(VECTORS)]
    inputs, (left, right) = random(*leading, DATA, places, columns), bases(leading, columns, kind)
    truth = expected([torch.einsum("...so,...si->...oi", g, inputs) for g in gradients], left, right)
    torch.testing.assert_close(squared_sums(gradients, inputs, budget, left, right), truth, **CLOSE)
    found = [per_datum(g, inputs) for g in gradients]
    before = [matrices.clone() for matrices in found]
    parts = [squared_matrices(matrices, left, right, budget) for matrices in found]
    torch.testing.assert_close(torch.stack(parts).sum(0), truth, **CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize("kind", ["both", "left", "right", "none"])
@pytest.mark.parametrize("leading", [(), (GROUPS,)])
@pytest.mark.parametrize("same", [True, False])
def test_one_input(same: bool, leading: tuple[int, ...], kind: str) -> None:
    """A bias' ones, which are one number, and other columns: no product is needed for each datum."""
    torch.manual_seed(0)
    shape = (*leading, DATA, 6, 1)
    inputs = torch.tensor(2.0, dtype=torch.float64).expand(shape) if same else random(*shape)
    gradients, (left, right) = random(*leading, DATA, 6, OUTPUTS), bases(leading, 1, kind)
    found = per_datum(gradients, inputs)
    torch.testing.assert_close(found, gradients.mT @ inputs, **CLOSE)
    torch.testing.assert_close(squared_matrices(found, left, right, 7), expected([found], left, right), **CLOSE)
