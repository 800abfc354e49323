"""The rows of many cotangents, chunk by chunk."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import kfacopt
from kfacopt.capture import chunks
from kfacopt.layers.convolution import ConvolutionHandler
from kfacopt.layers.linear import LinearHandler
from kfacopt.likelihoods import Likelihood
from kfacopt.operators import KFACLinearOperator
from tests.capture.harness import assert_same_factors, attached, fresh
from tests.cases import train_step


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 5))


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=generator), torch.arange(6) % 5


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[nn.Module]:
    """How often the inputs of a module's rows were built."""
    counted: Counter[nn.Module] = Counter()
    for handler in (ConvolutionHandler, LinearHandler):

        def counting(self: Any, module: nn.Module, *args: Any, original: Any = handler.input_rows) -> Any:
            counted[module] += 1
            return original(self, module, *args)

        monkeypatch.setattr(handler, "input_rows", counting)
    return counted


@pytest.mark.parametrize("small", ["vectors", "cache"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_an_optimizer_builds_inputs_once(
    optimizer: Any, small: str, built: Counter[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many chunks the cotangents come in; and the statistics are the same."""
    x, y = pictures()
    model, plain = fresh(convolutional), fresh(convolutional)
    other = attached(plain)
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    if small == "vectors":
        monkeypatch.setattr(Likelihood, "vectors_per_chunk", 1)
    else:
        monkeypatch.setattr(chunks, "_CACHED", 1)
    watched, delivered = attached(model), 0
    deliver = watched._capture._deliver

    def counting(*args: Any) -> None:
        nonlocal delivered
        delivered += 1
        deliver(*args)

    watched._capture._deliver = counting
    train_step(watched, model, nn.CrossEntropyLoss(), x, y)
    assert delivered == 3 * 4
    assert [built[model[i]] for i in (0, 2, 4)] == [1, 1, 1]
    assert_same_factors(watched, other, {"0": "0", "2": "2", "4": "4"})


def test_an_operator_builds_inputs_once(built: Counter[nn.Module]) -> None:
    model = fresh(convolutional)
    options = {"fisher_type": "type-2", "check_deterministic": False, "byte_budget": 1}
    options |= {"separate_weight_and_bias": False}
    KFACLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), [pictures()], **options).compute()
    assert [built[model[i]] for i in (0, 2, 4)] == [1, 1, 1]
