"""A watched model's graphs live no longer than an unwatched one's."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.capture.harness import attached, batch, fresh
from tests.cases import mlp, parameters_of, train_step


class Marked(torch.autograd.Function):
    """An identity whose node can be watched: its marker dies with it."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.marker = _Marker()
        Marked.alive.add(ctx.marker)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Marker:
    pass


class Watched(nn.Module):
    """A model whose graph can be watched, with outputs of several kinds."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.net, self.aux, self.output = mlp(), nn.Linear(3, 2), output

    def forward(self, x: Tensor) -> Any:
        logits = self.net(Marked.apply(x))
        if self.output == "plain":
            return logits
        if self.output == "aux":  # a head on top of the prediction: the graph goes on behind it
            return {"logits": logits, "aux": self.aux(logits)}
        return logits, self.aux(logits)


RULES = pytest.mark.parametrize("rule", [None, kfacopt.LevenbergMarquardt(every=1)], ids=["", "damping-rule"])


@RULES
@pytest.mark.parametrize("output", ["plain", "aux", "ambiguous"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_forward_without_backward_keeps_no_graph(output: str, wanted: bool, rule: Any) -> None:
    model = fresh(lambda: Watched(output))
    x, y = batch()
    x.requires_grad_()
    choose = (lambda out: out[0]) if output == "ambiguous" and wanted else None
    optimizer = attached(model, prediction=choose, damping_rule=rule)
    gc.collect()
    Marked.alive.clear()
    for _ in range(3):
        model(x)
    gc.collect()
    assert len(Marked.alive) == 0
    del optimizer, y


@RULES
@pytest.mark.parametrize("output", ["plain", "aux"])
def test_a_trained_step_keeps_no_graph(output: str, rule: Any) -> None:
    model = fresh(lambda: Watched(output))
    x, y = batch()
    x.requires_grad_()
    optimizer = attached(model, lr=0.1, damping_rule=rule)
    for _ in range(3):
        optimizer.zero_grad()
        result = model(x)
        F.cross_entropy(result["logits"] if output == "aux" else result, y).backward()
        optimizer.step()
        del result
    gc.collect()
    Marked.alive.clear()
    optimizer.zero_grad()
    result = model(x)
    F.cross_entropy(result["logits"] if output == "aux" else result, y).backward()
    optimizer.step()
    assert len(Marked.alive) == 1
    del result
    gc.collect()
    assert len(Marked.alive) == 0


def test_forwards_without_backward_change_nothing() -> None:
    """Validation that forgot no_grad, in either mode, between any two calls of the loop."""
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model, twin = fresh(), fresh()
    optimizer, plain = attached(model, lr=0.1), attached(twin, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model(x), y)
        model.eval()
        model(x[:3])
        model.train()
        value.backward()
        model(x[:2])
        optimizer.step()
        train_step(plain, twin, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), parameters_of(twin), strict=True))


class Keeping(nn.Module):
    """A model that keeps what it computed, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.features = mlp(), {}
        for name, module in self.net.named_children():
            module.register_forward_hook(partial(self.keep, name))

    def keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features[name] = output

    def forward(self, x: Tensor) -> Tensor:
        self.prediction = self.net(Marked.apply(x))
        return self.prediction


@RULES
def test_a_model_that_keeps_its_outputs_is_no_cycle_through_the_graph(rule: Any) -> None:
    (x, y), model = batch(), fresh(Keeping)
    x.requires_grad_()
    optimizer = attached(model, damping_rule=rule)
    Marked.alive.clear()
    train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    model(x)
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None
    assert len(Marked.alive) == 0
