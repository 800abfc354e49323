"""Linear layers that hold `[i o]` train as those that hold `[o i]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import TransposedLinearHandler, handler_for, register_handler
from kfacopt.layers.linear import LinearHandler
from tests.cases import CE, train_step


class Conv1D(nn.Module):
    """As that of `transformers`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


Conv1D.__module__ = "transformers.pytorch_utils"


def test_it_is_known_by_its_name_and_a_registration_counts_more() -> None:
    assert isinstance(handler_for(Conv1D(2, 3)), TransposedLinearHandler)
    other = LinearHandler()
    with register_handler(Conv1D, other):
        assert handler_for(Conv1D(2, 3)) is other
    assert isinstance(handler_for(Conv1D(2, 3)), TransposedLinearHandler)


class Pooled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out.mean(1)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_it_trains_as_a_linear_layer(optimizer: Callable[..., Any], approx: str) -> None:
    torch.manual_seed(0)
    one = Pooled(Conv1D(6, 4), nn.Tanh(), Conv1D(3, 6)).double()
    two = Pooled(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for ours, theirs in ((one[0], two[0]), (one[2], two[2])):
        theirs.weight.data.copy_(ours.weight.T)
        theirs.bias.data.copy_(ours.bias)
    made = [
        optimizer(model, CE(), factor_every=1, refresh_every=1, curvature="ggn", kfac_approx=approx)
        for model in (one, two)
    ]
    for _ in range(4):
        x, y = torch.randn(8, 5, 4, dtype=torch.float64), torch.randint(3, (8,))
        for model, its in zip((one, two), made, strict=True):
            train_step(its, model, CE(), x, y)
    torch.testing.assert_close(one[0].weight.T, two[0].weight, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one[2].bias, two[2].bias, rtol=1e-9, atol=1e-11)
