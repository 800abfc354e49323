"""Matrices with zeros up to sizes at which products are fast."""

from __future__ import annotations

import pytest
import torch

from kfacopt.linalg import alignment


@pytest.mark.parametrize("size", [1, 127, 128, 129, 144, 785])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_what_is_added_is_zero(size: int, leading: tuple[int, ...]) -> None:
    long = size + alignment.missing(size)
    assert long == size if size < 128 else long % 16 == 0
    matrix = torch.randn(*leading, size, size)
    whole = torch.zeros(*leading, long, long)
    whole[..., :size, :size] = matrix
    assert torch.equal(alignment.square(matrix), whole)
    assert torch.equal(alignment.wide(matrix), whole[..., :size, :])
    assert torch.equal(alignment.tall(matrix), whole[..., :size])


def test_a_diagonal_stays_as_it_is() -> None:
    diagonal = torch.ones(129)
    assert alignment.square(diagonal) is diagonal
