"""Report 21: a constant factor on the loss.

The curvature of `c · loss` is `c · C`. With damping relative to the curvature the step is the same for every c; with
an absolute damping it is `(c C + damping I)⁻¹ c g`. A factor that does not reach `.grad` (a loss scaler's) is none, and
one that comes after the backward (clipping) is a factor of the step. Where c cannot be told, the loss is refused by
name; a loss with c = 1 never is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests import reference
from tests.reports.reports import TYPE2, exact_or_named, flat, near

FACTORS = (1.0, 0.5, 100.0, 1e-3)
NAMES = ("factor", "scale", "constant", "times", "multiplied")
DATA = 16

Loss = tuple[nn.Module, Tensor]


def loss_of(name: str) -> Loss:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (DATA,), generator=generator)
    if name == "squares":
        return nn.MSELoss(), torch.randn(DATA, 3, generator=generator, dtype=torch.float64)
    if name == "binary":
        return nn.BCEWithLogitsLoss(), F.one_hot(labels, 3).double()
    return nn.CrossEntropyLoss(reduction="sum" if name == "cross-entropy, sum" else "mean"), labels


# The gradient of these tells their labels, and so the factor.
READABLE = ("cross-entropy", "cross-entropy, sum", "binary")
# That of squared errors tells neither: what is left is the graph between the loss and the prediction.
LOSSES = (*READABLE, "squares")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def inputs() -> Tensor:
    return torch.randn(DATA, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(make: Callable[..., Any], name: str, factor: float, steps: int) -> Tensor:
    """Parameters after some steps on `factor` times the loss."""
    model, (loss, y) = mlp(), loss_of(name)
    optimizer = make(model, loss)
    for _ in range(steps):
        optimizer.zero_grad()
        (factor * loss(model(inputs()), y)).backward()
        optimizer.step()
    return flat(model.parameters())


def assert_close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-8)


def same_for(factor: float, run: Callable[[float], Tensor]) -> None:
    """What `run` returns is the same for this factor as for one; only a factor may be refused."""
    want = run(1.0)
    if factor != 1.0:
        exact_or_named(lambda: run(factor), lambda found: assert_close(found, want), *NAMES)


def dense_step(name: str, factor: float, damping: float) -> Tensor:
    """`(c C + damping I)⁻¹ c g` of the mean loss."""
    model, (loss, y) = mlp(), loss_of(name)
    mean = type(loss)()
    g = flat(torch.autograd.grad(mean(model(inputs()), y), list(model.parameters())))
    curvature = reference.whole_ggn(model, mean, inputs(), y)
    return torch.linalg.solve(factor * curvature + damping * torch.eye(len(g), dtype=g.dtype), factor * g)


@pytest.mark.parametrize(
    "solver", [kfacopt.Gram, lambda: kfacopt.CG(tolerance=1e-11, progress=None)], ids=["gram", "cg"]
)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", LOSSES)
def test_natural_gradient_takes_the_dense_step_of_the_scaled_loss(name: str, factor: float, solver: Any) -> None:
    def run() -> Tensor:
        return flat(mlp().parameters()) - trained(
            lambda m, loss: kfacopt.NaturalGradient(m, loss, damping=0.01, solver=solver()), name, factor, 1
        )

    want = dense_step(name, factor, 0.01)
    exact_or_named(run, lambda found: assert_close(found, want), *(NAMES if factor != 1.0 else ()))


INVARIANT: dict[str, Callable[..., Any]] = {
    "kfac": lambda m, loss: kfacopt.KFAC(m, loss, kl_clip=None, **TYPE2),
    "ekfac": lambda m, loss: kfacopt.EKFAC(m, loss, kl_clip=None, **TYPE2),
    "ekfac, defaults": lambda m, loss: kfacopt.EKFAC(m, loss),
    "kfac, clipped": lambda m, loss: kfacopt.KFAC(m, loss, lr=10.0, kl_clip=0.01),
    "kfac, damping rule": lambda m, loss: kfacopt.KFAC(m, loss, damping_rule=kfacopt.LevenbergMarquardt(every=1)),
    "kfac, auto": lambda m, loss: kfacopt.KFAC(m, loss, lr="auto"),
    "ekfac, auto": lambda m, loss: kfacopt.EKFAC(m, loss, lr="auto"),
}


@pytest.mark.parametrize("factor", FACTORS[1:])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("optimizer", INVARIANT)
def test_with_relative_damping_the_steps_are_the_same(optimizer: str, name: str, factor: float) -> None:
    same_for(factor, lambda c: trained(INVARIANT[optimizer], name, c, 4))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["cross-entropy", "binary", "squares"])
def test_with_absolute_damping_the_step_is_the_dense_one(name: str, factor: float) -> None:
    """One datum and one layer: the Kronecker product is the Gauss-Newton matrix itself."""
    torch.manual_seed(0)
    model, (loss, y) = nn.Linear(4, 3).double(), loss_of(name)
    x, y = inputs()[:1], y[:1]
    g = flat(torch.autograd.grad(loss(model(x), y), list(model.parameters())))
    curvature = reference.whole_ggn(model, loss, x, y)
    want = torch.linalg.solve(factor * curvature + 0.05 * torch.eye(len(g), dtype=g.dtype), factor * g)

    def run() -> Tensor:
        options = {"lr": 1.0, "damping": 0.05, "momentum": 0.0, "kl_clip": None} | TYPE2
        optimizer = kfacopt.SecondOrderOptimizer(model, loss, backend=kfacopt.EigenKFACBackend(1, 1), **options)
        before = flat(model.parameters())
        (factor * loss(model(x), y)).backward()
        optimizer.step()
        return before - flat(model.parameters())

    exact_or_named(run, lambda found: assert_close(found, want), *(NAMES if factor != 1.0 else ()))


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize("name", ["cross-entropy", "binary", "squares"])
@pytest.mark.parametrize("optimizer", INVARIANT)
def test_micro_batches_whose_mean_losses_are_added(optimizer: str, name: str, pieces: int) -> None:
    """Without the division by their number the loss is `pieces` times the mean of all; with it, it is the mean."""

    def run(factor: float) -> Tensor:
        model, (loss, y) = mlp(), loss_of(name)
        made = INVARIANT[optimizer](model, loss)
        for _ in range(3):
            made.zero_grad()
            for x, part in zip(inputs().chunk(pieces), y.chunk(pieces), strict=True):
                (factor / pieces * loss(model(x), part)).backward()
            made.step()
        return flat(model.parameters())

    same_for(float(pieces), run)


def test_auto_learns_whatever_the_factor() -> None:
    """The report's own figure: ten times the loss went from 1.06 to 2e16."""
    model, (loss, y) = mlp(), loss_of("cross-entropy")
    optimizer, losses = kfacopt.KFAC(model, loss, lr="auto"), []
    for _ in range(15):
        optimizer.zero_grad()
        value = 10.0 * loss(model(inputs()), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert max(losses) <= 1.2 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


PLAIN: dict[str, Callable[..., Any]] = {
    "kfac": lambda m, loss: kfacopt.KFAC(m, loss, lr=0.1, momentum=0.0, kl_clip=None, **TYPE2),
    "ekfac, absolute damping": lambda m, loss: kfacopt.EKFAC(m, loss, lr=0.1, damping=0.1, kl_clip=None, **TYPE2),
    "kfac, auto": lambda m, loss: kfacopt.KFAC(m, loss, lr="auto"),
    "natural gradient": lambda m, loss: kfacopt.NaturalGradient(m, loss, damping=0.1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("optimizer", PLAIN)
def test_a_loss_scaler_leaves_the_step_as_it_is(optimizer: str, name: str) -> None:
    """What is divided out before the step is no factor of the loss, and never refused."""

    def run(scaled: bool) -> Tensor:
        model, (loss, y) = mlp(), loss_of(name)
        made = PLAIN[optimizer](model, loss)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(2):
            made.zero_grad()
            scaler.scale(loss(model(inputs()), y)).backward()
            scaler.step(made)
            scaler.update()
        return flat(model.parameters())

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("optimizer", ["kfac", "ekfac, absolute damping"])
def test_clipping_the_gradient_shortens_the_step(optimizer: str, name: str) -> None:
    def run(clipped: bool) -> Tensor:
        model, (loss, y) = mlp(), loss_of(name)
        made = PLAIN[optimizer](model, loss)
        loss(model(inputs()), y).backward()
        if clipped:
            norm = flat(p.grad for p in model.parameters()).norm()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5 * float(norm))
        made.step()
        return flat(model.parameters()) - flat(mlp().parameters())

    torch.testing.assert_close(run(True), 0.5 * run(False), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("factor", FACTORS[1:])
@pytest.mark.parametrize("name", ["cross-entropy", "binary"])
def test_the_reduction_ratio_does_not_depend_on_the_factor(name: str, factor: float) -> None:
    def ratio(c: float) -> float:
        model, (loss, y) = mlp(), loss_of(name)
        rule = kfacopt.LevenbergMarquardt(every=1)
        optimizer = kfacopt.EKFAC(model, loss, damping_rule=rule, **TYPE2)
        (c * loss(model(inputs()), y)).backward()
        optimizer.step()
        return optimizer.health()["rho"]

    assert math.isfinite(ratio(1.0))

    def check(found: float) -> None:
        assert near(found, ratio(1.0))

    exact_or_named(lambda: ratio(factor), check, *NAMES)
