"""The least that EKFAC of a multilayer perceptron takes as an operator: its products at their best rate, its `eigh`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfacopt.operators import EKFACLinearOperator

Action = Callable[[], object]


@dataclass(frozen=True)
class Floor:
    """What is left of an operator's cost when everything but matrix products and eigendecompositions is free.

    Attributes:
        flops: Of the products, by term.
        decomposed: Sizes of the matrices that LAPACK gets.
        rate: Best that a product reached, in flops a second.
        eigh: Seconds of all eigendecompositions.
        gradient: Seconds of a gradient.
        operator: Seconds of construction and product, as measured.
    """

    flops: dict[str, float]
    decomposed: tuple[int, ...]
    rate: float
    eigh: float
    gradient: float
    operator: float

    @property
    def gradients(self) -> float:
        """The floor, in gradients."""
        return (self.eigh + sum(self.flops.values()) / self.rate) / self.gradient


class _Decomposed(TorchDispatchMode):
    """Keeps what LAPACK is given within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.matrices: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "eigh" in func.overloadpacket.__name__:
            self.matrices.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def needed_flops(
    sizes: Sequence[tuple[int, int]], ranks: Sequence[int], data: int, cotangents: int
) -> dict[str, float]:
    """Flops that the definition asks for, by term, of linear layers one after the other, without their biases.

    Of products with their own transpose half. Where there are fewer data n than inputs i, A has the eigenvalues of the
    rows' product `[n n]`, whose eigenvectors are the rows' coordinates: what is cheapest is counted.

    Args:
        sizes: (outputs o, inputs i) of the layers, in the order of the forward.
        ranks: r of A's eigenbasis `[i r]`.
        data: n.
        cotangents: v of each datum.

    >>> terms = needed_flops([(2, 4)], [4], data=8, cotangents=1)
    >>> terms["forward"], terms["backward"], terms["A"], terms["coordinates of g"]
    (128.0, 0, 128.0, 64.0)
    """
    n, v = float(data), float(cotangents)
    each = [(float(o), float(i), float(r)) for (o, i), r in zip(sizes, ranks, strict=True)]
    return {
        "forward": sum(2 * n * o * i for o, i, _ in each),
        "backward": sum(2 * v * n * o * i for o, i, _ in each[1:]),
        "A": sum(n * i * min(n, i) for _, i, _ in each),
        "G": sum(v * n * o * o for o, _, _ in each),
        "eigenvectors of A": sum(2 * n * i * r for _, i, r in each if n < i),
        "coordinates of a": sum(2 * n * i * r for _, i, r in each if n >= i),
        "coordinates of g": sum(2 * v * n * o * o for o, _, _ in each),
        "corrected eigenvalues": sum(2 * n * o * r for o, _, r in each),
        "product": sum(4 * (o * i * r + o * o * r) for o, i, r in each),
    }


def measured(instance: Any, fisher_type: str, seconds: float, clock: Callable[[], float] = time.process_time) -> Floor:
    """The floor of an instance of `bench_operators`; gradient, operator, `eigh` and products take turns.

    Args:
        instance: Its model is linear layers with activations.
        fisher_type: Of the operator.
        seconds: Of all turns, but five at least.
        clock: Of the turns. The least of each counts: a floor is what nothing disturbed.
    """
    options: dict[str, Any] = {"fisher_type": fisher_type, "check_deterministic": False}
    kind, seen = EKFACLinearOperator, _Decomposed()
    operator = kind(instance.model, instance.loss, instance.params, [(instance.x, instance.y)], **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a dispatch mode is of one thread: decompositions side by side would not be seen
    with seen:
        operator.compute()
    torch.set_num_threads(threads)
    layers = [(name, module) for name, module in instance.model.named_modules() if isinstance(module, nn.Linear)]
    ranks = [_rank(operator, name, module.in_features) for name, module in layers]
    sizes = [(module.out_features, module.in_features) for _, module in layers]
    cotangents = 1 if fisher_type == "mc" else layers[-1][1].out_features - 1
    shapes = [(512, 512, 512), (1024, 1024, 1024), (4096, 512, 512)]
    actions: dict[object, Action] = {
        "gradient": instance.gradient(),
        "operator": instance.product(kind, fisher_type=fisher_type),
    }
    actions |= {("eigh", k): lambda m=m: torch.linalg.eigh(m) for k, m in enumerate(seen.matrices)}  # type: ignore[misc]
    for m, k, n in shapes:
        left, right = torch.randn(m, k), torch.randn(k, n)
        actions[m, k, n] = lambda left=left, right=right: left @ right  # type: ignore[misc]
    best = _least(actions, seconds, clock)
    return Floor(
        needed_flops(sizes, ranks, len(instance.x), cotangents),
        tuple(matrix.shape[-1] for matrix in seen.matrices),
        max(2 * m * k * n / best[m, k, n] for m, k, n in shapes),
        sum(best["eigh", k] for k in range(len(seen.matrices))),
        best["gradient"],
        best["operator"],
    )


def _rank(operator: EKFACLinearOperator, name: str, inputs: int) -> int:
    basis = operator.blocks[f"{name}.weight"].cache()["input_basis"]
    return inputs if basis is None else basis.shape[-1]


def _least(actions: dict[object, Action], seconds: float, clock: Callable[[], float]) -> dict[object, float]:
    """The shortest turn of each, by turns."""
    least = dict.fromkeys(actions, float("inf"))
    begin, turns = time.perf_counter(), 0
    while turns < 5 or time.perf_counter() - begin < seconds:
        for name, action in actions.items():
            start = clock()
            action()
            least[name] = min(least[name], clock() - start)
        turns += 1
    return least


def floor_table(floors: dict[str, Floor]) -> Table:
    """Terms in rows, a column for each operator; in gradients but for the first rows."""
    made = Table(title="The least that EKFAC takes, construction and one product, in gradients")
    made.add_column("term")
    for name in floors:
        made.add_column(name, justify="right")
    found = list(floors.values())
    made.add_row("gradient", *(f"{1e3 * f.gradient:.1f} ms" for f in found))
    made.add_row("rate of products", *(f"{f.rate / 1e9:.0f} GFLOP/s" for f in found))
    for term in found[0].flops:
        shares = [(f.flops[term], f.flops[term] / f.rate / f.gradient) for f in found]
        made.add_row(term, *(f"{flops / 1e9:.2f} GFLOP {share:.2f}" for flops, share in shares))
    sizes = [", ".join(str(size) for size in f.decomposed if size > 1) for f in found]
    made.add_row("eigh", *(f"of {of} {f.eigh / f.gradient:.2f}" for of, f in zip(sizes, found, strict=True)))
    made.add_row("floor", *(f"{f.gradients:.2f}" for f in found), style="bold")
    made.add_row("measured", *(f"{f.operator / f.gradient:.2f}" for f in found))
    return made
