"""Which tensor of a model's output is the prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

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


def test_an_ambiguous_output_is_an_error_that_says_what_to_pass() -> None:
    model = fresh(lambda: Various("chosen"))
    optimizer = attached(model)
    x, y = batch()
    with pytest.raises(ValueError, match=r"Various.*prediction="):
        F.cross_entropy(model(x)["b"][1], y).backward()
    assert pending(optimizer) == []


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
