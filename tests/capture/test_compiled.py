"""`torch.compile`, made before the optimizer or after it: losses and curvature are those of the plain model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import kfacopt
from kfacopt.capture import hooks
from tests.cases import mlp, train_step

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")),
]
SIZES = {"fixed": (None, [12, 12, 12]), "dynamic": (True, [12, 7, 5])}


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Dynamo says in its log that hooks are not compiled."""
    level = logging.getLogger("torch._dynamo").level
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.reset()
    yield
    logging.getLogger("torch._dynamo").setLevel(level)


def losses(way: str, sizes: list[int], **options: Any) -> list[float]:
    """Of some steps of a model that is compiled in a way; "plain": it is not."""
    torch.manual_seed(0)
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))

    def made(of: nn.Module) -> Any:
        return kfacopt.KFAC(of, loss, curvature="ggn", factor_every=1, refresh_every=1)

    called: Any = model
    if way == "before":
        called = torch.compile(model, **options)
    optimizer = made(called)
    if way == "after":
        called = torch.compile(model, **options)
    elif way == "in place":
        model.compile(**options)
    result = [float(train_step(optimizer, called, loss, x[:size], y[:size])) for size in sizes]
    assert optimizer.health()["unseen_layers"] == 0.0
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shapes", SIZES)
@pytest.mark.parametrize("way", ["before", "after", "in place"])
def test_a_compiled_model_trains_as_the_plain_one(way: str, shapes: str, backend: str) -> None:
    """To what other kernels leave of float32 in three steps. Compiled and run before: `tests/reports`, it is said."""
    dynamic, sizes = SIZES[shapes]
    assert losses(way, sizes, backend=backend, dynamic=dynamic) == pytest.approx(losses("plain", sizes), rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_a_model_that_is_compiled_in_the_middle_shows_its_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our hooks are off the modules then, and compiled code never looks for hooks again."""
    frames = hooks._frames_compiled()
    monkeypatch.setattr(hooks, "_frames_compiled", lambda: counters["frames"]["total"] - frames)
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model, loss = mlp(), nn.CrossEntropyLoss()
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = kfacopt.KFAC(model, loss, curvature="ggn", factor_every=3, refresh_every=1)
        steps = [float(train_step(optimizer, model, loss, x, y)) for _ in range(2)]
        if compiles:
            assert not any(module._forward_hooks for module in model.modules())
            model.compile(backend="aot_eager")
        found.append([*steps, *(float(train_step(optimizer, model, loss, x, y)) for _ in range(6))])
        assert optimizer.health()["unseen_layers"] == 0.0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
