"""Which forwards lead to a prediction, and which backwards make a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.capture.harness import CURVATURES, assert_same_factors, attached, batch, fresh, pending
from tests.cases import backward, mlp, parameters_of, still, train_step


class Parts(nn.Module):
    """As a LightningModule: its own forward is never called, and the loss is one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        net = mlp()
        self.encoder, self.act, self.decoder = net[0], net[1], net[2]
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("never called")


def separately(model: Parts, x: Tensor) -> Tensor:
    result: Tensor = model.decoder(model.act(model.encoder(x)))
    return result


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor_every", [1, 3])
def test_several_roots_are_one_model(curvature: str, reduction: str, factor_every: int) -> None:
    x, y = batch()
    model, plain = fresh(Parts), fresh()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    options = {"curvature": curvature, "lr": 0.1, "factor_every": factor_every}
    optimizer, other = attached(model, loss, **options), attached(plain, loss, **options)
    for _ in range(4):
        optimizer.zero_grad()
        loss(separately(model, x), y).backward()
        optimizer.step()
        train_step(other, plain, loss, x, y)
    assert_same_factors(optimizer, other, {"encoder": "0", "decoder": "2"})
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_several_roots_and_gradients_that_are_returned(curvature: str) -> None:
    """By `autograd.grad`, put into `.grad` by hand: the encoder's output is no prediction then either."""
    x, y = batch()
    model, plain = fresh(Parts), fresh()
    optimizer, other = attached(model, curvature=curvature), attached(plain, curvature=curvature)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(separately(model, x), y), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    optimizer.step()
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"encoder": "0", "decoder": "2"})


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_a_loss_that_is_a_module_of_the_model(kind: type[nn.Module]) -> None:
    x, y = batch()
    target = y if kind is nn.CrossEntropyLoss else F.one_hot(y, 3).double()
    model, plain = fresh(Parts), fresh()
    model.criterion = kind()
    optimizer, other = attached(model, model.criterion), attached(plain, kind())
    model.criterion(separately(model, x), target).backward()
    optimizer.step()
    train_step(other, plain, kind(), x, target)
    assert_same_factors(optimizer, other, {"encoder": "0", "decoder": "2"})


def test_an_encoder_without_covered_layers() -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.PReLU(4), nn.Linear(4, 3)

    (x, y), model = batch(), fresh(Bent)
    optimizer = attached(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.decoder(model.encoder(x)), y).backward()
        assert pending(optimizer) == ["decoder"]
        optimizer.step()


def test_a_module_called_in_several_forwards() -> None:
    """Two forwards, two losses, one backward: two micro-batches."""
    x, y = batch()
    model, plain = fresh(), fresh()
    optimizer, other = attached(model), attached(plain)
    loss = F.cross_entropy(model(x[:3]), y[:3], reduction="sum")
    loss = loss + F.cross_entropy(model(x[3:]), y[3:], reduction="sum")
    (loss / len(x)).backward()
    optimizer.step()
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"0": "0", "2": "2"})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 5, 1)])
def test_accumulation_is_the_big_batch(reduction: str, optimizer: Any, sizes: tuple[int, ...]) -> None:
    x, y = batch(data=sum(sizes))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    made = []
    for parts in (sizes, (sum(sizes),)):
        model = fresh()
        options = still(lr=0.1, kl_clip=1e-2, refresh_every=2, ema_decay=0.9)
        used = optimizer(model, loss, **options)
        for _ in range(3):
            used.zero_grad()
            for some_x, some_y in zip(x.split(list(parts)), y.split(list(parts)), strict=True):
                share = len(some_x) / len(x) if reduction == "mean" else 1.0
                (share * loss(model(some_x), some_y)).backward()
            used.step()
        made.append((model, used))
    for a, b in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_micro_batches_of_different_length() -> None:
    """The input factor is the mean over all rows, however many cotangents a micro-batch needs."""
    model = fresh(lambda: nn.Linear(3, 8))
    optimizer = attached(model, nn.MSELoss())
    batches = [torch.randn(2, t, 3, dtype=torch.float64) for t in (4, 16)]
    for x in batches:
        backward(model, nn.MSELoss(), x, torch.zeros(2, x.shape[1], 8, dtype=torch.float64))
    optimizer.step()
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    gradient_factor, input_factor = optimizer.backend.blocks[""].factors()
    torch.testing.assert_close(input_factor, rows.mT @ rows / len(rows), rtol=1e-10, atol=1e-12)
    expected = 2 * torch.eye(8, dtype=torch.float64) * 2 / 8  # two mean losses were added, not averaged
    torch.testing.assert_close(gradient_factor, expected, rtol=1e-10, atol=1e-12)


class TwiceCalled(nn.Module):
    """A layer that is called a second time, on other data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh() + self.inner(x[:1]))


def test_a_layer_called_with_different_batch_sizes() -> None:
    """An error that names the module and the way out; nothing of the batch is left; the way out works."""
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model = fresh(TwiceCalled)
    optimizer = attached(model)
    with pytest.raises(ValueError, match=r"'inner'.*curvature.*False"):
        backward(model, loss, x, y)
    assert pending(optimizer) == []
    optimizer.close()
    groups = [
        {"params": model.head.parameters()},
        {"params": model.inner.parameters(), "curvature": False},
    ]
    optimizer = kfacopt.KFAC(model, loss, groups, factor_every=1)
    train_step(optimizer, model, loss, x, y)
    optimizer.close()


def test_an_unbatched_input_is_a_batch_of_one() -> None:
    x, y = batch()
    one, many = fresh(), fresh()
    single, batched = attached(one), attached(many)
    backward(one, nn.CrossEntropyLoss(), x[0], y[0])
    backward(many, nn.CrossEntropyLoss(), x[:1], y[:1])
    single.step()
    batched.step()
    assert_same_factors(single, batched, {"0": "0", "2": "2"})


class Recursive(nn.Module):
    """A root that calls itself, as tree-structured networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self.inner(x).tanh()
        if depth == 0:
            return h
        h = h + self(h, depth - 1)
        return 2 * self.head(h) if depth == 2 else h


def test_a_root_that_calls_itself() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = self.inner(x).tanh()
            second = self.inner(first).tanh()
            third = self.inner(second).tanh()
            return 2 * self.head(first + (second + third))

    x, y = batch()
    model, plain = fresh(Recursive), fresh(Unrolled)
    optimizer, other = attached(model), attached(plain)
    train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"inner": "inner", "head": "head"})


def test_a_step_that_reaches_only_uncovered_parameters() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cell = nn.Linear(4, 3), nn.Bilinear(4, 4, 3)

    model, (x, y) = fresh(Alternating), batch()
    optimizer = attached(model, lr=0.1, adamw_lr=0.1)
    before = parameters_of(model)
    for part, inputs in ((model.cell, (x, x)), (model.linear, (x,))):
        optimizer.zero_grad()
        F.cross_entropy(part(*inputs), y).backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_model() -> None:
    """Compiled before the optimizer is made: the same statistics. (After: a RuntimeError says what to do.)"""
    x, y = batch()
    model, plain = fresh(), fresh()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = attached(compiled), attached(plain)
    for _ in range(2):
        train_step(optimizer, compiled, nn.CrossEntropyLoss(), x, y)
        train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"_orig_mod.0": "0", "_orig_mod.2": "2"})
