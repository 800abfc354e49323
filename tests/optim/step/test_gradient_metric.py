"""Matrices of networks that differentiate themselves, against dense roots of their gradients' moments in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import geometric_mean

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.layers.plain import DIFFERENTIATED, USED_ELSEWHERE
from kfacopt.optim.step import gradient_metric, spectral
from tests.cases import train_step
from tests.optim.step.test_spectral import svd_polar

DAMPING = 0.03


class Slope(nn.Module):
    """The derivative of a network with respect to its input, as a physics-informed loss has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            points = x.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(points).sum(), points, create_graph=True)
        return slope


class Again(nn.Module):
    """A weight that is used by a function, too; no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.net(x)) @ self.net.weight


def sloped() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    return Slope().double(), nn.MSELoss(), x, torch.cos(3.0 * x)


def inverse_root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * (values + DAMPING * values.mean()).rsqrt()) @ vectors.mT


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_against_dense_roots_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that average with a decay of 0.8, roots of both sides, exact polar factors; momentum 0, no clipping."""
    monkeypatch.setattr(gradient_metric, "_ALL_UNTIL", 100)
    model, loss, x, y = sloped()
    direction = kfacopt.Spectral(momentum=0.0, polar=svd_polar, row_decay=None, warmup=0, full_steps=None)
    made = kfacopt.SpectralDescent(model, loss, lr=1e-2, direction=direction)
    left, right, weight = dict.fromkeys(matrices(model), 0.0), dict.fromkeys(matrices(model), 0.0), 0.0
    for _ in range(4):
        before = {p: p.detach().clone() for p in matrices(model)}
        train_step(made, model, loss, x, y)
        weight = 0.8 * weight + 0.2
        for p, old in before.items():
            assert p.grad is not None
            left[p] = 0.8 * left[p] + 0.2 * p.grad @ p.grad.T
            right[p] = 0.8 * right[p] + 0.2 * p.grad.T @ p.grad
            one, other = inverse_root(left[p] / weight), inverse_root(right[p] / weight)
            want = one @ svd_polar(one @ p.grad @ other) @ other
            want = want * (1e-2 * len(p) ** 0.5 / want.norm())
            torch.testing.assert_close(old - p.detach(), want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("model_type", "why"), [(Slope, DIFFERENTIATED), (Again, USED_ELSEWHERE)], ids=["derivative", "function"]
)
def test_only_a_derivative_is_taken_for_one(model_type: Callable[[], nn.Module], why: str) -> None:
    _, loss, x, y = sloped()
    torch.manual_seed(0)
    model = model_type().double()
    made = kfacopt.SpectralDescent(model, loss, lr=1e-2)
    with pytest.warns(UserWarning, match=why.split(",")[0].split("(")[0]):
        train_step(made, model, loss, x, y)
    train_step(made, model, loss, x, y)
    assert {row.why for row in made.coverage().rows} == {why}
    assert all(("left_moment" in made.state[p]) is (why == DIFFERENTIATED) for p in matrices(model))


@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_it_ends_far_below_the_step_without_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def last() -> float:
        # Of many steps: at a constant rate a single one's loss is a draw, an order of magnitude up or down by rounding.
        model, loss, x, y = sloped()
        made = kfacopt.SpectralDescent(model, loss)
        return geometric_mean([float(train_step(made, model, loss, x, y)) for _ in range(300)][100:])

    ours = last()
    monkeypatch.setattr(spectral, "steepest_by_gradients", lambda step, stack, polar: polar(stack.matrices))
    assert ours < 0.3 * last()  # 0.21 and 0.22 were measured, with other rounding


@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_resuming_bit_for_bit() -> None:
    model, loss, x, y = sloped()
    made = kfacopt.SpectralDescent(model, loss)
    for _ in range(13):
        train_step(made, model, loss, x, y)
    twin = copy.deepcopy(model)
    other = kfacopt.SpectralDescent(twin, loss)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    for _ in range(12):
        train_step(made, model, loss, x, y)
        train_step(other, twin, loss, x, y)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_long_sides_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_metric, "_WIDEST", 4)
    model, loss, x, y = sloped()
    made = kfacopt.SpectralDescent(model, loss, lr=1e-2)
    train_step(made, model, loss, x, y)
    train_step(made, model, loss, x, y)
    first, middle, last = matrices(model)
    assert ["left_moment" in made.state[p] for p in (first, middle, last)] == [False, True, True]
    assert ["right_moment" in made.state[p] for p in (first, middle, last)] == [True, False, True]


@pytest.mark.parametrize("widest", [1024, 4])
@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_every_fourth_gradient_counts_after_the_first_ones(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_metric, "_WIDEST", widest)
    model, loss, x, y = sloped()
    made = kfacopt.SpectralDescent(model, loss, lr=1e-2)
    for _ in range(10):
        train_step(made, model, loss, x, y)
    # Those of five steps in a row, and of step 8.
    sides = [f"{side}_moments" for side in ("left", "right")]
    counts = {made.state[p][name] for p in matrices(model) for name in sides if name in made.state[p]}
    assert counts == {6}


@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_gradients_of_zero_leave_the_weights() -> None:
    model, loss, x, _ = sloped()
    made = kfacopt.SpectralDescent(model, loss)  # no decay either
    train_step(made, model, loss, x, model(x).detach())
    before = copy.deepcopy(model.state_dict())
    train_step(made, model, loss, x, model(x).detach())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*a derivative of the model is taken in its forward")
def test_the_momentum_grows_to_its_root() -> None:
    model, loss, x, y = sloped()
    made = kfacopt.SpectralDescent(model, loss, lr=1e-2, direction=kfacopt.Spectral(momentum=0.81, warmup=1))
    train_step(made, model, loss, x, y)  # whether a derivative is taken shows in the first backward
    first = {p: (made.state[p]["momentum_buffer"].clone(), made.state[p]["momentum_weight"]) for p in matrices(model)}
    train_step(made, model, loss, x, y)
    for p, (buffer, weight) in first.items():
        assert p.grad is not None
        torch.testing.assert_close(made.state[p]["momentum_buffer"], 0.9 * buffer + 0.1 * p.grad)
        assert made.state[p]["momentum_weight"] == pytest.approx(0.9 * weight + 0.1)
