"""Report 2: a backward inside the backward (reversible nets, reentrant checkpointing) leaves gradients bit for bit.

A custom function that recomputes its forward and calls `.backward()` in its own backward accumulates into the leaves
whenever it runs. Whatever pass the curvature makes, what lies in `.grad` is what lies there without an optimizer; or
the model is refused by name, before harm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt import operators as ops
from tests import reference
from tests.reports.reports import (
    EMPIRICAL,
    MC,
    OPERATOR_TYPE2,
    TYPE2,
    assert_same_gradients,
    exact_or_named,
    flat,
    gradients_of,
    near,
    still,
)

CE = nn.CrossEntropyLoss()
NAMES = ("Reversible", "Recomputed", "checkpoint", "reentrant", "backward inside", "inside the backward")


class Reversible(torch.autograd.Function):
    """An additive coupling that keeps its outputs alone (Gomez et al. 2017)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, f: nn.Module, g: nn.Module) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            above = a + f(b)
            below = b + g(above)
        ctx.f, ctx.g = f, g
        ctx.save_for_backward(above, below)
        return above, below

    @staticmethod
    def backward(ctx: Any, of_above: Tensor, of_below: Tensor) -> tuple[Tensor | None, ...]:
        above, below = ctx.saved_tensors
        with torch.enable_grad():
            again = above.detach().requires_grad_()
            moved = ctx.g(again)
            torch.autograd.backward(moved, of_below)
        of_above = of_above + again.grad
        with torch.enable_grad():
            b = (below - moved).detach().requires_grad_()
            torch.autograd.backward(ctx.f(b), of_above)
        return of_above, of_below + b.grad, None, None


class Recomputed(torch.autograd.Function):
    """Checkpointing as everybody writes it once: the forward runs again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            result: Tensor = module(x)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.module(x).backward(gradient)
        return x.grad, None


class Net(nn.Module):
    """A middle part run in one of several ways that are the same function."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.f, self.g = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def coupled(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], -1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.how == "reversible":
            a, b = h.chunk(2, -1)
            return self.head(torch.cat(Reversible.apply(a.contiguous(), b.contiguous(), self.f, self.g), -1))
        if self.how == "recomputed":
            return self.head(torch.cat([h[:, :4], Recomputed.apply(h[:, 4:], self.f)], -1))
        if self.how == "reentrant":
            return self.head(checkpoint(self.coupled, h, use_reentrant=True))
        return self.head(self.coupled(h))


HOWS = ("reversible", "recomputed", "reentrant")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def made(how: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(how).double()


def backward(model: nn.Module) -> None:
    x, y = batch()
    F.cross_entropy(model(x), y).backward()


def wanted(how: str, backwards: int = 1) -> dict[str, Tensor | None]:
    model = made(how)
    for _ in range(backwards):
        backward(model)
    return gradients_of(model)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "kfac-mc": lambda m: kfacopt.KFAC(m, CE, **MC),
    "kfac-mc-samples": lambda m: kfacopt.KFAC(m, CE, curvature=kfacopt.Fisher("mc", samples=3)),
    "kfac-type-2": lambda m: kfacopt.KFAC(m, CE, **TYPE2),
    "ekfac-empirical": lambda m: kfacopt.EKFAC(m, CE, **EMPIRICAL),
    "ekfac-auto": lambda m: kfacopt.EKFAC(m, CE, lr="auto"),
    "damping-rule": lambda m: kfacopt.KFAC(m, CE, damping_rule=kfacopt.LevenbergMarquardt(every=1)),
    "natural-gradient": lambda m: kfacopt.NaturalGradient(m, CE, damping=0.1),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_what_they_are_without_an_optimizer(name: str, how: str) -> None:
    """After the backward, and still after the step."""
    model = made(how)
    optimizer = OPTIMIZERS[name](model)
    want = wanted(how)

    def steps() -> None:
        backward(model)
        assert_same_gradients(gradients_of(model), want)
        optimizer.step()

    exact_or_named(steps, lambda _: assert_same_gradients(gradients_of(model), want), *NAMES)
    # Refused or not: nothing foreign was added to what the user's own backward has accumulated so far.
    for name_, gradient in gradients_of(model).items():
        assert gradient is None or torch.equal(gradient, want[name_])


@pytest.mark.parametrize("how", HOWS)
def test_gradients_accumulate_as_without_an_optimizer(how: str) -> None:
    model = made(how)
    optimizer = kfacopt.KFAC(model, CE)

    def twice() -> dict[str, Tensor | None]:
        backward(model)
        backward(model)
        return gradients_of(model)

    exact_or_named(twice, lambda found: assert_same_gradients(found, wanted(how, 2)), *NAMES)
    optimizer.close()


@pytest.mark.parametrize("how", HOWS)
def test_hooks_on_accumulated_gradients_run_as_often_as_without(how: str) -> None:
    """An optimizer step in the backward, gradient bucketing and offloading hang on these hooks."""

    def calls(watched: bool) -> list[tuple[str, float]]:
        model, seen = made(how), []
        for name, p in model.named_parameters():
            hook = lambda q, n=name: seen.append((n, float(q.grad.norm())))  # noqa: E731
            p.register_post_accumulate_grad_hook(hook)
        optimizer = kfacopt.KFAC(model, CE) if watched else None
        backward(model)
        assert (optimizer is None) == (not watched)
        return seen

    def check(found: list[tuple[str, float]]) -> None:
        assert found == calls(watched=False)

    exact_or_named(lambda: calls(watched=True), check, *NAMES)


@pytest.mark.parametrize("how", HOWS)
def test_statistics_of_what_runs_within_the_nested_backward(how: str) -> None:
    """Curvature of the layers outside it is the same function's; of those inside it is so too, or they are named."""
    factors: dict[str, Any] = {}

    def stepped(one: str) -> Any:
        model = made(one)
        optimizer = kfacopt.KFAC(model, CE, **still(damping=0.1))
        backward(model)
        optimizer.step()
        factors[one] = dict(optimizer.backend.blocks)
        return optimizer

    def check(optimizer: Any) -> None:
        for name, block in factors["plain"].items():
            here = factors[how][name]
            if here.estimated:
                torch.testing.assert_close(here.factors(), block.factors())
            else:
                rows = {row.module: row.treatment for row in optimizer.coverage().rows}
                assert rows[name].startswith("AdamW"), f"{name} has no curvature, but coverage() says {rows[name]}"

    stepped("plain")
    exact_or_named(lambda: stepped(how), check, *NAMES)


@pytest.mark.parametrize("how", HOWS)
def test_natural_gradient_takes_the_step_of_the_same_function(how: str) -> None:
    """Differentiating twice does not see through a backward that detaches: dense truth, or a refusal."""
    x, y = batch()
    model, simple = made(how), made("plain")
    optimizer = kfacopt.NaturalGradient(model, CE, damping=0.1)
    g = flat(torch.autograd.grad(F.cross_entropy(simple(x), y), list(simple.parameters())))
    dense = reference.whole_ggn(simple, CE, x, y)
    want = torch.linalg.solve(dense + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    before = flat(model.parameters())

    def step() -> Tensor:
        backward(model)
        optimizer.step()
        return before - flat(model.parameters())

    exact_or_named(step, lambda found: torch.testing.assert_close(found, want), *NAMES)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("operator", [ops.KFACLinearOperator, ops.EKFACLinearOperator, ops.GGNLinearOperator])
def test_operators_leave_gradients_alone(operator: Any, how: str) -> None:
    model, simple = made(how), made("plain")
    backward(model)
    before = gradients_of(model)
    options = {} if operator is ops.GGNLinearOperator else OPERATOR_TYPE2

    def trace(one: nn.Module) -> float:
        matrix = operator(one, CE, list(one.parameters()), [batch()], **options)
        return float((matrix @ torch.eye(matrix.shape[1], dtype=torch.float64)).trace())

    def check(found: float) -> None:
        assert near(found, trace(simple))

    try:
        exact_or_named(lambda: trace(model), check, *NAMES)
    finally:
        assert_same_gradients(gradients_of(model), before)
