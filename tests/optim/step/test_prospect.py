"""A step of fixed length is not to go far past the lowest point of its own quadratic model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.optim.step import Spectral, Step, TrustRegion, Updates
from kfacopt.optim.step.prospect import MARGIN

KINDS = [kfacopt.SpectralDescent, kfacopt.KFAC, kfacopt.EKFAC]
PLAIN = Spectral(momentum=0.0, warmup=0, decay=0.0)
"""Of the gradient itself."""


class Noted(TrustRegion):
    """Keeps what each step was, before its length was chosen."""

    def __init__(self) -> None:
        super().__init__(kl_clip=None)
        self.steps: list[tuple[Step, Updates]] = []

    def scaled(self, step: Step, updates: Updates) -> Updates | None:
        self.steps.append((step, updates))
        return super().scaled(step, updates)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30.0 * x)


def steep() -> nn.Module:
    """A network of sines of thirty times their inputs (Sitzmann et al. 2020), with its own initial weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), Sine(), nn.Linear(32, 32), Sine(), nn.Linear(32, 1))
    with torch.no_grad():
        model[0].weight.uniform_(-1.0, 1.0)
        for layer in (model[2], model[4]):
            layer.weight.uniform_(-((6.0 / 32.0) ** 0.5) / 30.0, (6.0 / 32.0) ** 0.5 / 30.0)
    return model


def ordinary() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))


def train(model: nn.Module, optimizer: Any, steps: int, factor: float = 1.0) -> None:
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        (factor * nn.functional.cross_entropy(model(x), y)).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_sines_of_thirty_times_their_inputs_are_learned(kind: Any) -> None:
    model = steep()
    optimizer = kind(model, nn.MSELoss())
    x = torch.linspace(-1.0, 1.0, 256)[:, None]
    y = torch.sin(25.0 * x) * x
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.04 * (1.0 - step / 300)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    # With whole steps it stays at the targets' mean square.
    assert nn.functional.mse_loss(model(x), y) < 0.02 * float(y.square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_slope_and_cost_are_those_of_the_step(kind: Any) -> None:
    """The slope is the gradient's product with the step; the cost its squared length times the mean eigenvalues."""
    model, noted = ordinary(), Noted()
    optimizer = kind(model, nn.CrossEntropyLoss(), curvature="ggn", direction=PLAIN, lr=0.02, step_length=noted)
    train(model, optimizer, 4)
    step, updates = noted.steps[-1]
    assert updates.prospect is not None
    slope = sum(0.02 * (step.gradients[p] * u).sum() for p, u in updates.tensors.items())
    torch.testing.assert_close(updates.prospect.slope, slope, rtol=1e-9, atol=0.0)
    cost, means = 0.0, step.backend.mean_eigenvalues() if step.backend is not None else {}
    for layer in step.layers:
        size = step.input_sizes[layer.name] if kind is kfacopt.SpectralDescent else 1.0
        squares = sum(float(updates.tensors[p].square().sum()) for p in layer.parameters.values())
        cost += 0.02**2 * means[layer] * size * squares
    assert updates.prospect.cost == pytest.approx(MARGIN * cost, rel=1e-9)


def test_the_size_of_inputs_is_their_mean_square_with_the_bias() -> None:
    model, noted = ordinary(), Noted()
    train(model, kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(), step_length=noted), 1)
    x, _ = batch()
    expected = (float(x.square().sum()) / 16 + 1.0) / 5
    assert noted.steps[0][0].input_sizes["0"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_promises_too_little_is_taken_in_part(kind: Any) -> None:
    model, noted = ordinary(), Noted()
    optimizer = kind(model, nn.CrossEntropyLoss(), lr=5.0, direction=PLAIN, step_length=noted)
    train(model, optimizer, 3)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    _, updates = noted.steps[-1]
    assert updates.prospect is not None
    part = float(updates.prospect.slope) / updates.prospect.cost
    assert 0.0 < part < 0.5
    assert optimizer.health()["kl_scale"] == pytest.approx(part, rel=1e-9)
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - part * 5.0 * updates.tensors[p], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [1e-6, 1e3])
def test_the_tighter_of_two_bounds_holds(clip: float) -> None:
    model, noted = ordinary(), Noted()
    noted._defaults["kl_clip"] = clip
    train(model, made := kfacopt.KFAC(model, nn.CrossEntropyLoss(), lr=5.0, direction=PLAIN, step_length=noted), 3)
    _, updates = noted.steps[-1]
    assert updates.prospect is not None
    part, kept = float(updates.prospect.slope) / updates.prospect.cost, made.health()["kl_scale"]
    assert kept == pytest.approx(part, rel=1e-9) if clip > 1.0 else kept < 0.5 * part


@pytest.mark.parametrize("kind", KINDS)
def test_whole_steps_are_as_if_nobody_had_asked(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        model = ordinary()
        optimizer = kind(model, nn.CrossEntropyLoss())
        train(model, optimizer, 5)
        found.append([p.detach() for p in model.parameters()])
        assert optimizer.health()["kl_scale"] == 1.0
        monkeypatch.setattr("kfacopt.optim.step.spectral.prospect_of", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_of_length_one_promise_nothing() -> None:
    """They have not the unit of the loss, and curvature has."""
    for direction, told in ((kfacopt.UnitGradients(PLAIN), False), (kfacopt.ClippedGradients(PLAIN), True)):
        model, noted = ordinary(), Noted()
        made = kfacopt.KFAC(model, nn.CrossEntropyLoss(), lr=0.04, direction=direction, step_length=noted)
        train(model, made, 2)
        assert all((updates.prospect is not None) is told for _, updates in noted.steps)


def test_a_factor_of_the_loss_shortens_no_further() -> None:
    found = []
    for factor in (1.0, 1000.0):
        model = ordinary()
        optimizer = kfacopt.SpectralDescent(
            model, nn.CrossEntropyLoss(), curvature="ggn", lr=5.0, direction=Spectral(), extra_terms=False
        )
        train(model, optimizer, 4, factor)
        assert optimizer.health()["kl_scale"] < 1.0
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_groups_count_with_their_rates() -> None:
    model, noted = ordinary(), Noted()
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "lr": 0.03}]
    optimizer = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(), groups, direction=PLAIN, step_length=noted)
    train(model, optimizer, 3)
    step, updates = noted.steps[-1]
    assert updates.prospect is not None
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    slope = sum(rates[p] * (step.gradients[p] * u).sum() for p, u in updates.tensors.items())
    torch.testing.assert_close(updates.prospect.slope, slope, rtol=1e-9, atol=0.0)


class Untold(kfacopt.KFACBackend):
    """One of a user's, that does not know its eigenvalues."""

    def mean_eigenvalues(self) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("options", [{"curvature": "empirical"}, {"backend": Untold(exponent=0.5), "damping": 0.1}])
def test_where_curvature_has_no_unit_of_the_loss_nothing_is_promised(options: dict[str, Any]) -> None:
    model, noted = ordinary(), Noted()
    optimizer = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(), lr=5.0, step_length=noted, **options)
    train(model, optimizer, 3)
    assert all(updates.prospect is None for _, updates in noted.steps)
