"""Report 13: code of the user's that runs in the backward sees the user's pass, once, and nothing else.

Hooks that remove themselves (implicit differentiation), functions that free what they saved, hooks that log, count or
change gradients: with the optimizer watching they do what they do without it; or the model is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests.reports.reports import MC, TYPE2, assert_same_gradients, exact_or_named, gradients_of

CE = nn.CrossEntropyLoss()
NAMES = ("hook", "Freeing", "Counting", "Averaging", "saved tensor", "user code", "paused")


class Equilibrium(nn.Module):
    """A fixed point, differentiated implicitly: a tensor hook solves the adjoint and removes itself first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.f, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.f.weight.data.mul_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        z = torch.zeros_like(u)
        with torch.no_grad():
            for _ in range(30):
                z = torch.tanh(self.f(z) + u)
        z = torch.tanh(self.f(z) + u)
        start = z.detach().requires_grad_()
        again = torch.tanh(self.f(start) + u)

        def adjoint(gradient: Tensor) -> Tensor:
            self.handle.remove()
            y = gradient
            for _ in range(30):
                y = torch.autograd.grad(again, start, y, retain_graph=True)[0] + gradient
            return y

        self.handle = z.register_hook(adjoint)
        return self.head(z)


class Freeing(torch.autograd.Function):
    """Frees what it kept as soon as it has been used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().clone()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result = gradient * ctx.kept.cos()
        del ctx.kept
        return result


class Counting(torch.autograd.Function):
    """A schedule that moves with every backward: a gradient reversal whose strength grows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.module.calls += 1
        return -0.1 * ctx.module.calls * gradient, None


class Averaging(torch.autograd.Function):
    """Keeps a running average of the gradient's size in a buffer, and divides by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Tensor) -> Tensor:
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.size.lerp_(gradient.abs().mean(), 0.1)
        return gradient / ctx.size, None


class Between(nn.Module):
    """Two layers, and something of the user's between them."""

    def __init__(self, what: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Linear(4, 5), nn.Linear(5, 3), what
        self.calls = 0
        self.seen: list[float] = []
        self.register_buffer("size", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.what(self, torch.tanh(self.first(x))))

    def note(self, gradient: Tensor) -> None:
        self.seen.append(float(gradient.norm()))


def hooked(act: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A tensor hook between the layers."""

    def what(module: Any, h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: act(module, gradient))
        return h

    return what


def once(module: Any, h: Tensor) -> Tensor:
    """A hook that acts on the first gradient alone, as a seed of noise or a warm-up does."""

    def act(gradient: Tensor) -> Tensor:
        module.calls += 1
        return 3.0 * gradient if module.calls == 1 else gradient

    h.register_hook(act)
    return h


def on_the_node(module: Any, h: Tensor) -> Tensor:
    h.grad_fn.register_hook(lambda inputs, outputs: module.note(outputs[0]))
    h.grad_fn.register_prehook(lambda outputs: module.note(outputs[0]))
    return h


def unpacked_once(module: Any, h: Tensor) -> Tensor:
    """Saved tensors that are given back once: offloading to a pool that frees on return."""
    store: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        store[len(store)] = tensor
        return len(store) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, store.pop):
        return h * torch.sigmoid(h)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "equilibrium": Equilibrium,
    "freeing function": lambda: Between(lambda module, h: Freeing.apply(h)),
    "counting function": lambda: Between(lambda module, h: Counting.apply(h, module)),
    "averaging function": lambda: Between(lambda module, h: Averaging.apply(h, module.size)),
    "logging hook": lambda: Between(hooked(lambda module, gradient: module.note(gradient))),
    "hook that acts once": lambda: Between(once),
    "hooks on the node": lambda: Between(on_the_node),
    "saved tensors given back once": lambda: Between(unpacked_once),
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def ran(model: nn.Module, optimizer: Any, steps: int) -> list[Any]:
    """What the user sees of some steps that move nothing: gradients, buffers, counts and logs."""
    x, y = batch()
    seen: list[Any] = []
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        seen.append(gradients_of(model) | {name: b.clone() for name, b in model.named_buffers()})
        seen.append((getattr(model, "calls", 0), list(getattr(model, "seen", []))))
        if optimizer is not None:
            optimizer.step()
    return seen


def assert_same(found: list[Any], want: list[Any]) -> None:
    for here, there in zip(found, want, strict=True):
        if isinstance(there, dict):
            assert_same_gradients(here, there)
        else:
            assert here == there


OPTIMIZERS = {
    "mc": lambda m: kfacopt.KFAC(m, CE, lr=0.0, adamw_lr=0.0, **MC),
    "type-2": lambda m: kfacopt.EKFAC(m, CE, lr=0.0, adamw_lr=0.0, **TYPE2),
    "natural-gradient": lambda m: kfacopt.NaturalGradient(m, CE, lr=0.0, damping=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("what", MODELS)
def test_user_code_does_what_it_does_without_an_optimizer(what: str, name: str) -> None:
    torch.manual_seed(0)
    alone = MODELS[what]().double()
    want = ran(alone, None, 2)
    torch.manual_seed(0)
    model = MODELS[what]().double()
    optimizer = OPTIMIZERS[name](model)
    exact_or_named(lambda: ran(model, optimizer, 2), lambda found: assert_same(found, want), *NAMES)


def module_hook(kind: str, seen: list[float]) -> Callable[[nn.Module], Any]:
    """Registers a hook on a module's backward that logs what arrives at its output."""
    if kind == "full backward hook":
        return lambda m: m.register_full_backward_hook(lambda _, inputs, outputs: seen.append(float(outputs[0].norm())))
    if kind == "full backward pre-hook":
        return lambda m: m.register_full_backward_pre_hook(lambda _, outputs: seen.append(float(outputs[0].norm())))
    if kind == "hook that clips":
        return lambda m: m.register_full_backward_hook(
            lambda _, inputs, outputs: tuple(i if i is None else i.clamp(-1e-3, 1e-3) for i in inputs)
        )
    return lambda m: m.register_forward_hook(  # Grad-CAM
        lambda _, inputs, output: output.register_hook(lambda gradient: seen.append(float(gradient.norm()))) and None
    )


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize(
    "kind", ["full backward hook", "full backward pre-hook", "hook that clips", "hook by a forward hook"]
)
def test_module_hooks_see_the_users_pass_alone(kind: str, where: int) -> None:
    x, y = batch()
    x = x.requires_grad_()

    def run(watched: bool) -> tuple[list[float], dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        seen: list[float] = []
        module_hook(kind, seen)(model[where])
        optimizer = kfacopt.KFAC(model, CE) if watched else None
        F.cross_entropy(model(x), y).backward()
        if optimizer is not None:
            optimizer.step()
        return seen, gradients_of(model)

    def check(found: tuple[list[float], dict[str, Any]]) -> None:
        want = run(watched=False)
        assert found[0] == want[0]
        assert_same_gradients(found[1], want[1])

    exact_or_named(lambda: run(watched=True), check, *NAMES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_hook_put_on_after_the_forward_sees_the_users_pass_alone(name: str) -> None:
    """Between forward and backward the user may put hooks on any tensor the model returned or kept."""
    x, y = batch()
    torch.manual_seed(0)
    model = Between(lambda module, h: h).double()
    kept: list[Tensor] = []
    model.first.register_forward_hook(lambda module, inputs, output: kept.append(output))
    optimizer = OPTIMIZERS[name](model)

    def run() -> list[float]:
        seen: list[float] = []
        loss = F.cross_entropy(model(x), y)
        kept[-1].register_hook(lambda gradient: seen.append(float(gradient.norm())))
        loss.backward()
        optimizer.step()
        return seen

    def check(seen: list[float]) -> None:
        loss = F.cross_entropy(model(x), y)  # the parameters have not moved
        assert seen == [float(torch.autograd.grad(loss, kept[-1])[0].norm())]

    exact_or_named(run, check, *NAMES)


def test_statistics_are_those_of_a_model_without_hooks_that_only_look() -> None:
    """However looking hooks are kept from the nested pass, curvature still flows through."""
    x, y = batch()
    factors = []
    for what in (lambda module, h: h, hooked(lambda module, gradient: module.note(gradient))):
        torch.manual_seed(0)
        model = Between(what).double()
        optimizer = kfacopt.KFAC(model, CE, **TYPE2)

        def run(model: nn.Module = model, optimizer: Any = optimizer) -> Any:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            return optimizer.backend.blocks["first"].factors()

        exact_or_named(run, factors.append, *NAMES)
    for found in factors[1:]:
        torch.testing.assert_close(found, factors[0])
