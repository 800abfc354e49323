"""Whatever a training loop does with a torch optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import kfacopt
from tests.cases import BY_NAME, mlp, parameters_of, still, train_step

OPTIMIZERS = (kfacopt.KFAC, kfacopt.EKFAC)
both = pytest.mark.parametrize("optimizer", OPTIMIZERS)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def setup(
    optimizer: Any = kfacopt.KFAC, reduction: str = "mean", **options: Any
) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Any]:
    model, _, x, y = BY_NAME["mlp-ce"].make()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    fixed = {"lr": 0.1, "damping": 0.05, "factor_every": 1, "refresh_every": 2, "curvature": "ggn"}
    return model, loss, x, y, optimizer(model, loss, **(fixed | options))


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_close(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- the loop's own order --------------------------------------------------------------------------


@both
def test_a_closure_is_the_plain_loop(optimizer: Any) -> None:
    model, loss, x, y, made = setup(optimizer)
    twin, _, _, _, plain = setup(optimizer)

    def closure() -> Tensor:
        made.zero_grad()
        value: Tensor = loss(model(x), y)
        value.backward()
        return value

    for _ in range(4):
        returned = made.step(closure)
        expected = train_step(plain, twin, loss, x, y)
        assert torch.equal(returned, expected)
    assert_equal(model, twin)


@both
@reductions
@pytest.mark.parametrize("order", ["first", "between", "last", "none-kept"])
def test_where_zero_grad_is_called_makes_no_difference(optimizer: Any, reduction: str, order: str) -> None:
    model, loss, x, y, made = setup(optimizer, reduction)
    twin, _, _, _, plain = setup(optimizer, reduction)
    for _ in range(4):
        if order == "first":
            made.zero_grad()
        value = loss(model(x), y)
        if order == "between":
            made.zero_grad()
        if order == "none-kept":
            made.zero_grad(set_to_none=False)
        value.backward()
        made.step()
        if order == "last":
            made.zero_grad()
        train_step(plain, twin, loss, x, y)
    assert_equal(model, twin)


@both
def test_model_zero_grad(optimizer: Any) -> None:
    model, loss, x, y, made = setup(optimizer)
    twin, _, _, _, plain = setup(optimizer)
    for _ in range(4):
        model.zero_grad()
        loss(model(x), y).backward()
        made.step()
        train_step(plain, twin, loss, x, y)
    assert_equal(model, twin)


@both
@reductions
def test_a_backward_that_was_thrown_away(optimizer: Any, reduction: str) -> None:
    """zero_grad after a backward (a guard against NaN losses, say) forgets its statistics as well."""
    model, loss, x, y, made = setup(optimizer, reduction)
    twin, _, _, _, plain = setup(optimizer, reduction)
    for turn in range(4):
        if turn % 2:
            made.zero_grad()
            loss(model(3 * x), y).backward()
        train_step(made, model, loss, x, y)
        train_step(plain, twin, loss, x, y)
    assert_equal(model, twin)


@both
@reductions
def test_a_nan_backward_that_was_thrown_away(optimizer: Any, reduction: str) -> None:
    model, loss, x, y, made = setup(optimizer, reduction)
    twin, _, _, _, plain = setup(optimizer, reduction)
    for turn in range(4):
        if turn % 2:
            made.zero_grad()
            loss(model(x * math.nan), y).backward()
        train_step(made, model, loss, x, y)
        train_step(plain, twin, loss, x, y)
    assert_equal(model, twin)


@both
def test_the_scale_of_a_step_without_a_backward_is_that_of_the_last(optimizer: Any) -> None:
    """step() twice, and after close(): a sum is a sum still."""
    models = []
    for reduction in ("mean", "sum"):
        model, loss, x, y, made = setup(optimizer, reduction)
        train_step(made, model, loss, x, y)
        made.step()
        train_step(made, model, loss, x, y)
        made.close()
        train_step(made, model, loss, x, y)
        models.append(model)
    assert_close(*models, tolerance=1e-8)


@both
def test_a_step_without_gradients_does_nothing(optimizer: Any) -> None:
    """Before any forward, in evaluation mode, with nothing in .grad: as torch's optimizers."""
    model, loss, x, y, made = setup(optimizer)
    twin, _, _, _, plain = setup(optimizer)
    before = parameters_of(model)
    made.step()
    model.eval()
    made.step()
    model.train()
    made.zero_grad()
    made.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(3):
        train_step(made, model, loss, x, y)
        train_step(plain, twin, loss, x, y)
    assert_equal(model, twin)


@both
def test_a_step_without_curvature_says_so_and_is_adamws(optimizer: Any) -> None:
    """Gradients set by hand before any backward; torch's optimizers step, and so do these."""
    model, loss, x, y, made = setup(optimizer, kl_clip=0.03)
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=made.param_groups[0]["adamw_lr"], weight_decay=0.0)
    other = copy.deepcopy(model)  # not watched
    loss(other(x), y).backward()
    for parameter, source in zip(model.parameters(), other.parameters(), strict=True):
        parameter.grad = source.grad
    for parameter, source in zip(twin.parameters(), other.parameters(), strict=True):
        parameter.grad = source.grad
    with pytest.warns(
        UserWarning, match=r"no backward shows the curvature of '0', '2' \(no curvature has been captured"
    ):
        made.step()
    adamw.step()
    assert_equal(model, twin)
    assert {row.treatment for row in made.coverage().rows} == {"AdamW"}
    assert made.health()["unseen_layers"] == len(made.coverage().rows)
    made.step()  # said once
    train_step(made, model, loss, x, y)
    assert "AdamW" not in {row.treatment for row in made.coverage().rows}
    assert made.health()["unseen_layers"] == 0.0


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.NaturalGradient, kfacopt.TrustRegionNewton])
def test_a_step_of_zero_gradients_before_any_backward_does_nothing(make: Any) -> None:
    model = mlp()
    made, before = make(model, nn.CrossEntropyLoss()), parameters_of(model)
    made.step()  # no gradients at all
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@both
def test_evaluation_mode_makes_no_difference(optimizer: Any) -> None:
    model, loss, x, y, made = setup(optimizer)
    twin, _, _, _, plain = setup(optimizer)
    model.eval()
    for _ in range(3):
        train_step(made, model, loss, x, y)
        train_step(plain, twin, loss, x, y)
    assert_equal(model, twin)


@both
def test_an_old_curvature_serves_backwards_that_were_not_seen(optimizer: Any) -> None:
    model, loss, x, y, made = setup(optimizer)
    train_step(made, model, loss, x, y)
    state = copy.deepcopy(made.state_dict()["curvature"]["backend"]["blocks"])
    made.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = parameters_of(model)
    made.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    now = made.state_dict()["curvature"]["backend"]["blocks"]
    for name, block in state.items():
        for kind, average in block["averages"].items():
            value = now[name]["averages"][kind]["value"]
            assert value is average["value"] is None or torch.equal(value, average["value"])


# -- batches that are not finite -------------------------------------------------------------------


def poison(kind: str, x: Tensor, y: Tensor, model: nn.Module, loss: nn.Module) -> None:
    """A backward that leaves gradients which are not finite."""
    if kind == "loss":
        (loss(model(x), y) * math.nan).backward()
    elif kind == "inputs":
        bad = x.clone()
        bad[0, 0] = math.nan
        loss(model(bad), y).backward()
    elif kind == "infinite-inputs":
        bad = x.clone()
        bad[0, 0] = math.inf
        loss(model(bad), y).backward()
    else:
        loss(model(x), y).backward()
        next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]


@both
@pytest.mark.parametrize("kind", ["loss", "inputs", "infinite-inputs", "gradient"])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("first", [False, True])
def test_a_batch_that_is_not_finite_is_skipped(optimizer: Any, kind: str, fisher_type: str, first: bool) -> None:
    """As if it had never been, but for the count; also as the very first."""
    # Momentum and the running averages would carry a poison on.
    model, loss, x, y, made = setup(optimizer, curvature=fisher_type)
    twin, _, _, _, plain = setup(optimizer, curvature=fisher_type)
    skipped = 0
    for turn in range(5):
        if turn == 3 or (turn == 0 and first):
            made.zero_grad()
            poison(kind, x, y, model, loss)
            made.step()
            skipped += 1
        train_step(made, model, loss, x, y)
        train_step(plain, twin, loss, x, y)
    assert made.health()["skipped_steps"] == skipped
    if fisher_type == "mc":  # a label was drawn for the skipped batch
        assert all(p.isfinite().all() for p in model.parameters())
        for block in made.backend.blocks.values():
            assert all(a.value is None or a.value.isfinite().all() for a in block.averages().values())
    else:
        assert_equal(model, twin)


@both
def test_rows_that_are_not_finite_under_finite_gradients(optimizer: Any) -> None:
    """The statistics of such a batch are dropped as a whole; the step is taken with those there were."""

    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            # The user's gradient is small and passes, the sampled ones are not.
            return torch.where(g.abs() > 0.08, math.inf, g)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head, self.on = nn.Linear(4, 5), nn.Linear(5, 3), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.head(self.inner(x).tanh())
            return Overflowing.apply(h) if self.on else h

    torch.manual_seed(0)
    model, loss = Model().double(), nn.CrossEntropyLoss()
    _, _, x, _ = BY_NAME["mlp-ce"].make()
    x, y = x.repeat(10, 1), torch.randint(3, (60,))
    made = optimizer(model, loss, factor_every=1, refresh_every=1, lr=0.1)
    train_step(made, model, loss, x, y)
    before = copy.deepcopy(made.state_dict()["curvature"]["backend"]["blocks"])
    model.on = True
    with pytest.warns(UserWarning, match=r"curvature of '(inner|head)' is not finite"):
        train_step(made, model, loss, x, y)
    health = made.health()
    assert (health["skipped_steps"], health["dropped_updates"]) == (0.0, 2.0)  # of two layers
    now = made.state_dict()["curvature"]["backend"]["blocks"]
    for name, block in before.items():
        for kind, average in block["averages"].items():
            value = now[name]["averages"][kind]["value"]
            assert (value is None and average["value"] is None) or torch.equal(value, average["value"])
    model.on = False
    train_step(made, model, loss, x, y)
    assert all(p.isfinite().all() for p in model.parameters())


# -- schedulers ------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 3], 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_write_the_learning_rate(scheduler: Callable[[Any], Any], as_tensor: bool) -> None:
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    model, loss, x, y, made = setup(lr=lr)
    torchs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=copy.deepcopy(lr), momentum=0.95)
    ours, theirs = scheduler(made), scheduler(torchs)
    metric = [1.0] if isinstance(ours, lr_scheduler.ReduceLROnPlateau) else []
    for _ in range(6):
        assert float(made.param_groups[0]["lr"]) == pytest.approx(float(torchs.param_groups[0]["lr"]))
        assert made.param_groups[0]["momentum"] == pytest.approx(torchs.param_groups[0]["momentum"])
        train_step(made, model, loss, x, y)
        torchs.step()
        ours.step(*metric)
        theirs.step(*metric)
    assert all(p.isfinite().all() for p in model.parameters())
    restored = scheduler(setup(lr=copy.deepcopy(lr))[-1])
    restored.load_state_dict(ours.state_dict())


def test_a_tensor_learning_rate_is_the_number() -> None:
    models = []
    for lr in (0.125, torch.tensor(0.125), torch.tensor(0.125, dtype=torch.float64)):
        model, loss, x, y, made = setup(lr=lr)
        for _ in range(3):
            train_step(made, model, loss, x, y)
        made.param_groups[0]["lr"] = 0.5
        train_step(made, model, loss, x, y)
        models.append(model)
    assert_equal(models[0], models[1])
    assert_equal(models[0], models[2])


def test_stochastic_weight_averaging() -> None:
    model, loss, x, y, made = setup()
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(made, swa_lr=0.05)
    for _ in range(4):
        train_step(made, model, loss, x, y)
        average.update_parameters(model)
        schedule.step()
    assert all(p.isfinite().all() for p in average.parameters())


# -- param groups ----------------------------------------------------------------------------------


@both
def test_groups_have_their_own_numbers(optimizer: Any) -> None:
    """Two groups with other numbers each act as two optimizers with these numbers (but for the common clip)."""
    common = {"kl_clip": None, "factor_every": 1, "refresh_every": 1, "curvature": "ggn"}
    numbers = (
        {"lr": 0.1, "damping": 0.1, "momentum": 0.9, "weight_decay": 0.0, "ema_decay": 0.9},
        {"lr": 0.02, "damping": 0.5, "momentum": 0.0, "weight_decay": 0.1, "ema_decay": 0.5},
    )
    one, loss, x, y = BY_NAME["mlp-ce"].make()
    groups = [{"params": one[i].parameters(), **n} for i, n in zip((0, 2), numbers, strict=True)]
    grouped = optimizer(one, loss, groups, **common)
    two = BY_NAME["mlp-ce"].make()[0]
    apart = [optimizer(two, loss, two[i].parameters(), **n, **common) for i, n in zip((0, 2), numbers, strict=True)]
    for _ in range(4):
        train_step(grouped, one, loss, x, y)
        two.zero_grad()
        loss(two(x), y).backward()
        for made in apart:
            made.step()
    assert_close(one, two)


def test_weight_and_bias_in_groups_of_other_lr() -> None:
    """One block, two learning rates: the joint natural gradient, each part at its rate."""
    model, loss, x, y = BY_NAME["linear-ce"].make()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.0}]
    made = kfacopt.KFAC(model, loss, groups, lr=0.1, factor_every=1, kl_clip=None)
    before = parameters_of(model)
    train_step(made, model, loss, x, y)
    assert not torch.equal(before[0], model.weight)
    assert torch.equal(before[1], model.bias)


def test_weight_and_bias_in_groups_of_other_damping_are_refused_by_name() -> None:
    model, loss, x, y, _ = setup()
    groups = [
        {"params": [model[0].weight, *model[2].parameters()]},
        {"params": [model[0].bias], "damping": 1.0},
    ]
    with pytest.raises(ValueError, match=r"'0'.*separate_weight_and_bias"):
        train_step(kfacopt.KFAC(model, loss, groups, damping=0.1), model, loss, x, y)
    made = kfacopt.KFAC(model, loss, groups, damping=0.1, separate_weight_and_bias=True)
    train_step(made, model, loss, x, y)


@both
def test_a_group_without_curvature(optimizer: Any) -> None:
    model, loss, x, y, _ = setup()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "curvature": False, "lr": 1e-3},
    ]
    made = optimizer(model, loss, groups, lr=0.1, factor_every=1)
    train_step(made, model, loss, x, y)
    assert list(made.backend.blocks) == ["0"]
    assert set(made.state[model[2].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "exp_avg" not in made.state[model[0].weight]


@both
def test_add_param_group(optimizer: Any) -> None:
    """Parameters added later get curvature from the next forward on; those that stay keep their statistics."""
    model, loss, x, y, _ = setup()
    made = optimizer(model, loss, model[2].parameters(), lr=0.1, factor_every=1, refresh_every=2)
    frozen = parameters_of(model[0])
    for _ in range(2):
        train_step(made, model, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(frozen, model[0].parameters(), strict=True))
    weight = made.backend.blocks["2"].averages()["input_factor"].weight
    made.add_param_group({"params": model[0].parameters(), "lr": 0.01, "damping": 0.3})
    assert made.param_groups[1]["momentum"] == made.param_groups[0]["momentum"]
    assert made.backend.blocks["2"].averages()["input_factor"].weight == weight
    train_step(made, model, loss, x, y)
    assert not any(torch.equal(a, b) for a, b in zip(frozen, model[0].parameters(), strict=True))
    assert made.backend.blocks["0"].ready
    with pytest.raises(ValueError, match="momentum"):
        made.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "momentum": 1.5})
    assert len(made.param_groups) == 2
    train_step(made, model, loss, x, y)


def test_named_parameters_and_generators() -> None:
    models = []
    for kind in ("default", "named", "generator", "list"):
        model, loss, x, y = BY_NAME["mlp-ce"].make()
        params = {
            "default": None,
            "named": model.named_parameters(),
            "generator": (p for p in model.parameters()),
            "list": list(model.parameters()),
        }[kind]
        made = kfacopt.KFAC(model, loss, params, factor_every=1, curvature="ggn")
        for _ in range(2):
            train_step(made, model, loss, x, y)
        made.load_state_dict(made.state_dict())
        models.append(model)
    for model in models[1:]:
        assert_equal(models[0], model)


@both
def test_parameters_that_the_model_does_not_hold(optimizer: Any) -> None:
    model, loss, x, y, _ = setup()
    temperature = nn.Parameter(torch.ones(()).double())
    made = optimizer(model, loss, [*model.parameters(), temperature], factor_every=1, adamw_lr=0.01)
    made.zero_grad()
    (loss(model(x), y) + temperature.square()).backward()
    made.step()
    assert temperature < 1.0
    assert "not held by the model" in str(made.coverage())


@both
@reductions
def test_freezing_and_unfreezing(optimizer: Any, reduction: str) -> None:
    """Frozen parameters rest; layers that change get a new block, the others keep theirs."""
    model, loss, x, y, made = setup(optimizer, reduction)
    for _ in range(2):
        train_step(made, model, loss, x, y)
    head = made.backend.blocks["2"]
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = None
    held = model[0].weight.detach().clone()
    for _ in range(2):
        train_step(made, model, loss, x, y)
    assert torch.equal(held, model[0].weight)
    assert set(made.backend.blocks) == {"0.bias", "2"}
    model[0].weight.requires_grad_(True)
    for _ in range(3):
        value = train_step(made, model, loss, x, y)
    assert set(made.backend.blocks) == {"0", "2"}
    assert made.backend.blocks["2"] is head
    assert made.backend.blocks["0"].ready
    assert not torch.equal(held, model[0].weight)
    assert value.isfinite()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_the_scale_survives_freezing(frozen: str) -> None:
    """A sum's factor 1/M also in the step in which the layers are found anew."""
    models = []
    for reduction in ("mean", "sum"):
        model, loss, x, y, made = setup(reduction=reduction, kl_clip=None)
        for turn in range(4):
            if turn == 2:
                getattr(model[2], frozen).requires_grad_(False)
            train_step(made, model, loss, x, y)
        models.append(model)
    assert_close(*models, tolerance=1e-8)


# -- hooks, clipping, scaling ----------------------------------------------------------------------


def test_optimizer_hooks() -> None:
    model, loss, x, y, made = setup()
    calls: list[str] = []
    handles = [
        made.register_step_pre_hook(lambda o, args, kwargs: calls.append("before")),
        made.register_step_post_hook(lambda o, args, kwargs: calls.append("after")),
        made.register_state_dict_pre_hook(lambda o: calls.append("save")),
        made.register_state_dict_post_hook(lambda o, state: calls.append("saved")),
        made.register_load_state_dict_pre_hook(lambda o, state: calls.append("load")),
        made.register_load_state_dict_post_hook(lambda o: calls.append("loaded")),
    ]
    train_step(made, model, loss, x, y)
    made.load_state_dict(made.state_dict())
    assert calls == ["before", "after", "save", "saved", "load", "loaded"]
    for handle in handles:
        handle.remove()
    train_step(made, model, loss, x, y)
    assert len(calls) == 6


@both
def test_gradient_clipping(optimizer: Any) -> None:
    """The clipped gradient is what is preconditioned; the curvature is that of the loss."""
    model, loss, x, y, made = setup(optimizer, kl_clip=None, momentum=0.0)
    twin, _, _, _, plain = setup(optimizer, kl_clip=None, momentum=0.0, lr=0.1)
    for _ in range(3):
        made.zero_grad()
        loss(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        made.step()
        plain.zero_grad()
        loss(twin(x), y).backward()
        plain.param_groups[0]["lr"] = 0.1 * float(1e-3 / (norm + 1e-6))
        plain.step()
    assert_close(model, twin, tolerance=1e-8)


@both
@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_loss_scaling(optimizer: Any, fisher_type: str) -> None:
    """GradScaler's scale reaches neither statistics nor step; a skipped step leaves nothing behind."""
    model, loss, x, y, made = setup(optimizer, curvature=fisher_type)
    twin, _, _, _, plain = setup(optimizer, curvature=fisher_type)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for turn in range(5):
        if turn == 2 and fisher_type == "type-2":  # overflow
            made.zero_grad()
            scaler.scale(loss(model(x), y) * math.inf).backward()
            scaler.step(made)
            scaler.update()
        made.zero_grad()
        scaler.scale(loss(model(x), y)).backward()
        scaler.unscale_(made)
        scaler.step(made)
        scaler.update()
        train_step(plain, twin, loss, x, y)
    assert_close(model, twin, tolerance=1e-10)


@both
def test_scaled_losses(optimizer: Any) -> None:
    """A constant factor of the loss is one of the curvature, too: twice the loss at twice the damping."""
    model, loss, x, y, made = setup(optimizer, damping=0.1)
    twin, _, _, _, plain = setup(optimizer, damping=0.05)
    for _ in range(3):
        made.zero_grad()
        (2.0 * loss(model(x), y)).backward()
        made.step()
        train_step(plain, twin, loss, x, y)
    assert_close(model, twin)


@both
def test_autocast(optimizer: Any) -> None:
    torch.manual_seed(0)
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    made = optimizer(model, loss, factor_every=1, refresh_every=2, lr=0.1)
    losses = []
    for _ in range(10):
        made.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(x), y)
        value.backward()
        made.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]


def test_a_train_loop_with_everything_at_once() -> None:
    """Accumulation, clipping, scheduling, scaling, validation and a second loss, over three epochs."""
    torch.manual_seed(0)
    model, loss = mlp().double(), nn.CrossEntropyLoss(label_smoothing=0.05)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    made = kfacopt.EKFAC(model, loss, factor_every=3, refresh_every=7, lr=0.2, kl_clip=0.03)
    schedule = lr_scheduler.OneCycleLR(made, 0.3, total_steps=30)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    for _ in range(3):
        model.train()
        for index, rows in enumerate(torch.randperm(40).split(4)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
                value = loss(model(x[rows]), y[rows]) / 2
            scaler.scale(value).backward()
            if index % 2:
                scaler.unscale_(made)
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                scaler.step(made)
                scaler.update()
                schedule.step()
                made.zero_grad()
        model.eval()
        losses.append(float(F.cross_entropy(model(x), y).detach()))
    assert losses[-1] < losses[0]
    health = made.health()
    assert {
        "damping",
        "kl",
        "kl_scale",
        "condition",
        "staleness",
        "factor_ms",
        "refresh_ms",
        "overhead",
        "fallbacks",
        "skipped_steps",
    } <= set(health)
    assert all(isinstance(value, float) for value in health.values())
    assert health["staleness"] < 7


def test_health_before_the_first_step() -> None:
    _, _, _, _, made = setup()
    assert all(isinstance(value, float) for value in made.health().values())


@both
def test_still_learning_rate_zero(optimizer: Any) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = optimizer(model, loss, **still(refresh_every=2))
    before = parameters_of(model)
    for _ in range(3):
        train_step(made, model, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
