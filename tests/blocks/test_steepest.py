"""The steepest step by fewer products, against whitening and its adjoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kfacopt.blocks import Block, CorrectedEigenBlock, KroneckerBlock, OutputBlock, PartialEigenBlock
from kfacopt.blocks.sides import Diagonals
from kfacopt.layers.base import Rows
from kfacopt.linalg.polar import NewtonSchulz, exact_polar

DAMPING = 0.01
SHAPES = [(6, 30), (30, 6), (5, 6), (6, 5), (70, 150), (150, 70), (100, 210), (1, 4), (4, 1)]
"""Long ones are treated by the Gram matrix of the short side; sides beyond 64 can be cut, and 128 are aligned."""

MAKERS: dict[str, Callable[[], Block]] = {
    "kronecker": lambda: KroneckerBlock(0.5),
    "kronecker, natural": KroneckerBlock,
    "kronecker, A diagonal": lambda: KroneckerBlock(0.5, Diagonals(False, True)),
    "corrected": lambda: CorrectedEigenBlock(0.5),
    "partial": lambda: PartialEigenBlock(0.3, 0.5),
    "partial, one kept": lambda: PartialEigenBlock(0.9, 1.0),
    "partial, nothing cut": lambda: PartialEigenBlock(1e-9, 0.5),
}


def filled(make: Callable[[], Block], shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> Block:
    """Of rows with steep spectra."""
    torch.manual_seed(seed)
    block, (outputs, inputs) = make(), shape
    for _ in range(2):
        a = torch.randn(400, 1, inputs, dtype=dtype) * torch.logspace(0, -2, inputs, dtype=dtype)
        g = torch.randn(1, 400, 1, outputs, dtype=dtype) * torch.logspace(0, -2, outputs, dtype=dtype)
        block.update(Rows(a, g, torch.tensor(400.0, dtype=dtype)))  # type: ignore[arg-type]
        block.fold(0.5)
        block.refresh(DAMPING)
    return block


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [1, 3])
def test_it_is_whitened_brought_to_the_polar_factor_and_back(name: str, shape: tuple[int, int], count: int) -> None:
    blocks = [filled(MAKERS[name], shape, seed) for seed in range(count)]
    matrices = torch.randn(count, *shape, dtype=torch.float64)
    for polar in (NewtonSchulz(iterations=3), exact_polar):
        kept = matrices.clone()
        found = type(blocks[0]).steepest(blocks, matrices, [DAMPING] * count, polar)
        expected = Block.steepest(blocks, matrices, [DAMPING] * count, polar)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
        assert torch.equal(matrices, kept)
        again = type(blocks[0]).steepest(blocks, matrices, [DAMPING] * count, polar)
        assert torch.equal(found, again)


@pytest.mark.parametrize("name", ["kronecker", "partial"])
def test_in_float32_it_is_off_by_rounding(name: str) -> None:
    exact, short = (filled(MAKERS[name], (64, 300), 0, dtype) for dtype in (torch.float64, torch.float32))
    short.load_state_dict(
        {
            "averages": {
                key: {k: v.float() if isinstance(v, Tensor) else v for k, v in average.items()}
                for key, average in exact.state_dict()["averages"].items()
            },
            "cache": {k: None if v is None else v.float() for k, v in exact.cache().items()},
            "retries": 0,
        }
    )
    matrix, polar = torch.randn(1, 64, 300, dtype=torch.float64), NewtonSchulz(iterations=3)
    expected = Block.steepest([exact], matrix, [DAMPING], polar)
    found = type(short).steepest([short], matrix.float(), [DAMPING], polar)
    plain = Block.steepest([short], matrix.float(), [DAMPING], polar)
    error, usual = ((one.double() - expected).norm() / expected.norm() for one in (found, plain))
    assert error < 3 * usual + 1e-6


class Doubled(KroneckerBlock):
    """Whitens otherwise: the class' own steepest step is another's."""

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        return super().whiten(matrix, damping)[:, :1].expand_as(matrix)

    def unwhiten(self, matrix: Tensor, damping: float) -> Tensor:
        return 2.0 * super().unwhiten(matrix, damping)


def test_who_whitens_otherwise_steps_so() -> None:
    block = filled(lambda: Doubled(0.5), (6, 30), 0)
    matrix = torch.randn(1, 6, 30, dtype=torch.float64)
    polar = NewtonSchulz()
    expected = block.unwhiten(polar(block.whiten(matrix[0], DAMPING)), DAMPING)
    torch.testing.assert_close(Doubled.steepest([block], matrix, [DAMPING], polar)[0], expected)
    assert KroneckerBlock.steepest is not Block.steepest
    assert OutputBlock.steepest is not Block.steepest


def test_a_wide_layer_needs_no_root_of_its_inputs() -> None:
    block = filled(lambda: KroneckerBlock(0.5), (6, 30), 0)
    assert isinstance(block, KroneckerBlock)
    KroneckerBlock.steepest([block], torch.randn(1, 6, 30, dtype=torch.float64), [DAMPING], NewtonSchulz())
    assert block._roots[0] is not None
    assert block._roots[1] is None
    block.refresh(DAMPING)
    assert block._roots == [None, None]


@pytest.mark.parametrize("shape", [(3, 4), (70, 150)], ids=str)
def test_whitening_and_its_adjoint_are_the_solve(shape: tuple[int, int]) -> None:
    for name in ("partial", "partial, nothing cut", "kronecker"):
        block = filled(MAKERS[name], shape, 0)
        first, second = torch.randn(2, *shape, dtype=torch.float64)
        whole = block.unwhiten(block.whiten(first, DAMPING), DAMPING)
        torch.testing.assert_close(whole, block.solve(first, DAMPING))
        ours = (block.whiten(first, DAMPING) * second).sum()
        torch.testing.assert_close(ours, (first * block.unwhiten(second, DAMPING)).sum())
