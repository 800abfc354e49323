"""Code of the user's in the backward sees the user's pass alone: hooks, custom functions, unpacking, inner backwards."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable
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
