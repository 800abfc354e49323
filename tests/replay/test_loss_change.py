"""The change of a step's loss on its own batches, against the loss itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.capture.records import Call, Replay
from kfacopt.likelihoods.estimator import TermsEstimator
from kfacopt.replay.linearization import BatchLinearization, moved
from kfacopt.replay.loss_change import loss_change, parts_of, reduction_ratio
from tests.cases import BY_NAME, Squares, backward, exact_kfac, soft, train_step


def replay_of(estimator: TermsEstimator, model: nn.Module, loss: Any, x: Tensor, y: Tensor, scale: float) -> Replay:
    call = Call.now(model, (x,), {})
    prediction = model(x)
    (gradient,) = torch.autograd.grad(scale * loss(prediction, y), prediction)
    return Replay(call, estimator.likelihood.terms(prediction, gradient=gradient), gradient)


def mean_loss(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(loss(model(x), y).detach())


@pytest.mark.parametrize("parts", [(6,), (3, 3), (1, 5)])
@pytest.mark.parametrize(
    ("name", "likelihood", "of_target"),
    [
        ("mlp-ce", nn.CrossEntropyLoss(), None),
        ("mlp-bce", nn.BCEWithLogitsLoss(), None),
        ("mlp-mse", nn.MSELoss(), None),
        ("mlp-mse", Squares(), None),
        ("mlp-ce", nn.CrossEntropyLoss(), soft),
    ],
    ids=["ce", "bce", "mse", "a user's", "soft"],
)
def test_it_is_the_change_of_the_loss(name: str, likelihood: Any, of_target: Any, parts: tuple[int, ...]) -> None:
    """Of optimizers (which start from a linearization) and of damping rules alike; accumulated or not."""
    model, loss, x, y = BY_NAME[name].make()
    y = y if of_target is None else of_target(y)
    estimator, parameters = TermsEstimator(likelihood), list(model.parameters())
    replays = [
        replay_of(estimator, model, loss, some_x, some_y, len(some_x) / len(x))
        for some_x, some_y in zip(x.split(list(parts)), y.split(list(parts)), strict=True)
    ]
    linearization = BatchLinearization(parameters, replays, estimator, 1.0)
    before, step = mean_loss(model, loss, x, y), [0.3 * torch.randn_like(p) for p in parameters]
    with moved(parameters, step, 1.0):
        found = loss_change(parts_of(replays, estimator, 1.0), estimator)
        assert linearization.loss_change() == found.total
        assert found.total == pytest.approx(mean_loss(model, loss, x, y) - before, rel=1e-9)
    assert found.divergence > 0.0
    assert mean_loss(model, loss, x, y) == before


def test_means_that_were_added_up_are_the_loss() -> None:
    """Micro-batches without accumulation's 1/k: the gradients' sum is what the step is of."""
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    estimator, parameters = TermsEstimator(loss), list(model.parameters())
    replays = [replay_of(estimator, model, loss, a, b, 1.0) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]
    parts = parts_of(replays, estimator, 1.0)
    gradient = torch.autograd.grad(
        sum(loss(model(a), b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)), parameters
    )
    step = [-1e-6 * g for g in gradient]
    with moved(parameters, step, 1.0):
        found = loss_change(parts, estimator)
    assert found.linear == pytest.approx(-1e-6 * float(sum(g.square().sum() for g in gradient)), rel=1e-4)


def test_ratio() -> None:
    assert reduction_ratio(-1.0, -4.0) == 0.25
    assert reduction_ratio(math.inf, -4.0) == -math.inf
    assert all(math.isnan(reduction_ratio(-1.0, promised)) for promised in (0.0, 1.0, math.nan))


class Slope(nn.Module):
    """A model that differentiates itself with respect to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.network(x).sum(), x, create_graph=True)[0]


@pytest.mark.filterwarnings("ignore:no backward shows the curvature of")
@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_a_model_that_differentiates_itself_is_judged() -> None:
    """Its layers train by AdamW, and one after the slope by its curvature."""
    model, loss = nn.Sequential(Slope(), nn.Linear(2, 2)).double(), nn.MSELoss()
    x, y = torch.rand(6, 2, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    made = kfacopt.KFAC(model, loss, lr=1e-3, damping=1.0, damping_rule=kfacopt.LevenbergMarquardt(every=1))
    train_step(made, model, loss, x, y)
    assert made.health()["rho"] > 0.0


def test_forwards_that_are_run_again_go_unnoticed_by_another_optimizer_of_the_model() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    watching = exact_kfac(model, loss, params=first)
    stepping = kfacopt.NaturalGradient(model, loss, params=second)
    backward(model, loss, x, y)
    before = watching._open_capture().tally.passes
    stepping.step()
    assert watching._open_capture().tally.passes == before
