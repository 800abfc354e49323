"""How often a step waits for the device: each number that Python reads of a tensor is one synchronisation there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kfacopt

SELDOM = {"factor_every": 100, "refresh_every": 100}

# Numbers read at a step on which neither statistics nor a refresh are due: whether the gradients are finite, before
# anything moves, and whether the updates are (of a bounded step: its length, which is finite then), before they are
# written. A step that minimises a quadratic model or solves by CG reads that model's numbers: no bound is set there.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SpectralDescent": (kfacopt.SpectralDescent, {}),
    "KFAC": (kfacopt.KFAC, {}),
    "KFAC, clipped": (kfacopt.KFAC, {"kl_clip": 0.03}),
    "KFAC, unbounded": (kfacopt.KFAC, {"kl_clip": None}),
    "EKFAC": (kfacopt.EKFAC, {}),
}


@pytest.mark.parametrize(("made", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("layers", [1, 5])
def test_a_step_reads_two_numbers_however_many_layers(
    made: Callable[..., Any], options: dict[str, Any], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden = [module for _ in range(layers) for module in (nn.Linear(6, 6), nn.Tanh())]
    model, loss = nn.Sequential(*hidden, nn.Linear(6, 3)), nn.CrossEntropyLoss()
    optimizer = made(model, loss, **SELDOM, **options)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    lists, tolist = list[torch.Size](), Tensor.tolist

    def listed(tensor: Tensor) -> list[Any]:
        lists.append(tensor.shape)  # one synchronisation, which no operation of torch's shows
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", listed)
    for step in range(4):
        lists.clear()
        with profile(activities=[ProfilerActivity.CPU]) as taken:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        read = sum(one.count for one in taken.key_averages() if one.key == "aten::_local_scalar_dense")
        assert step == 0 or read + len(lists) == 2  # at the first everything is due
