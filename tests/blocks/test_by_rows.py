"""Matrices of which one side does not mix, in pieces."""

from __future__ import annotations

import pytest
import torch

from kfacopt.blocks import Block, CorrectedEigenBlock, EigenBlock, by_rows
from kfacopt.blocks.by_rows import steepest_by_rows, times_by_rows
from kfacopt.blocks.sides import Diagonals
from kfacopt.layers.base import Rows
from kfacopt.linalg.polar import NewtonSchulz, exact_polar

LONG, SHORT, DAMPING = 11, 3, 0.1


@pytest.mark.parametrize(("to", "back"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("has_basis", [True, False])
def test_rows_that_do_not_mix_are_treated_in_pieces(
    batch: tuple[int, ...], has_basis: bool, to: bool, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "at_once", lambda device: 4 * 2 * 3)  # two rows, or one of each of three
    matrix, values = torch.randn(*batch, 5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] if has_basis else None
    q = torch.eye(3, dtype=torch.float64) if basis is None else basis
    expected = (matrix @ q if to else matrix) * values @ (q.mT if back else torch.eye(3, dtype=torch.float64))
    found = times_by_rows(matrix, basis, lambda some: values[some], to, back)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_polar_factor_in_pieces_is_that_of_the_whole(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "at_once", lambda device: 4 * 2 * SHORT)  # two rows
    matrix, values = torch.randn(LONG, SHORT), 0.5 + torch.rand(LONG, SHORT)
    matrix[:2] = 0.0
    basis, polar = torch.linalg.qr(torch.randn(SHORT, SHORT))[0], NewtonSchulz(3)
    found = steepest_by_rows(scale * matrix, basis, values, polar)
    torch.testing.assert_close(found, (polar(scale * (matrix @ basis) * values) * values) @ basis.mT)
    torch.testing.assert_close(steepest_by_rows(0.0 * matrix, basis, values, polar), torch.zeros(LONG, SHORT))


@pytest.mark.parametrize("kind", [EigenBlock, CorrectedEigenBlock])
@pytest.mark.parametrize("wide", ["gradient", "input"])
@pytest.mark.parametrize("long", [LONG, SHORT])
def test_a_step_by_rows_is_that_of_whitened_matrices(
    kind: type[EigenBlock], wide: str, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, inputs = (long, SHORT) if wide == "gradient" else (SHORT, long)
    blocks: list[Block] = []
    for _ in range(2):
        block = kind(diagonals=Diagonals(wide == "gradient", wide == "input"))
        for _ in range(2):  # the second batch corrects the eigenvalues
            gradients = torch.randn(1, 7, 1, outputs, dtype=torch.float64)
            inputs_of = torch.randn(7, 1, inputs, dtype=torch.float64)
            block.update(Rows(inputs_of, gradients, torch.tensor(7.0)))
            block.fold(0.5)
            block.refresh(DAMPING)
        blocks.append(block)
    calls: list[int] = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return steepest_by_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("kfacopt.blocks.eigen.steepest_by_rows", counted)
    matrices = torch.randn(2, outputs, inputs, dtype=torch.float64)
    for polar in (NewtonSchulz(), exact_polar):
        found = kind.steepest(blocks, matrices, [DAMPING, 2 * DAMPING], polar)
        truth = Block.steepest(blocks, matrices, [DAMPING, 2 * DAMPING], polar)
        again = kind.steepest(blocks, matrices, [2 * DAMPING, DAMPING], polar)
        other = Block.steepest(blocks, matrices, [2 * DAMPING, DAMPING], polar)
        torch.testing.assert_close(again, other, rtol=0, atol=1e-9)
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-9)
    assert len(calls) == (4 if long == LONG else 0)  # of both blocks, where it is long and by iterations
