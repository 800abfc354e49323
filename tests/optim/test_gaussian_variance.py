"""GaussianNLLLoss: a mean and a variance, whose Fisher information has nothing between the two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from kfacopt.likelihoods.gaussian_variance import GaussianMean, GaussianVariance
from tests import reference
from tests.cases import exact_ekfac, still
from tests.optim.test_heads import Head, seen
from tests.test_curvature import CLOSE, dense_basis, grouped

DATA = 7
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(DATA, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(DATA, 2, generator=GENERATOR, dtype=torch.float64)


class Uncertain(nn.Module):
    """A mean and a variance for each output, or one variance for all outputs of a datum."""

    def __init__(self, way: str, variances: int) -> None:
        super().__init__()
        self.trunk, self.mean, self.spread = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, variances)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x).tanh()
        mean, variance = self.mean(h), F.softplus(self.spread(h)) + 0.1
        return (mean, variance) if self.way == "tuple" else {self.way: variance, "mean": mean}


def made(way: str = "tuple", variances: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Uncertain(way, variances).double()


def parts(output: Any) -> tuple[Tensor, Tensor]:
    return output if isinstance(output, tuple) else (output["mean"], next(iter(output.values())))


def jacobian(model: nn.Module, layer: Any, name: Any) -> Tensor:
    return reference.jacobian(Head(model, name), layer, X).flatten(2)


def truth(model: nn.Module, layer: Any) -> Tensor:
    """Fisher information of torch's own distribution: its expectation of the Hessian of `-log p` by quadrature."""
    keys = (0, 1) if model.way == "tuple" else ("mean", model.way)
    _, variance = parts(model(X))
    spread = variance.detach().broadcast_to(DATA, 2)
    first, second = (jacobian(model, layer, key) for key in keys)
    per_variance = (0.5 / spread.square()).reshape(DATA, variance.shape[1], -1).sum(-1).flatten()
    total = torch.einsum("pka,p,pkb->kab", first, 1.0 / spread.flatten(), first)
    return (total + torch.einsum("pka,p,pkb->kab", second, per_variance, second)) / Y.numel()


@pytest.mark.parametrize("variances", [2, 1])
@pytest.mark.parametrize("way", ["tuple", "var", "variance"])
@pytest.mark.parametrize("factor", [1.0, 5.0])
@pytest.mark.parametrize("functional", [False, True])
def test_corrected_eigenvalues_are_the_fishers(way: str, variances: int, factor: float, functional: bool) -> None:
    model, loss = made(way, variances), nn.GaussianNLLLoss(full=True)
    optimizer = exact_ekfac(model, loss, **still())

    def loop(model: nn.Module) -> None:
        mean, variance = parts(model(X))
        value = F.gaussian_nll_loss(mean, Y, variance, full=True) if functional else loss(mean, Y, variance)
        (factor * value).backward()

    if functional and factor != 1.0:
        with pytest.warns(UserWarning, match="constant factor"):
            seen(optimizer, model, loop)
        return
    seen(optimizer, model, loop)
    for layer in optimizer._layers:
        block = optimizer.backend.blocks[layer.name]
        basis = dense_basis(block)
        want = factor * (basis.mT @ truth(model, layer) @ basis).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(grouped(block.corrected.value, 2).flatten(1), want, **CLOSE)


def test_the_information_is_the_expected_hessian_of_torchs_loss() -> None:
    """Over labels of the model, by Gauss-Hermite quadrature of a quadratic: exact."""
    f, v = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for sign in (1.0, -1.0):
        y = f + sign * v.sqrt()
        hessian = torch.func.jacrev(
            torch.func.jacrev(lambda p, y=y: F.gaussian_nll_loss(p[None, :1], y, p[None, 1:]))  # type: ignore[misc]
        )(torch.cat([f, v], 1)[0])
        expected += 0.5 * hessian
    mean = GaussianMean().beside({"variance": v})
    for place, (likelihood, at) in enumerate(((mean, f), (GaussianVariance(), v))):
        terms = likelihood.terms(at)
        torch.testing.assert_close(likelihood.hessian_product(terms, torch.ones_like(at))[0, 0], expected[place, place])
    torch.testing.assert_close(expected[0, 1], torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent, kfacopt.NaturalGradient])
def test_it_trains(optimizer: Any) -> None:
    model, loss = made(), nn.GaussianNLLLoss()
    short = {"lr": 0.3, "damping": 0.1} if optimizer is kfacopt.NaturalGradient else {}
    used = optimizer(model, loss, **short)
    values = []
    for _ in range(20):
        used.zero_grad()
        mean, variance = model(X)
        value = loss(mean, Y, variance)
        value.backward()
        used.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0]


def test_refusals_say_what_to_return() -> None:
    for loss, options in (
        (nn.GaussianNLLLoss(reduction="sum"), {}),
        (nn.GaussianNLLLoss(), {"prediction": lambda output: output[0]}),
    ):
        with pytest.raises(ValueError, match="let the model return the mean and the variance"):
            kfacopt.KFAC(made(), loss, **options)
    with pytest.raises(TypeError, match="GaussianNLLLoss is not supported: it takes two predictions"):
        kfacopt.KFAC(made(), {"mean": nn.GaussianNLLLoss()})
