"""The operator of a few eigenvectors against itself written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfacopt.linalg.partial_basis import Coefficients, apply, gram_of_long, steepest_of_long, whole_sides

SMALL = [(6, 5, left, right) for left in (1, 3, 6) for right in (1, 2, 5)]
PADDED = [(136, 131, left, right) for left in (130, 136) for right in (3, 131)]
"""Sizes of which products are taken at a width of their own (`kfacopt.linalg.alignment`)."""


def orthonormal(size: int, kept: int) -> tuple[Tensor, Tensor]:
    """The kept columns and the rest of a random basis."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return basis[:, :kept], basis[:, kept:]


@pytest.mark.parametrize(("outputs", "inputs", "left_kept", "right_kept"), SMALL + PADDED)
def test_the_operator_is_what_it_says(outputs: int, inputs: int, left_kept: int, right_kept: int) -> None:
    left, left_rest = orthonormal(outputs, left_kept)
    right, right_rest = orthonormal(inputs, right_kept)
    values = [
        torch.rand(shape, dtype=torch.float64) for shape in ((left_kept, right_kept), (left_kept,), (right_kept,), ())
    ]
    at = Coefficients(*values)
    table = torch.empty(outputs, inputs, dtype=torch.float64)
    table[:left_kept, :right_kept] = at.both
    table[:left_kept, right_kept:] = at.left[:, None]
    table[left_kept:, :right_kept] = at.right
    table[left_kept:, right_kept:] = at.neither
    matrix = torch.randn(outputs, inputs, dtype=torch.float64)
    kept = matrix.clone()
    whole_left, whole_right = torch.cat([left, left_rest], 1), torch.cat([right, right_rest], 1)
    expected = whole_left @ (table * (whole_left.mT @ matrix @ whole_right)) @ whole_right.mT
    found = apply(matrix, left, right, at, whole_sides(left, right, at))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize(("left_kept", "right_kept"), [(2, 3), (4, 3), (2, 9), (4, 9), (1, 1)])
def test_its_steepest_step_is_met_through_the_gram_matrix(left_kept: int, right_kept: int) -> None:
    (left, _), (right, _) = orthonormal(4, left_kept), orthonormal(9, right_kept)
    at = Coefficients(
        *(torch.rand(s, dtype=torch.float64) for s in ((left_kept, right_kept), (left_kept,), (right_kept,), ()))
    )
    matrix, whole = torch.randn(4, 9, dtype=torch.float64), whole_sides(left, right, at)
    whitened = apply(matrix, left, right, at, whole)
    found = gram_of_long(matrix, left, right, at, whole)
    torch.testing.assert_close(found.gram, whitened @ whitened.mT)
    anything = torch.randn(4, 4, dtype=torch.float64)
    expected = apply(anything @ whitened, left, right, at, whole)
    torch.testing.assert_close(steepest_of_long(matrix, left, right, at, found, anything), expected)
