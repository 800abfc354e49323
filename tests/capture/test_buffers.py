"""Copies take the place of a model's buffers, and the originals come back untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfacopt.capture.buffers import copied_buffers
from kfacopt.operators import GGNLinearOperator, HessianLinearOperator, KFACLinearOperator


class Counting(nn.Module):
    """Buffers of all kinds: shared, written in place, replaced, made when first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.inner = nn.Linear(3, 2), nn.BatchNorm1d(3), nn.Module()
        self.register_buffer("calls", torch.zeros(()))
        self.inner.register_buffer("calls", self.calls)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("late", None)

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total = self.total + self.inner.calls
        if self.late is None:
            self.late = torch.ones(())
        return self.linear(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Checkpointed(Counting):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return result


def state(model: nn.Module) -> dict[tuple[int, str], Any]:
    """The buffers themselves, their values and their versions."""
    return {
        (number, name): None if b is None else (id(b), b.tolist(), b._version)
        for number, module in enumerate(model.modules())
        for name, b in module._buffers.items()
    }


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_originals_come_back(error: type[BaseException] | None) -> None:
    model = Counting()
    before = state(model)
    try:
        with copied_buffers(model):
            model(torch.randn(4, 3))
            assert float(model.calls) == float(model.inner.calls) == float(model.total) == 1.0
            assert model.inner.calls is model.calls
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert state(model) == before


def test_a_graph_that_saved_them_stays_valid() -> None:
    model = Counting().eval()
    output = model(torch.randn(4, 3))
    with copied_buffers(model):
        model.train()(torch.randn(4, 3))
    output.sum().backward()


@pytest.mark.parametrize("kind", [GGNLinearOperator, HessianLinearOperator, KFACLinearOperator])
def test_operators_leave_them(kind: Any) -> None:
    """Also where activation checkpointing runs the model again in the backward."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    products = []
    for build in (Counting, Checkpointed):
        torch.manual_seed(0)
        model = build().double()
        before = state(model)
        params = list(model.linear.parameters())
        linear = kind(model, nn.MSELoss(), params, [(x, y)])
        products.append(linear @ torch.ones(linear.shape[1], dtype=torch.float64))
        assert state(model) == before
    torch.testing.assert_close(products[0], products[1])


def test_a_loop_that_breaks_off_leaves_them() -> None:
    model = Counting().double()
    data = [(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64))] * 2
    linear = GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data, check_deterministic=False)
    before = state(model)
    for X, _ in linear._loop_over_data("test"):
        model(X)
        break
    assert state(model) == before

    def fail() -> None:
        for X, _ in linear._loop_over_data("test"):
            model(X)
            raise RuntimeError("as told")

    with pytest.raises(RuntimeError, match="as told"):
        fail()
    assert state(model) == before
