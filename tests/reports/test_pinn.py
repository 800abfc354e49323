"""Report 22 and Report 26: derivatives of the network, in the user's loop or in the module.

A network whose derivative enters the loss acts through a second backward, which no hook of a layer sees. In a module
that returns the residual, the weights' blocks hold both ways, or the layers are named. Where the loop forms the
residual of a raw network, the forward that could be run again is not what the loss was taken of: natural gradient is
refused, by an error that names the remedy, a module that returns the residual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.func import grad as functional_grad
from torch.nn import functional as F

import kfacopt
from kfacopt import operators as ops
from tests import reference
from tests.reports.reports import (
    OPERATOR_TYPE2,
    TYPE2,
    block_traces,
    exact_or_named,
    flat,
    heard,
    named,
    near,
    plain,
    uncovered,
)

DATA = 12
MSE = nn.MSELoss()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def inputs() -> Tensor:
    return torch.randn(DATA, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def derivative(u: Tensor, x: Tensor) -> Tensor:
    """The gradient of every datum's `u` with respect to its `x`, with its graph."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def second_order(net: nn.Module, x: Tensor) -> Tensor:
    du = derivative(net(x), x)
    return derivative(du[:, :1], x)[:, :1] + torch.sin(x[:, :1])


def reaction(net: nn.Module, x: Tensor) -> Tensor:
    """The network's value is in the residual too."""
    u = net(x)
    return derivative(derivative(u, x)[:, :1], x)[:, :1] + u - u**3


def first_order(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    du = derivative(u, x)
    return du[:, :1] + u * du[:, 1:]


def force(net: nn.Module, x: Tensor) -> Tensor:
    """A force field: minus the gradient of an energy."""
    return -derivative(net(x), x)


def value_and_slope(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    return torch.cat([u, derivative(u, x)], 1)


def laplacian(net: nn.Module, x: Tensor) -> Tensor:
    du = derivative(net(x), x)
    return sum(derivative(du[:, i : i + 1], x)[:, i : i + 1] for i in range(2)) + torch.zeros(DATA, 1).double()


RESIDUALS = {f.__name__: f for f in (second_order, reaction, first_order, force, value_and_slope, laplacian)}


class Residual(nn.Module):
    """The network and what is made of it, as one module."""

    def __init__(self, of: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.of = network(), of

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.of(self.net, x.detach().requires_grad_())


class Functional(Residual):
    """The slope by `torch.func`, one datum at a time."""

    def forward(self, x: Tensor) -> Tensor:
        own = dict(self.net.named_parameters())
        return vmap(functional_grad(lambda one: functional_call(self.net, own, (one,)).sum()))(x)


def modules() -> dict[str, Callable[[], nn.Module]]:
    result = {name: lambda of=of: Residual(of) for name, of in RESIDUALS.items()}
    return result | {"torch.func": lambda: Functional(force)}


MODULES = modules()


def jacobian(model: nn.Module) -> Tensor:
    """Of the module's output with respect to all parameters, `[p d]`."""
    parameters = list(model.parameters())
    rows = []
    for value in model(inputs()).flatten():
        parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(flat(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)))
    return torch.stack(rows)


def gauss_newton(model: nn.Module) -> Tensor:
    """Of the mean squared residual."""
    outer = jacobian(model)
    return 2.0 * outer.T @ outer / len(outer)


def stepped(optimizer: Any, loss: Callable[[], Tensor], steps: int = 2) -> list[str]:
    with heard() as said:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return said


EKFAC = {"lr": 0.0, "adamw_lr": 0.0, "damping": 0.1, "ema_decay": 0.0, **TYPE2}


def check_blocks(optimizer: Any, said: list[str], want: dict[str, float], prefix: str = "") -> None:
    """Every layer's block has the true trace; or the layer is named, and trains by AdamW."""
    for name, trace in want.items():
        block = optimizer.backend.blocks.get(prefix + name)
        if not named(optimizer, prefix + name, said):
            assert block is not None
            assert block.ready, f"{name} has no curvature, but coverage() says that it has"
            assert near(float(block.trace()), trace), name
        else:
            assert uncovered(optimizer, prefix + name), f"{name}: what is not known is not used"


@pytest.mark.parametrize("name", MODULES)
def test_blocks_of_a_residual_module_are_whole_or_named(name: str) -> None:
    model = MODULES[name]()
    want = block_traces(model, gauss_newton(model))
    optimizer = kfacopt.SecondOrderOptimizer(model, MSE, backend=kfacopt.FullEKFACBackend(1, 1), **EKFAC)

    def check(said: list[str]) -> None:
        check_blocks(optimizer, said, want)

    exact_or_named(lambda: stepped(optimizer, lambda: model(inputs()).square().mean()), check, "net.")


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("name", MODULES)
def test_every_backend_names_what_it_does_not_hold(name: str, make: Any) -> None:
    """Half of a layer's ways to the residual is not its curvature, whatever the factors are."""
    model = MODULES[name]()
    want = block_traces(model, gauss_newton(model))
    optimizer = make(model, MSE, factor_every=1, refresh_every=1, **EKFAC)

    def check(said: list[str]) -> None:
        for layer, trace in want.items():
            if not named(optimizer, layer, said):
                g, a = optimizer.backend.blocks[layer].factors()
                assert float(g.trace() * a.trace()) == pytest.approx(trace, rel=0.2)

    exact_or_named(lambda: stepped(optimizer, lambda: model(inputs()).square().mean()), check, "net.")


@pytest.mark.parametrize("name", MODULES)
def test_operators_on_a_residual_module_are_whole_or_refused(name: str) -> None:
    model = MODULES[name]()

    def traces() -> dict[str, float]:
        data = [(inputs(), torch.zeros_like(model(inputs())))]
        matrix = ops.EKFACLinearOperator(model, MSE, list(model.parameters()), data, **OPERATOR_TYPE2)
        return block_traces(model, matrix @ torch.eye(matrix.shape[1], dtype=torch.float64))

    def check(found: dict[str, float]) -> None:
        assert found == pytest.approx(block_traces(model, gauss_newton(model)), rel=1e-6)

    exact_or_named(traces, check, "net.")


@pytest.mark.parametrize("name", RESIDUALS)
def test_natural_gradient_on_a_residual_module_is_the_dense_step(name: str) -> None:
    model = MODULES[name]()
    g = flat(
        torch.zeros_like(p) if q is None else q
        for p, q in zip(
            model.parameters(),
            torch.autograd.grad(model(inputs()).square().mean(), list(model.parameters()), allow_unused=True),
            strict=True,
        )
    )
    want = torch.linalg.solve(gauss_newton(model) + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    optimizer, before = kfacopt.NaturalGradient(model, MSE, damping=0.1), flat(model.parameters())
    model(inputs()).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(before - flat(model.parameters()), want, rtol=1e-6, atol=1e-9)


# -- the raw network, with derivatives formed in the loop --------------------------------------------------------------


def slope_matched(net: nn.Module, x: Tensor) -> Tensor:
    """Sobolev training: the value, and beside it the slope."""
    u = net(x)
    return (u - 1.0).square().mean() + (derivative(u, x)[:, :1] - torch.cos(x[:, :1])).square().mean()


def slope_penalised(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    return (u - 1.0).square().mean() + 10.0 * (derivative(u, x).norm(dim=1) - 1.0).square().mean()


def residual_and_boundary(net: nn.Module, x: Tensor) -> Tensor:
    return second_order(net, x).square().mean() + net(torch.zeros(3, 2).double()).square().mean()


LOOPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    **{name: lambda net, x, of=of: of(net, x).square().mean() for name, of in RESIDUALS.items()},
    **{f.__name__: f for f in (slope_matched, slope_penalised, residual_and_boundary)},
}


def loop_losses(name: str, make: Callable[[nn.Module], Any], steps: int = 8) -> list[float]:
    net = network()
    optimizer, losses = make(net), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = LOOPS[name](net, inputs().requires_grad_())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses


REPLAYING: dict[str, Callable[[nn.Module], Any]] = {
    "natural gradient": lambda m: kfacopt.NaturalGradient(m, MSE, damping=1e-4),
    "with a line search": lambda m: kfacopt.NaturalGradient(m, MSE, damping=1e-4, line_search=kfacopt.GridLineSearch()),
    "by conjugate gradients": lambda m: kfacopt.NaturalGradient(m, MSE, damping=1e-4, solver=kfacopt.CG()),
    "trust region": lambda m: kfacopt.TrustRegionNewton(m, MSE),
}


@pytest.mark.parametrize("how", REPLAYING)
@pytest.mark.parametrize("name", LOOPS)
def test_a_raw_network_is_refused_by_the_remedy(name: str, how: str) -> None:
    if how == "trust region":
        with pytest.raises(RuntimeError, match=r"gradient|backward|batch"):
            loop_losses(name, REPLAYING[how])
    else:
        with pytest.raises(RuntimeError, match="residual"):
            loop_losses(name, REPLAYING[how])


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("name", LOOPS)
def test_auto_does_not_diverge_on_a_raw_network(name: str, make: Any) -> None:
    def check(losses: list[float]) -> None:
        assert max(losses) <= 2.0 * losses[0]

    exact_or_named(lambda: loop_losses(name, lambda m: make(m, MSE, lr="auto")), check, "residual", "derivative")


@pytest.mark.parametrize("name", RESIDUALS)
def test_blocks_of_a_raw_network_are_those_of_the_residual_or_named(name: str) -> None:
    net = network()
    model = Residual(RESIDUALS[name])
    whole = block_traces(model, gauss_newton(model))
    optimizer = kfacopt.SecondOrderOptimizer(net, MSE, backend=kfacopt.FullEKFACBackend(1, 1), **EKFAC)

    def run() -> list[str]:
        return stepped(optimizer, lambda: RESIDUALS[name](net, inputs().requires_grad_()).square().mean())

    def check(said: list[str]) -> None:
        check_blocks(optimizer, said, {layer.removeprefix("net."): trace for layer, trace in whole.items()})

    exact_or_named(run, check, "residual", "derivative", "no curvature has been captured")


def test_a_penalty_on_the_parameters_is_no_reason_to_refuse() -> None:
    """Its gradient is part of the step's: `(C + damping I)⁻¹ (g + e)`."""
    net, x = network(), inputs()
    y = torch.sin(x[:, :1])

    def loss() -> Tensor:
        return F.mse_loss(net(x), y) + 0.05 * sum(p.square().sum() for p in net.parameters())

    g = flat(torch.autograd.grad(loss(), list(net.parameters())))
    curvature = reference.whole_ggn(net, MSE, x, y)
    want = torch.linalg.solve(curvature + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    optimizer, before = kfacopt.NaturalGradient(net, MSE, damping=0.1), flat(net.parameters())
    loss().backward()
    optimizer.step()
    torch.testing.assert_close(before - flat(net.parameters()), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_plain_network_whose_inputs_need_gradients_is_named_nowhere(make: Any) -> None:
    """A derivative that is looked at, without its graph, is no use of the weights."""
    net = network()
    optimizer = make(net, MSE, **plain(damping=0.1))

    def loss() -> Tensor:
        x = inputs().requires_grad_()
        u = net(x)
        torch.autograd.grad(u.sum(), x, retain_graph=True)
        return F.mse_loss(u, torch.sin(x[:, :1]).detach())

    assert not stepped(optimizer, loss)
    assert all(row.treatment.startswith(make.__name__) for row in optimizer.coverage().rows)
