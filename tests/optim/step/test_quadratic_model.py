"""Learning rate and momentum from the exact quadratic model, against dense float64 truth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt import KFAC, LevenbergMarquardt, QuadraticModel
from tests.cases import BY_NAME, OPTIMIZERS, backward, train_step
from tests.solvers import dense

NAMES = ["mlp-ce", "mlp-mse", "mlp-bce", "conv-2d", "transformer", "mlp-ce-sum"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", ["kfac", "ekfac"])
def test_the_step_minimises_the_damped_model_over_its_two_directions(name: str, optimizer: str) -> None:
    """At its minimum, the model's gradient is orthogonal to the direction and to the last step."""
    model, loss, x, y = BY_NAME[name].make()
    rule = QuadraticModel(damping_rule=LevenbergMarquardt(every=100))
    made = OPTIMIZERS[optimizer](model, loss, lr=rule, damping=0.1, curvature="ggn")
    covered = {id(p) for layer in made._layers for p in layer.parameters.values()}
    keep = torch.cat([torch.full((p.numel(),), id(p) in covered) for p in model.parameters()])
    last = None
    for _ in range(3):
        made.zero_grad()
        backward(model, loss, x, y)
        before, g = dense.flat(model.parameters()), dense.flat(p.grad for p in model.parameters())
        if loss.reduction == "sum":
            g = g / len(x)
        curvature = dense.ggn(model, loss, x, y)
        made.step()
        delta = (dense.flat(model.parameters()) - before) * keep
        slope = g + curvature @ delta + made.health()["model_damping"] * delta
        assert delta @ g < 0
        size = float(slope.norm() * delta.norm())
        assert abs(float(slope @ delta)) < 1e-7 * size + 1e-12
        if last is not None:
            assert abs(float(slope @ last)) < 1e-6 * float(g.norm() * last.norm())
            assert made.health()["mu"] != 0.0
        last = delta


def test_rho_is_the_change_of_the_loss_over_what_the_model_promised() -> None:
    model, loss, x, y = BY_NAME["mlp-mse"].make()
    made = KFAC(model, loss, lr=QuadraticModel(damping_rule=LevenbergMarquardt(every=1, decay=0.5)), damping=0.1)
    start = backward(model, loss, x, y).item()
    before, g = dense.flat(model.parameters()), dense.flat(p.grad for p in model.parameters())
    curvature = dense.ggn(model, loss, x, y)
    made.step()
    delta, damping = dense.flat(model.parameters()) - before, made.health()["model_damping"]
    promised = g @ delta + 0.5 * delta @ (curvature @ delta + damping * delta)
    change = loss(model(x), y).item() - start
    assert made.health()["rho"] == pytest.approx(change / promised.item(), rel=1e-8)


def test_accumulation_chooses_the_same_step() -> None:
    steps = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model, loss, x, y = BY_NAME["mlp-ce"].make()
        made = KFAC(model, loss, lr="auto", curvature="ggn")
        before = dense.flat(model.parameters())
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss(model(xs), ys) / parts).backward()
        made.step()
        steps.append(dense.flat(model.parameters()) - before)
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_half_precision_trains_to_the_end(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    made, loss = KFAC(model, nn.CrossEntropyLoss(), lr="auto"), nn.CrossEntropyLoss()
    values = []
    for _ in range(15):
        made.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(x), y)
        (scale * value).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= scale
        made.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]


def run(model: nn.Module, made: Any, loss: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        train_step(made, model, loss, x, y)
    return dense.flat(model.parameters())


@pytest.mark.parametrize("every", [1, 3])
def test_resuming_repeats_bit_for_bit(every: int) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = KFAC(model, loss, lr=QuadraticModel(every=every))
    run(model, made, loss, x, y, 4)
    other = copy.deepcopy(model)
    second = KFAC(other, loss, lr=QuadraticModel(every=every))
    second.load_state_dict(copy.deepcopy(made.state_dict()))
    assert torch.equal(run(model, made, loss, x, y, 7), run(other, second, loss, x, y, 7))


def test_it_needs_no_tuning_on_problems_of_any_scale() -> None:
    for scale in (1e-2, 1.0, 1e2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        x, y = torch.randn(64, 5, dtype=torch.float64), scale * torch.randn(64, 2, dtype=torch.float64)
        made = kfacopt.EKFAC(model, nn.MSELoss(), lr="auto")
        start = nn.functional.mse_loss(model(x), y).item()
        run(model, made, nn.MSELoss(), x, y, 40)
        assert nn.functional.mse_loss(model(x), y).item() < 0.8 * start


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuadraticModel(every=0), "every must be at least 1"),
        (lambda: QuadraticModel(damping=0.0), "damping must be positive"),
        (lambda: KFAC(nn.Linear(2, 1), nn.MSELoss(), lr="best"), "lr must be a number, 'auto'"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
