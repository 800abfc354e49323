"""Binary cross-entropy with targets between 0 and 1: its curvature does not depend on them, so none are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import exact_or_named, still

DATA = 12
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(DATA, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.rand(DATA, 3, generator=GENERATOR, dtype=torch.float64)
W = 3.0 * torch.rand(DATA, 1, generator=GENERATOR, dtype=torch.float64)
BCE = nn.BCEWithLogitsLoss


def bce(f: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, Y, **options)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def hessian(of: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """Of the loss with respect to a datum's outputs, summed over the data `[c c]`."""
    blocks: Tensor = jacrev(grad(lambda flat: of(flat.view(DATA, 3))))(f.detach().flatten())
    return torch.einsum("ncnd->cd", blocks.view(DATA, 3, DATA, 3))


LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "a mean": (BCE(), bce),
    "times a constant": (BCE(), lambda f: 3.0 * bce(f)),
    "a part of another loss": (BCE(), lambda f: bce(f) + 1e-2 * X.sum()),
    "a sum over the outputs": (BCE(), lambda f: bce(f, reduction="none").sum(1).mean()),
    "the module": (BCE(), lambda f: BCE()(f, Y)),
    "weights of the outputs": (
        BCE(weight=torch.tensor([1.0, 2.0, 0.5])),
        lambda f: bce(f, weight=torch.tensor([1.0, 2.0, 0.5])),
    ),
    "positive weights of one": (BCE(pos_weight=torch.ones(3)), bce),
    "weights of the data": (BCE(), lambda f: (bce(f, reduction="none") * W).mean()),
    "a positive weight that was not announced": (BCE(), lambda f: bce(f, pos_weight=torch.tensor(5.0))),
    "a mask": (BCE(), lambda f: bce(f, weight=(W > 1.5).double())),
    "written out": (BCE(), lambda f: (F.softplus(f) - Y * f).mean()),
    "squares": (BCE(), lambda f: F.mse_loss(f, Y)),
    "absolute errors": (BCE(), lambda f: F.l1_loss(f, Y)),
}
EXACT = {
    *("a mean", "times a constant", "a part of another loss", "a sum over the outputs", "the module", "written out"),
    *("weights of the outputs", "positive weights of one"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_factor_is_that_of_the_loss_or_said(name: str) -> None:
    announced, of = LOSSES[name]
    model = linear()

    def factor() -> Tensor:
        optimizer = kfacopt.KFAC(model, announced, **still(damping=0.1))
        of(model(X)).backward()
        optimizer.step()
        found: Tensor = optimizer.backend.blocks[""].factors()[0]
        return found

    want = hessian(of, model(X))
    if name in EXACT:
        torch.testing.assert_close(factor(), want)
    else:
        exact_or_named(factor, lambda found: torch.testing.assert_close(found, want), "weight", "MseLoss", "pos_weight")


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.NaturalGradient, kfacopt.SpectralDescent])
def test_a_grad_scaler_changes_nothing(optimizer: Any, scale: float) -> None:
    moved = []
    for enabled in (False, True):
        model = linear()
        made = optimizer(model, BCE())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        for _ in range(3):
            made.zero_grad()
            scaler.scale(bce(model(X))).backward()
            scaler.step(made)
            scaler.update()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(moved[0], moved[1])


def test_squares_announced_as_binary_are_refused_in_the_backward() -> None:
    model = linear()
    optimizer = kfacopt.KFAC(model, BCE())
    with pytest.raises(ValueError, match=r"torch's MseLoss, not that of Bernoulli"):
        F.mse_loss(model(X), Y).backward()
    bce(model(X)).backward()
    optimizer.step()


def test_a_variational_autoencoder_has_the_curvature_of_its_reconstruction() -> None:
    """A sum over pixels, beside a divergence of the code that other outputs carry."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.back = nn.Linear(4, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            code = self.code(x)
            return self.back(code), code

    torch.manual_seed(0)
    model = Autoencoder().double()
    optimizer = kfacopt.KFAC(model, BCE(reduction="sum"), prediction=lambda output: output[0], **still(damping=0.1))
    picture, code = model(X)
    (bce(picture, reduction="sum") + code.square().sum()).backward()
    optimizer.step()
    found = optimizer.backend.blocks["back"].factors()[0]
    torch.testing.assert_close(found, hessian(lambda f: bce(f, reduction="sum"), picture) / DATA)
