"""Report 1: a layer that is called with no rows, and other means over nothing, leave no trace in later steps.

An expert without tokens and a detector without boxes are daily events. Rows that are not there give no mean: a layer's
input factor stays as it was. Statistics that are not finite are dropped layer by layer, counted and named.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from kfacopt import operators as ops
from tests.reports.reports import OPERATOR_TYPE2, flat, ggn_traces, heard, named, near, still

CE = nn.CrossEntropyLoss()


class Experts(nn.Module):
    """One of the layers sees the rows whose first input is positive, and those alone."""

    def __init__(self, expert: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.expert = nn.Linear(6, 6) if expert is None else expert

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        chosen = (x[:, 0] > 0).nonzero()[:, 0]
        return self.head(h.index_add(0, chosen, self.expert(h[chosen]).flatten(1)))


def batch(seed: int, empty: bool = False, data: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs and classes; `empty`: none of the data is the expert's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(data, 4, generator=generator, dtype=torch.float64)
    x[:, 0] = -x[:, 0].abs() if empty else x[:, 0]
    return x, x[:, 1:].argmax(1)


def run(optimizer: Any, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def is_finite(optimizer: Any, model: nn.Module) -> bool:
    factors = [f for b in optimizer.backend.blocks.values() if b.estimated for f in b.factors()]
    return bool(flat(factors).isfinite().all() and flat(model.parameters()).isfinite().all())


OPTIMIZERS = {
    "kfac": lambda m: kfacopt.KFAC(m, CE, factor_every=1),
    "ekfac": lambda m: kfacopt.EKFAC(m, CE, factor_every=1),
    "ekfac-absolute-damping": lambda m: kfacopt.EKFAC(m, CE, factor_every=1, damping=0.1),
    "ekfac-auto": lambda m: kfacopt.EKFAC(m, CE, factor_every=1, lr="auto"),
    "ekfac-damping-rule": lambda m: kfacopt.EKFAC(m, CE, factor_every=1, damping_rule=kfacopt.LevenbergMarquardt()),
    "kfac-auto": lambda m: kfacopt.KFAC(m, CE, lr="auto"),
    "natural-gradient": lambda m: kfacopt.NaturalGradient(m, CE, damping=0.1),
}


@pytest.mark.parametrize("empty_step", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_a_step_without_rows(name: str, empty_step: int) -> None:
    model = Experts().double()
    optimizer = OPTIMIZERS[name](model)
    losses = run(optimizer, model, [batch(0, empty=t == empty_step) for t in range(14)])
    assert losses[-1] < min(losses[1], losses[4]) - 0.02, "it learns after the empty call, too"
    assert optimizer.health()["skipped_steps"] == 0.0
    if name != "natural-gradient":
        assert is_finite(optimizer, model)
        assert optimizer.backend.blocks["expert"].ready, "the expert has curvature again"
        assert optimizer.health()["condition"] < float("inf")
        assert optimizer.health()["fallbacks"] == 0.0


def factors_after(make: Any, batches: list[tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """G and A of every layer after some steps that move nothing."""
    torch.manual_seed(0)
    model = Experts().double()
    optimizer = make(model, CE, **still(ema_decay=0.5, damping=0.1))
    run(optimizer, model, batches)
    return {name: block.factors() for name, block in optimizer.backend.blocks.items()}


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_step_without_rows_leaves_a_layers_input_factor(make: Any) -> None:
    """Its gradient factor stays too, or takes the zero in: the mean loss of that step has no curvature there."""
    first, nothing, second = batch(0), batch(5, empty=True), batch(1)
    found = factors_after(make, [first, nothing, second])["expert"]
    without = factors_after(make, [first, second])["expert"]
    torch.testing.assert_close(found[1], without[1])
    alone = [factors_after(make, [one])["expert"][0] for one in (first, second)]
    zero_taken_in = (0.125 * alone[0] + 0.5 * alone[1]) / 0.875
    assert any(torch.allclose(found[0], want) for want in (without[0], zero_taken_in))


@pytest.mark.parametrize("order", ["empty first", "empty last"])
@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_micro_batch_without_rows_counts_as_part_of_the_whole(make: Any, order: str) -> None:
    """The statistics of two micro-batches are those of both as one batch."""
    parts = [batch(0), batch(5, empty=True)]
    parts = parts[::-1] if order == "empty first" else parts
    found = {}
    for name, pieces in {"two": parts, "one": [tuple(torch.cat(z) for z in zip(*parts, strict=True))]}.items():
        torch.manual_seed(0)
        model = Experts().double()
        optimizer = make(model, CE, **still(damping=0.1))
        for x, y in pieces:
            (F.cross_entropy(model(x), y) / len(pieces)).backward()
        optimizer.step()
        found[name] = {key: block.factors() for key, block in optimizer.backend.blocks.items()}
    for layer, factors in found["one"].items():
        torch.testing.assert_close(found["two"][layer], factors)


class Convolved(nn.Module):
    """A convolution as an expert: rows `[n 6]` are images of two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.convolution(h.unflatten(1, (2, 3)))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 6)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.embedding((h[:, 0] > 0).long())


FAMILIES = {
    "convolution": Convolved,
    "embedding": Embedded,
    "layer-norm": lambda: nn.LayerNorm(6),
    "rms-norm": lambda: nn.RMSNorm(6),
    "no-bias": lambda: nn.Linear(6, 6, bias=False),
}


@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_family_is_poisoned(family: str, make: Any) -> None:
    model = Experts(FAMILIES[family]()).double()
    optimizer = make(model, CE, factor_every=1)
    losses = run(optimizer, model, [batch(0, empty=t in (0, 3)) for t in range(10)])
    assert losses[-1] < losses[4]
    assert optimizer.health()["skipped_steps"] == 0.0
    assert all(bool(flat(v.eigenvalues()[None]).isfinite().all()) for v in optimizer.backend.blocks.values())
    assert all(block.ready for block in optimizer.backend.blocks.values())


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_step_whose_targets_are_all_ignored(make: Any, when: int) -> None:
    model = Experts().double()
    optimizer = make(model, nn.CrossEntropyLoss(reduction="sum"), factor_every=1)
    for t in range(8):
        x, y = batch(t)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.full_like(y, -100) if t == when else y, reduction="sum")
        loss.backward()
        optimizer.step()
    assert is_finite(optimizer, model)
    assert all(block.ready for block in optimizer.backend.blocks.values())
    assert optimizer.health()["skipped_steps"] == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_batch_without_data_is_as_harmless_as_for_torchs_optimizers(make: Any, reduction: str) -> None:
    model = Experts().double()
    optimizer = make(model, nn.CrossEntropyLoss(reduction=reduction), factor_every=1)
    run(optimizer, model, [batch(0)])
    x, y = batch(1, data=0)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    optimizer.step()
    run(optimizer, model, [batch(2)])
    assert is_finite(optimizer, model)


class Overflowing(nn.Module):
    """Squares of one layer's inputs leave float32, its gradients do not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.big, self.head = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor, size: float) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) + 1e-3 * self.big(x * size) / size)


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("make", [kfacopt.KFAC, kfacopt.EKFAC])
def test_only_the_layer_whose_statistics_are_not_finite_drops_them(make: Any, when: int) -> None:
    found: dict[bool, Any] = {}
    for broken in (False, True):
        torch.manual_seed(0)
        model = Overflowing()
        optimizer = make(model, CE, **still(ema_decay=0.5))
        with heard() as said:
            for t in range(4):
                x, y = batch(t)
                optimizer.zero_grad()
                F.cross_entropy(model(x.float(), 1e25 if broken and t == when else 1.0), y).backward()
                optimizer.step()
        found[broken] = {name: block.factors() for name, block in optimizer.backend.blocks.items()}
    for layer in ("inner", "head"):
        torch.testing.assert_close(found[True][layer], found[False][layer], rtol=1e-4, atol=1e-6)
    assert bool(flat(found[True]["big"]).isfinite().all())
    assert optimizer.health()["dropped_updates"] == 1.0
    assert named(optimizer, "big", said), "the user is told which layer"
    assert sum(repr("big") in text for text in said) <= 1, "once"


@pytest.mark.parametrize("batches", [1, 2], ids=["all data in one batch", "one of two batches without rows"])
@pytest.mark.parametrize("operator", [ops.KFACLinearOperator, ops.EKFACLinearOperator])
def test_operators_over_batches_without_rows(operator: Any, batches: int) -> None:
    """The expert's block is that of the batches that have rows; the trace of EKFAC is the Gauss-Newton matrix's."""
    model = Experts().double()
    data = [batch(5, empty=True), batch(0)][:batches]
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    matrix = operator(model, CE, list(model.parameters()), data, **OPERATOR_TYPE2)
    dense = matrix @ torch.eye(matrix.shape[1], dtype=torch.float64)
    assert bool(dense.isfinite().all())
    assert near(float(matrix.trace), float(dense.trace()))
    if operator is ops.EKFACLinearOperator:
        assert near(float(matrix.trace), sum(ggn_traces(model, CE, x, y).values()))
    else:  # however the data are cut, the factors are the same
        again = operator(model, CE, list(model.parameters()), [(x, y)], **OPERATOR_TYPE2)
        assert near(float(matrix.trace), float(again.trace))
