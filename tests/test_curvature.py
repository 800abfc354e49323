"""Factors, eigenbases and corrected eigenvalues against dense float64 truth, over the whole table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kfacopt
from kfacopt.blocks import Block, CorrectedEigenBlock, DiagonalBlock, KroneckerBlock, PartialEigenBlock
from kfacopt.layers.layer import Layer
from tests import reference
from tests.cases import BOTH, BY_NAME, FISHER_CASES, Case, backward, exact_ekfac, still, train_step
from tests.cases import CASES as TABLE

# Sums of a few dozen products of numbers of order one.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

CASES = (*TABLE, *FISHER_CASES)
EKFACS = {"ekfac": kfacopt.EKFAC, "exact-ekfac": exact_ekfac}
CORRECTED = (CorrectedEigenBlock, PartialEigenBlock)
APART = [case for case in CASES if not case.mixes_data]


class Estimate:
    """An optimizer that has seen a batch twice (the second time with an eigenbasis) and moved nothing."""

    def __init__(self, case: Case, optimizer: Any, seed: int = 0, **options: Any) -> None:
        self.model, self.loss, self.x, self.y = case.make(seed)
        self.optimizer = optimizer(self.model, self.loss, **still(**options))
        self.cotangents: list[Tensor] = []
        self._record()
        for _ in range(2):
            self.cotangents.clear()
            self.optimizer.zero_grad()
            backward(self.model, self.loss, self.x, self.y)
            self.optimizer.step()
        self.optimizer.close()
        self.terms = reference.term_count(self.loss, self.model(self.x), self.y)

    def _record(self) -> None:
        estimator = self.optimizer._estimator
        inner = estimator.cotangents

        def recorded(terms: Any) -> Iterator[Tensor]:
            for chunk in inner(terms):
                self.cotangents.append(chunk.flatten(1))
                yield chunk

        estimator.cotangents = recorded

    def blocks(self, kind: type[Block] | tuple[type[Block], ...] = Block) -> list[tuple[Layer, Any]]:
        blocks = [(layer, self.optimizer.backend.blocks[layer.name]) for layer in self.optimizer._layers]
        return [
            (layer, block)
            for layer, block in blocks
            if isinstance(block, kind) and block.estimated  # an unused module never is
        ]


def grouped(tensor: Tensor, axes: int) -> Tensor:
    """A block's tensor with the axis k of groups that most layers leave out; a diagonal as a matrix."""
    if axes == 2 and tensor.ndim == 1:
        tensor = tensor.diag()
    return tensor if tensor.ndim == axes + 1 else tensor.unsqueeze(0)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """`[k (o i) (o i)]` of factors `[k o o]` and `[k i i]`."""
    return torch.stack([torch.kron(g.contiguous(), a.contiguous()) for g, a in zip(left, right, strict=True)])


def factors(block: Any) -> tuple[Tensor, Tensor]:
    left, right = block.factors()
    return grouped(left, 2), grouped(right, 2)


def dense_basis(block: Any) -> Tensor:
    if isinstance(block, PartialEigenBlock):
        left, right = (side.basis for side in block.sides())
    else:
        left, right = block.basis()
    left = grouped(left, 2)
    if right is None:
        right = torch.eye(block.factors()[1].shape[-1], dtype=left.dtype)
    return kronecker(left, grouped(right, 2))


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("case", "approx"),
    [pytest.param(c, approx, id=f"{approx}-{c.name}") for c in CASES for approx in c.kfac_exact],
)
def test_kfac_is_the_ggn_where_it_is_exact(case: Case, approx: str, separate: bool) -> None:
    found = Estimate(case, kfacopt.KFAC, kfac_approx=approx, separate_weight_and_bias=separate)
    blocks = found.blocks(KroneckerBlock)
    assert blocks
    for layer, block in blocks:
        truth = reference.ggn(found.model, found.loss, layer, found.x, found.y)
        torch.testing.assert_close(kronecker(*factors(block)), truth, **CLOSE)


@named(APART)  # one cotangent serves all data, which is exact only where they do not mix
@pytest.mark.parametrize("approx", BOTH)
def test_type_2_factors(case: Case, approx: str) -> None:
    found = Estimate(case, kfacopt.KFAC, kfac_approx=approx)
    hessian = reference.loss_hessian(found.loss, found.model(found.x), found.y)
    for layer, block in found.blocks(KroneckerBlock):
        truth = reference.factors(
            found.model, layer, found.x, approx, lambda rows: reference.gradient_factor(rows, hessian)
        )
        for ours, dense in zip(factors(block), truth, strict=True):
            torch.testing.assert_close(ours, dense, **CLOSE)


@named(list(CASES))
@pytest.mark.parametrize("approx", BOTH)
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_sampled_factors(case: Case, approx: str, fisher_type: str) -> None:
    fisher = kfacopt.Fisher(fisher_type, samples=3 if fisher_type == "mc" else 1)
    found = Estimate(case, kfacopt.KFAC, curvature=fisher, kfac_approx=approx, ema_decay=0.0)
    cotangents = torch.cat(found.cotangents)
    if fisher_type == "empirical":
        expected = reference.term_gradients(found.loss, found.model(found.x), found.y)
        torch.testing.assert_close(cotangents, expected, **CLOSE)
    for layer, block in found.blocks(KroneckerBlock):
        truth = reference.factors(
            found.model,
            layer,
            found.x,
            approx,
            lambda rows: reference.sampled_gradient_factor(rows, cotangents, found.terms),
        )
        for ours, dense in zip(factors(block), truth, strict=True):
            torch.testing.assert_close(ours, dense, **CLOSE)


@named(APART)
@pytest.mark.parametrize("approx", BOTH)
@pytest.mark.parametrize("optimizer", EKFACS.values(), ids=EKFACS)
def test_corrected_eigenvalues_are_the_diagonal_of_the_ggn(case: Case, approx: str, optimizer: Any) -> None:
    found = Estimate(case, optimizer, kfac_approx=approx)
    for layer, block in found.blocks(CORRECTED):
        basis = dense_basis(block)
        truth = basis.mT @ reference.ggn(found.model, found.loss, layer, found.x, found.y) @ basis
        assert block.corrected.value is not None
        values = grouped(block.corrected.value, 2).flatten(1)
        torch.testing.assert_close(values, truth.diagonal(dim1=1, dim2=2), **CLOSE)


@named(APART)
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("optimizer", EKFACS.values(), ids=EKFACS)
def test_corrected_eigenvalues_of_samples(case: Case, fisher_type: str, optimizer: Any) -> None:
    found = Estimate(case, optimizer, curvature=fisher_type, separate_weight_and_bias=True)
    cotangents = torch.cat(found.cotangents)
    for layer, block in found.blocks(CORRECTED):
        basis = dense_basis(block)
        dense = reference.fisher(found.model, layer, found.x, cotangents, found.terms)
        assert block.corrected.value is not None
        values = grouped(block.corrected.value, 2).flatten(1)
        torch.testing.assert_close(values, (basis.mT @ dense @ basis).diagonal(dim1=1, dim2=2), **CLOSE)


@named([case for case in APART if case.name in ("norms", "transformer")])
@pytest.mark.parametrize("approx", BOTH)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_scale_and_shift_have_the_ggn_s_diagonal(case: Case, optimizer: Any, approx: str) -> None:
    """Whatever the approximation: there is nothing to be saved by reducing."""
    found = Estimate(case, optimizer, kfac_approx=approx)
    assert found.blocks(DiagonalBlock)
    for layer, block in found.blocks(DiagonalBlock):
        truth = reference.ggn(found.model, found.loss, layer, found.x, found.y)
        assert block.diagonal.value is not None
        diagonal = truth.diagonal(dim1=1, dim2=2).flatten()
        torch.testing.assert_close(block.diagonal.value.flatten(), diagonal, **CLOSE)


@named(list(CASES))
@pytest.mark.parametrize("separate", [False, True])
def test_eigenbases_diagonalise_the_factors(case: Case, separate: bool) -> None:
    found = Estimate(case, exact_ekfac, separate_weight_and_bias=separate)
    for _, block in found.blocks(CorrectedEigenBlock):
        for factor, basis, values in zip(block.factors(), block.basis(), block.factor_eigenvalues(), strict=True):
            if basis is None:
                torch.testing.assert_close(factor, values, **CLOSE)
                continue
            identity = torch.eye(basis.shape[-1], dtype=basis.dtype).expand_as(basis)
            torch.testing.assert_close(basis.mT @ basis, identity, **CLOSE)
            torch.testing.assert_close(basis * values.unsqueeze(-2) @ basis.mT, factor, **CLOSE)


@named(list(CASES))
def test_chunks_of_cotangents_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Estimate(case, kfacopt.EKFAC)
    monkeypatch.setattr(kfacopt.Likelihood, "vectors_per_chunk", 2)
    parts = Estimate(case, kfacopt.EKFAC)
    assert len(parts.cotangents) >= len(whole.cotangents)
    for (_, a), (_, b) in zip(whole.blocks(), parts.blocks(), strict=True):
        for name, average in a.averages().items():
            if name == "corrected":  # of a degenerate eigenspace's basis, which is anybody's choice
                continue
            torch.testing.assert_close(average.value, b.averages()[name].value, **CLOSE)


@named(APART)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_duplicated_batch_changes_nothing(case: Case, optimizer: Any, fisher_type: str) -> None:
    """Factors, damping's meaning and the step, for every reduction."""
    moved, averages = [], []
    for copies in (1, 4):
        model, loss, x, y = case.make()
        made = optimizer(
            model,
            loss,
            curvature=fisher_type,
            factor_every=1,
            refresh_every=2 if optimizer is kfacopt.KFAC else 1000,
            lr=0.1,
            damping=0.1,
            kl_clip=1e-4,
        )
        # One basis for both: that of a degenerate eigenspace is anybody's choice, and turns with the rounding.
        train_step(made, model, loss, x, y)
        x, y = (t.repeat(copies, *(1,) * (t.ndim - 1)) for t in (x, y))
        for _ in range(2):  # KFAC's inverses are renewed in the second
            train_step(made, model, loss, x, y)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        averages.append(
            {
                (name, kind): average.value
                for name, block in made.backend.blocks.items()
                for kind, average in block.averages().items()
            }
        )
        assert made.health()["skipped_steps"] == 0.0
        made.close()
    # Steps multiply rounding by the condition number of the damped curvature, here below 1e4.
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-10)
    for key, value in averages[0].items():
        torch.testing.assert_close(averages[1][key], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp-ce", "mlp-mse", "mlp-bce", "sequence-mixed", "conv-groups"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_ekfac])
def test_monte_carlo_tends_to_type_2(name: str, optimizer: Any) -> None:
    """500 samples of each of a few data: the standard error is a few percent of a factor's norm."""
    case = BY_NAME[name]
    exact = Estimate(case, optimizer)
    sampled = Estimate(case, optimizer, curvature=kfacopt.Fisher("mc", samples=500))
    for (layer, a), (_, b) in zip(exact.blocks(), sampled.blocks(), strict=True):
        for kind in a.averages():
            if kind == "corrected":
                continue
            truth, estimate = a.averages()[kind].value, b.averages()[kind].value
            error = (truth - estimate).norm() / truth.norm()
            assert error < 0.2, (layer.name, kind, float(error))


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_the_curvature_of_batch_normalisation(optimizer: Any) -> None:
    """Its data mix, so its curvature is an approximation, but one that is finite and positive."""
    for _, block in Estimate(BY_NAME["batch-norm"], optimizer).blocks():
        assert block.trace().isfinite()
        assert block.trace() > 0
