"""Hooks are gone when they should be, and an exception in the forward does no harm."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.capture import hooks
from tests.capture.harness import NAMED, assert_same_factors, attached, batch, fresh, hooks_on, pending
from tests.cases import Case, backward, parameters_of, still, train_step


@pytest.mark.parametrize("case", NAMED)
def test_close_removes_every_hook(case: Case) -> None:
    model, loss, x, y = case.make()
    own = next(model.modules()).register_forward_hook(lambda module, args, output: None)
    before = hooks_on(model)
    optimizer = kfacopt.EKFAC(model, loss, **still())
    assert hooks_on(model) > before
    train_step(optimizer, model, loss, x, y)
    loss(model(x), y)  # a forward whose backward has not come
    optimizer.close()
    optimizer.close()
    assert hooks_on(model) == before
    own.remove()
    assert hooks_on(model) == 0


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames count as compiled: none, whatever other tests compiled in this process."""
    frames = [0]
    monkeypatch.setattr(hooks, "_frames_compiled", lambda: frames[0])
    return frames


def called(model: nn.Module) -> list[str]:
    """The hooks of a module in the order in which they are called: ours, or by their names."""
    own = ("ours" if isinstance(hook, hooks.Hook) else hook.__name__ for hook in model._forward_hooks.values())
    return list(own)


def test_hooks_are_off_the_modules_in_steps_that_want_nothing(nothing_compiled: list[int]) -> None:
    model, (x, y) = fresh(), batch()
    optimizer = attached(model, factor_every=3)
    seen = []
    for _ in range(7):
        seen.append(all(map(called, model.modules())))
        train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    assert seen == [True, False, False, True, False, False, True]
    optimizer.close()
    assert hooks_on(model) == 0


def test_hooks_that_come_back_are_where_they_were(nothing_compiled: list[int]) -> None:
    def first(*_: object) -> None: ...
    def second(*_: object) -> None: ...
    def third(*_: object) -> None: ...

    model, (x, y) = fresh(), batch()
    model.register_forward_hook(first)
    optimizer = attached(model, factor_every=3)
    model.register_forward_hook(second)
    train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    assert called(model) == ["first", "second"]
    handle = model.register_forward_hook(third)
    for _ in range(2):
        train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    assert called(model) == ["first", "ours", "second", "third"]
    handle.remove()
    assert called(model) == ["first", "ours", "second"]


def test_hooks_stay_where_something_was_compiled(nothing_compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made_anew = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: made_anew.append(True))
    model, (x, y) = fresh(), batch()
    optimizer = attached(model, factor_every=9)
    own = hooks_on(model)
    train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    assert hooks_on(model) < own
    nothing_compiled[0] = 1  # by a model without our hooks: what was made of it has to be made again
    for _ in range(3):
        train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
        assert hooks_on(model) == own
    assert made_anew == [True]


def test_a_refused_optimizer_leaves_no_hook() -> None:
    model = fresh()
    for arguments in (
        {"loss_func": nn.SoftMarginLoss()},
        {"loss_func": nn.CrossEntropyLoss(), "curvature": "type-3"},
        {"loss_func": nn.CrossEntropyLoss(), "lr": -1.0},
        {"loss_func": nn.CrossEntropyLoss(), "factor_every": 0},
    ):
        with pytest.raises((TypeError, ValueError)):
            kfacopt.KFAC(model, **arguments)
        assert hooks_on(model) == 0


def test_an_optimizer_that_is_gone_stops_watching() -> None:
    model, (x, y) = fresh(), batch()
    optimizer = attached(model)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    backward(model, nn.CrossEntropyLoss(), x, y)
    second = attached(model)
    own = 2 * len(list(model.modules()))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == own
    second.close()
    assert hooks_on(model) == 0


class Failing(nn.Module):
    """Raises in the middle of the model when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.error is not None:
            raise self.error("as told")
        return self.head(h.tanh())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("nested", [False, True])
def test_an_exception_inside_forward(error: type[BaseException], nested: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Failing()) if nested else Failing()

    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model, twin = fresh(build), fresh(build)
    optimizer, undisturbed = attached(model, lr=0.1), attached(twin, lr=0.1)
    inner = model[0] if nested else model
    for _ in range(2):
        inner.error = error
        with pytest.raises(error, match="as told"):
            model(x)
        inner.error = None
        assert pending(optimizer) == []
        train_step(optimizer, model, loss, x, y)
        train_step(undisturbed, twin, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), parameters_of(twin), strict=True))
    optimizer.close()
    assert hooks_on(model) == 0


def test_an_exception_that_the_model_catches_itself() -> None:
    class Careful(Failing):
        def __init__(self) -> None:
            super().__init__()
            self.risky = Failing()

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.risky(x)
            except RuntimeError:
                return super().forward(x)
            raise AssertionError

    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model, twin = fresh(Careful), fresh(Failing)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "risky" not in k})
    model.risky.error = RuntimeError
    optimizer, other = attached(model), attached(twin)
    for made, of in ((optimizer, model), (other, twin)):
        train_step(made, of, loss, x, y)
    assert_same_factors(optimizer, other, {"inner": "inner", "head": "head"})
