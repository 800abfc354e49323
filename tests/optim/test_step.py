"""The arithmetic of a step, against formulas written out densely."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kfacopt
from tests import reference
from tests.cases import (
    BY_NAME,
    CASES,
    OPTIMIZERS,
    Case,
    backward,
    exact_ekfac,
    exact_kfac,
    parameters_of,
    still,
    train_step,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
DAMPING = 0.05
EXACT = [pytest.param(case, id=case.name) for case in CASES if "expand" in case.kfac_exact]


def plain(**options: Any) -> dict[str, Any]:
    """Nothing but the preconditioned gradient."""
    fixed = {"lr": 1.0, "damping": DAMPING, "momentum": 0.0, "kl_clip": None, "ema_decay": 0.0}
    return fixed | {"factor_every": 1, "refresh_every": 1, "curvature": "ggn"} | options


def moved(case: Case, optimizer: Any, **options: Any) -> tuple[nn.Module, Any, dict[Any, Tensor]]:
    """A case after one step: model as before it, the optimizer, and by layer the step `[k o i]`."""
    model, loss, x, y = case.make()
    made = optimizer(model, loss, **plain(**options))
    before = {p: p.detach().clone() for p in model.parameters()}
    train_step(made, model, loss, x, y)
    steps = {
        layer: reference.as_matrices(
            layer, {role: (p.detach() - before[p]).unsqueeze(0) for role, p in layer.parameters.items()}
        ).squeeze(0)
        for layer in made._layers
        if all(p.grad is not None for p in layer.parameters.values())
    }
    return case.make()[0], made, steps


def gradients_of(case: Case, layers: list[Any], made: Any) -> list[Tensor]:
    """Mean-loss gradients before the step, by layer."""
    model, loss, x, y = case.make()
    of_step = dict(zip(made.model.parameters(), model.parameters(), strict=True))
    reference.mean_loss(loss, model(x), y).backward()
    result = []
    for layer in layers:
        parts = {role: of_step[p].grad.unsqueeze(0) for role, p in layer.parameters.items()}
        result.append(reference.as_matrices(layer, parts).squeeze(0))
    return result


def restored(case: Case, made: Any) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The optimizer's own model at its initial parameters: its layers' parameters are in it."""
    fresh, loss, x, y = case.make()
    made.close()
    made.model.load_state_dict(fresh.state_dict())
    return made.model, loss, x, y


@pytest.mark.parametrize("case", EXACT)
def test_exact_kfac_steps_along_the_damped_inverse_of_the_ggn(case: Case) -> None:
    _, made, steps = moved(case, exact_kfac)
    gradients = gradients_of(case, list(steps), made)
    model, loss, x, y = restored(case, made)
    for (layer, step), gradient in zip(steps.items(), gradients, strict=True):
        ggn = reference.ggn(model, loss, layer, x, y)
        damped = ggn + DAMPING * torch.eye(ggn.shape[-1], dtype=ggn.dtype)
        expected = torch.linalg.solve(damped, gradient.flatten(1).unsqueeze(-1)).reshape(step.shape)
        torch.testing.assert_close(-step, expected, **CLOSE)


@pytest.mark.parametrize("case", EXACT)
def test_kfac_damps_its_factors_by_the_pi_split(case: Case) -> None:
    _, made, steps = moved(case, kfacopt.KFAC)
    gradients = gradients_of(case, list(steps), made)
    for (layer, step), gradient in zip(steps.items(), gradients, strict=True):
        left, right = (f if f.ndim == 3 else f.unsqueeze(0) for f in made.backend.blocks[layer.name].factors())
        for k in range(len(step)):
            g, a = left[k], right[k]
            pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
            g = g + math.sqrt(DAMPING) / pi * torch.eye(len(g), dtype=g.dtype)
            a = a + math.sqrt(DAMPING) * pi * torch.eye(len(a), dtype=a.dtype)
            expected = torch.linalg.solve(g, gradient[k]) @ torch.linalg.inv(a)
            torch.testing.assert_close(-step[k], expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp-ce", "conv-groups", "words", "shared-twice", "norms"])
@pytest.mark.parametrize("optimizer", [kfacopt.EKFAC, exact_ekfac])
def test_ekfac_damps_its_corrected_eigenvalues_as_kfac_does(name: str, optimizer: Any) -> None:
    """`E + √damping (π λ_G + λ_A / π) + damping`, in a basis of the batch before."""
    case = BY_NAME[name]
    model, loss, x, y = case.make()
    made = optimizer(model, loss, **plain(refresh_every=1000))
    train_step(made, model, loss, x, y)
    before = {p: p.detach().clone() for p in model.parameters()}
    train_step(made, model, loss, x, y)
    compared = 0
    for layer in made._layers:
        block = made.backend.blocks[layer.name]
        if layer.handler.structure == "elementwise":
            continue
        left, right, values_left, values_right = decomposition(block)
        if left.shape[-1] != left.shape[-2] or right.shape[-1] != right.shape[-2]:
            continue  # a cut basis: see tests/blocks
        parts = {role: (p.detach() - before[p]).unsqueeze(0) for role, p in layer.parameters.items()}
        step = reference.as_matrices(layer, parts).squeeze(0)
        gradient = reference.as_matrices(
            layer, {role: p.grad.unsqueeze(0) for role, p in layer.parameters.items()}
        ).squeeze(0)
        corrected = block.corrected.value if block.corrected.value.ndim == 3 else block.corrected.value.unsqueeze(0)
        for k in range(len(step)):
            g, a = values_left[k], values_right[k]
            pi = math.sqrt(float(a.mean() / g.mean()))
            root = math.sqrt(DAMPING)
            damped = corrected[k] + root * (pi * g[:, None] + a[None, :] / pi) + DAMPING
            expected = left[k] @ ((left[k].mT @ gradient[k] @ right[k]) / damped) @ right[k].mT
            torch.testing.assert_close(-step[k], expected, **CLOSE)
            compared += 1
    assert compared >= 2


def decomposition(block: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q_G, Q_A, λ_G, λ_A, all with an axis of groups."""
    if isinstance(block, kfacopt.blocks.PartialEigenBlock):
        (left, right) = block.sides()
        found = [left.basis, right.basis, left.values, right.values]
    else:
        found = [*block.basis(), *block.factor_eigenvalues()]
    if found[1] is None:
        found[1] = torch.eye(found[3].shape[-1], dtype=found[0].dtype)
    bases = [b if b.ndim == 3 else b.unsqueeze(0) for b in found[:2]]
    values = [v if v.ndim == 2 else v.unsqueeze(0) for v in found[2:]]
    return bases[0], bases[1], values[0], values[1]


@pytest.mark.parametrize("optimizer", [exact_kfac, kfacopt.KFAC, kfacopt.EKFAC])
def test_one_step_solves_a_quadratic(optimizer: Any) -> None:
    """Linear regression without noise, hardly damped: a Newton step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    truth = nn.Linear(3, 2).double()
    y = truth(x).detach()
    made = optimizer(model, nn.MSELoss(), **plain(damping=1e-12))
    train_step(made, model, nn.MSELoss(), x, y)
    # KFAC's split damping is of the order of the root of `damping`.
    torch.testing.assert_close(model.weight, truth.weight, rtol=1e-4, atol=1e-4)
    assert nn.functional.mse_loss(model(x), y) < 1e-9


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_large_damping_is_gradient_descent(optimizer: Any) -> None:
    case = BY_NAME["norms"]
    model, loss, x, y = case.make()
    damping = 1e10
    made = optimizer(model, loss, **plain(damping=damping, lr=damping))
    before = [p.detach().clone() for p in model.parameters()]
    train_step(made, model, loss, x, y)
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(old - parameter, parameter.grad, rtol=1e-4, atol=1e-6)


def test_momentum_weight_decay_and_clip() -> None:
    """Three steps of the documented formula; some step is clipped, some is not."""
    case = BY_NAME["mlp-ce"]
    model, loss, x, y = case.make()
    lr, momentum, weight_decay, kl_clip = 0.3, 0.8, 0.1, 1e-2
    made = kfacopt.KFAC(
        model,
        loss,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        kl_clip=kl_clip,
        damping=DAMPING,
        factor_every=1,
        refresh_every=1,
        curvature="ggn",
    )
    seen: list[list[Tensor]] = []
    scales = []
    for turn in range(4):
        made.zero_grad()
        backward(model, loss, x if turn != 2 else 1e-3 * x, y)
        before = [p.detach().clone() for p in model.parameters()]
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        made.step()
        # The gradients' weights: one more decay on all but the newest (Nesterov), then normalised to sum to one.
        weights = [(1 - momentum) * momentum ** (turn - i + 1) for i in range(turn + 1)]
        weights[-1] += 1 - momentum
        total = sum(weights)
        means = [
            sum(w * g for w, g in zip(weights, gradients, strict=True)) / total for gradients in zip(*seen, strict=True)
        ]
        by_id = {id(p): m for p, m in zip(model.parameters(), means, strict=True)}
        natural = made.backend.solve(
            {layer: {r: by_id[id(p)] for r, p in layer.parameters.items()} for layer in made._layers},
            {layer: kfacopt.Settings(DAMPING, 0.95) for layer in made._layers},
        )
        of = {id(layer.parameters[r]): u for layer, parts in natural.items() for r, u in parts.items()}
        updates = [of[id(p)] for p in model.parameters()]
        inner = sum(float((u * m).sum()) for u, m in zip(updates, means, strict=True))
        nu = min(1.0, math.sqrt(kl_clip / (lr**2 * inner)))
        scales.append(nu)
        assert made.health()["kl_scale"] == pytest.approx(nu, rel=1e-9)
        for update, old, parameter in zip(updates, before, model.parameters(), strict=True):
            expected = (1 - lr * weight_decay) * old - lr * nu * update
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-11)
    assert min(scales) < 1.0


@given(momenta=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=10))
def test_the_average_of_a_constant_gradient_is_that_gradient(momenta: list[float]) -> None:
    """Whatever a scheduler does to the momentum (OneCycleLR and CyclicLR cycle it)."""
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    made = exact_kfac(model, nn.MSELoss(), **plain(lr=1e-3, damping=1e6, adamw_lr=0.0))
    backward(model, nn.MSELoss(), torch.ones(1, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    for momentum in momenta:
        made.param_groups[0]["momentum"] = momentum
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = parameters_of(model)
        made.step()
        for old, parameter in zip(before, model.parameters(), strict=True):
            # The damping is all there is: the step is lr / damping times the average.
            average = (old - parameter.detach()) * 1e6 / 1e-3
            torch.testing.assert_close(average, torch.ones_like(average), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_the_relative_clip_bounds_each_layer_s_step(optimizer: Any, lr: float) -> None:
    case, relative = BY_NAME["conv-2d"], 0.02
    model, loss, x, y = case.make()
    made = optimizer(model, loss, **plain(lr=lr, damping=1e-6, relative_clip=relative))
    bounded = 0
    for _ in range(2):
        before = {p: p.detach().clone() for p in model.parameters()}
        train_step(made, model, loss, x, y)
        for layer in made._layers:
            parts = list(layer.parameters.values())
            moved = math.sqrt(sum(float((p.detach() - before[p]).square().sum()) for p in parts))
            length = math.sqrt(sum(float(before[p].square().sum()) for p in parts))
            assert moved <= relative * length * (1 + 1e-9)
            bounded += moved >= relative * length * (1 - 1e-9)
    assert bounded


@pytest.mark.parametrize("raised", [1.0, 30.0])
def test_the_clip_bounds_the_step_whoever_raised_the_learning_rate(raised: float) -> None:
    """A scheduler with a peak (OneCycleLR's max_lr) or a user's hand may raise lr above what was given."""
    case = BY_NAME["mlp-ce"]
    model, loss, x, y = case.make()
    kl_clip = 1e-3
    made = exact_kfac(model, loss, **plain(lr=0.5, kl_clip=kl_clip, damping=1e-3))
    made.param_groups[0]["lr"] *= raised
    before = [p.detach().clone() for p in model.parameters()]
    train_step(made, model, loss, x, y)
    inner = sum(float(((old - p.detach()) * p.grad).sum()) for old, p in zip(before, model.parameters(), strict=True))
    # The step is lr ν u, so its product with g is lr ν uᵀg; the bound is on (lr ν)² uᵀg.
    scale = made.param_groups[0]["lr"] * made.health()["kl_scale"]
    assert scale * inner <= kl_clip * (1 + 1e-9)


def test_a_schedule_shortens_clipped_steps_too() -> None:
    lengths = []
    for factor in (1.0, 0.1):
        model, loss, x, y = BY_NAME["mlp-ce"].make()
        made = kfacopt.KFAC(model, loss, **plain(kl_clip=1e-6))
        made.param_groups[0]["lr"] *= factor
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        train_step(made, model, loss, x, y)
        lengths.append(float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()))
    assert lengths[1] == pytest.approx(0.1 * lengths[0], rel=1e-9)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_curvature_it_is_torchs_adamw(optimizer: Any, weight_decay: float) -> None:
    """Bit for bit, for a group that excludes curvature, under a scheduler."""
    case = BY_NAME["mlp-ce"]
    ours, loss, x, y = case.make()
    theirs = case.make()[0]
    groups = [{"params": list(ours.parameters()), "curvature": False}]
    made = optimizer(ours, loss, groups, lr=0.01, weight_decay=weight_decay)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=weight_decay, fused=True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (made, torchs)]
    for _ in range(4):
        for model, used in ((ours, made), (theirs, torchs)):
            train_step(used, model, loss, x, y)
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_uncovered_parameters_follow_the_schedule_in_proportion() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scale

    torch.manual_seed(0)
    model, loss = Scaled().double(), nn.CrossEntropyLoss()
    _, _, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.KFAC(model, loss, lr=0.5, adamw_lr=0.01, factor_every=1)
    assert {r.treatment for r in made.coverage().rows if "scale" in r.parameters} == {"AdamW"}
    twin = nn.Parameter(model.scale.detach().clone())
    torchs = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
    for turn in range(4):
        for group, base in ((made.param_groups[0], 0.5), (torchs.param_groups[0], 0.01)):
            group["lr"] = base * 0.8**turn
        made.zero_grad()
        backward(model, loss, x, y)
        assert model.scale.grad is not None
        twin.grad = model.scale.grad.clone()
        made.step()
        torchs.step()
        torch.testing.assert_close(model.scale.detach(), twin.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_case_trains(case: Case, optimizer: Any) -> None:
    """With defaults but for the schedules: the loss falls, all that got a gradient moves."""
    model, loss, x, y = case.make()
    made = optimizer(model, loss, factor_every=1, refresh_every=3, lr=0.1, adamw_lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    first = train_step(made, model, loss, x, y)
    for old, parameter in zip(before, model.parameters(), strict=True):
        still_there = torch.equal(old, parameter)
        assert still_there == (parameter.grad is None or not bool(parameter.grad.any()))
    for _ in range(11):
        last = train_step(made, model, loss, x, y)
    assert last < first
    assert made.health()["skipped_steps"] == 0.0


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_coverage_lists_every_parameter_once(case: Case) -> None:
    model, loss, _, _ = case.make()
    made = kfacopt.EKFAC(model, loss)
    places = [
        (f"{row.module}.{name}".lstrip("."), row.treatment) for row in made.coverage().rows for name in row.parameters
    ]
    names = [name.split("+")[0] for name, _ in places]
    whole = [name for name in names if "[" not in name]  # of the others some rows each: tests/layers/test_attention.py
    packed = {id(p) for layer in made._layers for r, p in layer.parameters.items() if layer.rows(r) is not None}
    assert len(names) == len(set(names))
    assert len(whole) == len(list(model.parameters())) - len(packed)
    for row in made.coverage().rows:
        assert row.treatment
        assert row.why
        assert (row.module or "(root)") in str(made.coverage())
        assert row.why in str(made.coverage())


def test_coverage_says_why() -> None:
    expected = {
        "tied-embedding": ("embedding", "EKFAC", "one block for the sum of both uses"),
        "transformer": ("layer.self_attn.k_proj", "EKFAC", "projection of the keys"),
        "frozen": ("first", "frozen", "requires_grad"),
    }
    for name, (module, treatment, why) in expected.items():
        model, loss, _, _ = BY_NAME[name].make()
        rows = [r for r in kfacopt.EKFAC(model, loss).coverage().rows if r.module == module]
        assert any(treatment in r.treatment and why in r.why for r in rows), (name, rows)


def test_tied_linear_layers_share_a_block() -> None:
    model, loss, _, _ = BY_NAME["tied"].make()
    rows = {(r.module, r.parameters): r for r in kfacopt.EKFAC(model, loss).coverage().rows}
    shared = next(r for (_, parameters), r in rows.items() if parameters == ("weight",))
    assert "2 modules" in shared.why
    assert len(rows) == 4  # the weight, two biases, the head


def test_still_options_move_nothing() -> None:
    model, loss, x, y = BY_NAME["transformer"].make()
    before = [p.detach().clone() for p in model.parameters()]
    train_step(kfacopt.EKFAC(model, loss, **still()), model, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
