"""The dtype of long products is measured, once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from kfacopt.linalg import fast_dtype


@pytest.mark.parametrize(("coarse", "expected"), [(1.0, torch.bfloat16), (1.9, torch.float32), (40.0, torch.float32)])
def test_bfloat16_has_to_be_clearly_faster(
    coarse: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that says 2 for each product in float32, and `coarse` for each in bfloat16."""

    def ticks() -> Iterator[float]:
        now = 0.0
        for seconds in (2.0, coarse):
            for _ in range(6):
                yield now
                now += seconds
                yield now

    clock = ticks()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    fast_dtype.fast_dtype.cache_clear()
    assert fast_dtype.fast_dtype("cpu") == expected
    assert fast_dtype.fast_dtype("cpu") == expected  # the clock has no more to say
    fast_dtype.fast_dtype.cache_clear()


def test_of_other_devices_only_cuda_is_known() -> None:
    assert fast_dtype.fast_dtype("mps") == torch.float32
