"""Several optimizers at a time: on parts of one model, and on a generator and a discriminator that train each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from tests.cases import exact_ekfac, mlp, train_step

both = pytest.mark.parametrize("make", [kfacopt.KFAC, exact_ekfac], ids=["kfac", "ekfac"])
EXACT = {"curvature": "ggn", "factor_every": 1, "refresh_every": 1}
BCE, STEPS, DATA = nn.BCEWithLogitsLoss(), 3, 8


def assert_equal(ours: nn.Module, truth: nn.Module) -> None:
    """To what float64 leaves of three steps."""
    for a, b in zip(ours.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@both
def test_two_optimizers_on_one_model_see_what_one_sees(make: Callable[..., Any]) -> None:
    """Each has its layers' blocks from the same backward; a step of the one is no sign of change to the other."""
    torch.manual_seed(0)
    model, loss = mlp().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    sole = make(whole := copy.deepcopy(model), loss, **EXACT)
    layers = [m for m in model if next(m.parameters(), None) is not None]  # type: ignore[attr-defined]
    first = make(model, loss, params=list(layers[0].parameters()), **EXACT)
    rest = make(model, loss, params=[p for m in layers[1:] for p in m.parameters()], **EXACT)
    for made in (sole, first, rest):
        made.param_groups[0]["lr"] = 0.0  # the same network at every step, whatever bounds a step's length together
    for _ in range(STEPS):
        train_step(sole, whole, loss, x, y)
        first.zero_grad()
        rest.zero_grad()
        loss(model(x), y).backward()
        first.step()
        rest.step()
    assert {*first.backend.blocks, *rest.backend.blocks} == {*sole.backend.blocks}
    for made in (first, rest):
        assert made.health()["unseen_layers"] == 0.0
        for name, block in made.backend.blocks.items():
            truth = sole.backend.blocks[name].averages().values()
            for a, b in zip(block.averages().values(), truth, strict=True):
                torch.testing.assert_close(a.value, b.value, rtol=1e-12, atol=1e-12)


class Game:
    """A generator and a discriminator in float64, and their batches."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.discriminator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.noise = [torch.randn(DATA, 3, dtype=torch.float64) for _ in range(STEPS)]
        self.real = [torch.randn(DATA, 2, dtype=torch.float64) for _ in range(STEPS)]

    def judged(self, made: Any, real: Tensor, fake: Tensor) -> None:
        """A step of the discriminator: two calls of it in one backward."""
        ones, zeros = (make(DATA, 1, dtype=torch.float64) for make in (torch.ones, torch.zeros))
        made.zero_grad()
        (BCE(self.discriminator(real), ones) + BCE(self.discriminator(fake), zeros)).backward()
        made.step()

    def deceived(self, made: Any, noise: Tensor, through: nn.Module) -> None:
        """A step of the generator, whose backward goes through the discriminator and leaves gradients there."""
        made.zero_grad()
        BCE(through(self.generator(noise)), torch.ones(DATA, 1, dtype=torch.float64)).backward()
        made.step()


@both
def test_a_generator_and_a_discriminator_train_as_each_would_alone(make: Callable[..., Any]) -> None:
    """The generator's optimizer is given both as one model, and its own parameters."""
    game = Game()
    alone, twin = Game(), Game()
    chain = nn.Sequential(game.generator, game.discriminator)
    of_generator = make(chain, BCE, params=list(game.generator.parameters()), **EXACT)
    of_discriminator = make(game.discriminator, BCE, **EXACT)
    of_alone = make(alone.discriminator, BCE, **EXACT)  # it never sees a generator, but its fakes
    own = nn.Sequential(twin.generator, twin.discriminator)
    of_twin = make(own, BCE, params=list(twin.generator.parameters()), **EXACT)  # nobody else has hooks there
    for noise, real in zip(game.noise, game.real, strict=True):
        fake = game.generator(noise).detach()
        game.judged(of_discriminator, real, fake)
        alone.judged(of_alone, real, fake)
        twin.discriminator.load_state_dict(game.discriminator.state_dict())
        game.deceived(of_generator, noise, game.discriminator)
        twin.deceived(of_twin, noise, twin.discriminator)
        assert_equal(game.discriminator, alone.discriminator)
        assert_equal(game.generator, twin.generator)
    for made in (of_generator, of_discriminator):
        assert made.health()["unseen_layers"] == made.health()["skipped_steps"] == 0.0


DISCRIMINATORS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 1),
    "without a bias": lambda: nn.Sequential(nn.Tanh(), nn.Linear(2, 1, bias=False)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv1d(1, 1, 2), nn.Flatten()),
    "frozen": lambda: nn.Linear(2, 1).requires_grad_(False),
}


@pytest.mark.parametrize("loss", [BCE, nn.MSELoss()], ids=["logits", "squares"])
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_generator_alone_is_told_what_to_pass(kind: str, loss: nn.Module) -> None:
    """The loss' curvature at the generator's output is not that at the discriminator's; nothing is lost."""
    torch.manual_seed(0)
    generator, discriminator = nn.Linear(3, 2).double(), DISCRIMINATORS[kind]().double()
    noise, real = torch.randn(DATA, 3).double(), torch.ones(DATA, 1).double()
    optimizer = kfacopt.KFAC(generator, loss)
    with pytest.raises(ValueError, match=r"another layer .*nn\.Sequential\(generator, discriminator\).*'empirical'"):
        loss(discriminator(generator(noise)), real).backward()
    optimizer.close()
    both = nn.Sequential(generator, discriminator)
    for remedy in (
        kfacopt.KFAC(both, loss, params=list(generator.parameters())),
        kfacopt.KFAC(generator, nn.functional.cross_entropy, curvature="empirical"),
    ):
        remedy.zero_grad()
        loss(both(noise), real).backward()
        remedy.step()
        assert remedy.health()["unseen_layers"] == 0.0
        remedy.close()


def test_a_layer_beside_the_loss_of_the_prediction_itself_is_no_error() -> None:
    """As features of another network are compared, too: the loss' curvature, which is said."""
    torch.manual_seed(0)
    model, features = nn.Linear(3, 2).double(), nn.Linear(2, 4).double()
    optimizer = kfacopt.KFAC(model, nn.MSELoss())
    x, y = torch.randn(DATA, 3).double(), torch.randn(DATA, 2).double()
    prediction = model(x)
    (nn.MSELoss()(prediction, y) + nn.MSELoss()(features(prediction), features(y))).backward()
    with pytest.warns(UserWarning, match="cannot be told|is not that of"):
        optimizer.step()
    optimizer.close()
