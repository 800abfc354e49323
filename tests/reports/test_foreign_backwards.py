"""Report 6: only backwards that leave the gradient of the step take part in the step.

Gradients with respect to inputs (adversarial training), diagnostics, and gradients that the user threw away, however:
the step is that of a loop without them, in the count of terms as in the statistics. What does leave its gradient
counts, also where the user puts it into `.grad` by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import EMPIRICAL, TYPE2, exact_or_named, flat, plain

Loss = Callable[[Tensor, Tensor], Tensor]
Foreign = Callable[[nn.Module, Any, Loss], None]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def fgsm(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    x, y = batch()
    x.requires_grad_()
    torch.autograd.grad(loss(model(x), y), x)


def pgd(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    for _ in range(4):
        fgsm(model, optimizer, loss)


def fgsm_by_inputs(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    x, y = batch()
    x.requires_grad_()
    loss(model(x), y).backward(inputs=[x])


def fgsm_with_the_weights_frozen(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    for p in model.parameters():
        p.requires_grad_(False)
    x, y = batch()
    x.requires_grad_()
    loss(model(x), y).backward()
    for p in model.parameters():
        p.requires_grad_(True)


def hessian_vector_product(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    x, y = batch()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(3 * x), y), parameters, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)


def gradient_norm(model: nn.Module, optimizer: Any, loss: Loss) -> None:
    x, y = batch()
    torch.autograd.grad(loss(model(3 * x), y), list(model.parameters()))


def thrown(zero: Callable[[nn.Module, Any], None]) -> Foreign:
    """A backward whose gradients the user throws away."""

    def foreign(model: nn.Module, optimizer: Any, loss: Loss) -> None:
        x, y = batch()
        loss(model(5 * x), y).backward()
        zero(model, optimizer)

    return foreign


def no_gradients(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        p.grad = None


def zero_in_place(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.zero_()


def foreach_zero(model: nn.Module, optimizer: Any) -> None:
    torch._foreach_zero_([p.grad for p in model.parameters()])


def replaced(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


FOREIGN: dict[str, Foreign] = {
    "fgsm": fgsm,
    "pgd": pgd,
    "fgsm by backward(inputs=)": fgsm_by_inputs,
    "fgsm with frozen weights": fgsm_with_the_weights_frozen,
    "hessian-vector product": hessian_vector_product,
    "gradient norm": gradient_norm,
    "optimizer.zero_grad()": thrown(lambda m, o: o.zero_grad()),
    "optimizer.zero_grad(set_to_none=False)": thrown(lambda m, o: o.zero_grad(set_to_none=False)),
    "model.zero_grad()": thrown(lambda m, o: m.zero_grad()),
    "model.zero_grad(set_to_none=False)": thrown(lambda m, o: m.zero_grad(set_to_none=False)),
    "p.grad = None": thrown(no_gradients),
    "p.grad.zero_()": thrown(zero_in_place),
    "foreach_zero_": thrown(foreach_zero),
    "p.grad = zeros": thrown(replaced),
}

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "kfac": lambda m, loss: kfacopt.KFAC(m, loss, **plain(damping=0.1)),
    "ekfac-empirical": lambda m, loss: kfacopt.EKFAC(m, loss, **plain(damping=0.1) | EMPIRICAL),
    "kfac-auto": lambda m, loss: kfacopt.KFAC(m, loss, lr="auto", **TYPE2),
    "natural-gradient": lambda m, loss: kfacopt.NaturalGradient(m, loss, damping=0.1),
}


def loss_of(reduction: str) -> Loss:
    return lambda prediction, y: F.cross_entropy(prediction, y, reduction=reduction)


def stepped(name: str, reduction: str, before: Foreign | None, after: Foreign | None = None) -> Tensor:
    """The step of a loop with something foreign before or after the step's own backward."""
    model, (x, y), loss = mlp(), batch(1), loss_of(reduction)
    optimizer = OPTIMIZERS[name](model, nn.CrossEntropyLoss(reduction=reduction))
    old = flat(model.parameters())
    if before is not None:
        before(model, optimizer, loss)
    loss(model(x), y).backward()
    if after is not None:
        after(model, optimizer, loss)
    optimizer.step()
    return flat(model.parameters()) - old


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_came_before_and_left_no_gradient_is_not_in_the_step(foreign: str, name: str, reduction: str) -> None:
    want = stepped(name, reduction, None)
    assert float(want.norm()) > 0.0
    torch.testing.assert_close(stepped(name, reduction, FOREIGN[foreign]), want)


LATER = ("fgsm", "fgsm by backward(inputs=)", "hessian-vector product", "gradient norm")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("foreign", LATER)
def test_what_comes_between_backward_and_step_is_not_in_the_step(foreign: str, name: str, reduction: str) -> None:
    torch.testing.assert_close(stepped(name, reduction, None, FOREIGN[foreign]), stepped(name, reduction, None))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_thrown_and_a_second_accumulated_over_two_micro_batches(name: str) -> None:
    """Two micro-batches of a sum are the sum over both, whatever was thrown away before."""

    def step(pieces: int, before: Foreign | None) -> Tensor:
        model, (x, y), loss = mlp(), batch(1), loss_of("sum")
        optimizer = OPTIMIZERS[name](model, nn.CrossEntropyLoss(reduction="sum"))
        old = flat(model.parameters())
        if before is not None:
            before(model, optimizer, loss)
        for part, labels in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            loss(model(part), labels).backward()
        optimizer.step()
        return flat(model.parameters()) - old

    torch.testing.assert_close(step(2, FOREIGN["model.zero_grad()"]), step(1, None))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharpness_aware_steps_take_the_curvature_of_their_second_backward(name: str) -> None:
    x, y = batch(1)

    def step(first: bool) -> Tensor:
        model, loss = mlp(), loss_of("mean")
        optimizer = OPTIMIZERS[name](model, nn.CrossEntropyLoss())
        if first:
            loss(model(x), y).backward()
            model.zero_grad()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05)
        loss(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05)
        old = flat(model.parameters())
        optimizer.step()
        return flat(model.parameters()) - old

    exact_or_named(lambda: step(True), lambda found: torch.testing.assert_close(found, step(False)), "forward", "moved")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_put_into_grad_by_hand_are_the_steps(name: str, reduction: str) -> None:
    """As gradient surgery does (PCGrad): the step's gradient comes from `autograd.grad`, and counts."""
    x, y = batch(1)

    def step() -> Tensor:
        model, loss = mlp(), loss_of(reduction)
        optimizer = OPTIMIZERS[name](model, nn.CrossEntropyLoss(reduction=reduction))
        old = flat(model.parameters())
        parameters = list(model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss(model(x), y), parameters), strict=True):
            p.grad = g
        optimizer.step()
        return flat(model.parameters()) - old

    want = stepped(name, reduction, None)
    exact_or_named(step, lambda found: torch.testing.assert_close(found, want), "backward", ".grad")


def test_a_foreign_backward_in_a_later_step_is_not_in_the_running_average() -> None:
    def factors(foreign: bool) -> Any:
        model, loss = mlp(), loss_of("mean")
        optimizer = kfacopt.KFAC(model, nn.CrossEntropyLoss(), **plain(damping=0.1, ema_decay=0.5))
        for t in range(3):
            model.zero_grad()
            if foreign and t == 1:
                FOREIGN["model.zero_grad()"](model, optimizer, loss)
            x, y = batch(t)
            loss(model(x), y).backward()
            optimizer.step()
        return [block.factors() for block in optimizer.backend.blocks.values()]

    torch.testing.assert_close(factors(True), factors(False))
