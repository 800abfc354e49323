"""The curvature of a step's own batches as a linear operator, against dense truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.capture.records import Call, Replay
from kfacopt.likelihoods.estimator import TermsEstimator
from kfacopt.likelihoods.fisher import Curvature, Fisher
from kfacopt.likelihoods.weights import weighed
from kfacopt.operators import CGInverseLinearOperator, IdentityLinearOperator, hutchinson_trace
from kfacopt.replay.linearization import BatchLinearization
from kfacopt.replay.metric import Metric
from tests import reference
from tests.cases import BY_NAME, Squares

NAMES = ["mlp-ce", "mlp-mse", "mlp-bce", "sequence-ce"]
DAMPING = 1.0


def metric_of(
    model: nn.Module,
    loss: Any,
    x: Tensor,
    y: Tensor,
    kind: Curvature,
    *,
    likelihood: Any = None,
    pieces: int = 1,
    scale: float = 1.0,
    clip: float = 1.0,
) -> Metric:
    """Of a loop that scales its loss, accumulates `pieces` micro-batches, unscales, and clips."""
    estimator = TermsEstimator(likelihood or loss, fisher=Fisher("mc", seed=3))
    parameters, replays = list(model.parameters()), []
    gradient = [torch.zeros_like(p) for p in parameters]
    for some_x, some_y in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        call, prediction = Call.now(model, (some_x,), {}), model(some_x)
        value = scale / pieces * loss(prediction, some_y)
        at_prediction, *found = torch.autograd.grad(value, [prediction, *parameters])
        gradient = [g + clip / scale * f for g, f in zip(gradient, found, strict=True)]
        terms = estimator.likelihood.terms(prediction, gradient=at_prediction)
        replays.append(Replay(call, weighed(estimator.likelihood, terms, at_prediction), at_prediction))
    # That the loop has unscaled is for the optimizer to find out (`kfacopt.optim.scaling`).
    linearization = BatchLinearization(parameters, replays, estimator, 1.0 / scale)
    linearization.match(gradient)
    return Metric(linearization, kind)


def by_rows(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """The Jacobian, `[rows, outputs, parameters]`."""
    prediction = model(x)
    axis = 1 if name == "sequence-ce" else prediction.ndim - 1
    jacobian = reference.whole_jacobian(model, x).view(*prediction.shape, -1)
    return jacobian.movedim(axis, -2).flatten(0, -3)


def truth(metric: Metric, model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Dense, from the loss and its target alone; the sampled Fisher from a generator of the same seed."""
    if metric.curvature is Curvature.GGN:
        return reference.whole_ggn(model, loss, x, y)
    if metric.curvature is Curvature.HESSIAN:
        return reference.whole_hessian(model, loss, x, y)
    rows, prediction = by_rows(model, x, name), model(x)
    count = reference.term_count(loss, prediction, y)
    if metric.curvature is Curvature.EMPIRICAL:
        axis = 1 if name == "sequence-ce" else prediction.ndim - 1
        gradients = reference.term_gradients(loss, prediction, y).view(prediction.shape)
        vectors = gradients.movedim(axis, -1).flatten(0, -2)[None]
    else:
        again = TermsEstimator(loss, fisher=Fisher("mc", seed=3))
        vectors = again.sampled(again.likelihood, metric.linearization.pieces[0].terms)
    per_row = torch.einsum("kmc,mcp->kmp", vectors, rows).flatten(0, 1)
    return per_row.T @ per_row / count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", list(Curvature))
def test_the_operator_is_the_dense_curvature(kind: Curvature, name: str) -> None:
    model, loss, x, y = BY_NAME[name].make()
    metric = metric_of(model, loss, x, y, kind)
    size = sum(p.numel() for p in model.parameters())
    dense = truth(metric, model, loss, x, y, name)
    assert metric.shape == (size, size)
    torch.testing.assert_close(metric @ torch.eye(size, dtype=torch.float64), dense)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    found = torch.cat([part.flatten() for part in metric @ vectors])
    torch.testing.assert_close(found, dense @ torch.cat([v.flatten() for v in vectors]))
    assert all(torch.equal(a, b) for a, b in zip(metric @ vectors, metric.multiply(vectors), strict=True))


@pytest.mark.parametrize("kind", list(Curvature))
def test_traces_and_inverses_of_operators_work_on_it(kind: Curvature) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    metric = metric_of(model, loss, x, y, kind)
    dense = truth(metric, model, loss, x, y, "mlp-ce")
    damped = dense + DAMPING * torch.eye(len(dense), dtype=torch.float64)
    assert torch.linalg.eigvalsh(damped)[0] > 0.0
    right = torch.randn(len(dense), dtype=torch.float64)
    inverse = CGInverseLinearOperator(metric + DAMPING * IdentityLinearOperator.like(metric), tolerance=1e-10)
    torch.testing.assert_close(inverse @ right, torch.linalg.solve(damped, right), rtol=1e-6, atol=1e-8)
    trace = hutchinson_trace(metric, len(dense) - 1, generator=torch.Generator().manual_seed(0))
    spread = (2.0 * (dense.square().sum() - dense.diagonal().square().sum()) / (len(dense) - 1)).sqrt()
    assert abs(trace - dense.trace()) <= 4.0 * spread


LOOPS: dict[str, dict[str, Any]] = {
    "accumulated": {"pieces": 2},
    "scaled": {"scale": 128.0},
    "both": {"pieces": 2, "scale": 128.0},
}


@pytest.mark.parametrize("loop", [*LOOPS, "clipped"])
@pytest.mark.parametrize("kind", [Curvature.GGN, Curvature.EMPIRICAL, Curvature.HESSIAN])
def test_what_the_loop_does_with_a_loss_whose_target_can_be_read_changes_nothing(kind: Curvature, loop: str) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    metric = metric_of(model, loss, x, y, kind, **LOOPS.get(loop, {"clip": 0.1}))
    dense = truth(metric, model, loss, x, y, "mlp-ce")
    torch.testing.assert_close(metric @ torch.eye(len(dense), dtype=torch.float64), dense)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", [Curvature.GGN, Curvature.EMPIRICAL, Curvature.HESSIAN])
@pytest.mark.parametrize("likelihood", [nn.MSELoss(), Squares()], ids=["mse", "a user's"])
def test_loss_scale_and_accumulation_change_nothing_of_squared_errors(
    likelihood: Any, kind: Curvature, loop: str
) -> None:
    model, loss, x, y = BY_NAME["mlp-mse"].make()
    metric = metric_of(model, loss, x, y, kind, likelihood=likelihood, **LOOPS[loop])
    dense = truth(metric, model, loss, x, y, "mlp-mse")
    torch.testing.assert_close(metric @ torch.eye(len(dense), dtype=torch.float64), dense)


def test_parameters_of_several_dtypes_have_the_widest() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].double()
    model[0].register_forward_hook(lambda module, inputs, output: output.float())
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2)
    metric = metric_of(model, nn.MSELoss(), x, y, Curvature.GGN)
    dense = metric @ torch.eye(metric.shape[0], dtype=metric.dtype)
    assert metric.dtype == dense.dtype == torch.float64
    torch.testing.assert_close(dense, dense.T, rtol=1e-4, atol=1e-5)


def test_the_step_of_an_optimizer_has_it() -> None:
    """What `Step.metric` hands to solvers is the operator."""
    seen: list[Metric] = []

    class Watching(kfacopt.CG):
        def solve(self, problem: kfacopt.Problem) -> kfacopt.Solved:
            seen.append(problem.metric)
            return super().solve(problem)

    model, loss, x, y = BY_NAME["mlp-ce"].make()
    optimizer = kfacopt.NaturalGradient(model, loss, solver=Watching(), damping=DAMPING)
    loss(model(x), y).backward()
    optimizer.step()
    assert isinstance(seen[0], kfacopt.operators.LinearOperator)
