"""The user's gradients are what they would be without an optimizer watching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfacopt
from tests.capture.harness import CURVATURES, NAMED, assert_same_factors, attached, batch, factors, fresh
from tests.cases import Case, backward, mlp, still, train_step


def gradients(case: Case, attach: Callable[[nn.Module, nn.Module], Any]) -> list[Tensor]:
    """Of parameters and inputs: two accumulated backwards, the second through a retained graph twice."""
    model, loss, x, y = case.make()
    held = attach(model, loss)
    if x.is_floating_point():
        x.requires_grad_()
    backward(model, loss, x, y)
    value = loss(model(x), y)
    value.backward(retain_graph=True)
    value.backward()
    del held
    tensors = [p for p in model.parameters() if p.grad is not None]
    return [t.grad for t in [*tensors, *([x] if x.requires_grad else [])] if t.grad is not None]


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_gradients_are_bit_identical(case: Case, curvature: str) -> None:
    bare = gradients(case, lambda model, loss: None)
    for optimizer in (kfacopt.KFAC, kfacopt.EKFAC):

        def attach(model: nn.Module, loss: nn.Module, kind: Any = optimizer) -> Any:
            return kind(model, loss, **still(curvature=curvature))

        watched = gradients(case, attach)
        assert len(bare) == len(watched)
        assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_activation_checkpointing(reentrant: bool, curvature: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, active: bool) -> None:
            super().__init__()
            self.net, self.head, self.active = mlp(4), nn.Linear(4, 3), active

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.net, x, use_reentrant=reentrant) if self.active else self.net(x)
            return self.head(h)

    x, y = batch()
    results = []
    for active in (False, True):
        for watched in (False, True):
            model = fresh(lambda active=active: Checkpointed(active))
            optimizer = attached(model, curvature=curvature) if watched else None
            inputs = x.clone().requires_grad_()
            backward(model, nn.CrossEntropyLoss(), inputs, y)
            results.append([p.grad for p in [*model.parameters(), inputs]])
            if optimizer is not None and active and not reentrant:
                plain = fresh(lambda: Checkpointed(False))
                twin = attached(plain, curvature=curvature)
                backward(plain, nn.CrossEntropyLoss(), x, y)
                optimizer.step()
                twin.step()
                assert_same_factors(optimizer, twin, {n: n for n in ("net.0", "net.2", "head")})
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("around", [False, True], ids=["alone", "residual"])
def test_a_layer_below_a_reentrant_checkpoint_trains_without_curvature_and_says_why(around: bool) -> None:
    """torch lets no pass through it but a whole backward; what is above it keeps its curvature."""

    class Checkpointed(nn.Module):
        def __init__(self, active: bool) -> None:
            super().__init__()
            self.stem, self.net, self.head, self.active = nn.Linear(4, 4), mlp(4), nn.Linear(4, 3), active

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            h = checkpoint(self.net, x, use_reentrant=True) if self.active else self.net(x)
            return self.head(x + h if around else h)

    x, y = batch()
    made = []
    for active in (True, False):
        model = fresh(lambda active=active: Checkpointed(active))
        optimizer = attached(model)
        backward(model, nn.CrossEntropyLoss(), x, y)
        made.append((optimizer, [p.grad for p in model.parameters()]))
    (ours, gradients), (plain, others) = made
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    plain.step()
    with (
        pytest.warns(UserWarning, match=r"'net.0', 'net.2'.*use_reentrant=False"),
        pytest.warns(UserWarning, match=r"'stem': torch.utils.checkpoint with use_reentrant=True"),
    ):
        ours.step()
    assert factors(ours).keys() == {"head"}
    for mine, theirs in zip(factors(ours)["head"], factors(plain)["head"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    why = {row.module: row.why for row in ours.coverage().rows}
    assert "use_reentrant=False" in why["stem"]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_retained_gradients_of_activations(curvature: str) -> None:
    """`h.retain_grad()` of a module's output shows the user's gradient, not the curvature pass's on top."""

    def retained(watch: bool) -> list[Tensor]:
        model, kept = fresh(), []
        held = attached(model, curvature=curvature) if watch else None

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept.append(output)

        for module in model:
            module.register_forward_hook(keep)
        x, y = batch()
        backward(model, nn.CrossEntropyLoss(), x, y)
        del held
        return [h.grad.clone() for h in kept]

    for bare, watched in zip(retained(False), retained(True), strict=True):
        assert torch.equal(bare, watched)


def test_retained_gradients_of_several_roots() -> None:
    """Also of an encoder that was called before its decoder, and of an earlier forward."""

    def retained(watch: bool) -> list[Tensor]:
        model, (x, y) = fresh(), batch()
        held = attached(model) if watch else None
        hidden = model[0](x)
        first = model[2](model[1](hidden))
        second = model(x)
        for tensor in (hidden, first, second):
            tensor.retain_grad()
        (F.cross_entropy(first, y) + F.cross_entropy(second, y)).backward()
        del held
        return [tensor.grad.clone() for tensor in (hidden, first, second)]

    for bare, watched in zip(retained(False), retained(True), strict=True):
        assert torch.equal(bare, watched)


def test_gradient_penalties() -> None:
    """A double backward (`create_graph`) leaves the user's gradients alone; what it means for curvature is said."""
    results = []
    for watch in (False, True):
        model = fresh()
        optimizer = attached(model, nn.MSELoss()) if watch else None
        x = batch()[0].requires_grad_()
        prediction = model(x)
        (slope,) = torch.autograd.grad(prediction.sum(), x, create_graph=True)
        (prediction.square().mean() + slope.square().sum()).backward()
        results.append([p.grad for p in model.parameters()])
        if optimizer is not None:  # a squared error's gradient does not show whether it is the loss's
            with pytest.warns(UserWarning, match="the loss is of a derivative"):
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_functional_transforms_of_a_watched_model() -> None:
    """torch.func differentiates a watched model (per-example gradients for a plot, say) as an unwatched one."""
    x, y = batch()
    results = []
    for watch in (False, True):
        model = fresh()
        optimizer = attached(model) if watch else None

        def loss(parameters: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

        detached = {name: p.detach() for name, p in model.named_parameters()}
        results.append(torch.func.grad(loss)(detached))
        if optimizer is not None:
            train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)
