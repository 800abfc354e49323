"""Complex parameters, as of Fourier layers: they train by AdamW, and real layers around them have true curvature."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import still

OURS = {"KFAC": kfacopt.KFAC, "EKFAC": kfacopt.EKFAC, "SpectralDescent": kfacopt.SpectralDescent}


class Fourier(nn.Module):
    """A layer of weights on frequencies (Li et al. 2021, arXiv:2010.08895) between two of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.double()
        self.weight.data = self.weight.data.to(torch.complex128)

    def behind(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.last(torch.fft.irfft(torch.fft.rfft(hidden) * self.weight, n=6).tanh())
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.first(x))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(8, 3, **draw), torch.randn(8, 2, **draw)


def train(model: nn.Module, made: torch.optim.Optimizer, steps: int) -> list[float]:
    (x, y), losses = data(), []
    for _ in range(steps):
        made.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        made.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OURS)
def test_training_and_resuming(name: str) -> None:
    model = Fourier()
    made = OURS[name](model, nn.MSELoss())
    assert "complex numbers" in str(made.coverage())
    losses = train(model, made, 30)
    assert losses[-1] < 0.5 * losses[0]
    assert made.health()["skipped_steps"] == made.health()["unseen_layers"] == 0.0
    kept = io.BytesIO()
    torch.save(made.state_dict(), kept)
    kept.seek(0)
    other = copy.deepcopy(model)
    resumed = OURS[name](other, nn.MSELoss())
    resumed.load_state_dict(torch.load(kept, weights_only=True))
    assert train(model, made, 5) == train(other, resumed, 5)


def test_the_step_is_that_of_torch() -> None:
    model, rival = Fourier(), Fourier()
    groups = [{"params": [p], "lr": 0.01, "weight_decay": 0.1, "curvature": False} for p in model.parameters()]
    train(model, kfacopt.KFAC(model, nn.MSELoss(), groups), 5)
    train(rival, torch.optim.AdamW(rival.parameters(), lr=0.01, weight_decay=0.1), 5)
    torch.testing.assert_close(list(model.parameters()), list(rival.parameters()))


def test_real_layers_around_have_true_factors() -> None:
    model, x = Fourier(), data()[0]
    made = kfacopt.KFAC(model, nn.MSELoss(), **still(damping=0.1))
    train(model, made, 1)
    hidden = model.first(x).detach()
    jacobian = torch.stack([jacrev(model.behind)(one) for one in hidden]).detach()
    want = torch.einsum("nko,nkp->op", jacobian, jacobian) / len(x)  # Hessian of a mean over two outputs: one
    torch.testing.assert_close(made.backend.blocks["first"].factors()[0], want)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: kfacopt.NaturalGradient(model, nn.MSELoss()),
        lambda model: kfacopt.TrustRegionNewton(nn.Sequential(model), nn.MSELoss()),
    ],
    ids=["NaturalGradient", "TrustRegionNewton"],
)
def test_where_all_parameters_are_one_vector_they_are_refused(make: Callable[[nn.Module], Any]) -> None:
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"'(0\.)?weight' is complex .* SpectralDescent, which train it by AdamW"):
        make(model)
    assert not model._forward_hooks
