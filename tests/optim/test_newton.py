"""TrustRegionNewton: fixed batches to the bottom, exact rejection, exact resumption, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfacopt.operators import ChainHessian
from kfacopt.optim.newton import TrustRegionNewton
from kfacopt.optim.subproblem import ExactTrustRegion, GaussNewton, Proposal, SaddleFree, TrustRegionStrategy
from tests.cases import parameters_of

STRATEGIES = {
    "default": (GaussNewton(), ExactTrustRegion()),
    "exact": ExactTrustRegion(),
    "gauss-newton": GaussNewton(),
    "saddle-free": SaddleFree(rank=25),
}
strategies = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def deep(width: int = 6, depth: int = 4, inputs: int = 12, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    sizes = [inputs] + [width] * (depth - 1)
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), activation())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 4)).double()


def batch(data: int = 12, inputs: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(data, inputs, dtype=torch.float64), torch.randint(4, (data,))


def step(optimizer: TrustRegionNewton, loss: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loop, one turn; the loss before the step."""
    optimizer.zero_grad()
    value = loss(optimizer.model(x), y)
    value.backward()
    optimizer.step()
    return float(value.detach())


def value_of(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(loss(model(x), y))


def train(optimizer: TrustRegionNewton, loss: nn.Module, x: Tensor, y: Tensor, steps: int, goal: float) -> list[float]:
    """The losses until one is below the goal; every accepted step lowers it, every other leaves it."""
    losses = [value_of(optimizer.model, loss, x, y)]
    while losses[-1] >= goal and len(losses) <= steps:
        before = parameters_of(optimizer.model)
        step(optimizer, loss, x, y)
        losses.append(value_of(optimizer.model, loss, x, y))
        if optimizer.health()["accepted"]:
            assert losses[-1] < losses[-2]
        else:
            assert all(torch.equal(p, q) for p, q in zip(parameters_of(optimizer.model), before, strict=True))
    return losses


@strategies
def test_a_fixed_batch(strategy: Any) -> None:
    model, (x, y) = deep(), batch()
    losses = train(TrustRegionNewton(model, nn.CrossEntropyLoss(), strategy), nn.CrossEntropyLoss(), x, y, 60, 0.2)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_below_a_thousandth(activation: Callable[[], nn.Module]) -> None:
    model, (x, y) = deep(12, 8, 12, activation), batch(16)
    losses = train(TrustRegionNewton(model, nn.CrossEntropyLoss()), nn.CrossEntropyLoss(), x, y, 100, 1e-3)
    assert losses[-1] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_batch_of_the_issue(activation: Callable[[], nn.Module]) -> None:
    """Sixty-four digits as images of 16 x 16 x 3, eight layers of width 24."""
    digits = load_digits()
    images = torch.tensor(digits.images[:64], dtype=torch.float64).unsqueeze(1) / 16
    x = nn.functional.interpolate(images, scale_factor=2).repeat(1, 3, 1, 1)
    sizes = [768] + [24] * 7
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), activation())]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(24, 10)).double()
    optimizer, y = TrustRegionNewton(model, nn.CrossEntropyLoss()), torch.tensor(digits.target[:64])
    assert train(optimizer, nn.CrossEntropyLoss(), x, y, 99, 1e-3)[-1] < 1e-3


LOSSES: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
    "ce-sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(4, (12,))),
    "ce-smooth": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.randint(4, (12,))),
    "ce-ignored": (nn.CrossEntropyLoss(ignore_index=1), lambda: torch.arange(12) % 4),
    "mse": (nn.MSELoss(), lambda: torch.randn(12, 4).double()),
    "mse-sum": (nn.MSELoss(reduction="sum"), lambda: torch.randn(12, 4).double()),
    "bce": (nn.BCEWithLogitsLoss(), lambda: torch.randint(2, (12, 4)).double()),
    "bce-sum": (nn.BCEWithLogitsLoss(reduction="sum"), lambda: torch.randint(2, (12, 4)).double()),
}


class Watched(ExactTrustRegion):
    """Checks the curvature it is given and the step it makes."""

    def propose(self, curvature: ChainHessian, gradient: Tensor, radius: float, shift: float) -> Proposal:
        seen.append((curvature, gradient))
        return super().propose(curvature, gradient, radius, shift)


seen: list[tuple[ChainHessian, Tensor]] = []


@pytest.mark.parametrize(("loss", "target"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("factor", [1.0, 128.0])
def test_the_curvature_read_off_the_backward_is_that_of_the_loss(
    loss: nn.Module, target: Callable[[], Tensor], factor: float
) -> None:
    """The targets, the reduction and a factor on the loss are read from the gradient at the prediction."""
    if factor != 1.0 and isinstance(loss, nn.MSELoss):
        pytest.skip("the gradient of MSELoss does not tell a factor; documented")
    seen.clear()
    model, (x, _), y = deep(), batch(), target()
    optimizer, want = TrustRegionNewton(model, loss, Watched()), ChainHessian(model, loss, x, y)
    before = value_of(model, loss, x, y)
    (factor * loss(model(x), y)).backward()
    optimizer.step()
    curvature, gradient = seen[0]
    v = torch.randn(len(gradient), dtype=torch.float64)
    torch.testing.assert_close(curvature @ v, factor * (want @ v), rtol=1e-9, atol=1e-12)
    health = optimizer.health()
    assert health["accepted"]
    # The ratio's numerator comes from the likelihood: it is the loss's own change.
    assert value_of(model, loss, x, y) < before
    assert -0.5 < health["rho"] < 3.0


def test_float32_models_train_and_keep_their_type() -> None:
    model, (x, y) = deep().float(), batch()
    losses = train(TrustRegionNewton(model, nn.CrossEntropyLoss()), nn.CrossEntropyLoss(), x.float(), y, 40, 0.05)
    assert losses[-1] < 0.05
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Uphill(TrustRegionStrategy):
    """Proposes what raises the loss."""

    def propose(self, curvature: ChainHessian, gradient: Tensor, radius: float, shift: float) -> Proposal:
        return Proposal(radius * gradient / gradient.norm(), shift, 1)


def test_rejection_restores_the_parameters_bit_for_bit() -> None:
    model, (x, y) = deep(), batch()
    optimizer = TrustRegionNewton(model, nn.CrossEntropyLoss(), Uphill(), attempts=3)
    before = parameters_of(model)
    step(optimizer, nn.CrossEntropyLoss(), x, y)
    health = optimizer.health()
    assert (health["accepted"], health["attempts"]) == (0.0, 3.0)
    assert all(torch.equal(p, q) for p, q in zip(parameters_of(model), before, strict=True))
    assert optimizer.param_groups[0]["radius"] == [pytest.approx(4.0**-3)]


def test_the_next_strategy_takes_over_after_a_rejection() -> None:
    model, (x, y) = deep(), batch()
    optimizer = TrustRegionNewton(model, nn.CrossEntropyLoss(), (Uphill(), GaussNewton()))
    step(optimizer, nn.CrossEntropyLoss(), x, y)
    assert optimizer.health()["accepted"]
    assert optimizer.health()["strategy"] == 1.0


def test_negative_curvature_leaves_a_saddle_point() -> None:
    """Two linear layers next to zero: Gauss-Newton sees no way down, the exact Hessian does."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-6)
    x = torch.randn(20, 3, dtype=torch.float64)
    assert ChainHessian(model, nn.MSELoss(), x, x).inertia(1e-3) == 9
    optimizer = TrustRegionNewton(model, nn.MSELoss(), ExactTrustRegion())
    losses = train(optimizer, nn.MSELoss(), x, x, 30, 1e-3)
    assert losses[-1] < 1e-3


@pytest.mark.parametrize("radius", [1e6, 0.3])
def test_saddle_free_takes_absolute_curvatures(radius: float) -> None:
    """In the whole space: `-(|H| + shift I)⁻¹ g` with the dense |H|, cut to the radius by the shift."""
    model, loss = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), nn.CrossEntropyLoss()
    hessian = ChainHessian(model, loss, torch.randn(8, 3).double(), torch.arange(8) % 2)
    unit = torch.eye(20, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(hessian @ unit)
    gradient = torch.cat([g.flatten() for g in hessian.gradient])
    proposal = SaddleFree(rank=20).propose(hessian, gradient, radius, 1.0)
    want = -(vectors @ ((vectors.mT @ gradient) / (values.abs() + proposal.shift)))
    torch.testing.assert_close(proposal.step, want, rtol=1e-4, atol=1e-7)
    assert float(proposal.step.norm()) == pytest.approx(radius) if radius < 1 else proposal.shift < 1e-6


def test_a_closure_serves_as_well() -> None:
    (one, two), (x, y) = (deep(), deep()), batch()
    two.load_state_dict(one.state_dict())
    loss, first, second = nn.CrossEntropyLoss(), *(TrustRegionNewton(m, nn.CrossEntropyLoss()) for m in (one, two))

    def closure() -> Tensor:
        second.zero_grad()
        value: Tensor = loss(two(x), y)
        value.backward()
        return value

    assert float(second.step(closure).detach()) == step(first, loss, x, y)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def through_disk(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_state_dict(optimizer: TrustRegionNewton) -> TrustRegionNewton:
    state = through_disk({"model": optimizer.model.state_dict(), "optimizer": optimizer.state_dict()})
    model = deep()
    fresh = TrustRegionNewton(model, nn.CrossEntropyLoss())
    model.load_state_dict(state["model"])
    fresh.load_state_dict(state["optimizer"])
    return fresh


WAYS = {
    "state-dict": by_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_resumes_exactly(way: Callable[[TrustRegionNewton], TrustRegionNewton]) -> None:
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    optimizer = TrustRegionNewton(deep(), loss)
    for _ in range(3):
        step(optimizer, loss, x, y)
    resumed = way(optimizer)
    for _ in range(3):
        assert step(resumed, loss, x, y) == step(optimizer, loss, x, y)
    pairs = zip(resumed.model.parameters(), optimizer.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert resumed.param_groups[0]["radius"] == optimizer.param_groups[0]["radius"]


def test_gradients_that_are_not_finite_skip_the_step() -> None:
    model, (x, y) = deep(), batch()
    optimizer, before = TrustRegionNewton(model, nn.CrossEntropyLoss()), parameters_of(model)
    x[0, 0] = torch.nan
    step(optimizer, nn.CrossEntropyLoss(), x, y)
    assert optimizer.health()["skipped_steps"] == 1.0
    assert all(torch.equal(p, q) for p, q in zip(parameters_of(model), before, strict=True))


def without_backward(optimizer: TrustRegionNewton, x: Tensor, y: Tensor) -> None:
    for p in optimizer.model.parameters():
        p.grad = torch.ones_like(p)


def two_backwards(optimizer: TrustRegionNewton, x: Tensor, y: Tensor) -> None:
    for _ in range(2):
        nn.functional.cross_entropy(optimizer.model(x), y).backward()


def clipped(optimizer: TrustRegionNewton, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(optimizer.model(x), y).backward()
    nn.utils.clip_grad_norm_(optimizer.model.parameters(), 1e-3)


def half_the_chain(optimizer: TrustRegionNewton, x: Tensor, y: Tensor) -> None:
    z = optimizer.model[:3](x)
    nn.functional.cross_entropy(optimizer.model[3:](z), y).backward()


def another_loss(optimizer: TrustRegionNewton, x: Tensor, y: Tensor) -> None:
    optimizer.model(x).square().mean().backward()


BAD_LOOPS = {
    "no-backward": (without_backward, RuntimeError, "no backward has reached the model"),
    "two-backwards": (two_backwards, RuntimeError, "2 backwards have reached the model"),
    "clipped": (clipped, RuntimeError, r"the gradients in \.grad are not those of the loss on the last batch"),
    "half-the-chain": (half_the_chain, RuntimeError, "needs a call of the whole chain"),
    "another-loss": (another_loss, ValueError, "is not that of CrossEntropyLoss"),
}


@pytest.mark.parametrize(("loop", "error", "match"), BAD_LOOPS.values(), ids=BAD_LOOPS)
def test_loops_that_are_refused_change_nothing(loop: Any, error: type[Exception], match: str) -> None:
    model, (x, y) = deep(), batch()
    optimizer = TrustRegionNewton(model, nn.CrossEntropyLoss(weight=torch.ones(4).double()))
    before = parameters_of(model)

    def turn() -> None:
        loop(optimizer, x, y)
        optimizer.step()

    with pytest.raises(error, match=match):
        turn()
    assert all(torch.equal(p, q) for p, q in zip(parameters_of(model), before, strict=True))
    optimizer.zero_grad()
    step(optimizer, nn.CrossEntropyLoss(), x, y)
    assert optimizer.health()["accepted"]


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no-chain": (lambda: TrustRegionNewton(nn.GRU(3, 3), nn.MSELoss()), TypeError, "is GRU, which does not fit"),
    "dropout": (
        lambda: TrustRegionNewton(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), nn.MSELoss()),
        ValueError,
        r"the layer '1' \(Dropout\) drops at random",
    ),
    "loss": (lambda: TrustRegionNewton(deep(), nn.SoftMarginLoss()), TypeError, "SoftMarginLoss is not supported"),
    "string": (lambda: TrustRegionNewton(deep(), nn.MSELoss(), "exact"), TypeError, "strategies must be one or"),
    "none": (lambda: TrustRegionNewton(deep(), nn.MSELoss(), ()), TypeError, "strategies must be one or"),
    "radius": (lambda: TrustRegionNewton(deep(), nn.MSELoss(), radius=0.0), ValueError, "0 < radius <= largest_radius"),
    "attempts": (lambda: TrustRegionNewton(deep(), nn.MSELoss(), attempts=0), ValueError, "attempts must be at least"),
    "progress": (lambda: TrustRegionNewton(deep(), nn.MSELoss(), progress=1.0), ValueError, "progress must lie in"),
    "rank": (lambda: SaddleFree(rank=0), ValueError, "rank must be at least 1"),
    "tolerance": (lambda: GaussNewton(tolerance=1.0), ValueError, "tolerance must lie between 0 and 1"),
    "smallest-shift": (lambda: ExactTrustRegion(smallest_shift=0.0), ValueError, "smallest_shift must be positive"),
}


@pytest.mark.parametrize(("make", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_arguments(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_one_param_group() -> None:
    optimizer = TrustRegionNewton(deep(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="has one param group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_closing_leaves_the_model_as_it_was() -> None:
    model = deep()
    optimizer = TrustRegionNewton(model, nn.CrossEntropyLoss())
    optimizer.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
