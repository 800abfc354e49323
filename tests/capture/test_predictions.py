"""Which tensor of a model's output is the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from kfacopt.capture import loss_graph
from tests.capture.harness import assert_same_factors, attached, batch, fresh, pending
from tests.cases import mlp, train_step


@dataclass
class Output:
    """As Hugging Face's models return it."""

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class Various(nn.Module):
    """Returns its logits in many ways, and takes its input by position or keyword."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = mlp(), kind

    def forward(self, x: Tensor | None = None, *, features: Tensor | None = None, scale: float = 1.0) -> Any:
        given = features if x is None else x
        assert given is not None
        hidden = self.net[1](self.net[0](given * scale))
        logits = self.net[2](hidden)
        kinds: dict[str, Any] = {
            "tensor": logits,
            "tuple": (logits, hidden.detach()),
            "list": [None, logits],
            "dict": {"logits": logits, "hidden": hidden},
            "one-of-dict": {"scores": logits, "indices": logits.argmax(1)},
            "object": Output(logits, hidden),
            "chosen": {"a": hidden, "b": (hidden, logits)},
            "with-loss": Output(logits, hidden, F.cross_entropy(logits, batch()[1])),
        }
        return kinds[self.kind]


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Output):
        return output.logits
    if isinstance(output, dict):
        return output["b"][1] if "b" in output else output.get("logits", output.get("scores"))
    return next(t for t in output if t is not None and t.requires_grad)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "one-of-dict", "object", "chosen", "with-loss"])
@pytest.mark.parametrize("keyword", [False, True])
def test_outputs_and_inputs_of_many_kinds(kind: str, keyword: bool) -> None:
    x, y = batch()
    model, plain = fresh(lambda: Various(kind)), fresh()
    choose = (lambda output: output["b"][1]) if kind == "chosen" else None
    optimizer, other = attached(model, prediction=choose), attached(plain)
    output = model(features=x, scale=1.0) if keyword else model(x)
    value = output.loss if kind == "with-loss" else F.cross_entropy(logits_of(output), y)
    value.backward()
    optimizer.step()
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"net.0": "0", "net.2": "2"})


class Unsaid(nn.Module):
    """A network in two parts; its output does not say which tensor the loss is taken of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        net = mlp()
        self.body, self.head, self.kind = net[:2], net[2], kind
        self.beside = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        hidden = self.body(x)
        logits = self.head(hidden)
        loss = F.cross_entropy(logits, y)
        if self.kind == "chunks":
            return torch.cat([logits, hidden[:, :3]], 1).chunk(2, 1)
        kinds: dict[str, Any] = {
            "tuple": (logits, hidden),
            "hidden first": (hidden, logits),
            "nested": (logits, (hidden, hidden.square())),
            "dict": {"out": logits, "features": hidden},
            "loss first": (loss, logits, hidden),
            "loss last": (logits, hidden, loss),
            "on top": (logits, self.beside(logits)),
            "loss": loss,
            "dict of the loss": {"loss": loss},
        }
        return kinds[self.kind]

    def loss(self, output: Any, y: Tensor) -> Tensor:
        """As a loop takes it."""
        if self.kind.startswith("loss") or self.kind == "dict of the loss":
            value: Tensor = output if self.kind == "loss" else output["loss"] if isinstance(output, dict) else None
            return value if value is not None else next(t for t in output if t.ndim == 0)
        logits = {"dict": "out", "hidden first": 1}.get(self.kind, 0)
        return F.cross_entropy(output[logits], y)


UNSAID = ["tuple", "hidden first", "nested", "dict", "loss first", "loss last", "on top", "chunks"]
UNSAID += ["loss", "dict of the loss"]


@pytest.mark.parametrize("way", ["backward", "autograd.grad"])
@pytest.mark.parametrize("kind", UNSAID)
def test_the_loss_tells_which_of_several_tensors_is_the_prediction(kind: str, way: str) -> None:
    x, y = batch()
    model, plain = fresh(lambda: Unsaid(kind)), fresh()
    optimizer, other = attached(model), attached(plain)
    value = model.loss(model(x, y), y)
    if way == "backward":
        value.backward()
    else:
        held = [*model.body.parameters(), *model.head.parameters()]
        for p, gradient in zip(held, torch.autograd.grad(value, held), strict=True):
            p.grad = gradient
    optimizer.step()
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"body.0": "0", "head": "2"})


@pytest.mark.parametrize("kind", ["tuple", "hidden first", "dict", "loss first", "loss"])
def test_what_is_run_again_has_the_prediction_that_the_loss_told(kind: str) -> None:
    x, y = batch()
    model, plain = fresh(lambda: Unsaid(kind)), fresh()
    held = [*model.body.parameters(), *model.head.parameters()]
    first = kfacopt.NaturalGradient(model, nn.CrossEntropyLoss(), params=held)
    second = kfacopt.NaturalGradient(plain, nn.CrossEntropyLoss())
    for _ in range(2):
        first.zero_grad()
        model.loss(model(x, y), y).backward()
        first.step()
        train_step(second, plain, nn.CrossEntropyLoss(), x, y)
    for a, b in zip(held, plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["tuple", "dict", "loss"])
def test_a_loss_of_several_tensors_is_an_error_that_says_what_to_pass(kind: str) -> None:
    model = fresh(lambda: Unsaid(kind))
    optimizer = attached(model)
    x, y = batch()
    output = model(x, y)
    value = model.loss(output, y)
    more = model.body(x) if kind == "loss" else output["features"] if kind == "dict" else output[1]
    if kind == "loss":  # two calls within one, both of which the loss is taken of
        model.forward = lambda x, y: (model.head(model.body(x)) + model.beside(x[:, :3])).square().mean()
        value, more = model(x, y), torch.zeros(())
    with pytest.raises(ValueError, match=r"Unsaid.*prediction=.*of 2 of them.*a loss for each"):
        (value + more.square().mean()).backward()
    assert pending(optimizer) == []


def test_where_the_graph_of_the_loss_is_not_seen_the_prediction_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_graph, "roots_of_backward", lambda: None)
    model = fresh(lambda: Unsaid("tuple"))
    optimizer = attached(model)
    x, y = batch()
    with pytest.raises(ValueError, match=r"Unsaid is ambiguous.*prediction="):
        model.loss(model(x, y), y).backward()
    assert pending(optimizer) == []


class Copied(nn.Module):
    """Half of it in bfloat16; returns the logits or a copy in float32, and a loss of the logits themselves."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.net, self.copied = mlp().bfloat16(), copied

    def forward(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        loss = F.cross_entropy(logits.float(), y)
        return Output(logits.float() if self.copied else logits, logits.detach(), loss)


@pytest.mark.parametrize("seen", [True, False], ids=["", "graph unseen"])
@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_a_copy_of_the_prediction_beside_the_loss(inside: bool, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate's wrapper of a forward returns under autocast."""
    if not seen:  # as where several threads run a backward
        monkeypatch.setattr(loss_graph, "roots_of_backward", lambda: None)
    x, y = batch()
    made = []
    for copied in (True, False):
        torch.manual_seed(0)
        model = Copied(copied)
        optimizer = attached(model)
        output = model(x.bfloat16(), y)
        (output.loss if inside else F.cross_entropy(output.logits.float(), y)).backward()
        optimizer.step()
        assert optimizer.health()["unseen_layers"] == 0.0
        made.append(optimizer)
    assert_same_factors(*made, {"net.0": "net.0", "net.2": "net.2"})


def test_a_loss_of_both_a_copy_and_its_original_is_an_error() -> None:
    torch.manual_seed(0)
    model = Copied(copied=True)
    held = attached(model)
    x, y = batch()
    output = model(x.bfloat16(), y)
    assert output.loss is not None
    with pytest.raises(ValueError, match=r"Copied is ambiguous.*copy"):
        (output.loss + F.cross_entropy(output.logits, y)).backward()
    held.close()


def test_a_prediction_function_must_return_a_tensor() -> None:
    model = fresh()
    held = attached(model, prediction=lambda output: [output])
    with pytest.raises(TypeError, match="prediction="):
        model(batch()[0]).sum().backward()
    held.close()


def test_a_prediction_changed_in_place_is_an_error() -> None:
    model = fresh(lambda: nn.Linear(4, 3))
    held = attached(model)
    x, y = batch()
    prediction = model(x)
    prediction *= 0.5
    with pytest.raises(RuntimeError, match="in place"):
        F.cross_entropy(prediction, y).backward()
    held.close()
