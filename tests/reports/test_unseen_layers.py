"""Report 7: what `coverage()` says is what happens.

A covered layer whose calls no pass sees (its `forward` called directly, compiled before the optimizer was made, called
with other tensors in the place of its parameters, replaced) trains by AdamW, or by curvature that nothing updates. It
is seen after all; or the user is told: by a warning that names it, once, by `coverage()`, by `health()`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import MC, TYPE2, heard, named, treatment, uncovered

CE = nn.CrossEntropyLoss()
# Of the natural gradient: the spectral step takes matrices without curvature as well.
OPTIMIZERS = {"kfac": partial(kfacopt.KFAC, kl_clip=0.03), "ekfac": partial(kfacopt.EKFAC, kl_clip=0.03)}


class Net(nn.Module):
    """Two layers; `call` says how the first is called."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) if self.call is None else self.call(self.first, x)
        return self.second(torch.tanh(h))


def with_copies(layer: nn.Module, x: Tensor) -> Tensor:
    """As meta-learning does: the layer's function of other tensors that come from its parameters."""
    result: Tensor = functional_call(layer, {n: 1.0 * p for n, p in layer.named_parameters()}, (x,))
    return result


UNSEEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "layer.forward(x)": lambda layer, x: layer.forward(x),
    "F.linear of its weight": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "x @ weight.T": lambda layer, x: x @ layer.weight.T + layer.bias,
    "functional_call with copies": with_copies,
}


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def train(optimizer: Any, call: Callable[[Tensor], Tensor], steps: int) -> None:
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()


def seen_exactly(optimizer: Any, model: nn.Module, module: str) -> bool:
    """Whether a layer's factors are those of the model as it now is (after a step that moved nothing)."""
    block = optimizer.backend.blocks[module]
    if not block.estimated:
        return False
    twin = Net().double()
    twin.load_state_dict({name: p for name, p in model.state_dict().items() if name in twin.state_dict()})
    reference = OPTIMIZERS["kfac"](twin, CE, **frozen())
    train(reference, twin, 1)
    found, want = block.factors(), reference.backend.blocks[module].factors()
    return all(torch.allclose(a, b) for a, b in zip(found, want, strict=True))


def frozen() -> dict[str, Any]:
    return {"lr": 0.0, "adamw_lr": 0.0, "ema_decay": 0.0, "factor_every": 1, "damping": 0.1} | TYPE2


@pytest.mark.parametrize("how", UNSEEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_that_no_pass_reaches_is_named(name: str, how: str) -> None:
    model = Net(UNSEEN[how]).double()
    optimizer = OPTIMIZERS[name](model, CE, **frozen())
    before = treatment(optimizer, "first")
    with heard() as said:
        train(optimizer, model, 12)
    if seen_exactly(optimizer, model, "first"):
        assert treatment(optimizer, "first") == before
        assert optimizer.health()["unseen_layers"] == 0.0
    else:
        assert any("first" in text for text in said), "a warning names the layer"
        assert sum("first" in text for text in said) == 1, "once"
        assert uncovered(optimizer, "first"), "coverage() says what happens"
        assert not any("second" in text for text in said)
        assert optimizer.health()["unseen_layers"] == 1.0
    assert treatment(optimizer, "second").startswith(type(optimizer).__name__)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_and_run_before_the_optimizer_was_made(name: str) -> None:
    torch._dynamo.reset()
    model = Net().double()
    compiled = torch.compile(model, backend="eager")
    compiled(batch()[0])
    optimizer = OPTIMIZERS[name](compiled, CE, **frozen())
    with heard() as said:
        train(optimizer, compiled, 12)
    rows = [row for row in optimizer.coverage().rows if row.module.endswith(("first", "second"))]
    estimated = [block.estimated for block in optimizer.backend.blocks.values()]
    if all(estimated):
        assert optimizer.health()["unseen_layers"] == 0.0
    else:
        assert optimizer.health()["unseen_layers"] == 2.0
        assert all(row.treatment.startswith("AdamW") for row in rows)
        assert any("first" in text and "second" in text for text in said) or len(said) >= 2
    torch._dynamo.reset()


class Own(nn.Linear):
    """A layer that nobody knows, though it holds a known layer's weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [Own, nn.Linear])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_replaced_later_by_another_with_its_weights(name: str, kind: type[nn.Linear]) -> None:
    """Its curvature is not the first steps' for ever without a word."""
    model = Net().double()
    optimizer = OPTIMIZERS[name](model, CE, **frozen())
    train(optimizer, model, 1)
    new = kind(8, 3).double()
    new.weight, new.bias = model.second.weight, model.second.bias
    model.second = new
    with torch.no_grad():
        model.first.weight.mul_(3.0)  # the factors of old are not those of the model as it now is
    with heard() as said:
        train(optimizer, model, 12)
    told = named(optimizer, "second", said) or any("second" in text for text in said)
    assert seen_exactly(optimizer, model, "second") or told


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_called_directly_from_some_step_on(name: str) -> None:
    """Seen at first, and then no more."""
    model = Net().double()
    optimizer = OPTIMIZERS[name](model, CE, **frozen())
    train(optimizer, model, 2)
    model.call = UNSEEN["layer.forward(x)"]
    with torch.no_grad():
        model.first.weight.mul_(3.0)
        model.second.weight.mul_(3.0)
    with heard() as said:
        train(optimizer, model, 40)
    told = named(optimizer, "first", said) or any("first" in text for text in said)
    stale = optimizer.health()["staleness"] >= 30.0
    assert seen_exactly(optimizer, model, "first") or told or stale


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layer_that_is_reached_later_is_covered_from_then_on(name: str) -> None:
    model = Net(UNSEEN["layer.forward(x)"]).double()
    optimizer = OPTIMIZERS[name](model, CE, **frozen())
    with heard():
        train(optimizer, model, 12)
    model.call = None
    train(optimizer, model, 2)
    assert optimizer.health()["unseen_layers"] == 0.0
    assert treatment(optimizer, "first").startswith(type(optimizer).__name__)
    assert seen_exactly(optimizer, model, "first")


@pytest.mark.parametrize("options", [{}, TYPE2, MC], ids=["default", "type-2", "mc"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_said_where_all_layers_are_reached(name: str, options: dict[str, Any]) -> None:
    model = Net().double()
    optimizer = OPTIMIZERS[name](model, CE, **options)
    assert optimizer.health()["unseen_layers"] == 0.0, "no step was taken yet"
    train(optimizer, model, 12)  # warnings are errors
    assert optimizer.health()["unseen_layers"] == 0.0
    assert treatment(optimizer, "first").startswith(type(optimizer).__name__)


def test_layers_without_any_gradient_are_no_reason_to_warn() -> None:
    """A head that this training does not use: nothing trains, so nothing trains otherwise than is said."""
    model = Net().double()
    model.unused = nn.Linear(8, 5).double()
    optimizer = kfacopt.EKFAC(model, CE, **frozen())
    train(optimizer, model, 12)
    assert treatment(optimizer, "first").startswith("EKFAC")


@pytest.mark.parametrize("backend", [kfacopt.FullEKFACBackend, kfacopt.EigenKFACBackend, kfacopt.EKFACBackend])
def test_any_backend_says_so(backend: Any) -> None:
    model = Net(UNSEEN["layer.forward(x)"]).double()
    optimizer = kfacopt.SecondOrderOptimizer(model, CE, backend=backend(1, 1), lr=0.0, **TYPE2)
    with heard() as said:
        train(optimizer, model, 12)
    if not optimizer.backend.blocks["first"].estimated:
        assert any("first" in text for text in said)
        assert optimizer.health()["unseen_layers"] == 1.0
        assert uncovered(optimizer, "first")


class RawMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (RawMatrix, "no handler for RawMatrix; .* kfacopt.layers.ProductsHandler"),
        (lambda: torch.jit.script(nn.Linear(4, 3)), "made by torch.jit, .* train the module that it was made of"),
    ],
    ids=["raw", "jit"],
)
def test_that_nothing_has_curvature_is_said_when_the_optimizer_is_made(make: Any, words: str) -> None:
    for kind in (kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent):
        with pytest.warns(UserWarning, match=f"no parameter gets curvature.*{words}"):
            kind(make(), nn.MSELoss())
    model = make()
    kfacopt.KFAC(model, nn.MSELoss(), params=[{"params": list(model.parameters()), "curvature": False}])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kfacopt.KFAC(model, nn.MSELoss())
