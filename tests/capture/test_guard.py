"""Code of the user's in the backward sees the user's pass alone: hooks, functions, unpacking, inner backwards."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt.capture.guard import Guard
from kfacopt.capture.reach import Reach
from kfacopt.capture.tensor_hooks import HooksSince, own, silent
from kfacopt.capture.writes import KeptTensors
from kfacopt.operators import GGNLinearOperator
from tests.reports.reports import assert_same_gradients, gradients_of

CE = nn.CrossEntropyLoss()
CURVATURE: dict[str, Any] = {
    "mc": kfacopt.Fisher("mc", samples=3),
    "type-2": "ggn",
    "empirical": "empirical",
}


def doubled(act: Callable[[Any, Tensor], Any], saved: bool = False) -> Callable[[nn.Module, Tensor], Tensor]:
    """A custom function that is twice the identity, whose backward calls `act(ctx, gradient)` for its factor."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
            ctx.module = module
            if saved:
                ctx.save_for_backward(torch.full_like(x, 2.0))
            return 2.0 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient * act(ctx, gradient), None

    return lambda module, h: Doubled.apply(h, module)


class State:
    """Where a backward may count, in all ways that Python has."""

    calls = 0


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


CALLS = 0
LOG: list[float] = []
HOLDER = {"inner": [Slotted()]}
ARRAY = np.zeros(3)
QUEUE: deque[int] = deque()
GENERATOR = torch.Generator()
RANDOM = random.Random(0)


def reset() -> None:
    global CALLS
    CALLS, State.calls, HOLDER["inner"][0].calls, ARRAY[:] = 0, 0, 0, 0.0
    LOG.clear()
    QUEUE.clear()
    GENERATOR.manual_seed(0)
    RANDOM.seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def in_a_global(ctx: Any, gradient: Tensor) -> float:
    global CALLS
    CALLS += 1
    return 2.0 / CALLS


def in_a_class(ctx: Any, gradient: Tensor) -> float:
    State.calls += 1
    return 2.0 / State.calls


def in_slots(ctx: Any, gradient: Tensor) -> float:
    HOLDER["inner"][0].calls += 1
    return 2.0 / HOLDER["inner"][0].calls


def in_a_helper(ctx: Any, gradient: Tensor) -> float:
    return in_slots(ctx, gradient) * in_a_global(ctx, gradient)


def in_an_array(ctx: Any, gradient: Tensor) -> float:
    ARRAY[1] += 1.0
    return 2.0 / float(ARRAY[1])


def in_a_queue(ctx: Any, gradient: Tensor) -> float:
    QUEUE.append(1)
    return 2.0 / len(QUEUE)


def in_a_closure() -> Callable[[Any, Tensor], float]:
    calls = 0

    def act(ctx: Any, gradient: Tensor) -> float:
        nonlocal calls
        calls += 1
        return 2.0 / calls

    return act


def on_the_module(ctx: Any, gradient: Tensor) -> float:
    ctx.module.calls = getattr(ctx.module, "calls", 0) + 1
    return 2.0 / ctx.module.calls


def in_a_list(ctx: Any, gradient: Tensor) -> float:
    LOG.append(float(gradient.norm()))
    return 2.0 / len(LOG)


def in_a_buffer(ctx: Any, gradient: Tensor) -> Tensor:
    ctx.module.buffer.add_(1.0)
    return 2.0 / ctx.module.buffer


def in_a_view(ctx: Any, gradient: Tensor) -> Tensor:
    ctx.module.table[1:2].add_(1.0)
    return 2.0 / ctx.module.table[1]


def in_what_was_saved(ctx: Any, gradient: Tensor) -> Tensor:
    (kept,) = ctx.saved_tensors
    return kept.sub_(1.0)


def in_the_gradient(ctx: Any, gradient: Tensor) -> float:
    gradient = gradient.clone()
    gradient[gradient > 0] = 0.0
    return 2.0


def freed(ctx: Any, gradient: Tensor) -> float:
    del ctx.module
    return 2.0


def torchs_noise(ctx: Any, gradient: Tensor) -> Tensor:
    return torch.rand_like(gradient)


def generators_noise(ctx: Any, gradient: Tensor) -> Tensor:
    return torch.rand((), generator=GENERATOR, dtype=gradient.dtype)


def pythons_noise(ctx: Any, gradient: Tensor) -> float:
    return random.random() + RANDOM.random()


def numpys_noise(ctx: Any, gradient: Tensor) -> float:
    return float(np.random.rand())


STATES: dict[str, Callable[[], Callable[[Any, Tensor], Any]]] = {
    act.__name__: (lambda act=act: act)
    for act in (
        in_a_global,
        in_a_class,
        in_slots,
        in_a_helper,
        in_an_array,
        in_a_queue,
        on_the_module,
        in_a_list,
        in_a_buffer,
        in_a_view,
        in_what_was_saved,
        in_the_gradient,
        freed,
        torchs_noise,
        generators_noise,
        pythons_noise,
        numpys_noise,
    )
} | {"in_a_closure": in_a_closure}


class Between(nn.Module):
    """Two layers, and something of the user's between them."""

    def __init__(self, what: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Linear(4, 5), nn.Linear(5, 3), what
        self.register_buffer("buffer", torch.zeros(()))
        self.table = torch.zeros(3, dtype=torch.float64)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.what(self, torch.tanh(self.first(x))))


def made(what: Callable[[Any, Tensor], Tensor]) -> Between:
    torch.manual_seed(0)
    return Between(what).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def optimizer_of(model: nn.Module, curvature: Any = "ggn") -> kfacopt.KFAC:
    return kfacopt.KFAC(model, CE, lr=0.0, adamw_lr=0.0, curvature=curvature)


def seen(model: Between) -> Any:
    """All that the user can see of the state."""
    tensors = [t if t.grad_fn is None else t.grad for t in tree_leaves(model.seen)]
    noted = [t if t is None else t.tolist() for t in tensors]
    attributes = getattr(model, "calls", 0), model.buffer.item(), model.table.tolist(), noted
    generators = GENERATOR.get_state().tolist(), random.getstate(), RANDOM.getstate(), torch.get_rng_state().tolist()
    numpys = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    held = CALLS, State.calls, HOLDER["inner"][0].calls, ARRAY.tolist(), list(LOG), list(QUEUE)
    return attributes, generators, numpys, held


def run(model: Between, optimizer: Any, steps: int = 3) -> list[Any]:
    found: list[Any] = []
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        found.append((gradients_of(model), seen(model)))
        if optimizer is not None:
            optimizer.step()
    return found


def assert_unnoticed(what: Callable[[], Callable[[Any, Tensor], Tensor]], curvature: Any) -> Any:
    """The user sees what he sees without an optimizer; returns the optimizer."""
    alone = made(what())
    reset()
    want = run(alone, None)
    model = made(what())
    optimizer = optimizer_of(model, curvature)
    reset()
    for (here, state), (there, expected) in zip(run(model, optimizer), want, strict=True):
        assert_same_gradients(here, there)
        assert state == expected
    return optimizer


@pytest.mark.parametrize("curvature", CURVATURE.values(), ids=CURVATURE)
@pytest.mark.parametrize("state", STATES)
def test_state_of_a_custom_function(state: str, curvature: Any) -> None:
    assert_unnoticed(lambda: doubled(STATES[state](), saved=state == "in_what_was_saved"), curvature)


def test_each_pass_sees_the_state_that_the_users_pass_will_see() -> None:
    """So that curvature is that of the gradient: of three samples brought down one by one, too."""
    plain, counting = made(lambda _, h: 2.0 * h), made(doubled(in_a_list))
    factors = []
    for model in (plain, counting):
        reset()
        optimizer = optimizer_of(model, kfacopt.Fisher("mc", samples=3))
        run(model, optimizer, 1)
        factors.append(optimizer.backend.blocks["first"].factors())
    torch.testing.assert_close(factors[1], factors[0])


def once(module: Any, h: Tensor) -> Tensor:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = x.detach().clone()
            return x.sin()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            LOG.append(1.0)
            kept = ctx.__dict__.pop("kept")
            return gradient * kept.cos()

    return Once.apply(h)


@torch.library.custom_op("kfacopt_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2.0


def _halved_backward(ctx: Any, gradient: Tensor) -> Tensor:
    LOG.append(1.0)
    return gradient / 2.0 / len(LOG)


halved.register_autograd(_halved_backward)


def unpacked(pop: Callable[[Any], Callable[[Any], Tensor]]) -> Callable[[Any, Tensor], Tensor]:
    def what(module: Any, h: Tensor) -> Tensor:
        store: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> int:
            store[len(store)] = tensor
            return len(store) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, pop(store)):
            return h * torch.sigmoid(h)

    return what


def popped(store: Any) -> Callable[[Any], Tensor]:
    def unpack(number: int) -> Tensor:
        LOG.append(number)
        return store.pop(number)

    return unpack


def hooked_since(put: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def what(module: Any, h: Tensor) -> Tensor:
        h = 2.0 * h  # neither input nor output of a module, and gone after the forward
        put(module, h)
        return 1.0 * h

    return what


def counted(module: Any, h: Tensor) -> None:
    torch.autograd.graph.register_multi_grad_hook([h], lambda gradients: LOG.append(len(gradients)))


def removing(module: Any, h: Tensor) -> None:
    def note(gradient: Tensor) -> None:
        handle.remove()
        LOG.append(float(gradient.norm()))

    handle = h.register_hook(note)


OTHERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "once differentiable": once,
    "custom op": lambda module, h: halved(h),
    "given back once": unpacked(lambda store: store.pop),
    "given back once, by Python": unpacked(popped),
    "builtin as a hook": hooked_since(lambda module, h: h.register_hook(module.seen.append)),
    "builtin on the node": hooked_since(lambda module, h: h.grad_fn.register_prehook(module.seen.append) and None),
    "hook on several tensors": hooked_since(counted),
    "hook that removes itself": hooked_since(removing),
    "retained gradient": hooked_since(lambda module, h: (h.retain_grad(), module.seen.append(h))),
}


@pytest.mark.parametrize("curvature", CURVATURE.values(), ids=CURVATURE)
@pytest.mark.parametrize("other", OTHERS)
def test_other_code(other: str, curvature: Any) -> None:
    assert_unnoticed(lambda: OTHERS[other], curvature)


# -- activation checkpointing runs the forward again, in the backward ------------------------------------------------


class Checkpointed(nn.Module):
    """Something with buffers, random numbers and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh())
        self.head, self.calls = nn.Linear(5, 3), 0

    def inner(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.part(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


@pytest.mark.parametrize("curvature", CURVATURE.values(), ids=CURVATURE)
def test_what_is_checkpointed_runs_as_often_as_without(curvature: Any) -> None:
    def found(watched: bool) -> Any:
        torch.manual_seed(0)
        model = Checkpointed().double()
        optimizer = optimizer_of(model, curvature) if watched else None
        torch.manual_seed(1)
        for _ in range(2):
            model.zero_grad()
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            if optimizer is not None:
                optimizer.step()
        return model.calls, {n: b.tolist() for n, b in model.named_buffers()}, gradients_of(model)

    (calls, buffers, gradients), (alone, *expected) = found(True), found(False)
    assert (calls, buffers) == (alone, expected[0])
    assert_same_gradients(gradients, expected[1])


# -- what is said ----------------------------------------------------------------------------------------------------


def clipping(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def test_a_hook_that_changes_the_gradient_is_named_once() -> None:
    model = made(hooked_since(lambda module, h: h.register_hook(clipping)))
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match="the hook clipping .*test_guard.py.* changes the gradient") as said:
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert len(said) == 1
    assert optimizer.health() is not None


def doubling(gradient: Tensor) -> None:
    gradient.mul_(2.0)


def test_a_hook_that_writes_to_the_gradient_is_named() -> None:
    model = made(hooked_since(lambda module, h: h.register_hook(doubling)))
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match="the hook doubling .* changes the gradient"):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.close()


def test_a_module_hook_that_changes_the_gradient_is_named() -> None:
    model = made(lambda module, h: h)
    model.second.register_full_backward_hook(lambda module, inputs, outputs: (2.0 * inputs[0],))
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match=r"the hook .*<lambda> .* of a Linear changes the gradient"):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.close()


@pytest.mark.parametrize("look", [lambda gradient: None, lambda gradient: gradient, lambda gradient: 1.0 * gradient])
def test_a_hook_that_does_not_change_the_gradient_is_not_warned_of(look: Callable[[Tensor], Any]) -> None:
    assert_unnoticed(lambda: hooked_since(lambda module, h: h.register_hook(look)), "ggn")


def test_the_layers_of_an_inner_backward_are_named() -> None:
    def inner(ctx: Any, gradient: Tensor) -> float:
        with torch.enable_grad():
            ctx.module.third(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        return 2.0

    model, calls = made(doubled(inner)), []
    model.third = nn.Linear(2, 1).double()
    model.third.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.norm()))
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match=r"Doubled.backward: calls backward inside .* third.weight, third.bias"):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert (model.third.weight.grad == 1.0).all()
    assert len(calls) == 1
    optimizer.close()


def test_an_error_of_the_users_leaves_his_state_as_it_was() -> None:
    def failing(ctx: Any, gradient: Tensor) -> float:
        LOG.append(1.0)
        ctx.module.buffer.add_(1.0)
        raise KeyError("the user's")

    reset()
    model = made(doubled(failing))
    optimizer_of(model)
    with pytest.raises(KeyError, match="the user's"):
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert LOG == []
    assert float(model.buffer) == 0.0


class Detaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient.detach()


def test_a_custom_function_that_detaches_is_refused_where_it_is_differentiated() -> None:
    model = made(lambda module, h: Detaching.apply(h))
    ggn = GGNLinearOperator(model, CE, list(model.parameters()), [batch()], check_deterministic=False)
    with pytest.raises(RuntimeError, match=r"Detaching.backward: cannot be differentiated through"):
        ggn @ torch.ones(ggn.shape[1], dtype=torch.float64)


def test_other_custom_functions_are_not_refused_there() -> None:
    model, plain = made(doubled(lambda ctx, gradient: 2.0)), made(lambda module, h: 2.0 * h)
    found = []
    for one in (model, plain):
        optimizer = kfacopt.NaturalGradient(one, CE, damping=0.1)
        F.cross_entropy(one(batch()[0]), batch()[1]).backward()
        optimizer.step()
        found.append(one.first.weight.detach())
    torch.testing.assert_close(found[0], found[1])


# -- the parts -------------------------------------------------------------------------------------------------------


def test_a_guard_of_a_graph_without_code_does_nothing() -> None:
    model = made(lambda module, h: h)
    guard = Guard([model(batch()[0]).grad_fn], HooksSince(), model)
    state = model.first.weight._version, model.first.weight.grad
    with guard():
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert guard.functions == ""
    assert state == (model.first.weight._version, model.first.weight.grad)


def test_only_hooks_of_others_on_tensors_are_found() -> None:
    model, since = made(lambda module, h: h), HooksSince()
    x = model(batch()[0])
    own(x.register_hook(lambda gradient: None))
    model.first.register_forward_hook(lambda *_: None)
    assert since.found(model.modules()) == []
    x = 2.0 * x
    handles = [x.register_hook(lambda gradient: None), x.grad_fn.register_prehook(lambda gradients: None)]
    del x
    assert [list(hooks) for hooks in since.found(model.modules())] == []  # the graph is gone, and they with it
    x = 2.0 * model(batch()[0])
    handles = [x.register_hook(lambda gradient: None), x.grad_fn.register_prehook(lambda gradients: None)]
    assert sorted(number for hooks in since.found(model.modules()) for number in hooks) == [h.id for h in handles]


def test_silent_hooks_are_back_afterwards_whatever_happens_to_them() -> None:
    x = torch.ones(2, requires_grad=True) * 2.0
    handle = x.register_hook(print)
    hooks = x._backward_hooks
    before = dict(hooks)
    with silent([hooks]):
        assert not hooks
        x.register_hook(print)
        handle.remove()
    assert hooks == before


def test_kept_tensors_are_those_that_were_there() -> None:
    x, kept = torch.ones(4), KeptTensors()
    view, clone = x[:2], x.clone()
    with kept:
        made_within = torch.zeros(2)
        made_within.add_(1.0)
        view.mul_(3.0)
        torch.add(clone, 1.0, out=clone)
    kept.restore()
    assert [t.tolist() for t in (x, clone, made_within)] == [[1.0] * 4, [1.0] * 4, [1.0] * 2]
    assert (x._version, clone._version) == (0, 0)
    assert len(kept._kept) == 2


class Makes(OrderedDict[str, Any]):
    """As transformers' table of activations: what is held are classes, what is shown are new objects of them."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


class Doubled(list[int]):
    def __iter__(self) -> Iterator[int]:
        return (2 * number for number in super().__iter__())


def test_containers_that_compute_what_they_show_keep_what_they_hold() -> None:
    """To read such a one as it shows itself, and write that back, would put other things in it."""
    table, numbers = Makes(silu=nn.SiLU, tanh=nn.Tanh), Doubled([1, 2])
    table.move_to_end("silu")
    state = Reach([table, numbers])
    for change in (lambda: None, lambda: (table.clear(), numbers.append(3))):
        before = state.saved()
        change()
        state.restore(before)
        assert list(OrderedDict.items(table)) == [("tanh", nn.Tanh), ("silu", nn.SiLU)]
        assert [numbers[place] for place in range(len(numbers))] == [1, 2]
    assert isinstance(table["silu"], nn.SiLU)


def test_reach_ends() -> None:
    loop: list[Any] = []
    loop.append(loop)
    many = [[i] for i in range(100_000)]
    state = Reach([loop, many, lambda: many])
    before = state.saved()
    loop.append(1)
    many.clear()
    state.restore(before)
    assert (len(loop), len(many)) == (1, 100_000)
