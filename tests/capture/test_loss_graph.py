"""What is seen above the predictions of a backward."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kfacopt.capture.loss_graph import LossGraph, roots_of_backward

Y = torch.linspace(-1.0, 1.0, 12).view(4, 3)
W = torch.tensor([1.0, 2.0, 3.0, 4.0])


def graph_of(of: Callable[[Tensor], Tensor]) -> tuple[LossGraph, Tensor]:
    f = torch.ones(4, 3, requires_grad=True) * 1.0
    loss = of(f)
    return LossGraph([(loss, torch.ones_like(loss))], lambda node: node is f.grad_fn), f


UNIFORM: dict[str, Callable[[Tensor], Tensor]] = {
    "torch's": lambda f: F.mse_loss(f, Y),
    "times a number": lambda f: 3.0 * F.mse_loss(f, Y) / 2.0,
    "times a tensor": lambda f: torch.tensor(3.0) * F.mse_loss(f, Y),
    "a sum": lambda f: F.mse_loss(f, Y, reduction="sum") / 7.0,
    "none, then a mean": lambda f: F.mse_loss(f, Y, reduction="none").mean(),
    "by hand": lambda f: ((f - Y) ** 2).mean(),
    "by hand, the other way": lambda f: 0.5 * (Y - f).square().sum(1).mean(),
    "by hand, a product": lambda f: ((d := f - Y) * d).mean(),
    "of nothing": lambda f: f.square().mean(),
    "flattened": lambda f: F.mse_loss(f.flatten(), Y.flatten()),
}
NOT: dict[str, Callable[[Tensor], Tensor]] = {
    "weights": lambda f: (F.mse_loss(f, Y, reduction="none") * W[:, None]).mean(),
    "weights of sums": lambda f: ((f - Y).square().mean(1) * W).mean(),
    "weights within": lambda f: F.mse_loss(W[:, None] * f, Y),
    "cubes": lambda f: ((f - Y) ** 3).mean(),
    "a root": lambda f: F.mse_loss(f, Y).sqrt(),
    "twice": lambda f: F.mse_loss(f, Y) + F.mse_loss(f, -Y),
    "a vector": lambda f: (f - Y).square().mean(1),
    "a part": lambda f: F.mse_loss(f[:2], Y[:2]),
    "no squares": lambda f: F.smooth_l1_loss(f, Y),
}


@pytest.mark.parametrize("name", [*UNIFORM, *NOT])
def test_uniform_is_a_constant_times_squares(name: str) -> None:
    graph, f = graph_of((UNIFORM | NOT)[name])
    assert graph.loss.alone
    assert f.grad_fn is not None
    assert graph.is_uniform(f.grad_fn) is (name in UNIFORM)


def test_a_loss_with_other_parts_is_not_alone() -> None:
    other = torch.ones(3, requires_grad=True)
    graph, f = graph_of(lambda f: F.mse_loss(f, Y) + other.sum())
    assert f.grad_fn is not None
    assert not graph.loss.alone
    assert not graph.is_uniform(f.grad_fn)
    assert graph.loss.value == pytest.approx(float(F.mse_loss(f.detach(), Y)) + 3.0)


@pytest.mark.parametrize(
    ("of", "reduction"),
    [
        (lambda f, p: F.mse_loss(f, Y) + p, "mean"),
        (lambda f, p: 0.3 * p + F.mse_loss(f, Y), "mean"),
        (lambda f, p: F.mse_loss(f, Y, reduction="sum") + p, "sum"),
        (lambda f, p: ((f - Y) ** 2).mean() + p, "mean"),
        (lambda f, p: (f - Y).square().sum() + p, "sum"),
        (lambda f, p: 2.0 * F.mse_loss(f, Y) + p, None),
        (lambda f, p: 2.0 * (F.mse_loss(f, Y) + p), None),
        (lambda f, p: torch.add(p, F.mse_loss(f, Y), alpha=2.0), None),
        (lambda f, p: (f - Y).square().sum(1).mean() + p, None),
        (lambda f, p: F.mse_loss(f, Y, reduction="none")[0, 0] + p, None),
        (lambda f, p: f.mean() + p, None),
    ],
)
def test_squares_that_are_added_as_they_are(of: Callable[[Tensor, Tensor], Tensor], reduction: str | None) -> None:
    penalty = torch.ones((), requires_grad=True)
    graph, f = graph_of(lambda f: of(f, penalty))
    assert f.grad_fn is not None
    assert graph.added(f.grad_fn) == reduction


@pytest.mark.parametrize("how", ["backward", "grad", "functions", "scaled"])
def test_the_roots_of_the_backward_that_runs(how: str) -> None:
    seen: list[tuple[float, float] | None] = []

    def look(_: object) -> None:
        roots = roots_of_backward()
        seen.append(None if roots is None else (float(roots[0][0].detach()), float(roots[0][1])))

    x = torch.ones(3, requires_grad=True)
    f = 2.0 * x
    assert f.grad_fn is not None
    f.grad_fn.register_prehook(look)  # type: ignore[arg-type]
    loss = f.square().sum()
    if how == "backward":
        loss.backward()
    elif how == "grad":
        torch.autograd.grad(loss, x)
    elif how == "functions":
        torch.autograd.backward([loss], [torch.tensor(1.0)])
    else:
        loss.backward(torch.tensor(3.0))
    assert seen == [(12.0, 3.0 if how == "scaled" else 1.0)]
    assert roots_of_backward() is None


def test_a_backward_within_a_backward_is_the_inner_one() -> None:
    seen: list[float] = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            with torch.enable_grad():
                inner = torch.ones((), requires_grad=True)
                doubled = 2.0 * inner
                assert doubled.grad_fn is not None
                doubled.grad_fn.register_prehook(lambda _: seen.append(float(roots_of_backward()[0][0])))  # type: ignore[arg-type,index,func-returns-value]
                (5.0 * doubled).backward()
            return gradients[0]

    Nested.apply(torch.ones((), requires_grad=True)).backward()  # type: ignore[no-untyped-call]
    assert seen == [10.0]


def test_a_thread_of_the_engines_sees_the_backward_that_waits_for_it() -> None:
    """As on an accelerator, whose nodes run on another thread; of two backwards at once it is not known which it is."""
    seen: list[float | None] = []

    def ask() -> None:
        roots = roots_of_backward()
        seen.append(None if roots is None else float(roots[0][0].detach()))

    def from_another_thread(_: object) -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    def doubled(hook: Callable[[object], None]) -> Tensor:
        f = 2.0 * torch.ones((), requires_grad=True)
        assert f.grad_fn is not None
        f.grad_fn.register_prehook(hook)  # type: ignore[arg-type]
        return 3.0 * f

    doubled(from_another_thread).backward()
    assert seen == [6.0]

    inner = doubled(from_another_thread)

    def within_another(_: object) -> None:
        other = threading.Thread(target=inner.backward)
        other.start()
        other.join()

    doubled(within_another).backward()
    assert seen == [6.0, None]
