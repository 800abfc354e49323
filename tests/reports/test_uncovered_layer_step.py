"""Report 19: one place decides which layers take part in a step.

A covered layer may get a gradient and no curvature: a second head beside `prediction=`, a layer unfrozen a moment ago,
an expert that no datum has reached yet. It trains by AdamW till it has curvature; nothing that asks the backend falls
over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import heard

CE = nn.CrossEntropyLoss()


class Heads(nn.Module):
    """An actor and a critic on one trunk; the likelihood is the actor's."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.actor, self.critic = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.late = nn.Linear(4, 8)

    def forward(self, x: Tensor, late: bool) -> tuple[Tensor, Tensor]:
        h = self.trunk(x) + (self.late(x) if late else 0.0)
        return self.actor(h.tanh()), self.critic(h.tanh())


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, x[:, :3].argmax(1), x.sum(1, keepdim=True)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "kfac": lambda m, **kw: kfacopt.KFAC(m, CE, **kw),
    "ekfac": lambda m, **kw: kfacopt.EKFAC(m, CE, **kw),
    "exact-kfac": lambda m, **kw: kfacopt.SecondOrderOptimizer(m, CE, backend=kfacopt.EigenKFACBackend(1, 1), **kw),
    "exact-ekfac": lambda m, **kw: kfacopt.SecondOrderOptimizer(m, CE, backend=kfacopt.FullEKFACBackend(1, 1), **kw),
}
RULES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {},
    "damping rule": lambda: {"damping_rule": kfacopt.LevenbergMarquardt(every=1)},
    "damping rule, absolute": lambda: {"damping_rule": kfacopt.LevenbergMarquardt(every=1), "damping": 0.1},
    "auto": lambda: {"lr": "auto"},
    "relative clip": lambda: {"relative_clip": 0.01},
}


def critic_and_actor(model: nn.Module, step: int, late: bool = False) -> Tensor:
    x, y, value = batch(step)
    logits, guess = model(x, late)
    return F.cross_entropy(logits, y) + 0.5 * F.mse_loss(guess, value)


def trained(
    name: str, rule: str, steps: int, loss_at: Callable[[nn.Module, int], Tensor]
) -> tuple[Any, Any, list[float]]:
    model = Heads().double()
    optimizer = OPTIMIZERS[name](model, prediction=lambda output: output[0], **RULES[rule]())
    losses = []
    with heard():  # a layer without curvature may be named
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_at(model, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_second_head_trains_whatever_the_rule(name: str, rule: str) -> None:
    torch.manual_seed(0)
    before = Heads().double().critic.weight.detach().clone()
    torch.manual_seed(0)
    model, optimizer, losses = trained(name, rule, 12, lambda m, step: critic_and_actor(m, step))
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert optimizer.health()["skipped_steps"] == 0.0
    assert not torch.equal(model.critic.weight, before)
    if rule.startswith("damping rule"):
        assert math.isfinite(optimizer.health()["rho"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_that_is_used_from_some_step_on(name: str, rule: str) -> None:
    """Its first rows come with the fifth step; it has curvature then."""
    _, optimizer, losses = trained(name, rule, 12, lambda m, step: critic_and_actor(m, step, late=step >= 5))
    assert all(math.isfinite(loss) for loss in losses)
    assert optimizer.backend.blocks["late"].estimated
    assert optimizer.health()["skipped_steps"] == 0.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_unfrozen_between_two_updates_of_the_statistics(name: str, rule: str) -> None:
    """It has a gradient in a step whose forward kept no rows of it."""

    def loss_at(model: nn.Module, step: int) -> Tensor:
        if step in (0, 4):
            model.trunk.requires_grad_(step == 4)
        return critic_and_actor(model, step)

    _, optimizer, losses = trained(name, rule, 9, loss_at)
    assert all(math.isfinite(loss) for loss in losses)
    assert optimizer.health()["skipped_steps"] == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_used_functionally_beside_the_damping_rule(rule: str) -> None:
    def loss_at(model: nn.Module, step: int) -> Tensor:
        x, y, _ = batch(step)
        h = F.linear(x, model.late.weight)  # no call of its module
        logits, _ = model(x, False)
        return F.cross_entropy(logits, y) + h.square().mean()

    _, optimizer, losses = trained("ekfac", rule, 9, loss_at)
    assert all(math.isfinite(loss) for loss in losses)
    assert optimizer.health()["skipped_steps"] == 0.0


@pytest.mark.parametrize("backend", [kfacopt.KFACBackend, kfacopt.EKFACBackend, kfacopt.FullEKFACBackend])
def test_a_preconditioner_of_natural_gradient_without_curvature_of_a_layer(backend: Any) -> None:
    torch.manual_seed(0)
    model = Heads().double()
    solver = kfacopt.CG(preconditioner=backend(1, 1))
    optimizer = kfacopt.NaturalGradient(
        model,
        CE,
        solver=solver,
        damping=0.5,
        prediction=lambda output: output[0],
        damping_rule=kfacopt.LevenbergMarquardt(every=1),
    )
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        x, y, _ = batch(step)
        loss = F.cross_entropy(model(x, step >= 4)[0], y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


BACKENDS = (kfacopt.KFACBackend, kfacopt.EKFACBackend, kfacopt.EigenKFACBackend, kfacopt.FullEKFACBackend)


@pytest.mark.parametrize("kind", BACKENDS)
def test_products_leave_out_the_layers_that_solve_leaves_out(kind: Any) -> None:
    """What a step moves by AdamW has no curvature in the promise that the damping rule checks."""

    class Listing(kind):
        layers: Sequence[kfacopt.Layer] = ()

        def attach(self, layers: Sequence[kfacopt.Layer]) -> None:
            self.layers = layers
            super().attach(layers)

    model, backend = Heads().double(), Listing(1, 1)
    optimizer = kfacopt.SecondOrderOptimizer(model, CE, backend=backend, prediction=lambda output: output[0])
    with heard():
        critic_and_actor(model, 0).backward()
        optimizer.step()
    tensors = {layer: {role: torch.ones_like(p) for role, p in layer.parameters.items()} for layer in backend.layers}
    assert {layer.name for layer in backend.multiply(tensors)} == {"trunk", "actor"}
