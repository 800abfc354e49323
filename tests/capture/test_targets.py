"""The targets of the user's own loss module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import flat, still

DATA = 8
WEIGHTS = torch.linspace(0.0, 3.0, DATA, dtype=torch.float64)


def data(outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(DATA, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(DATA, outputs, generator=generator, dtype=torch.float64)


def linear(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, outputs).double()


def factor(loss: nn.Module, of: Callable[[Tensor, Tensor], Tensor], outputs: int = 2) -> Tensor:
    """The gradient factor after one backward of a loss of the prediction and the target."""
    (x, y), model = data(outputs), linear(outputs)
    optimizer = kfacopt.KFAC(model, loss, **still(damping=0.1))
    of(model(x), y).backward()
    optimizer.step()
    found: Tensor = optimizer.backend.blocks[""].factors()[0]
    return found


def weighted(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: (loss(f, y) * WEIGHTS[:, None]).mean()


def test_weighted_squares_tell_their_weights_where_the_module_is_called() -> None:
    loss = nn.MSELoss(reduction="none")
    want = float(WEIGHTS.mean()) * torch.eye(2, dtype=torch.float64)  # 2 of a square, and a mean over two outputs
    torch.testing.assert_close(factor(loss, weighted(loss)), want)
    with pytest.warns(UserWarning, match="weights its data"):
        factor(loss, lambda f, y: (F.mse_loss(f, y, reduction="none") * WEIGHTS[:, None]).mean())


CALLS: dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "with keywords": lambda loss: lambda f, y: 3.0 * loss(input=f, target=y).mean(),
    "flattened": lambda loss: lambda f, y: 3.0 * loss(f.flatten(), y.flatten()).mean(),
    "beside a penalty": lambda loss: lambda f, y: 3.0 * loss(f, y).mean() + 1e-3 * f.sum() * 0.0,
    "after a look without gradients": lambda loss: lambda f, y: 3.0 * loss(f, y + 0.0 * looked(loss, f, y)).mean(),
}


def looked(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        value: Tensor = loss(f.detach(), -y).mean()
    return value


@pytest.mark.parametrize("name", CALLS)
def test_however_the_module_is_called(name: str) -> None:
    loss = nn.MSELoss(reduction="none")
    torch.testing.assert_close(factor(loss, CALLS[name](loss)), 3.0 * torch.eye(2, dtype=torch.float64))


def test_a_target_that_is_not_that_of_the_loss_is_of_no_account() -> None:
    """The module is called to print its value; another loss is differentiated, or two are added."""
    loss = nn.CrossEntropyLoss()
    labels = torch.arange(DATA) % 3

    def other(f: Tensor, _: Tensor) -> Tensor:
        loss(f, labels.flip(0))
        return F.cross_entropy(f, labels)

    def two(f: Tensor, _: Tensor) -> Tensor:
        value: Tensor = 0.3 * loss(f, labels) + 0.7 * loss(f, labels.flip(0))
        return value

    want = factor(nn.CrossEntropyLoss(), lambda f, y: F.cross_entropy(f, labels), outputs=3)
    for of in (other, two):
        torch.testing.assert_close(factor(loss, of, outputs=3), want)


@pytest.mark.parametrize("name", ["binary", "two classes"])
def test_what_the_gradient_alone_cannot_tell(name: str) -> None:
    x, _ = data(1)
    bits = (torch.arange(DATA) % 2).double()
    p = linear(1 if name == "binary" else 2)(x).detach()
    if name == "binary":
        loss: nn.Module = nn.BCEWithLogitsLoss(reduction="none")
        found = factor(loss, lambda f, _: (loss(f, bits[:, None]) * WEIGHTS[:, None]).mean(), outputs=1)
        want = (WEIGHTS[:, None] * p.sigmoid() * (-p).sigmoid()).mean()[None, None]
    else:
        loss = nn.CrossEntropyLoss(reduction="none")
        found = factor(loss, lambda f, _: (loss(f, bits.long()) * WEIGHTS).mean(), outputs=2)
        p = p.softmax(1)
        want = (WEIGHTS[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])).mean(0)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda loss: loss])
def test_closed_or_copied_nothing_is_left_on_the_module(make: Any) -> None:
    loss = nn.MSELoss()
    optimizer = kfacopt.KFAC(linear(2), loss)
    assert len(loss._forward_hooks) == 1
    other = make(loss)
    optimizer.close()
    assert not loss._forward_hooks
    again = kfacopt.KFAC(linear(2), other)
    assert len(other._forward_hooks) == 1
    again.close()


def test_a_dict_of_losses() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear(2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            f = self.body(x)
            return {"first": f[:, :1], "second": f[:, 1:]}

    (x, y), steps = data(2), []
    for called in (False, True):
        model, loss = Both(), nn.MSELoss()
        optimizer = kfacopt.NaturalGradient(
            model, {"first": loss, "second": (10.0, loss)}, damping=0.1, solver=kfacopt.Gram()
        )
        before, out = flat(model.parameters()), model(x)
        one = loss if called else F.mse_loss
        (one(out["first"], y[:, :1]) + 10.0 * one(out["second"], y[:, 1:])).backward()
        optimizer.step()
        steps.append(flat(model.parameters()) - before)
    torch.testing.assert_close(*steps)
