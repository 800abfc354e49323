"""Raw matrices of a module of one's own, found by their products."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import ProductsHandler, register_handler
from tests.cases import exact_ekfac

MSE = nn.MSELoss()


class Raw(nn.Module):
    """Matrices in a list and by name, one used twice, one by F.linear with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ParameterList(torch.randn(3, 3) / 2 for _ in range(2))
        self.out, self.shift = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.pair[0]).tanh() * (x @ self.pair[1]).sigmoid()
        return nn.functional.linear((h @ self.pair[0]).tanh(), self.out, self.shift)


class Written(nn.Module):
    """The same with linear layers."""

    def __init__(self, raw: Raw) -> None:
        super().__init__()
        self.zero, self.one = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.out, self.shift = nn.Linear(3, 2, bias=False), nn.Parameter(raw.shift.detach().clone())
        for layer, weight in ((self.zero, raw.pair[0].mT), (self.one, raw.pair[1].mT), (self.out, raw.out)):
            layer.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.zero(x).tanh() * self.one(x).sigmoid()
        return self.out(self.zero(h).tanh()) + self.shift


class Below(nn.Module):
    """Between linear layers, on sequences."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.below, self.inner, self.head = nn.Linear(4, 3), inner(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.below(x).tanh()).tanh().mean(1)).tanh()


HANDLER = ProductsHandler(linear=["out"], matmul=["pair"])


def trained(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = 3, **options: Any) -> Any:
    made = optimizer(model, MSE, curvature="ggn", factor_every=1, refresh_every=1, **options)
    for _ in range(steps):
        made.zero_grad()
        MSE(model(x), y).backward()
        made.step()
    return made


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_ekfac])
def test_steps_are_those_of_linear_layers(optimizer: Any, approx: str) -> None:
    """On sequences, a matrix that is used twice included; three steps in float64."""
    model = Below(Raw).double()
    assert isinstance(model.inner, Raw)
    raw = model.inner
    twin = Below(lambda: Written(raw)).double()
    for ours, theirs in ((model.below, twin.below), (model.head, twin.head)):
        theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(16, 3, 4, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    with register_handler(Raw, HANDLER):
        made = trained(model, optimizer, x, y, kfac_approx=approx)
    other = trained(twin, optimizer, x, y, kfac_approx=approx)
    treated = {row.module: row.treatment for row in made.coverage().rows if row.parameters != ("shift",)}
    assert "AdamW" not in treated.values()
    assert made.health()["unseen_layers"] == 0.0
    for name, block in {"pair.0": "zero", "pair.1": "one", "out": "out"}.items():
        found = made.backend.blocks[f"inner.{name}"].factors()
        for ours, theirs in zip(found, other.backend.blocks[f"inner.{block}"].factors(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert isinstance(twin.inner, Written)
    torch.testing.assert_close(raw.pair[0].mT, twin.inner.zero.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(raw.pair[1].mT, twin.inner.one.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(raw.out, twin.inner.out.weight, rtol=1e-7, atol=1e-9)


EINSUMS: dict[str, tuple[str, str, bool]] = {
    "held": ("ni,io->no", "matmul", False),
    "turned": ("ni,oi->no", "linear", False),
    "the matrix first": ("io,ni->no", "matmul", False),
    "places": ("nti,io->nto", "matmul", True),
    "dots": ("...i,oi->...o", "linear", True),
    "inputs in the middle": ("nit,io->not", "matmul", True),
}


class ByEinsum(nn.Module):
    def __init__(self, equation: str, turned: bool) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn((3, 2) if turned else (2, 3)) / 2)

    def forward(self, x: Tensor) -> Tensor:
        pair = (self.weight, x) if self.equation.startswith("io") else (x, self.weight)
        return torch.einsum(self.equation, *pair)


class Around(nn.Module):
    """Between linear layers; where the inputs are in the middle they are brought there by a convolution."""

    def __init__(self, inner: nn.Module, middle: bool) -> None:
        super().__init__()
        self.below = nn.Conv1d(4, 2, 1) if middle else nn.Linear(4, 2)
        self.inner, self.head, self.middle = inner, nn.Linear(3, 2), middle

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.below(x.mT if self.middle else x).tanh()).tanh()
        h = h.mT if self.middle else h
        return self.head(h.mean(1) if h.ndim == 3 else h)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_ekfac])
@pytest.mark.parametrize("kind", EINSUMS)
def test_einsum_is_a_linear_layer(kind: str, optimizer: Any, autocast: bool) -> None:
    equation, use, places = EINSUMS[kind]
    torch.manual_seed(0)
    inner = ByEinsum(equation, turned=use == "linear")
    model = Around(inner, equation.startswith("nit"))
    dtype = torch.float32 if autocast else torch.float64
    model = model.to(dtype)
    plain = nn.Linear(2, 3, bias=False).to(dtype)
    plain.weight.data.copy_(inner.weight if use == "linear" else inner.weight.mT)
    twin = Around(plain, False)
    twin.below, twin.head = nn.Linear(4, 2).to(dtype), copy.deepcopy(model.head)
    twin.below.weight.data.copy_(model.below.weight.flatten(1))
    twin.below.bias.data.copy_(model.below.bias)
    x = torch.randn(*((8, 3, 4) if places else (8, 4)), dtype=dtype)
    y = torch.randn(8, 2, dtype=dtype)
    with register_handler(ByEinsum, ProductsHandler(**{use: ["weight"]})), torch.autocast("cpu", enabled=autocast):
        made, other = (trained(m, optimizer, x, y, steps=1) for m in (model, twin))
    assert made.health()["unseen_layers"] == 0.0
    tolerance = {"rtol": 0.05, "atol": 0.02} if autocast else {"rtol": 1e-8, "atol": 1e-10}
    names = {"inner.weight": "inner", "below": "below"}
    for mine, theirs in names.items():
        found, want = made.backend.blocks[mine].factors(), other.backend.blocks[theirs].factors()
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


class OneMatrix(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.eye(3) + 0.1), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


OTHER_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum from the left": lambda x, w: torch.einsum("ni,ij->jn", x, w).T,
    "einsum of a part": lambda x, w: torch.einsum("ni,io->no", x[:, :2], w[:2]),
    "einsum with the data behind": lambda x, w: torch.einsum("abi,io->bao", torch.stack([x, x]), w)[:, 0],
    "a part": lambda x, w: nn.functional.pad(x @ w[:, :2], (0, 1)),
    "from the left": lambda x, w: (w @ x.T).T,
    "elementwise, too": lambda x, w: x @ w + w[0],
    "a contraction, too": lambda x, w: x @ w + torch.einsum("ni,ij->n", x, w)[:, None],
    "the other way round": lambda x, w: x @ w.T,
    "einsum the other way round": lambda x, w: torch.einsum("ni,oi->no", x, w),
}


@pytest.mark.parametrize("use", OTHER_USES.values(), ids=OTHER_USES)
def test_other_uses_train_by_adamw_and_are_said(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Never a share of the curvature for the whole."""
    model = nn.Sequential(nn.Linear(3, 3), OneMatrix(use), nn.Linear(3, 2))
    before = model[1].weight.detach().clone()
    with register_handler(OneMatrix, ProductsHandler(matmul=["weight"])):
        made = kfacopt.KFAC(model, MSE, factor_every=1, refresh_every=1, kl_clip=0.03)
    MSE(model(torch.randn(5, 3)), torch.randn(5, 2)).backward()
    with pytest.warns(UserWarning, match=r"no backward shows the curvature of '1\.weight'"):
        made.step()
    assert {row.module: row.treatment for row in made.coverage().rows}["1.weight"] == "AdamW"
    assert not torch.equal(before, model[1].weight)


@pytest.mark.parametrize("steps", [1, 3])
def test_half_precision_empty_batches_and_vectors(steps: int) -> None:
    model = nn.Sequential(OneMatrix(torch.matmul), nn.Linear(3, 2))
    with register_handler(OneMatrix, ProductsHandler(matmul=["weight"])):
        made = kfacopt.EKFAC(model, MSE, factor_every=1, refresh_every=1, kl_clip=0.03)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(5, 3))
        made.zero_grad()
        MSE(output.float(), torch.randn(5, 2)).backward()
        made.step()
    assert made.health()["unseen_layers"] == 0.0
    made.zero_grad()
    model(torch.randn(0, 3)).sum().backward()
    made.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"linear": "weight"}, {"linear": ["w"], "matmul": ["w"]}])
def test_bad_paths_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="each path once"):
        ProductsHandler(**options)
