"""Report 4: a parameter of a covered layer that is also used outside its module.

`F.linear(h, embedding.weight)` as a head, the transposed weight of a tied autoencoder, a bias added elsewhere: the
block holds both uses, so that its trace is the Gauss-Newton matrix's; or the layer is named, and trains by AdamW. A
penalty on the parameters is no such use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from kfacopt import operators as ops
from tests import reference
from tests.reports.reports import OPERATOR_TYPE2, TYPE2, block_traces, exact_or_named, heard, named, near, treatment


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.tied(x)), self.tied.weight.t())


class Head(nn.Module):
    """A language model whose head is the embedding's weight, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.tied(x))), self.tied.weight)


class Product(Head):
    """The same head as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(self.tied(x))) @ self.tied.weight.t()


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Conv1d(1, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(torch.tanh(self.tied(x)), self.tied.weight).squeeze(1)


class BiasElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tied, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tied(x))) + 2.0 * self.tied.bias


class Sliced(nn.Module):
    """A part of the weight scores the outputs of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.tied(x))
        return self.head(h) + h * self.tied.weight[0]


class Normalised(nn.Module):
    """Logits scaled by the norm of the layer's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(x) / self.tied.weight.norm()


Model = tuple[Callable[[], nn.Module], nn.Module, Callable[[], tuple[Tensor, Tensor]]]


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labelled() -> tuple[Tensor, Tensor]:
    return reals(9, 3), torch.arange(9) % 3


MODELS: dict[str, Model] = {
    "autoencoder": (Autoencoder, nn.MSELoss(), lambda: (reals(9, 3), reals(9, 3))),
    "language model": (Head, nn.CrossEntropyLoss(), lambda: (torch.arange(9) % 5, (2 * torch.arange(9)) % 5)),
    "matrix product": (Product, nn.CrossEntropyLoss(), lambda: (torch.arange(9) % 5, (2 * torch.arange(9)) % 5)),
    "transposed convolution": (Convolutional, nn.MSELoss(), lambda: (reals(4, 1, 6), reals(4, 6))),
    "bias elsewhere": (BiasElsewhere, nn.CrossEntropyLoss(), labelled),
    "row of the weight": (Sliced, nn.CrossEntropyLoss(), labelled),
    "norm of the weight": (Normalised, nn.CrossEntropyLoss(), labelled),
}


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor, dict[str, float]]:
    """Model, loss, batch, and the true traces of the Gauss-Newton blocks."""
    torch.manual_seed(0)
    model, loss, data = MODELS[name][0]().double(), MODELS[name][1], MODELS[name][2]()
    return model, loss, *data, block_traces(model, reference.whole_ggn(model, loss, *data))


@pytest.mark.parametrize("operator", [ops.EKFACLinearOperator, ops.KFACLinearOperator])
@pytest.mark.parametrize("name", MODELS)
def test_operators_hold_both_uses_or_refuse(name: str, operator: Any) -> None:
    """The trace of EKFAC is exact; that of KFAC, if it is there at all, is near it."""
    model, loss, x, y, want = made(name)

    def traces() -> dict[str, float]:
        matrix = operator(model, loss, list(model.parameters()), [(x, y)], **OPERATOR_TYPE2)
        return block_traces(model, matrix @ torch.eye(matrix.shape[1], dtype=torch.float64))

    def check(found: dict[str, float]) -> None:
        tolerance = 1e-6 if operator is ops.EKFACLinearOperator else 0.05
        assert found["tied"] == pytest.approx(want["tied"], rel=tolerance)

    exact_or_named(traces, check, "tied")


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizers_block_holds_both_uses_or_the_layer_is_named(name: str) -> None:
    model, loss, x, y, want = made(name)
    optimizer = kfacopt.SecondOrderOptimizer(
        model, loss, backend=kfacopt.FullEKFACBackend(1, 1), lr=0.0, adamw_lr=0.0, damping=0.1, ema_decay=0.0, **TYPE2
    )

    def stepped() -> list[str]:
        with heard() as said:
            for _ in range(2):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
        return said

    def check(said: list[str]) -> None:
        block = optimizer.backend.blocks.get("tied")
        if named(optimizer, "tied", said):
            assert treatment(optimizer, "tied").startswith("AdamW"), "what is not known is not used"
        else:
            assert block is not None
            assert near(float(block.trace()), want["tied"])

    exact_or_named(stepped, check, "tied")


class Sequence(nn.Module):
    """A small language model; the head is functional."""

    def __init__(self, vocabulary: int = 40, width: int = 16) -> None:
        super().__init__()
        self.tied = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tied.weight, std=0.02)
        self.up, self.down, self.norm = nn.Linear(width, 32), nn.Linear(32, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tied(x)
        h = h + self.down(F.gelu(self.up(h)))
        return F.linear(self.norm(h), self.tied.weight)


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_language_model_with_a_functional_head_learns(make: Any) -> None:
    """Its loss stays below chance once there, and coverage() is true."""
    generator = torch.Generator().manual_seed(0)
    follow = torch.randint(0, 40, (40,), generator=generator)
    model = Sequence()
    optimizer = make(model, nn.CrossEntropyLoss(), lr=0.3)
    losses: list[float] = []

    def trained() -> list[str]:
        with heard() as said:
            for _ in range(30):
                x = torch.randint(0, 40, (16, 8), generator=generator)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x).flatten(0, 1), follow[x].flatten())
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return said

    def check(said: list[str]) -> None:
        chance = float(torch.tensor(40.0).log())
        assert max(losses) < chance + 0.3
        assert losses[-1] < chance

    exact_or_named(trained, check, "tied")


def penalty(model: nn.Module) -> Tensor:
    return sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


def orthogonality(model: nn.Module) -> Tensor:
    weight = model[0].weight
    return (weight.T @ weight - torch.eye(weight.shape[1], dtype=weight.dtype)).square().sum()


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("of", [penalty, orthogonality])
def test_a_penalty_on_the_parameters_is_no_use_of_the_layer(of: Callable[[nn.Module], Tensor], make: Any) -> None:
    """The curvature of the likelihood is whole: the layers keep it, and nothing is said."""
    x, y = labelled()
    factors = []
    for weight in (0.1, 0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer = make(model, nn.CrossEntropyLoss(), lr=0.0, factor_every=1, **TYPE2)
        for _ in range(2):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + weight * of(model)).backward()
            optimizer.step()
        assert all(row.treatment.startswith(make.__name__) for row in optimizer.coverage().rows)
        factors.append([block.factors() for block in optimizer.backend.blocks.values()])
    torch.testing.assert_close(factors[0], factors[1])
