"""Report 17: what the user's gradient at the prediction reveals of the loss is taken, or refused; never half.

Weights of the data (importance weights, prioritised replay, boosting), class weights and masks that only the call of
the loss knows, a loss of some of the outputs: the curvature is that of the loss that was differentiated. Where the
gradient cannot tell, the loss is refused, by an error that says "weight".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn import functional as F

import kfacopt
from tests import reference
from tests.reports.reports import exact_or_named, flat, near, still

DATA = 16
NAMES = ("weight",)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def inputs() -> Tensor:
    return torch.randn(DATA, 4, generator=generator(), dtype=torch.float64)


def labels(outputs: int = 3) -> Tensor:
    return torch.randint(outputs, (DATA,), generator=generator())


def weights(zero: bool = False) -> Tensor:
    result = torch.ones(DATA, dtype=torch.float64)
    result[:4] = 0.0 if zero else 50.0
    result[4:8] = 0.25
    return result


def each(prediction: Tensor) -> Tensor:
    return F.cross_entropy(prediction, labels(), reduction="none")


def bits() -> Tensor:
    return F.one_hot(labels(), 3).double()


def focal(prediction: Tensor) -> Tensor:
    losses = each(prediction)
    return (losses * (1.0 - (-losses.detach()).exp()) ** 2).mean()


def pseudo_labels(prediction: Tensor) -> Tensor:
    return F.cross_entropy(prediction[:8], labels()[:8]) + 0.1 * F.cross_entropy(prediction[8:], labels()[8:])


def with_class_weights(prediction: Tensor) -> Tensor:
    return F.cross_entropy(prediction, labels(), weight=torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64))


def mixed_up(prediction: Tensor) -> Tensor:
    return 0.3 * F.cross_entropy(prediction, labels()) + 0.7 * F.cross_entropy(prediction, labels().flip(0))


def binary(prediction: Tensor, weight: Tensor) -> Tensor:
    return (F.binary_cross_entropy_with_logits(prediction, bits(), reduction="none") * weight).mean()


def squares(prediction: Tensor, weight: Tensor) -> Tensor:
    target = torch.randn(DATA, 3, generator=generator(), dtype=torch.float64)
    return ((prediction - target).square() * weight).mean()


CE, BCE, MSE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss

# The loss that is announced, and the loss that is differentiated: a function of the prediction whose Hessian is truth.
LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "weights of the data": (CE(reduction="none"), lambda f: (each(f) * weights()).mean()),
    "weights of the data, summed": (CE(reduction="none"), lambda f: (each(f) * weights()).sum()),
    "weights of the data, announced as a mean": (CE(), lambda f: (each(f) * weights()).mean()),
    "normalised weights": (CE(reduction="none"), lambda f: (each(f) * weights()).sum() / weights().sum()),
    "masked out of the mean over all": (CE(reduction="none"), lambda f: (each(f) * weights(zero=True)).mean()),
    "pseudo-labels that count less": (CE(), pseudo_labels),
    "class weights that were not announced": (CE(), with_class_weights),
    "label smoothing that was not announced": (CE(), lambda f: F.cross_entropy(f, labels(), label_smoothing=0.2)),
    "mixed up": (CE(), mixed_up),
    "the first two outputs": (CE(), lambda f: F.cross_entropy(f[:, :2], labels(2))),
    "temperature": (CE(), lambda f: F.cross_entropy(f / 2.0, labels())),
    "binary, weights of the data": (BCE(reduction="none"), lambda f: binary(f, weights()[:, None])),
    "binary, masked": (BCE(reduction="none"), lambda f: binary(f, weights(zero=True)[:, None])),
    "binary, weights of outputs": (BCE(), lambda f: binary(f, torch.tensor([1.0, 5.0, 0.2]).double())),
    "binary, positive weight not announced": (
        BCE(),
        lambda f: F.binary_cross_entropy_with_logits(f, bits(), pos_weight=torch.tensor(7.0).double()),
    ),
    "squares, weights of the data": (MSE(reduction="none"), lambda f: squares(f, weights()[:, None])),
    "squares, weights of outputs": (MSE(), lambda f: squares(f, torch.tensor([1.0, 5.0, 0.2]).double())),
    "squares, the first two outputs": (MSE(), lambda f: squares(f, torch.tensor([1.0, 1.0, 0.0]).double()) * 1.5),
}


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def loss_hessian(of: Callable[[Tensor], Tensor], prediction: Tensor) -> Tensor:
    """Hessian of the loss that was differentiated, `[n c n c]`."""
    flat_prediction = prediction.detach().flatten()
    result: Tensor = jacrev(grad(lambda f: of(f.unflatten(0, prediction.shape))))(flat_prediction)
    return result


def names_of(name: str) -> tuple[str, ...]:
    return ("output", "classes", "CrossEntropyLoss") if name in ("temperature", "the first two outputs") else NAMES


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_factor_is_that_of_the_loss_that_was_differentiated(name: str) -> None:
    """One layer, whose outputs are the prediction: G is the sum over the data of the loss's own Hessian blocks."""
    announced, of = LOSSES[name]
    model = linear()
    hessian = loss_hessian(of, model(inputs())).unflatten(0, (DATA, 3)).unflatten(2, (DATA, 3))
    want = torch.einsum("ncnd->cd", hessian)

    def factor() -> Tensor:
        optimizer = kfacopt.KFAC(model, announced, **still(damping=0.1))
        of(model(inputs())).backward()
        optimizer.step()
        found: Tensor = optimizer.backend.blocks[""].factors()[0]
        return found

    exact_or_named(factor, lambda found: torch.testing.assert_close(found, want), *names_of(name))


@pytest.mark.parametrize(
    "solver", [kfacopt.Gram, lambda: kfacopt.CG(tolerance=1e-11, progress=None)], ids=["gram", "cg"]
)
@pytest.mark.parametrize("name", LOSSES)
def test_natural_gradient_takes_the_dense_step_of_that_loss(name: str, solver: Any) -> None:
    announced, of = LOSSES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    outer = reference.whole_jacobian(model, inputs())
    curvature = outer.T @ loss_hessian(of, model(inputs())) @ outer
    g = flat(torch.autograd.grad(of(model(inputs())), list(model.parameters())))
    want = torch.linalg.solve(curvature + 0.1 * torch.eye(len(g), dtype=g.dtype), g)

    def step() -> Tensor:
        optimizer = kfacopt.NaturalGradient(model, announced, damping=0.1, solver=solver())
        before = flat(model.parameters())
        of(model(inputs())).backward()
        optimizer.step()
        return before - flat(model.parameters())

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-8)

    exact_or_named(step, check, *names_of(name))


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("name", LOSSES)
def test_auto_does_not_diverge(name: str, make: Any) -> None:
    announced, of = LOSSES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def losses() -> list[float]:
        optimizer, found = make(model, announced, lr="auto"), []
        for _ in range(8):
            optimizer.zero_grad()
            value = of(model(inputs()))
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    def check(found: list[float]) -> None:
        assert max(found) <= 1.2 * found[0]
        assert found[-1] < found[0]

    exact_or_named(losses, check, *names_of(name))


def test_one_for_every_weight_is_no_weight() -> None:
    factors = []
    for factor in (1.0, None):
        model = linear()
        optimizer = kfacopt.KFAC(model, CE(reduction="none"), **still(damping=0.1))
        loss = each(model(inputs()))
        (loss.mean() if factor is None else (loss * torch.ones(DATA, dtype=torch.float64)).mean()).backward()
        optimizer.step()
        factors.append(optimizer.backend.blocks[""].factors())
    torch.testing.assert_close(*factors)


def test_the_reports_own_figure() -> None:
    """Four of 32 data with the weight fifty: the trace of G was 0.60 for a true 4.18."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4).double(), torch.randint(0, 3, (32,))
    w = torch.ones(32, dtype=torch.float64)
    w[:4] = 50.0
    model = nn.Linear(4, 3).double()
    p = model(x).softmax(-1).detach()

    def trace() -> float:
        optimizer = kfacopt.KFAC(model, CE(reduction="none"), **still(damping=0.1))
        (F.cross_entropy(model(x), y, reduction="none") * w).mean().backward()
        optimizer.step()
        return float(optimizer.backend.blocks[""].factors()[0].trace())

    def check(found: float) -> None:
        assert near(found, float((w * (1.0 - p.square().sum(1))).mean()))

    exact_or_named(trace, check, *NAMES)
