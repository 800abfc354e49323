"""Statistics are float32 or better, whatever the model and the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kfacopt
from tests.capture.harness import CURVATURES, attached, batch
from tests.cases import backward, mlp, train_step


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_statistics_are_float32_under_autocast(optimizer: Any, inside: bool) -> None:
    """Also where backward and step are called within the autocast block."""
    torch.manual_seed(0)
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    x = x.float()
    made = optimizer(model, loss, factor_every=1, refresh_every=2, lr=0.1)
    for _ in range(4):
        made.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(x), y)
            if inside:
                value.backward()
                made.step()
        if not inside:
            value.backward()
            made.step()
    for block in made.backend.blocks.values():
        for average in block.averages().values():
            assert average.value is not None
            assert average.value.dtype == torch.float32
        for tensor in block.cache().values():
            assert tensor is None or tensor.dtype == torch.float32


def test_statistics_are_computed_in_float32_inside_autocast() -> None:
    """Not only stored: the covariance of an input is no bfloat16 product."""
    results = []
    x, y = batch(data=64)
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = attached(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            backward(model, nn.CrossEntropyLoss(), x.float(), y)
            optimizer.step()
        results.append(optimizer.backend.blocks[""].factors()[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_statistics(dtype: torch.dtype, curvature: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 3)).to(dtype)
    x, y = batch()
    loss = nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(model, loss, factor_every=1, refresh_every=2, lr=0.1, curvature=curvature)
    for _ in range(4):
        value = train_step(optimizer, model, loss, x.to(dtype), y)
    assert value.isfinite()
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    for block in optimizer.backend.blocks.values():
        assert {a.value.dtype for a in block.averages().values()} == {torch.float32}
