"""Thousands of steps with everything that changes over a run: memory stays where it was."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfacopt
from kfacopt.schedules import Growing, to_zero
from tests.cases import train_step

STEPS, WARM = 20_000, 2000
MAKERS: dict[str, Callable[..., Any]] = {
    "SpectralDescent": kfacopt.SpectralDescent,
    "KFAC": lambda m, loss: kfacopt.KFAC(
        m,
        loss,
        factor_every=Growing(1, 50, 1000),
        refresh_every=Growing(2, 100, 1000),
        damping_rule=kfacopt.LevenbergMarquardt(every=50),
    ),
    "EKFAC": lambda m, loss: kfacopt.EKFAC(m, loss, factor_every=10, refresh_every=50),
}


def held_tensors() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_memory_is_flat(name: str) -> None:
    """Tensors held after warming up are as many bytes at the end; the process grows by less than it takes to leak one
    number a step in each of the optimizer's collections."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss()
    optimizer = MAKERS[name](model, criterion)
    scheduler = to_zero(optimizer, STEPS)
    before, peak = 0, 0
    for step in range(STEPS):
        if step == WARM:
            before, peak = held_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x = torch.randn(8, 6)
        train_step(optimizer, model, criterion, x, x[:, :3].argmax(1))
        scheduler.step()
    assert held_tensors() <= before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KiB; a tensor a step were ten times it
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.health()["skipped_steps"] == 0.0
