"""Bad input gets an error that names it, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from tests.cases import BY_NAME, mlp, parameters_of, train_step

CE = nn.CrossEntropyLoss


def two_devices() -> nn.Module:
    model = mlp()
    model[2] = model[2].to("meta")
    return model


def sparse() -> nn.Module:
    model = mlp()
    model.table = nn.Parameter(torch.eye(3).to_sparse())
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: list(mlp().parameters()), "model"),
    "sparse": (sparse, "'table' is sparse"),
    "devices": (two_devices, "'2.weight' on meta"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0\.(weight|bias)' is not initialised"),
    "empty": (lambda: nn.ReLU(), "empty parameter list"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, message = MODELS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        kfacopt.KFAC(build(), CE())


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Replaying(kfacopt.Preconditioned):
    """A direction of a user's own that reads the forwards of its own process."""

    def wants_replays(self, step: int) -> bool:
        return True


def test_what_knows_one_process_alone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    kfacopt.KFAC(chain(), CE(), direction=Replaying()).close()
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 4)
    with pytest.raises(RuntimeError, match=r"4 processes train together, but .* in one process so far"):
        kfacopt.KFAC(chain(), CE(), direction=Replaying())


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -0.1}, "lr"),
    "lr-nan": ({"lr": float("nan")}, "lr"),
    "lr-vector": ({"lr": torch.ones(2)}, "lr"),
    "damping": ({"damping": -1.0}, "damping"),
    "damping-text": ({"damping": "small"}, "damping"),
    "momentum": ({"momentum": 1.0}, "momentum"),
    "weight_decay": ({"weight_decay": -1.0}, "weight_decay"),
    "ema_decay": ({"ema_decay": 1.0}, "ema_decay"),
    "kl_clip": ({"kl_clip": 0.0}, "kl_clip"),
    "adamw_lr": ({"adamw_lr": -1.0}, "adamw_lr"),
    "factor_every": ({"factor_every": 0}, "factor_every"),
    "factor_every-float": ({"factor_every": 2.5}, "factor_every"),
    "refresh_every": ({"refresh_every": -3}, "refresh_every"),
    "refresh_every-bool": ({"refresh_every": True}, "refresh_every"),
    "curvature-kind": ({"curvature": "type-3"}, "curvature.*ggn"),
    "kfac_approx": ({"kfac_approx": "shrink"}, "kfac_approx.*expand"),
    "hessian": ({"curvature": "hessian"}, "NaturalGradient"),
    "lr-by-position": ({"params": 1e-3}, "lr=0.001"),
    "backend": ({"backend": kfacopt.KFACBackend}, "backend"),
    "backend-and-interval": ({"backend": kfacopt.KFACBackend(), "factor_every": 2}, "factor_every"),
    "auto-and-length": ({"lr": "auto", "step_length": kfacopt.TrustRegion()}, "step_length"),
    "unknown": ({"kfac_aprox": "expand"}, "kfac_aprox"),
    "curvature": ({"params": [{"params": [], "curvature": "no"}]}, "curvature"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    options, message = OPTIONS[name]
    model = mlp()
    with pytest.raises((TypeError, ValueError), match=message):
        kfacopt.EKFAC(model, CE(), **options)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    "loss", [nn.SoftMarginLoss(), nn.MultiMarginLoss(), nn.CrossEntropyLoss, nn.functional.cross_entropy, None]
)
def test_losses_without_a_likelihood(loss: Any) -> None:
    with pytest.raises(TypeError, match="loss_func"):
        kfacopt.KFAC(mlp(), loss)


def wrong_backwards() -> dict[str, tuple[Any, Callable[[nn.Module, Tensor, Tensor], Any], str]]:
    functional = nn.functional
    return {
        "wrong loss": (
            CE(),
            lambda m, x, y: functional.mse_loss(m(x), functional.one_hot(y, 3).double()),
            "CrossEntropyLoss",
        ),
        "soft binary targets": (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
            lambda m, x, y: functional.binary_cross_entropy_with_logits(
                m(x), torch.full((6, 3), 0.3).double(), pos_weight=torch.tensor(2.0)
            ),
            "call the loss_func itself",
        ),
    }


@pytest.mark.parametrize("name", list(wrong_backwards()))
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_wrong_backward_changes_nothing(optimizer: Any, name: str, steps: int) -> None:
    """The error comes from backward; the loop goes on as if that batch had never been."""
    loss, wrong, message = wrong_backwards()[name]
    right = (lambda m, x, y: loss(m(x), y)) if isinstance(loss, CE) else binary(loss)
    made, models = [], []
    _, _, x, y = BY_NAME["mlp-ce"].make()
    for disturbed in (False, True):
        model = BY_NAME["mlp-ce"].make()[0]
        used = optimizer(model, loss, factor_every=1, refresh_every=2, curvature="ggn")
        for turn in range(4):
            if disturbed and turn == steps:
                state, before = copy.deepcopy(used.state_dict()), parameters_of(model)
                used.zero_grad()
                with pytest.raises(ValueError, match=message):
                    wrong(model, x, y).backward()
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
                assert str(used.state_dict()) == str(state)
            used.zero_grad()
            right(model, x, y).backward()
            used.step()
        made.append(used)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_batch_of_no_data_adds_nothing(optimizer: Any) -> None:
    """torch's gradients of it are zero, and so are its statistics."""
    made, models = [], []
    _, _, x, y = BY_NAME["mlp-ce"].make()
    for empty in (False, True):
        model = BY_NAME["mlp-ce"].make()[0]
        used = optimizer(model, CE(), factor_every=1, refresh_every=2, curvature="ggn")
        for _ in range(3):
            used.zero_grad()
            if empty:
                nn.functional.cross_entropy(model(x[:0]), y[:0], reduction="sum").backward()
            nn.functional.cross_entropy(model(x), y).backward()
            used.step()
        made.append(used)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def binary(loss: nn.Module) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def value(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = loss(model(x), nn.functional.one_hot(y, 3).double())
        return result

    return value


def test_sparse_gradients() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).mean(1))

    torch.manual_seed(0)
    model, x, y = Sparse(), torch.randint(6, (5, 3)), torch.randint(3, (5,))
    made = kfacopt.KFAC(model, CE(), factor_every=1)
    before = parameters_of(model)
    with pytest.raises(TypeError, match=r"sparse=False"):
        train_step(made, model, CE(), x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert made.state_dict()["state"] == {}
    others = kfacopt.KFAC(model, CE(), model.head.parameters(), factor_every=1)
    train_step(others, model, CE(), x, y)


def test_all_targets_ignored() -> None:
    """A batch without a loss term has no curvature; the step is defined, also as the first."""
    model, loss, x, y = BY_NAME["mlp-ignored"].make()
    nothing = torch.full_like(y, -100)
    for steps in (0, 2):
        made = kfacopt.KFAC(model, CE(reduction="sum"), factor_every=1)
        for _ in range(steps):
            train_step(made, model, CE(reduction="sum"), x, y)
        before = parameters_of(model)
        made.param_groups[0]["momentum"] = 0.0
        train_step(made, model, CE(reduction="sum"), x, nothing)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        train_step(made, model, CE(reduction="sum"), x, y)
        made.close()
    assert loss is not None


def test_a_schedule_that_returns_nonsense_is_named() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()

    def half(step: int) -> Any:
        return 0.5

    made = kfacopt.KFAC(model, loss, refresh_every=half)
    with pytest.raises(ValueError, match=r"0\.5 at step 0"):
        train_step(made, model, loss, x, y)
