"""Stacks of matrices in one parameter: a layer for each, whatever takes the stack apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfacopt
from kfacopt.layers import ProductsHandler, check_handler, register_handler
from tests.cases import exact_ekfac, still, train_step

MSE = nn.MSELoss()
CHOSEN = torch.tensor([2, 0, 1, 1, 2, 0, 0])

Forward = Callable[[Tensor, Tensor], Tensor]


class Stack(nn.Module):
    def __init__(self, use: Forward, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.use, self.weight = use, nn.Parameter(torch.randn(shape) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


MATMUL: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "bmm": (torch.bmm, (3, 7, 4)),
    "a matrix for all": (torch.matmul, (7, 4)),
    "baddbmm": (lambda x, w: torch.baddbmm(x.new_zeros(3, 1, 5), x, w), (3, 7, 4)),
    "twice": (lambda x, w: torch.bmm(x, w) + torch.bmm(x.flip(0), w), (3, 7, 4)),
    "all experts": (lambda x, w: torch.einsum("ni,eio->neo", x, w), (7, 4)),
    "all experts of tokens": (lambda x, w: torch.einsum("nti,eio->ento", x, w), (2, 7, 4)),
    "slots": (lambda x, w: torch.einsum("eci,eio->eco", x, w), (3, 7, 4)),
    "summed over experts": (lambda x, w: torch.einsum("nei,eio->no", x, w), (7, 3, 4)),
    "heads": (lambda x, w: torch.einsum("nei,eio->neo", x, w), (7, 3, 4)),
    "broadcast": (lambda x, w: x.unsqueeze(-2) @ w, (6, 1, 3, 4)),
    "chosen for each": (lambda x, w: (x.unsqueeze(1) @ w[CHOSEN]).squeeze(1), (7, 4)),
    "chosen by einsum": (lambda x, w: torch.einsum("ni,nio->no", x, w[CHOSEN]), (7, 4)),
    "one by one": (lambda x, w: torch.cat([x[e == CHOSEN] @ w[e] for e in range(3)]), (7, 4)),
    "unbound": (lambda x, w: torch.stack([(x @ one).tanh() for one in w.unbind()]), (7, 4)),
}
LINEAR: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "bmm, turned": (lambda x, w: torch.bmm(x, w.mT), (3, 7, 4)),
    "all experts, turned": (lambda x, w: torch.einsum("ni,eoi->neo", x, w), (7, 4)),
    "F.linear": (lambda x, w: torch.cat([functional.linear(x[e == CHOSEN], w[e]) for e in range(3)]), (7, 4)),
}


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("kind", [*MATMUL, *LINEAR])
def test_rows_sum_to_the_gradient(kind: str, below: bool) -> None:
    torch.manual_seed(0)
    of_matmul = kind in MATMUL
    use, shape = (MATMUL if of_matmul else LINEAR)[kind]
    module = Stack(use, (3, 4, 5) if of_matmul else (3, 5, 4)).double()
    handler = ProductsHandler(matmul=["weight"]) if of_matmul else ProductsHandler(linear=["weight"])
    assert len(handler.parts(module)) == 3
    check_handler(handler, module, torch.randn(shape, dtype=torch.float64, requires_grad=below))


class Mixture(nn.Module):
    """Two layers of experts between linear layers; each datum goes to the expert that its first number chooses."""

    def __init__(self, chosen: Tensor, as_layers: bool) -> None:
        super().__init__()
        self.below, self.head, self.chosen = nn.Linear(4, 4), nn.Linear(4, 2), chosen
        shapes = ((3, 4, 5), (3, 5, 4))
        self.experts = nn.ParameterList(torch.randn(shape) / 2 for shape in shapes)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for e, i, o in shapes for _ in range(e))
        for number, layer in enumerate(self.layers):
            layer.weight.data.copy_(self.experts[number // 3][number % 3].mT)
        self.as_layers = as_layers
        if as_layers:
            del self.experts
        else:
            del self.layers

    def forward(self, x: Tensor) -> Tensor:
        h, result = self.below(x).tanh(), x.new_zeros(len(x), 4)
        for e in range(3):
            own = (self.chosen == e).nonzero().flatten()
            if self.as_layers:
                out = self.layers[3 + e](self.layers[e](h[own]).tanh())
            else:
                out = (h[own] @ self.experts[0][e]).tanh() @ self.experts[1][e]
            result = result.index_add(0, own, out)
        return self.head(result.tanh())


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_ekfac])
def test_steps_are_those_of_linear_layers(optimizer: Any) -> None:
    """Three steps in float64, each expert with data of its own number, so many that no factor is singular."""
    x, y = torch.randn(36, 4, dtype=torch.float64), torch.randn(36, 2, dtype=torch.float64)
    chosen = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1, 0] * 4)
    models = []
    for as_layers in (False, True):
        torch.manual_seed(0)
        models.append(Mixture(chosen, as_layers).double())
    made = []
    with register_handler(Mixture, ProductsHandler(matmul=["experts"])):
        for model in models:
            made.append(optimizer(model, MSE, curvature="ggn", factor_every=1, refresh_every=1))
            for _ in range(3):
                train_step(made[-1], model, MSE, x, y)
            assert made[-1].health()["unseen_layers"] == 0.0
    stacked, layers = models
    for number, layer in enumerate(layers.layers):
        ours = made[0].backend.blocks[f"experts.{number // 3}.{number % 3}"].factors()
        theirs = made[1].backend.blocks[f"layers.{number}"].factors()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(stacked.experts[number // 3][number % 3].mT, layer.weight, rtol=1e-7, atol=1e-9)


class Routed(nn.Module):
    """A router, and experts of which the best is taken, with its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 8) / 3), nn.Parameter(torch.randn(4, 8, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        best = gates.max(-1)
        hidden = torch.einsum("ni,eio->neo", x, self.up).relu()
        every = torch.einsum("nei,eio->neo", hidden, self.down)
        return best.values[:, None] * every[torch.arange(len(x)), best.indices]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent])
def test_a_mixture_trains_better_than_by_adamw(optimizer: Any, autocast: bool) -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(64, 6)
    plain = Routed()
    plain.load_state_dict(model.state_dict())
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3] + x[:, 4]], dim=1)
    with register_handler(Routed, ProductsHandler(matmul=["up", "down"])):
        made = optimizer(model, MSE)
    assert all(row.treatment != "AdamW" for row in made.coverage().rows)
    ends = []
    for one, stepped in ((model, made), (plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))):
        for _ in range(40):
            stepped.zero_grad()
            with torch.autocast("cpu", enabled=autocast):
                output = one(x)
            loss = MSE(output.float(), y)
            loss.backward()
            stepped.step()
        ends.append(loss.item())
    assert ends[0] < ends[1]
    assert made.health()["unseen_layers"] == 0.0


def test_experts_without_data_are_no_alarm() -> None:
    """No part of the gradient is an unused expert's: it keeps the curvature it had."""
    torch.manual_seed(0)
    model = Mixture(torch.tensor([0, 1, 2, 0, 1, 2]), as_layers=False)
    with register_handler(Mixture, ProductsHandler(matmul=["experts"])):
        made = kfacopt.KFAC(model, MSE, factor_every=1, refresh_every=1)
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    train_step(made, model, MSE, x, y)
    model.chosen = torch.tensor([0, 0, 0, 1, 1, 1])
    for _ in range(6):
        train_step(made, model, MSE, x, y)
    assert made.health()["unseen_layers"] == 0.0
    assert {row.treatment for row in made.coverage().rows} == {"KFAC"}


OTHER_USES: dict[str, Forward] = {
    "scaled": lambda x, w: torch.bmm(x, 2 * w),
    "mixed": lambda x, w: torch.bmm(x, w[[0, 0, 1]] + w[[1, 2, 2]]),
    "a part": lambda x, w: torch.bmm(x[..., :2], w[:, :2]),
    "elementwise, too": lambda x, w: torch.bmm(x, w) + w[:, :1],
    "from the left": lambda x, w: (w.mT @ x.mT).mT,
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_other_uses_train_by_adamw_and_are_said(use: str) -> None:
    """Never a share of the curvature for the whole."""
    model = nn.Sequential(nn.Linear(4, 4), Stack(OTHER_USES[use], (3, 4, 4)), nn.Linear(4, 2))
    with register_handler(Stack, ProductsHandler(matmul=["weight"])):
        made = kfacopt.KFAC(model, MSE, **still())
    MSE(model(torch.randn(3, 5, 4)), torch.randn(3, 5, 2)).backward()
    with pytest.warns(UserWarning, match=r"no backward shows the curvature of '1\.weight\.0', '1\.weight\.1'"):
        made.step()
    rows = {row.module: row.treatment for row in made.coverage().rows}
    assert rows["1.weight.0"] == "AdamW"
