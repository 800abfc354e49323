"""The seam: any direction with any length, one `Step` that both read, health and state of each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.linalg.tensors import flat
from kfacopt.optim.step.trust_region import kl_scale, squared_length
from kfacopt.replay.linearization import BatchLinearization
from tests.cases import BY_NAME, exact_ekfac, exact_kfac, mlp, train_step

CASE = BY_NAME["mlp-ce"]


class Gradient(kfacopt.Direction):
    """Steepest descent, of everything that is covered."""

    def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
        return kfacopt.Updates({p: g.clone() for p, g in step.gradients.items()})


class Counting(kfacopt.StepLength):
    """A length that halves every step, skips the third, and remembers how many there were."""

    def __init__(self) -> None:
        self.count = 0

    def scaled(self, step: kfacopt.Step, updates: kfacopt.Updates) -> kfacopt.Updates | None:
        self.count += 1
        return None if self.count == 3 else updates.scaled(0.5)

    def health(self) -> dict[str, float]:
        return {"count": float(self.count)}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])


def test_a_direction_and_a_length_of_ones_own() -> None:
    model, loss, x, y = CASE.make()
    made = kfacopt.KFAC(model, loss, lr=0.1, direction=Gradient(), step_length=Counting())
    for turn in range(1, 5):
        before = flat(list(model.parameters())).detach().clone()
        train_step(made, model, loss, x, y)
        moved = before - flat(list(model.parameters())).detach()
        expected = 0.0 if turn == 3 else 0.1 * 0.5 * flat([p.grad for p in model.parameters()])
        torch.testing.assert_close(moved, torch.zeros_like(moved) + expected)
        assert made.health()["count"] == turn
    assert made.health()["skipped_steps"] == 1.0
    other = kfacopt.KFAC(CASE.make()[0], loss, lr=0.1, direction=Gradient(), step_length=Counting())
    other.load_state_dict(made.state_dict())
    assert other.health()["skipped_steps"] == 1.0
    assert other.step_length.state_dict() == {"count": 4}


@pytest.mark.parametrize("backend", [kfacopt.KFACBackend, kfacopt.EKFACBackend, kfacopt.EigenKFACBackend])
@pytest.mark.parametrize("direction", [Gradient(), None])
def test_a_trust_region_bounds_the_divergence_of_any_direction(
    direction: kfacopt.Direction | None, backend: type[kfacopt.LayerwiseBackend]
) -> None:
    """`½ δᵀ (C + damping I) δ` with C written out column by column; π-split damping only approximates it."""
    model, loss, x, y = CASE.make()
    damping = 1e-6
    made = kfacopt.SecondOrderOptimizer(
        model, loss, lr=5.0, damping=damping, kl_clip=1e-3, curvature="ggn", direction=direction, backend=backend(1, 1)
    )
    before = [p.detach().clone() for p in model.parameters()]
    train_step(made, model, loss, x, y)
    delta = {p: p.detach() - old for p, old in zip(model.parameters(), before, strict=True)}
    by_layer = {layer: {r: delta[p] for r, p in layer.parameters.items()} for layer in made._layers}
    products = made.backend.multiply(by_layer)
    length = sum(
        float((by_layer[layer][role] * (c + damping * by_layer[layer][role])).sum())
        for layer, parts in products.items()
        for role, c in parts.items()
    )
    rtol = 1e-9 if direction is not None else 0.05
    torch.testing.assert_close(torch.tensor(length), torch.tensor(1e-3), rtol=rtol, atol=0.0)
    assert made.health()["kl"] == pytest.approx(0.5e-3)


def test_half_powers_measure_the_divergence_with_the_curvature_itself() -> None:
    """Of `u = (C + damping I)^-½ m`, `uᵀ m` is not the squared length."""
    model, loss, x, y = CASE.make()
    backend = kfacopt.EKFACBackend(1, 1, exponent=0.5)
    made = kfacopt.SecondOrderOptimizer(
        model, loss, lr=0.1, damping=0.1, momentum=0.0, curvature="ggn", backend=backend
    )
    before = [p.detach().clone() for p in model.parameters()]
    train_step(made, model, loss, x, y)
    delta = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    by_layer, start = {}, dict(zip(model.parameters(), delta, strict=True))
    for layer in made._layers:
        by_layer[layer] = {role: start[p] for role, p in layer.parameters.items()}
    products = made.backend.multiply(by_layer)
    twice = sum(
        float((d * (products[layer][role] + 0.1 * d)).sum())
        for layer, parts in by_layer.items()
        for role, d in parts.items()
    )
    assert made.health()["kl"] == pytest.approx(0.5 * twice, rel=1e-9)


def test_a_step_runs_its_forwards_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask for its linearization."""
    made_of: list[int] = []
    original = BatchLinearization.__init__

    def counted(self: BatchLinearization, *arguments: Any, **named: Any) -> None:
        made_of.append(1)
        original(self, *arguments, **named)

    monkeypatch.setattr(BatchLinearization, "__init__", counted)

    class Asking(kfacopt.Preconditioned):
        def wants_replays(self, step: int) -> bool:
            return True

        def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
            found = super().updates(step)
            step.linearization(list(found.tensors))
            return found

    model, loss, x, y = CASE.make()
    made = kfacopt.EKFAC(model, loss, lr="auto", direction=Asking(momentum=None))
    train_step(made, model, loss, x, y)
    assert len(made_of) == 1


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_line_search_is_a_step_length(optimizer: Any) -> None:
    model, loss, x, y = CASE.make()
    search = kfacopt.GridLineSearch(points=12, longest=4.0)
    made = optimizer(model, loss, lr=1.0, damping=0.1, curvature="ggn", step_length=search)
    losses = [float(train_step(made, model, loss, x, y)) for _ in range(8)]
    assert losses == sorted(losses, reverse=True)
    assert made.health()["step_size"] > 0.0


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, exact_kfac, exact_ekfac])
@pytest.mark.parametrize("name", ["mlp-ce", "conv-groups", "sequence-ce", "embedding"])
def test_unwhitening_what_was_whitened_solves(optimizer: Any, name: str) -> None:
    case = BY_NAME.get(name, CASE)
    model, loss, x, y = case.make()
    made = optimizer(model, loss, damping=0.1, curvature="ggn", factor_every=1, refresh_every=1)
    train_step(made, model, loss, x, y)
    gradients = {
        layer: {role: p.grad for role, p in layer.parameters.items()}
        for layer in made._layers
        if all(p.grad is not None for p in layer.parameters.values())
    }
    settings = {layer: kfacopt.Settings(0.1, 0.0) for layer in gradients}
    whole = made.backend.solve(gradients, settings)
    halves = made.backend.unwhiten(made.backend.whiten(gradients, settings), settings)
    for layer, parts in whole.items():
        for role, solved in parts.items():
            torch.testing.assert_close(halves[layer][role], solved, rtol=1e-9, atol=1e-12)


def test_bounds_scale_the_image_with_the_update() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    updates = kfacopt.Updates({p: torch.ones(2), q: torch.ones(2)}, image={p: torch.ones(2), q: torch.ones(2)})
    groups = [{"params": [p, q], "lr": 0.5, "base_lr": 0.5}]
    step: Any = type("Step", (), {"groups": groups})
    assert squared_length(step, updates) == pytest.approx(0.25 * 4.0)
    assert squared_length(step, updates.scaled_apart({p: 0.5})) == pytest.approx(0.25 * (2.0 * 0.25 + 2.0))
    assert kl_scale(float("inf"), 1.0) != kl_scale(float("inf"), 1.0)


OLD: list[tuple[dict[str, Any], kfacopt.Fisher]] = [
    ({"fisher_type": "type-2"}, kfacopt.Fisher("ggn")),
    ({"fisher_type": "empirical"}, kfacopt.Fisher("empirical")),
    ({"mc_samples": 2, "seed": 5}, kfacopt.Fisher("mc", samples=2, seed=5)),
]


@pytest.mark.parametrize(("old", "new"), OLD)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_old_spellings_still_work(optimizer: Any, old: dict[str, Any], new: kfacopt.Fisher) -> None:
    model, loss, x, y = CASE.make()
    twin = copy.deepcopy(model)
    with pytest.warns(DeprecationWarning, match=r"curvature=kfacopt\.Fisher\("):
        first = optimizer(model, loss, **old)
    second = optimizer(twin, loss, curvature=new)
    for _ in range(3):
        train_step(first, model, loss, x, y)
        train_step(second, twin, loss, x, y)
    assert torch.equal(flat(list(model.parameters())), flat(list(twin.parameters())))


def test_a_backend_by_position_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="pass backend="):
        made = kfacopt.SecondOrderOptimizer(mlp(), nn.CrossEntropyLoss(), kfacopt.KFACBackend())  # type: ignore[arg-type]
    assert isinstance(made.backend, kfacopt.KFACBackend)


def test_a_checkpoint_of_the_quadratic_model_under_its_old_name() -> None:
    model, loss, x, y = CASE.make()
    made = kfacopt.KFAC(model, loss, lr="auto")
    for _ in range(3):
        train_step(made, model, loss, x, y)
    state = made.state_dict()
    state["curvature"]["step_rule"] = state["curvature"].pop("step_length")
    del state["curvature"]["direction"]
    twin = copy.deepcopy(model)
    resumed = kfacopt.KFAC(twin, loss, lr="auto")
    resumed.load_state_dict(state)
    for _ in range(2):
        train_step(made, model, loss, x, y)
        train_step(resumed, twin, loss, x, y)
    same: Tensor = flat(list(model.parameters()))
    assert torch.equal(same, flat(list(twin.parameters())))
