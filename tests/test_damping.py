"""The Levenberg-Marquardt rule and damping in units of the curvature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from kfacopt import LevenbergMarquardt
from tests import reference
from tests.cases import BY_NAME, CASES, Case, Squares, exact_ekfac, exact_kfac, parameters_of, soft, train_step

EVERY = LevenbergMarquardt(every=1)


def options(**more: Any) -> dict[str, Any]:
    fixed = {"lr": 0.5, "damping": 0.2, "momentum": 0.0, "kl_clip": None, "damping_rule": EVERY}
    return fixed | {"factor_every": 1, "refresh_every": 1, "curvature": "ggn", "ema_decay": 0.0} | more


# -- the rule itself -------------------------------------------------------------------------------


def test_the_rule() -> None:
    rule = LevenbergMarquardt(every=4, decay=0.9, smallest=0.01, largest=100.0)
    assert rule.adjusted(1.0, 0.9) == pytest.approx(0.9**4)
    assert rule.adjusted(1.0, 0.1) == pytest.approx(0.9**-4)
    assert rule.adjusted(1.0, 0.5) == rule.adjusted(1.0, 0.75) == rule.adjusted(1.0, 0.25) == 1.0
    assert rule.adjusted(1.0, math.nan) > 1.0
    assert rule.adjusted(0.011, 1.0) == 0.01
    assert rule.adjusted(99.0, -1.0) == 100.0
    assert [step for step in range(9) if rule.due(step)] == [3, 7]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"decay": 1.0}, {"decay": 0.0}])
def test_nonsense_is_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LevenbergMarquardt(**arguments)


# -- rho -------------------------------------------------------------------------------------------


def expected_rho(
    made: Any, model: nn.Module, loss: nn.Module, batches: list[tuple[Tensor, Tensor]], damping: float, step: Any
) -> float:
    """Loss change over the quadratic model's, both computed openly; the loss as the mean over all batches."""

    def mean() -> float:
        with torch.no_grad():
            counts = [reference.term_count(loss, model(x), y) for x, y in batches]
            values = [
                float(reference.mean_loss(loss, model(x), y)) * m for (x, y), m in zip(batches, counts, strict=True)
            ]
        return sum(values) / sum(counts)

    before, old = mean(), parameters_of(model)
    step()
    gradient = [p.grad for p in model.parameters()]
    delta = [p.detach() - q for p, q in zip(model.parameters(), old, strict=True)]
    scale = 1.0
    if getattr(loss, "reduction", "mean") == "sum":
        scale = 1.0 / sum(reference.term_count(loss, model(x), y) for x, y in batches)
    predicted = sum(scale * float((g * d).sum()) for g, d in zip(gradient, delta, strict=True) if g is not None)
    by_parameter = {id(p): d for p, d in zip(model.parameters(), delta, strict=True)}
    moved = {layer: {r: by_parameter[id(p)] for r, p in layer.parameters.items()} for layer in made._layers}
    for layer, parts in made.backend.multiply(moved).items():
        for role, product in parts.items():
            d = moved[layer][role]
            predicted += 0.5 * float((d * (product + damping * d)).sum())
    return (mean() - before) / predicted


@pytest.mark.parametrize("name", ["linear-mse", "mlp-ce", "mlp-bce", "mlp-ce-sum", "linear-mse-sum", "mlp-weighted-ce"])
@pytest.mark.parametrize("optimizer", [exact_kfac, kfacopt.KFAC, kfacopt.EKFAC, exact_ekfac])
def test_rho_is_the_reduction_ratio(name: str, optimizer: Any) -> None:
    model, loss, x, y = BY_NAME[name].make()
    if name == "mlp-weighted-ce":  # smoothed targets are none that the gradient shows: see likelihoods
        loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
    made = optimizer(model, loss, **options())
    for _ in range(2):
        damping = made.param_groups[0]["damping"]
        rho = expected_rho(made, model, loss, [(x, y)], damping, lambda: train_step(made, model, loss, x, y))
        assert made.health()["rho"] == pytest.approx(rho, rel=1e-6)


@pytest.mark.parametrize("optimizer", [exact_kfac])
def test_rho_is_known_on_a_quadratic_problem(optimizer: Any) -> None:
    """Linear model, squared error, exact curvature: the model overpredicts by its damping term alone."""
    model, loss, x, y = BY_NAME["linear-mse"].make()
    damping, lr = 0.3, 0.7
    made = optimizer(model, loss, **options(damping=damping, lr=lr))
    old = parameters_of(model)
    train_step(made, model, loss, x, y)
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    d = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), old, strict=True)])
    # C d = -lr g - damping d, since d = -lr (C + damping)^-1 g.
    curved = float(d @ (-lr * g - damping * d))
    change, predicted = float(g @ d) + 0.5 * curved, float(g @ d) + 0.5 * (curved + damping * float(d @ d))
    assert made.health()["rho"] == pytest.approx(change / predicted, rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("parts", [(6,), (3, 3), (1, 5), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["mlp-ce", "mlp-mse", "mlp-bce"])
def test_rho_under_accumulation(kind: str, parts: tuple[int, ...], reduction: str) -> None:
    model, loss, x, y = BY_NAME[kind].make()
    loss.reduction = reduction
    made = exact_kfac(model, loss, **options())
    batches = list(zip(x.split(list(parts)), y.split(list(parts)), strict=True))

    def step() -> None:
        made.zero_grad()
        for some_x, some_y in batches:
            share = len(some_x) / len(x) if reduction == "mean" else 1.0
            (share * loss(model(some_x), some_y)).backward()
        made.step()

    damping = made.param_groups[0]["damping"]
    rho = expected_rho(made, model, loss, [(x, y)], damping, step)
    assert made.health()["rho"] == pytest.approx(rho, rel=1e-6)


def test_rho_under_loss_scaling() -> None:
    for kind, scale in (("mlp-ce", 2.0**12), ("mlp-bce", 2.0**12)):
        rhos = []
        for factor in (1.0, scale):
            model, loss, x, y = BY_NAME[kind].make()
            made = exact_kfac(model, loss, **options())
            scaler = torch.amp.GradScaler("cpu", init_scale=factor)
            for _ in range(2):
                made.zero_grad()
                scaler.scale(loss(model(x), y)).backward()
                scaler.step(made)
                scaler.update()
            rhos.append(made.health()["rho"])
        assert rhos[0] == pytest.approx(rhos[1], rel=1e-9)


# Of these the gradient at the prediction does not tell how the loss was scaled: likelihood, loss, what becomes of y.
UNTOLD: dict[str, tuple[Any, nn.Module, str, Any]] = {
    "mse": (nn.MSELoss(), nn.MSELoss(), "mlp-mse", lambda y: y),
    "a user's": (Squares(), nn.MSELoss(), "mlp-mse", lambda y: y),
    "soft classes": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), "mlp-ce", soft),
    "soft bits": (
        kfacopt.Bernoulli(soft_targets=True, reduction="mean"),
        nn.BCEWithLogitsLoss(),
        "mlp-bce",
        lambda y: 0.8 * y + 0.1,
    ),
}


@pytest.mark.parametrize("factor", [1.0, 2.0**12])
@pytest.mark.parametrize("kind", UNTOLD)
def test_rho_where_the_scale_cannot_be_told_is_right_or_left_alone(kind: str, factor: float) -> None:
    likelihood, loss, name, of_target = UNTOLD[kind]
    model, _, x, y = BY_NAME[name].make()
    y = of_target(y)
    made = exact_kfac(model, likelihood, **options())
    scaler = torch.amp.GradScaler("cpu", init_scale=factor)

    def step() -> None:
        made.zero_grad()
        scaler.scale(loss(model(x), y)).backward()
        scaler.step(made)
        scaler.update()

    rho = expected_rho(made, model, loss, [(x, y)], 0.2, step)
    reported = made.health().get("rho", math.nan)
    if factor == 1.0:
        assert reported == pytest.approx(rho, rel=1e-6)
    else:
        assert reported == pytest.approx(rho, rel=1e-6) or math.isnan(reported)
        assert made.param_groups[0]["damping"] == 0.2 or not math.isnan(reported)


@pytest.mark.parametrize("kind", [*UNTOLD, "classes"])
def test_rho_in_float16_only_where_the_scale_can_be_told(kind: str) -> None:
    """There a GradScaler is at work, by a factor that a short step would not show."""
    likelihood, loss, name, of_target = UNTOLD.get(kind, (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), "mlp-ce", None))
    model, _, x, y = BY_NAME[name].make()
    y = y if of_target is None else of_target(y)
    made = exact_kfac(model, likelihood, **options())
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        value = loss(model(x).double(), y)
    value.backward()
    made.step()
    assert ("rho" in made.health()) is (kind == "classes")


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)


def test_several_roots_leave_the_damping_alone_or_are_right() -> None:
    torch.manual_seed(0)
    model = Encoding().double()
    _, loss, x, y = BY_NAME["mlp-ce"].make()
    made = exact_kfac(model, loss, **options())
    made.zero_grad()
    loss(model.decoder(model.encoder(x)), y).backward()
    made.step()
    rho = made.health().get("rho", math.nan)
    assert math.isnan(rho)
    assert made.param_groups[0]["damping"] == 0.2


# -- the forward that is run again -----------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout and running statistics: running it again must repeat the one and not move the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.norm(self.first(x)).tanh()))


@pytest.mark.parametrize("training", [True, False])
def test_buffers_and_random_state_are_put_back(training: bool) -> None:
    results = []
    for rule in (EVERY, None):
        torch.manual_seed(0)
        model = Noisy().double().train(training)
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        # Damping does not follow rho here, so that both runs go the same way.
        fixed = rule and LevenbergMarquardt(every=1, smallest=0.2, largest=0.2)
        made = kfacopt.KFAC(model, nn.CrossEntropyLoss(), **options(damping_rule=fixed))
        for _ in range(3):
            train_step(made, model, nn.CrossEntropyLoss(), x, y)
        results.append((model.state_dict(), torch.get_rng_state()))
        assert model.calls == (6 if rule else 3)
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name
    assert torch.equal(results[0][1], results[1][1])


def test_rho_with_dropout_is_of_the_same_mask() -> None:
    """A tiny step has a reduction ratio of one, unless the mask changed between."""
    torch.manual_seed(0)
    model = Noisy().double()
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randint(3, (64,))
    made = exact_kfac(model, nn.CrossEntropyLoss(), **options(lr=1e-5, adamw_lr=0.0, damping=1e-6))
    train_step(made, model, nn.CrossEntropyLoss(), x, y)
    assert made.health()["rho"] == pytest.approx(1.0, abs=1e-3)


def test_rho_under_autocast_is_of_the_same_precision() -> None:
    rhos = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model, loss = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)), nn.CrossEntropyLoss()
        x, y = torch.randn(128, 4), torch.randint(3, (128,))
        made = exact_kfac(model, loss, **options(lr=0.2, damping=0.1))
        dtypes: set[torch.dtype] = set()

        def note(module: nn.Module, args: Any, output: Tensor, seen: set[torch.dtype] = dtypes) -> None:
            seen.add(output.dtype)

        model[0].register_forward_hook(note)
        for _ in range(2):
            made.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = loss(model(x), y)
            value.backward()
            made.step()
        assert dtypes == {torch.bfloat16 if autocast else torch.float32}
        rhos.append(made.health()["rho"])
    assert rhos[1] == pytest.approx(rhos[0], rel=0.2)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_every_case_adapts_its_damping(case: Case) -> None:
    model, loss, x, y = case.make()
    made = kfacopt.EKFAC(model, loss, factor_every=1, refresh_every=2, damping=0.1, damping_rule=LevenbergMarquardt(2))
    for _ in range(4):
        train_step(made, model, loss, x, y)
    health = made.health()
    assert math.isfinite(health["rho"])
    assert made.param_groups[0]["damping"] > 0
    assert health["kl"] >= 0


def test_keyword_inputs_and_chosen_predictions_are_run_again() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, *, features: Tensor) -> dict[str, Tensor]:
            out = self.net(features)
            return {"a": out, "b": 2 * out}

    torch.manual_seed(0)
    model = Chosen().double()
    _, loss, x, y = BY_NAME["mlp-ce"].make()
    made = exact_kfac(model, loss, **options(prediction=lambda output: output["b"]))
    F.cross_entropy(model(features=x)["b"], y).backward()
    made.step()
    assert math.isfinite(made.health()["rho"])


# -- damping in units of the curvature -------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-ce", "conv-groups", "norms", "words-padded"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_kfac, kfacopt.EKFAC, exact_ekfac])
def test_relative_damping_is_a_multiple_of_the_layer_s_mean_eigenvalue(name: str, optimizer: Any) -> None:
    """A step with it is the step with each layer's multiple given as a number."""
    factor = 0.7
    plain = options(damping_rule=None, separate_weight_and_bias=True)
    model, loss, x, y = BY_NAME[name].make()
    made = optimizer(model, loss, **plain | {"damping": kfacopt.RelativeDamping(factor)})
    train_step(made, model, loss, x, y)
    other = BY_NAME[name].make()[0]
    names = {id(p): n for n, p in model.named_parameters()}
    groups = []
    for layer in made._layers:
        block = made.backend.blocks[layer.name]
        values = {kind: average.value for kind, average in block.averages().items()}
        if "diagonal" in values:
            mean = values["diagonal"].mean()
        else:
            left, right = values["gradient_factor"], values["input_factor"]
            mean = left.diagonal(dim1=-2, dim2=-1).mean(-1)
            mean = (mean * (right if right.ndim == 1 else right.diagonal(dim1=-2, dim2=-1)).mean(-1)).mean()
        held = [other.get_parameter(names[id(p)]) for p in layer.parameters.values()]
        groups.append({"params": held, "damping": factor * float(mean)})
    told = optimizer(other, loss, groups, **plain)
    train_step(told, other, loss, x, y)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_relative_damping_fits_losses_of_any_scale() -> None:
    """Everything measured in other units: the same step in those."""
    steps = []
    for unit in (1.0, 1e3):
        model, loss, x, y = BY_NAME["linear-mse"].make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= unit
        old = parameters_of(model)
        made = kfacopt.KFAC(model, loss, **options(damping=kfacopt.RelativeDamping(1.0), damping_rule=None))
        train_step(made, model, loss, x, unit * y)
        steps.append([(p.detach() - q) / unit for p, q in zip(model.parameters(), old, strict=True)])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_dead_layer_has_a_relative_damping_too() -> None:
    """No curvature at all, no division by zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias -= 1e3
    _, loss, x, y = BY_NAME["mlp-ce"].make()
    for optimizer in (kfacopt.KFAC, kfacopt.EKFAC):
        made = optimizer(model, loss, factor_every=1, refresh_every=2)
        for _ in range(4):
            train_step(made, model, loss, x, y)
        assert all(p.isfinite().all() for p in model.parameters())
        made.close()


def test_a_number_in_a_group_is_no_multiple() -> None:
    model, loss, _, _ = BY_NAME["mlp-ce"].make()
    groups = [{"params": model[0].parameters(), "damping": 0.3}, {"params": model[2].parameters()}]
    made = kfacopt.KFAC(model, loss, groups, damping=kfacopt.RelativeDamping(2.0))
    assert [(g["damping"], g["relative_damping"]) for g in made.param_groups] == [(0.3, False), (2.0, True)]


def test_relative_damping_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        kfacopt.RelativeDamping(0.0)
