"""What EKFAC keeps between its sweeps: the result is that of two sweeps."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacopt.operators import EKFACLinearOperator

OPTIONS: dict[str, Any] = {"fisher_type": "type-2", "check_deterministic": False}


class MeanOverPlaces(nn.Module):
    """Of a linear layer's output `[n s o]`."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 3, bias=bias), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.linear(x).tanh().mean(1))
        return output


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", list(permutations([1, 3, 7])))
def test_batches_of_other_lengths(order: tuple[int, ...], bias: bool) -> None:
    """Rows of one place, of fewer places than inputs and of more: kept as they are, or as per-datum gradients."""
    torch.manual_seed(0)
    model, loss = MeanOverPlaces(bias).double(), nn.CrossEntropyLoss()
    data = [(torch.rand(2 + s, s, 4).double(), torch.randint(3, (2 + s,))) for s in (*order, order[0])]
    kept = EKFACLinearOperator(model, loss, list(model.parameters()), data, **OPTIONS)
    swept = EKFACLinearOperator(model, loss, list(model.parameters()), data, byte_budget=1, **OPTIONS)
    identity = torch.eye(kept.shape[0], dtype=torch.float64)
    torch.testing.assert_close(kept @ identity, swept @ identity, rtol=1e-8, atol=1e-10)


def test_gradients_take_the_place_of_more_rows_than_inputs() -> None:
    """A convolution's rows are larger than its per-datum gradients: these fit where those did not."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    calls = list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(5, 1, 9, 9), torch.randint(2, (5,))
    # One cotangent (two classes) of gradients [5 2 9]; rows would be inputs [5 49 9] and gradients [5 49 2].
    budget = 4 * 5 * 2 * 9
    for bytes_, forwards in ((budget, 1), (budget - 1, 2)):
        calls.clear()
        EKFACLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], num_data=5, byte_budget=bytes_, **OPTIONS
        ).compute()
        assert len(calls) == forwards
