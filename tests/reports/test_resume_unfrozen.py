"""Report 9: state follows the parameters, not the pattern in which they were frozen when the optimizer was made.

A fine-tuning is resumed as it was begun: build the model frozen, make the optimizer, unfreeze, load. Torch's optimizers
resume, whenever the unfreezing came; so do these, and go on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import TYPE2, flat

CE = nn.CrossEntropyLoss()

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "kfac": lambda m: kfacopt.KFAC(m, CE),
    "ekfac": lambda m: kfacopt.EKFAC(m, CE),
    "ekfac-type-2": lambda m: kfacopt.EKFAC(m, CE, **TYPE2),
    "ekfac-separate": lambda m: kfacopt.EKFAC(m, CE, separate_weight_and_bias=True),
    "kfac-auto": lambda m: kfacopt.KFAC(m, CE, lr="auto"),
}
OURS = [name for name in OPTIMIZERS if name != "sgd"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def freeze(model: nn.Module, frozen: str) -> None:
    """Set which parameters are frozen: letters of layers, b for the first one's bias alone."""
    for place, letter in enumerate("012"):
        model[2 * place].requires_grad_(letter not in frozen)
    if "b" in frozen:
        model[0].bias.requires_grad_(False)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


# How it is frozen when the optimizer is made; from step 2 on; when it is made for the resumed run; and when that loads.
WAYS = {
    "unfrozen between making and loading": ("0", "", "0", ""),
    "unfrozen before the optimizer is made": ("0", "", "", ""),
    "two layers, one of them unfrozen": ("01", "0", "01", "0"),
    "a bias unfrozen": ("b", "", "b", ""),
    "frozen later": ("", "0", "", "0"),
    "frozen later, made unfrozen and loaded so": ("", "0", "", ""),
    "still frozen when it loads": ("0", "", "0", "0"),
    "saved frozen, loaded unfrozen": ("0", "0", "0", ""),
}


def resumed(name: str, way: str) -> tuple[Tensor, Tensor]:
    """Parameters after some steps: of a run that goes on, and of one that was saved and resumed."""
    made, later, made_again, loaded = WAYS[way]
    model = net()
    freeze(model, made)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(2))
    freeze(model, later)
    train(model, optimizer, range(2, 5))
    saved = deepcopy(optimizer.state_dict())

    other = net()
    other.load_state_dict(model.state_dict())
    freeze(other, made_again)
    again = OPTIMIZERS[name](other)
    freeze(other, loaded)
    again.load_state_dict(saved)
    for one, its in ((model, optimizer), (other, again)):
        freeze(one, "" if way.startswith(("saved", "still")) or "made unfrozen" in way else later)
        train(one, its, range(5, 8))
    return flat(model.parameters()), flat(other.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_goes_on_as_the_first_would_have(name: str, way: str) -> None:
    whole, again = resumed(name, way)
    torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OURS)
def test_the_curvature_of_a_layer_that_was_frozen_when_it_loaded_is_not_lost(name: str) -> None:
    """Saved with curvature of all layers, loaded while one is frozen, then unfrozen: its curvature is the saved one."""
    model = net()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(3))
    key = next(key for key in optimizer.backend.blocks if key.startswith("0"))
    other = net()
    other.load_state_dict(model.state_dict())
    freeze(other, "0")
    again = OPTIMIZERS[name](other)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    freeze(other, "")
    train(other, again, range(3, 4))
    train(model, optimizer, range(3, 4))
    torch.testing.assert_close(again.backend.blocks[key].factors(), optimizer.backend.blocks[key].factors())


@pytest.mark.parametrize("name", OURS)
def test_a_second_save_of_a_resumed_run_loses_nothing(name: str) -> None:
    """Saved, loaded while a layer is frozen, saved again at once, loaded unfrozen."""
    model = net()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(3))
    saved = deepcopy(optimizer.state_dict())
    for frozen in ("0", ""):
        other = net()
        other.load_state_dict(model.state_dict())
        freeze(other, frozen)
        again = OPTIMIZERS[name](other)
        again.load_state_dict(saved)
        saved = again.state_dict()
    train(other, again, range(3, 5))
    train(model, optimizer, range(3, 5))
    torch.testing.assert_close(flat(other.parameters()), flat(model.parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OURS)
def test_a_state_of_another_model_is_still_refused_by_name(name: str) -> None:
    model, other = net(), net()
    other[2] = nn.Linear(8, 6, bias=False).double()
    optimizer, again = OPTIMIZERS[name](model), OPTIMIZERS[name](other)
    train(model, optimizer, range(2))
    with pytest.raises((ValueError, KeyError), match=r"2|size|group|shape"):
        again.load_state_dict(optimizer.state_dict())
    train(other, again, range(2))


def test_natural_gradient_resumes_too() -> None:
    model, other = net(), net()
    for one in (model, other):
        freeze(one, "0")
    optimizer, again = (kfacopt.NaturalGradient(one, CE, damping=0.1) for one in (model, other))
    freeze(model, "")
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    freeze(other, "")
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, again)):
        train(one, its, range(3, 5))
    torch.testing.assert_close(flat(other.parameters()), flat(model.parameters()))
