"""Report 16: every handle is as plain as torch's: cost, scripting, arguments by place, reductions outside the loss.

A module that the user's loop steps T times costs in proportion to T. Hooks do not keep a model from being scripted,
traced or exported. Arguments that torch's optimizers take in other places are refused by their names.
"""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import TYPE2, flat, plain

CE = nn.CrossEntropyLoss()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(data: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(data, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (data,), generator=generator)


# -- scripting and the like ------------------------------------------------------------------------------------------


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 gives torch.jit up
        return torch.jit.script(model)


def traced(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, batch()[0])


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (batch()[0],)).module()


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def symbolic(model: nn.Module) -> Any:
    return torch.fx.symbolic_trace(model)


TOOLS = {f.__name__: f for f in (scripted, traced, exported, saved_and_loaded, symbolic)}
STATES: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "watched": lambda m, o: m,
    "copied": lambda m, o: copy.deepcopy(m),
    "closed": lambda m, o: o.close() or m,
    "copied, then closed": lambda m, o: (copy.deepcopy(m), o.close())[0],
}


@pytest.mark.parametrize("optimizer", ["EKFAC", "NaturalGradient", "TrustRegionNewton"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_watched_model_can_be_deployed(tool: str, state: str, optimizer: str) -> None:
    model, (x, y) = mlp(), batch()
    made = getattr(kfacopt, optimizer)(model, CE)
    F.cross_entropy(model(x), y).backward()
    made.step()
    given = STATES[state](model, made)
    torch.testing.assert_close(TOOLS[tool](given)(x), model(x))
    if state == "watched":  # and goes on training
        made.zero_grad()
        F.cross_entropy(model(x), y).backward()
        made.step()


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "a part"])
def test_a_model_with_a_scripted_part_trains(parts: bool) -> None:
    """Scripted before the optimizer was made: an activation, say."""
    model = mlp()
    model[1] = scripted(nn.Tanh())
    if parts:
        model[1] = scripted(nn.Sequential(nn.Tanh(), nn.Tanh()))
    optimizer = kfacopt.EKFAC(model, CE)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(block.ready for block in optimizer.backend.blocks.values())


# -- arguments by place ----------------------------------------------------------------------------------------------


OPTIMIZERS = ("KFAC", "EKFAC", "NaturalGradient")


@pytest.mark.parametrize("lr", [1e-3, 1, torch.tensor(0.1), "auto"], ids=["float", "int", "tensor", "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_in_the_place_of_params_is_named(name: str, lr: Any) -> None:
    with pytest.raises(TypeError, match=r"lr="):
        getattr(kfacopt, name)(mlp(), CE, lr)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "TrustRegionNewton"])
def test_torchs_order_of_arguments_is_named(name: str) -> None:
    """`AdamW(model.parameters(), 1e-3)` is what fingers write."""
    with pytest.raises(TypeError, match="model"):
        getattr(kfacopt, name)(mlp().parameters(), CE)
    with pytest.raises(TypeError, match=r"model|loss"):
        getattr(kfacopt, name)(CE, mlp())
    with pytest.raises(TypeError, match="loss"):
        getattr(kfacopt, name)(mlp(), 1e-3)
    with pytest.raises(TypeError, match="loss"):
        getattr(kfacopt, name)(mlp(), mlp().parameters())


@pytest.mark.parametrize("params", [nn.Linear(4, 3), "weight", [1.0], [{"lr": 0.1}]])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_params_that_are_none_are_named(name: str, params: Any) -> None:
    with pytest.raises((TypeError, ValueError, KeyError), match="param"):
        getattr(kfacopt, name)(mlp(), CE, params)


@pytest.mark.parametrize("word", ["betas", "eps", "weight_decays", "nesterov"])
def test_an_option_of_another_optimizer_is_named(word: str) -> None:
    with pytest.raises(TypeError, match=word):
        kfacopt.EKFAC(mlp(), CE, **{word: 0.9})


# -- cost ------------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """A recurrent cell that the loop steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.hidden, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inner(x) + self.hidden(h))
        return self.out(h), h


def calls_of(work: Callable[[], None]) -> int:
    """Calls of functions in Python and out of it: a count of the work that no busy machine changes."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def unrolled(steps: int, watch: Callable[[nn.Module], Any] | None, detached: bool = False) -> int:
    torch.manual_seed(0)
    model = Cell().double()
    optimizer = None if watch is None else watch(model)

    def work() -> None:
        h, loss = torch.zeros(2, 5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for t in range(steps):
            out, h = model(torch.ones(2, 4, dtype=torch.float64), h.detach() if detached else h)
            loss = loss + F.cross_entropy(out, torch.tensor([t % 3, 1]))
        (loss / steps).backward()
        if optimizer is not None:
            optimizer.step()

    return calls_of(work)


WATCHES: dict[str, Callable[[nn.Module], Any]] = {
    "mc": lambda m: kfacopt.KFAC(m, CE, prediction=lambda output: output[0]),
    "type-2": lambda m: kfacopt.EKFAC(m, CE, prediction=lambda output: output[0], **TYPE2),
}


@pytest.mark.parametrize("detached", [False, True], ids=["through time", "truncated"])
@pytest.mark.parametrize("name", WATCHES)
def test_cost_is_linear_in_the_calls_of_a_module(name: str, detached: bool) -> None:
    few, many = (unrolled(steps, WATCHES[name], detached) for steps in (20, 80))
    assert many < 4.6 * few, f"four times the calls cost {many / few:.1f} times as much"


def test_cost_is_linear_in_the_calls_where_the_encoder_is_another_root() -> None:
    """An encoder called once and a decoder called T times: the encoder's graph is not searched T times."""

    def run(steps: int) -> int:
        torch.manual_seed(0)
        model = nn.ModuleDict({"encoder": nn.Linear(4, 5), "decoder": Cell()}).double()
        kfacopt.KFAC(model, CE, prediction=lambda output: output[0] if isinstance(output, tuple) else output)

        def work() -> None:
            h = torch.tanh(model["encoder"](torch.ones(2, 4, dtype=torch.float64)))
            loss = torch.zeros((), dtype=torch.float64)
            for _ in range(steps):
                out, h = model["decoder"](torch.ones(2, 4, dtype=torch.float64), h)
                loss = loss + F.cross_entropy(out, torch.tensor([0, 1]))
            loss.backward()

        return calls_of(work)

    few, many = run(20), run(80)
    assert many < 4.6 * few, f"four times the calls cost {many / few:.1f} times as much"


# -- reductions outside the loss, and lr = 0 -------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["sum", "mean"])
@pytest.mark.parametrize("loss", ["cross-entropy", "binary"])
def test_reduction_none_and_then_a_sum_takes_the_step_of_the_mean(loss: str, after: str) -> None:
    """The step does not depend on a constant factor of the loss, and a sum is a mean times one."""
    x, y = batch()
    steps = []
    for reduction in ("none", "mean"):
        model = mlp()
        module = CE if loss == "cross-entropy" else nn.BCEWithLogitsLoss()
        target = y if loss == "cross-entropy" else F.one_hot(y, 3).double()
        optimizer = kfacopt.KFAC(model, type(module)(reduction=reduction), **plain())
        before = flat(model.parameters())
        value = type(module)(reduction=reduction)(model(x), target)
        (getattr(value, after)() if reduction == "none" else value).backward()
        optimizer.step()
        steps.append(flat(model.parameters()) - before)
    torch.testing.assert_close(steps[0], steps[1])


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_made_with_lr_zero_an_activation_by_adamw_does_not_move(make: Any) -> None:
    x, y = batch()
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 3)).double()
    optimizer = make(model, CE, lr=0.0)
    before = flat(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert torch.equal(flat(model.parameters()), before)
