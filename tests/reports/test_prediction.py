"""Report 3: what the prediction is is verified, not guessed.

A module that returns its loss, losses of the data, or something that a function outside turns into the prediction:
the curvature is that of the loss at its true prediction, or an error names `prediction=`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import TYPE2, exact_or_named, still

DATA = 8
NAMES = ("prediction=",)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def inputs() -> Tensor:
    return torch.randn(DATA, 5, generator=generator(), dtype=torch.float64)


CRITERIA: dict[str, tuple[nn.Module, int, Callable[[], Tensor]]] = {
    "squares": (nn.MSELoss(), 2, lambda: torch.randn(DATA, 2, generator=generator(), dtype=torch.float64)),
    "binary": (nn.BCEWithLogitsLoss(), 1, lambda: torch.randint(2, (DATA, 1), generator=generator()).double()),
    "cross-entropy": (nn.CrossEntropyLoss(), 3, lambda: torch.randint(3, (DATA,), generator=generator())),
}


class Wrapper(nn.Module):
    """A network, and what its forward makes of the prediction and the target."""

    def __init__(self, name: str, of: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.criterion, outputs, _ = CRITERIA[name]
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()
        self.of = of

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.of(self.net(x), y, self.criterion)


class LossWithParameter(nn.Module):
    """Kendall's weighting: a loss module that holds a parameter, called after the network."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion, self.log_scale = criterion, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        return self.criterion(prediction, y) * self.log_scale.exp()


class Apart(nn.Module):
    """Network and loss module in one, never called as a whole."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        criterion, outputs, _ = CRITERIA[name]
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).double()
        self.loss = LossWithParameter(criterion)


def each(prediction: Tensor, y: Tensor, criterion: nn.Module) -> Tensor:
    losses: Tensor = type(criterion)(reduction="none")(prediction, y)
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


Way = tuple[Callable[..., Any], Callable[[Any], Tensor]]

# What the forward returns, and how the loop comes from that to the loss.
WAYS: dict[str, Way] = {
    "the loss": (lambda p, y, loss: loss(p, y), lambda out: out),
    "the loss as [1]": (lambda p, y, loss: loss(p, y).unsqueeze(0), lambda out: out.mean()),
    "a dict of the loss and a detached prediction": (
        lambda p, y, loss: {"loss": loss(p, y), "pred": p.detach()},
        lambda out: out["loss"],
    ),
    "a tuple of the loss and a detached prediction": (lambda p, y, loss: (loss(p, y), p.detach()), lambda out: out[0]),
    "a tuple of the loss and the prediction": (lambda p, y, loss: (loss(p, y), p), lambda out: out[0]),
    "an object with loss and logits": (
        lambda p, y, loss: SimpleNamespace(loss=loss(p, y), logits=p),
        lambda out: out.loss,
    ),
    "an object with the loss alone": (lambda p, y, loss: SimpleNamespace(loss=loss(p, y)), lambda out: out.loss),
    "the losses of the data": (each, lambda out: out.mean()),
    "the losses of the data as [n 1]": (lambda p, y, loss: each(p, y, loss)[:, None], lambda out: out.mean()),
    "the loss and a penalty in a dict": (
        lambda p, y, loss: {"loss": loss(p, y), "penalty": 0.0 * p.square().mean()},
        lambda out: out["loss"] + out["penalty"],
    ),
}


def gradient_factors(optimizer: Any) -> list[Tensor]:
    return [block.factors()[0] for block in optimizer.backend.blocks.values()]


def wanted(name: str) -> list[Tensor]:
    """Gradient factors of the network alone, with the loss outside."""
    model = Wrapper(name, lambda p, y, loss: p)
    optimizer = kfacopt.KFAC(model, model.criterion, **still(damping=0.1))
    y = CRITERIA[name][2]()
    model.criterion(model(inputs(), y), y).backward()
    optimizer.step()
    return gradient_factors(optimizer)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CRITERIA)
def test_curvature_is_that_at_the_true_prediction_or_prediction_is_asked_for(name: str, way: str) -> None:
    of, loss_from = WAYS[way]

    def run() -> list[Tensor]:
        model = Wrapper(name, of)
        optimizer = kfacopt.KFAC(model, model.criterion, **still(damping=0.1))
        loss_from(model(inputs(), CRITERIA[name][2]())).backward()
        optimizer.step()
        return gradient_factors(optimizer)

    exact_or_named(run, lambda found: torch.testing.assert_close(found, wanted(name)), *NAMES)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_loss_module_with_a_parameter_is_not_the_model(name: str) -> None:
    def run() -> list[Tensor]:
        model = Apart(name)
        optimizer = kfacopt.KFAC(model, CRITERIA[name][0], **still(damping=0.1))
        model.loss(model.net(inputs()), CRITERIA[name][2]()).backward()
        optimizer.step()
        return gradient_factors(optimizer)

    exact_or_named(run, lambda found: torch.testing.assert_close(found, wanted(name)), *NAMES, "loss")


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "ekfac": lambda m, loss: kfacopt.EKFAC(m, loss, damping=0.1, kl_clip=None, factor_every=1, **TYPE2),
    "kfac-auto": lambda m, loss: kfacopt.KFAC(m, loss, lr="auto", **TYPE2),
    "natural-gradient": lambda m, loss: kfacopt.NaturalGradient(m, loss, damping=0.1),
}


@pytest.mark.parametrize("way", ["the loss", "the losses of the data", "a dict of the loss and a detached prediction"])
@pytest.mark.parametrize("name", ["squares", "binary"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_steps_by_another_curvature(optimizer: str, name: str, way: str) -> None:
    y = CRITERIA[name][2]()

    def run(of: Callable[..., Any], loss_from: Callable[[Any], Tensor]) -> Tensor:
        model = Wrapper(name, of)
        made = OPTIMIZERS[optimizer](model, model.criterion)
        loss_from(model(inputs(), y)).backward()
        made.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def plain(prediction: Tensor) -> Tensor:
        value: Tensor = CRITERIA[name][0](prediction, y)
        return value

    want = run(lambda p, y, loss: p, plain)
    exact_or_named(lambda: run(*WAYS[way]), lambda found: torch.testing.assert_close(found, want), *NAMES)


# What the loop does to the output before the loss, and what that makes of the loss's Hessian at the output.
OUTSIDE: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "units of the target put back": ("squares", lambda p, y: F.mse_loss(10.0 * p + 3.0, y)),
    "a head outside": ("squares", lambda p, y: F.mse_loss(p @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), y)),
    "outputs summed": ("squares", lambda p, y: F.mse_loss(p.sum(1), y[:, 0])),
    "mean of the data": ("squares", lambda p, y: F.mse_loss(p.mean(0), y[0])),
    "an activation outside": ("squares", lambda p, y: F.mse_loss(p.exp(), y)),
    "differences of data": ("squares", lambda p, y: F.mse_loss(p[1:] - p[:-1], y[1:])),
    "a logarithm of the softmax first": ("cross-entropy", lambda p, y: F.nll_loss(p.log_softmax(1), y)),
    "half of the data": ("cross-entropy", lambda p, y: F.cross_entropy(p[:4], y[:4])),
    "pairs of data": ("cross-entropy", lambda p, y: F.cross_entropy(p[:4] + p[4:], y[:4])),
    "a temperature": ("cross-entropy", lambda p, y: F.cross_entropy(p * 3.0, y)),
    "a logit and its negative": ("binary", lambda p, y: F.binary_cross_entropy_with_logits(-2.0 * p, y)),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_happens_between_the_output_and_the_loss_is_in_the_curvature_or_refused(what: str) -> None:
    """The Gauss-Newton block of the last layer with the loss as it is, a function of the model's output."""
    name, loss_of = OUTSIDE[what]
    y = CRITERIA[name][2]()
    model = Wrapper(name, lambda p, y, loss: p)
    output = model(inputs(), y).detach()
    hessian = torch.autograd.functional.hessian(lambda f: loss_of(f, y), output)  # type: ignore[no-untyped-call]
    want = torch.einsum("ncnd->cd", hessian)
    if what == "an activation outside":  # Gauss-Newton: the Hessian of the loss between the activation's Jacobians
        want = torch.diag((2.0 * output.exp().square() / output.numel()).sum(0))

    def run() -> Tensor:
        optimizer = kfacopt.KFAC(model, model.criterion, **still(damping=0.1))
        loss_of(model(inputs(), y), y).backward()
        optimizer.step()
        return gradient_factors(optimizer)[-1]

    exact_or_named(run, lambda found: torch.testing.assert_close(found, want), *NAMES, type(model.criterion).__name__)


@pytest.mark.parametrize("way", ["a tuple of the loss and the prediction", "an object with loss and logits"])
@pytest.mark.parametrize("name", CRITERIA)
def test_prediction_given_is_what_counts(name: str, way: str) -> None:
    """Its gradient arrives through the loss that the module returns."""
    of, loss_from = WAYS[way]
    model = Wrapper(name, of)
    options = still(damping=0.1, prediction=lambda out: out[1] if isinstance(out, tuple) else out.logits)
    optimizer = kfacopt.KFAC(model, model.criterion, **options)
    loss_from(model(inputs(), CRITERIA[name][2]())).backward()
    optimizer.step()
    torch.testing.assert_close(gradient_factors(optimizer), wanted(name))


# Losses of a softmax that is far surer than that of the output, whose gradients are mostly rounding.
SURER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a temperature": lambda f, y: F.cross_entropy(f / 0.16, y),
    "a margin": lambda f, y: F.cross_entropy(10.0 * (f - F.one_hot(y, 3)), y),
    "a temperature, written out": lambda f, y: -(6.0 * f).log_softmax(1).gather(1, y[:, None]).mean(),
    "a temperature, smoothed": lambda f, y: F.cross_entropy(6.0 * f, y, label_smoothing=1e-7),
    "weights": lambda f, y: (F.cross_entropy(6.0 * f, y, reduction="none") * torch.linspace(1.0, 2.0, DATA)).mean(),
}


@pytest.mark.parametrize("what", SURER)
def test_a_softmax_outside_that_is_surer_is_named_as_it_was_before_it_was_sure(what: str) -> None:
    """Of a temperature is warned; no error follows once the loss has almost vanished. G is the plain loss'."""
    y, model = CRITERIA["cross-entropy"][2](), nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    x = 2.5 * F.one_hot(y, 3).float() + 0.05 * torch.randn(DATA, 3, generator=generator())
    optimizer = kfacopt.KFAC(model, nn.CrossEntropyLoss(), **still(damping=0.1))
    output = model(x)
    output.retain_grad()
    SURER[what](output, y).backward()
    assert output.grad is not None
    assert output.grad.sum(1).abs().sum() > 1e-3 * output.grad.abs().sum()  # no more than rounding
    with pytest.warns(UserWarning, match="the loss that was differentiated is not that of Categorical"):
        optimizer.step()
    p = output.detach().softmax(1)
    want = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(gradient_factors(optimizer), [want], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["a product with itself", "a head outside", "two ways"])
def test_what_only_looks_like_a_softmax_outside_is_refused(what: str) -> None:
    y, model = CRITERIA["cross-entropy"][2](), Wrapper("cross-entropy", lambda p, y, loss: p)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "a product with itself": lambda f: F.cross_entropy(f * f, y),
        "a head outside": lambda f: F.cross_entropy(f @ torch.arange(9.0).double().view(3, 3), y),
        "two ways": lambda f: F.cross_entropy(3.0 * f, y) + 0.1 * f.logsumexp(1).square().mean(),
    }
    optimizer = kfacopt.KFAC(model, model.criterion, **still(damping=0.1))
    loss = changes[what](model(inputs(), y))
    with pytest.raises(ValueError, match=r"CrossEntropyLoss.*prediction="):
        loss.backward()
    optimizer.close()


def test_a_sure_part_of_the_data_beside_masked_ones_that_are_not_is_no_other_loss() -> None:
    """The loss of some nodes of a graph, or of masked words: rounding is judged by the data that are part of it."""
    y, model = torch.arange(DATA) % 3, nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    x = 14.0 * F.one_hot(y, 3).float() + 0.1 * torch.randn(DATA, 3, generator=generator())
    x[4:] = 0.0
    optimizer = kfacopt.KFAC(model, nn.CrossEntropyLoss(), **still(damping=0.1))
    for loss in (
        lambda f: F.cross_entropy(f[:4], y[:4]),
        lambda f: F.cross_entropy(f[torch.arange(DATA) < 4], y[:4]),
        lambda f: F.cross_entropy(f, torch.where(torch.arange(DATA) < 4, y, -100)),
        lambda f: (f.logsumexp(1) - f.gather(1, y[:, None])[:, 0])[:4].mean(),
    ):
        output = model(x)
        output.retain_grad()
        loss(output).backward()
        assert output.grad is not None
        assert 1e-3 < output.grad.sum(1).abs().sum() / output.grad.abs().sum() < 0.5
        optimizer.step()
        p = output.detach()[:4].double().softmax(1)
        want = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
        # What the loss counts a datum is read in gradients of some twenty times the rounding of a probability near one.
        torch.testing.assert_close(gradient_factors(optimizer), [want.float()], rtol=0.1, atol=1e-12)
