"""Products of matrices with their own transposes, by strips."""

from __future__ import annotations

import pytest
import torch

from kfacopt.linalg.gram import gram


@pytest.mark.parametrize("shape", [(5, 3), (7, 383), (3, 384), (700, 385), (1, 402), (0, 400), (2, 6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = torch.randn(*shape, dtype=dtype)
    found, truth = gram(rows), rows.double().mT @ rows.double()
    # A sum of n products rounds by at most n eps of the largest row's squared length.
    tolerance = max(1, shape[-2]) * torch.finfo(dtype).eps * float(truth.abs().max() if truth.any() else 1.0)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=tolerance)
    assert found.dtype == dtype


def test_large_ones_are_exactly_symmetric() -> None:
    found = gram(torch.randn(300, 500).mT.contiguous().mT)
    assert torch.equal(found, found.mT)
