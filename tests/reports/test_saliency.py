"""Report 23: a gradient that is no step's is none of the optimizer's business, and there is a public way to pause.

Saliency maps, Jacobian penalties and class scores have gradients at the prediction that no loss has: they pass as
they do without an optimizer, in training and evaluation mode, within and between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import EMPIRICAL, TYPE2, flat, gradients_of, plain, still

LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda out: F.cross_entropy(out, labels())),
    "binary": (
        nn.BCEWithLogitsLoss(),
        lambda out: F.binary_cross_entropy_with_logits(out, F.one_hot(labels(), 4) * 1.0),
    ),
    "squares": (nn.MSELoss(), lambda out: F.mse_loss(out, F.one_hot(labels(), 4) * 1.0)),
}


def labels() -> Tensor:
    return torch.arange(12) % 4


def inputs() -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def saliency(model: nn.Module) -> Tensor:
    x = inputs().requires_grad_()
    return torch.autograd.grad(model(x)[:, 1].sum(), x)[0]


def saliency_by_backward(model: nn.Module) -> Tensor:
    x = inputs().requires_grad_()
    model(x).amax(-1).sum().backward(inputs=[x])
    assert x.grad is not None
    return x.grad


def probability(model: nn.Module) -> Tensor:
    x = inputs().requires_grad_()
    return torch.autograd.grad(model(x).softmax(-1)[:, 0].sum() * 1e3, x)[0]


def jacobian(model: nn.Module) -> Tensor:
    result: Tensor = torch.autograd.functional.jacobian(model, inputs())
    return result


def integrated_gradients(model: nn.Module) -> Tensor:
    parts = []
    for weight in (0.0, 0.5, 1.0):
        x = (weight * inputs()).requires_grad_()
        parts.append(torch.autograd.grad(model(x)[:, 2].sum(), x)[0])
    return torch.stack(parts)


def grad_cam(model: nn.Module) -> Tensor:
    kept: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    score = model(inputs())[:, 1].sum()
    handle.remove()
    return torch.autograd.grad(score, kept[0])[0]


LOOKS = {f.__name__: f for f in (saliency, saliency_by_backward, probability, jacobian, integrated_gradients, grad_cam)}

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "kfac": lambda m, loss: kfacopt.KFAC(m, loss, **plain(damping=0.1)),
    "ekfac-empirical": lambda m, loss: kfacopt.EKFAC(m, loss, **plain(damping=0.1) | EMPIRICAL),
    "natural-gradient": lambda m, loss: kfacopt.NaturalGradient(m, loss, damping=0.1),
}


def run(name: str, loss: str, look: str | None, when: str) -> Tensor:
    """Two steps, with a look at input gradients somewhere."""
    model, (module, of) = mlp(), LOSSES[loss]
    optimizer = OPTIMIZERS[name](model, module)

    def looked(here: str) -> None:
        if look is not None and here == when:
            torch.testing.assert_close(LOOKS[look](model), LOOKS[look](mlp_like(model)))

    for step in range(2):
        optimizer.zero_grad()
        if step == 1:
            looked("before the forward")
        prediction = model(inputs())
        if step == 1:
            looked("between forward and backward")
        of(prediction).backward()
        if step == 1:
            looked("before the step")
        optimizer.step()
        model.eval()
        if step == 0:
            looked("in eval()")
        model.train()
    return flat(model.parameters())


def mlp_like(model: nn.Module) -> nn.Module:
    """The same model without an optimizer."""
    result = mlp()
    result.load_state_dict(model.state_dict())
    return result


@pytest.mark.parametrize("when", ["before the forward", "between forward and backward", "before the step", "in eval()"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("look", LOOKS)
def test_input_gradients_are_right_and_leave_the_step_alone(look: str, loss: str, when: str) -> None:
    torch.testing.assert_close(run("kfac", loss, look, when), run("kfac", loss, None, when))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["ekfac-empirical", "natural-gradient"])
def test_they_leave_the_step_of_every_optimizer_alone(name: str, look: str) -> None:
    when = "before the step"
    torch.testing.assert_close(run(name, "squares", look, when), run(name, "squares", None, when))


@pytest.mark.parametrize("fisher", [TYPE2, EMPIRICAL], ids=["type-2", "empirical"])
def test_a_jacobian_penalty_on_the_same_forward(fisher: dict[str, Any]) -> None:
    """The gradient is the user's; the curvature is the likelihood's, of the pass that leaves the step's gradient."""
    factors, gradients = [], []
    for penalty in (0.1, 0.0):
        model = mlp()
        optimizer = kfacopt.KFAC(model, nn.CrossEntropyLoss(), **still(damping=0.1) | fisher)
        plain_model = mlp()
        for one in (plain_model, model):
            x = inputs().requires_grad_()
            prediction = one(x)
            of_input = torch.autograd.grad(prediction[:, 1].sum(), x, create_graph=True)[0]
            (F.cross_entropy(prediction, labels()) + penalty * of_input.square().sum()).backward()
            gradients.append(gradients_of(one))
        optimizer.step()
        factors.append([block.factors() for block in optimizer.backend.blocks.values()])
        torch.testing.assert_close(gradients[-1], gradients[-2])
    torch.testing.assert_close(factors[0], factors[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_backwards_within_paused_are_not_counted(name: str) -> None:
    """Even one that is the loss's own and leaves its gradient."""
    steps = []
    for foreign in (True, False):
        model, (module, of) = mlp(), LOSSES["cross-entropy"]
        optimizer = OPTIMIZERS[name](model, module)
        of(model(inputs())).backward()
        if foreign:
            kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
            with optimizer.paused():
                of(model(7 * inputs())).backward()
                saliency(model)
            for p, gradient in kept.items():
                p.grad = gradient
        optimizer.step()
        steps.append(flat(model.parameters()))
    torch.testing.assert_close(*steps)


def test_paused_ends_with_its_context_even_by_an_error() -> None:
    model, (module, of) = mlp(), LOSSES["cross-entropy"]
    optimizer = kfacopt.KFAC(model, module, **still(damping=0.1))

    def broken() -> None:
        with optimizer.paused(), optimizer.paused():
            of(model(inputs()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    of(model(inputs())).backward()
    optimizer.step()
    assert all(block.estimated for block in optimizer.backend.blocks.values())


def test_a_forward_within_paused_whose_backward_comes_later_is_not_counted() -> None:
    model, (module, of) = mlp(), LOSSES["cross-entropy"]
    optimizer = kfacopt.KFAC(model, module, **still(damping=0.1))
    with optimizer.paused():
        foreign = of(model(7 * inputs()))
    own = of(model(inputs()))
    torch.autograd.grad(foreign, list(model.parameters()))
    own.backward()
    optimizer.step()
    found = [block.factors() for block in optimizer.backend.blocks.values()]
    model = mlp()
    optimizer = kfacopt.KFAC(model, module, **still(damping=0.1))
    of(model(inputs())).backward()
    optimizer.step()
    torch.testing.assert_close(found, [block.factors() for block in optimizer.backend.blocks.values()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_the_announced_one_is_still_refused(name: str) -> None:
    """What is left alone is a gradient that is no step's; one that is must be that of the loss, or say so."""
    model = mlp()
    optimizer = OPTIMIZERS[name](model, nn.CrossEntropyLoss())

    def step() -> None:
        F.nll_loss(model(inputs()), labels()).backward()  # without its logarithm of the softmax
        optimizer.step()

    with pytest.raises((ValueError, RuntimeError), match="CrossEntropyLoss"):
        step()
