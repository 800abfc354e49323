"""The factor of the loss at a step: what was undone between backward and step is none, whatever was clipped."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.cases import Squares
from tests.reports.reports import TYPE2, flat, still

DATA = 16


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, labels, weights."""
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(DATA, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    return x, t, torch.randint(3, (DATA,), generator=generator), 3.0 * torch.rand(DATA, generator=generator).double()


Loss = Callable[[Tensor, Tensor], Tensor]  # of a prediction, and of which data
T, Y, W = data()[1:]
LOSSES: dict[str, tuple[Any, Loss]] = {
    "cross-entropy": (nn.CrossEntropyLoss, lambda f, i: F.cross_entropy(f, Y[i])),
    "weighted": (nn.CrossEntropyLoss, lambda f, i: (W[i] * F.cross_entropy(f, Y[i], reduction="none")).mean()),
    "squares": (nn.MSELoss, lambda f, i: F.mse_loss(f, T[i])),
    # What follows does not tell its factor: its value verifies that it is the plain loss.
    "soft labels": (nn.CrossEntropyLoss, lambda f, i: F.cross_entropy(f, T[i].softmax(1))),
    "squares and nothing": (nn.MSELoss, lambda f, i: F.mse_loss(f, T[i]) + 0.0 * f.sum()),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "kfac": lambda m, loss: kfacopt.KFAC(m, loss, lr=0.1, damping=0.1, momentum=0.0, kl_clip=None, **TYPE2),
    "ekfac, defaults": lambda m, loss: kfacopt.EKFAC(m, loss, **TYPE2),
    "kfac, auto": lambda m, loss: kfacopt.KFAC(m, loss, lr="auto", **TYPE2),
    "natural gradient": lambda m, loss: kfacopt.NaturalGradient(m, loss, damping=0.1),
    "empirical": lambda m, loss: kfacopt.KFAC(m, loss, lr=0.1, damping=0.1, kl_clip=None, curvature="empirical"),
    "damping rule": lambda m, loss: kfacopt.EKFAC(m, loss, damping_rule=kfacopt.LevenbergMarquardt(every=1), **TYPE2),
}


def trained(
    optimizer: str,
    name: str,
    *,
    scaler: float = 0.0,
    pieces: int = 1,
    factor: float = 1.0,
    divided: float = 1.0,
    clip: float = 0.0,
) -> Tensor:
    """Parameters after two steps of a loop that scales, accumulates, divides the gradients and clips."""
    kind, loss = LOSSES[name]
    model, x = mlp(), data()[0]
    made = OPTIMIZERS[optimizer](model, kind())
    scaling = torch.amp.GradScaler("cpu", init_scale=scaler or 1.0, enabled=scaler > 0.0)
    for _ in range(2):
        made.zero_grad()
        for i in torch.arange(DATA).chunk(pieces):
            scaling.scale(factor * loss(model(x[i]), i)).backward()
        scaling.unscale_(made)
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= divided
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaling.step(made)
        scaling.update()
    return flat(model.parameters())


LOOPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a scaler": ({"scaler": 65536.0}, {}),
    "a scaler of another scale": ({"scaler": 1000.0}, {}),
    "a scaler, and clipped": ({"scaler": 65536.0, "clip": 0.05}, {"clip": 0.05}),
    "a scaler, accumulated, and clipped": (
        {"scaler": 65536.0, "clip": 0.05, "pieces": 4, "factor": 0.25},
        {"clip": 0.05},
    ),
    "accumulated": ({"pieces": 4, "factor": 0.25}, {}),
    "accumulated, and the gradients divided": ({"pieces": 4, "divided": 4.0}, {}),
    "a scaler, accumulated, and the gradients divided": ({"scaler": 65536.0, "pieces": 4, "divided": 4.0}, {}),
    "scaled by hand": ({"factor": 128.0, "divided": 128.0}, {}),
    "scaled by hand, not by a power of two": ({"factor": 100.0, "divided": 100.0}, {}),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_undone_is_no_factor(optimizer: str, name: str, loop: str) -> None:
    if (optimizer, name) == ("empirical", "soft labels"):
        pytest.skip("refused: the terms' gradients are not known")
    options, plain = LOOPS[loop]
    torch.testing.assert_close(trained(optimizer, name, **options), trained(optimizer, name, **plain))


@pytest.mark.parametrize("optimizer", ["kfac", "kfac, auto", "natural gradient"])
@pytest.mark.parametrize("name", ["soft labels", "squares and nothing"])
def test_micro_batches_of_several_sizes_are_a_mean_of_means(optimizer: str, name: str) -> None:
    """Nothing is said, though the mean of means is not the mean."""
    trained(optimizer, name, pieces=3, factor=1.0 / 3.0)


def test_a_factor_with_clipping_is_a_factor() -> None:
    """A third of the gradient is left of a loss that is really seven times the plain one."""
    for name in ("cross-entropy", "squares"):
        (kind, loss), x, steps = LOSSES[name], data()[0], []
        for factor, damping, clipped in ((7.0, 0.7, 0.37), (1.0, 0.1, 0.37)):
            model = mlp()
            options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "kl_clip": None} | TYPE2
            made = kfacopt.KFAC(model, kind(), damping=damping, **options)
            (factor * loss(model(x), torch.arange(DATA))).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= clipped
            made.step()
            steps.append(flat(model.parameters()))
        torch.testing.assert_close(*steps)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor, head: int) -> Tensor:
        result: Tensor = (self.first, self.second)[head](x)
        return result


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("sizes", [(8, 8), (12, 4)])
def test_layers_that_only_some_backwards_reach_have_the_curvature_of_those(factor: float, sizes: Any) -> None:
    """The loss is `factor` times the sum of two means, each of another layer."""
    model, x = Heads(), data()[0]
    made = kfacopt.KFAC(model, nn.CrossEntropyLoss(), **still(damping=0.1))
    for head, i in enumerate(torch.arange(DATA).split(list(sizes))):
        (factor * F.cross_entropy(model(x[i], head), Y[i])).backward()
    made.step()
    for head, i in enumerate(torch.arange(DATA).split(list(sizes))):
        p = model(x[i], head).detach().softmax(1)
        want = factor * (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
        torch.testing.assert_close(made.backend.blocks[("first", "second")[head]].factors()[0], want)


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_resuming_between_micro_batches(factor: float) -> None:
    results = []
    for resumed in (False, True):
        model, x = mlp(), data()[0]
        made: Any = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), **TYPE2)
        for place, i in enumerate(torch.arange(DATA).chunk(4)):
            (factor * F.cross_entropy(model(x[i]), Y[i])).backward()
            if resumed and place == 1:
                buffer = io.BytesIO()
                torch.save(made.state_dict(), buffer)
                gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                model = mlp()
                made = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), **TYPE2)
                made.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
                model, made = pickle.loads(pickle.dumps((model, made)))
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    p.grad = gradient
        made.step()
        results.append(flat(model.parameters()))
        assert made._scaling.factor == pytest.approx(4.0 * factor)
    assert torch.equal(*results)


@pytest.mark.parametrize("clip", [0.01, None])
def test_the_factor_of_the_last_backward_that_was_looked_at_holds_for_steps_between(clip: float | None) -> None:
    steps = []
    for factor in (1.0, 100.0):
        model, x = mlp(), data()[0]
        made = kfacopt.KFAC(model, nn.CrossEntropyLoss(), lr=1.0, kl_clip=clip, factor_every=3, **TYPE2)
        for _ in range(4):
            made.zero_grad()
            (factor * F.cross_entropy(model(x), Y)).backward()
            made.step()
        steps.append(flat(model.parameters()))
        restored = copy.deepcopy(made)
        assert restored._scaling.factor == made._scaling.factor == pytest.approx(factor)
    torch.testing.assert_close(*steps)


def weighted_squares(f: Tensor) -> Tensor:
    return (F.mse_loss(f, T, reduction="none") * W[:, None]).mean()


@pytest.mark.parametrize("optimizer", ["kfac, auto", "natural gradient"])
def test_a_step_that_a_wrong_factor_would_make_wrong_is_refused(optimizer: str) -> None:
    model, x = mlp(), data()[0]
    made = OPTIMIZERS[optimizer](model, nn.MSELoss())
    before = flat(model.parameters())
    weighted_squares(model(x)).backward()
    with pytest.raises(RuntimeError, match=r"weights its data.*call the very loss module"):
        made.step()
    assert torch.equal(flat(model.parameters()), before)


def test_another_step_says_it_once() -> None:
    model, x = mlp(), data()[0]
    made = OPTIMIZERS["kfac"](model, nn.MSELoss())
    for place in range(3):
        made.zero_grad()
        weighted_squares(model(x)).backward()
        if place == 0:
            with pytest.warns(UserWarning, match="is not that of Gaussian"):
                made.step()
        else:
            made.step()


def test_a_loss_with_other_parts_is_said_to_hide_its_factor() -> None:
    model, x, spread = mlp(), data()[0], nn.Parameter(torch.ones((), dtype=torch.float64))
    made = OPTIMIZERS["natural gradient"](model, nn.MSELoss())
    (F.mse_loss(model(x), T) / spread + spread).backward()
    with pytest.warns(UserWarning, match="has weights or a constant factor.*cannot be told"):
        made.step()


def test_a_users_likelihood_is_taken_at_its_word() -> None:
    model, x = mlp(), data()[0]
    made = kfacopt.NaturalGradient(model, Squares(), damping=0.1)
    weighted_squares(model(x)).backward()
    made.step()


def test_a_backend_without_rescale_says_what_it_lacks() -> None:
    class Plain(kfacopt.CurvatureBackend):
        def solve(self, gradients: Any, settings: Any) -> Any:
            return gradients

    for factor in (1.0, 3.0):
        model, x = mlp(), data()[0]
        options: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "kl_clip": None}
        made = kfacopt.SecondOrderOptimizer(model, nn.CrossEntropyLoss(), backend=Plain(), **options)
        (factor * F.cross_entropy(model(x), Y)).backward()
        if factor == 1.0:
            made.step()
        else:
            with pytest.raises(NotImplementedError, match=r"Plain has no rescale\(\): a loss with a constant factor"):
                made.step()
