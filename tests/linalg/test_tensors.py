"""Lists of tensors as one vector, or as a matrix of columns."""

from __future__ import annotations

import pytest
import torch

from kfacopt.linalg.tensors import (
    all_finite,
    as_statistic,
    flat,
    flat_columns,
    inner_product,
    split_columns,
    split_like,
)

SHAPES = [(2, 3), (), (4,), (1, 2, 1)]


def test_inner_product_sums_over_the_list() -> None:
    assert inner_product([torch.ones(2), torch.ones(())], [torch.ones(2), torch.ones((), dtype=torch.float64)]) == 3.0
    assert inner_product([], []) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_entry_that_is_not_finite_is_found(value: float) -> None:
    tensors = [torch.zeros(2), torch.zeros(3, dtype=torch.float64)]
    assert all_finite(tensors)
    assert all_finite([])
    tensors[1][2] = value
    assert not all_finite(tensors)


def test_flat_and_back() -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    torch.testing.assert_close(split_like(flat(tensors), tensors), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_columns_and_back(columns: int) -> None:
    tensors = [torch.randn(*shape, columns) for shape in SHAPES]
    matrix = flat_columns(tensors)
    assert matrix.shape == (13, columns)
    shapes = [torch.Size(shape) for shape in SHAPES]
    torch.testing.assert_close(split_columns(matrix, shapes), tensors, rtol=0, atol=0)
    for k in range(columns):
        assert torch.equal(matrix[:, k], flat([t[..., k] for t in tensors]))


def test_statistics_have_at_least_single_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert as_statistic(torch.ones(1, dtype=dtype)).dtype == torch.float32
    assert as_statistic(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
