"""A symmetric matrix comes back from its triangle bit for bit, and takes little more than half of its room."""

from __future__ import annotations

import pytest
import torch

from kfacopt.linalg.triangles import pack_triangle, unpack_triangle


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 128, 129, 257])
@pytest.mark.parametrize("leading", [(), (3,)])
def test_round_trip(size: int, leading: tuple[int, ...]) -> None:
    half = torch.randn(*leading, size, size, dtype=torch.float64)
    matrix = half + half.mT
    packed = pack_triangle(matrix)
    assert packed.shape == (*leading, (size + 1) // 2, size + 1)
    assert torch.equal(unpack_triangle(packed), matrix)


def test_the_upper_triangle_counts() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(unpack_triangle(pack_triangle(matrix)), torch.tensor([[1.0, 2.0], [2.0, 4.0]]))


def test_sums_of_packed_are_packed_sums() -> None:
    one, two = (torch.diag(torch.arange(1.0, 6.0)) + k for k in (0.5, 2.0))
    assert torch.equal(unpack_triangle(pack_triangle(one) + pack_triangle(two)), one + two)
