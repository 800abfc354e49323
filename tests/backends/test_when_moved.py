"""Refreshes that are spared where nothing moved: what is kept is true to the tolerance, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kfacopt
from kfacopt.blocks import Block, CorrectedEigenBlock, EigenBlock, KroneckerBlock, OutputBlock, PartialEigenBlock
from kfacopt.schedules import Background, MaxOverhead, WhenMoved
from tests.backends.test_background import Run, through_a_file
from tests.cases import OPTIMIZERS

SPECTRAL = {"spectral": kfacopt.SpectralDescent}
kinds = pytest.mark.parametrize("optimizer", (OPTIMIZERS | SPECTRAL).values(), ids=OPTIMIZERS | SPECTRAL)
OUTPUTS, INPUTS, DAMPING, TOLERANCE = 70, 90, 0.3, 0.1
BLOCKS: dict[str, Callable[[], Block]] = {
    "kronecker": KroneckerBlock,
    "kronecker, root": lambda: KroneckerBlock(0.5),
    "outputs": lambda: OutputBlock((OUTPUTS, INPUTS)),
    "outputs, root": lambda: OutputBlock((OUTPUTS, INPUTS), 0.5),
    "eigen": EigenBlock,
    "corrected": CorrectedEigenBlock,
    "partial": lambda: PartialEigenBlock(0.5),
}


def steep(size: int, seed: int) -> Tensor:
    """A covariance whose eigenvalues fall by a factor of 300."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(rows)[0][:size]
    turned = torch.linalg.qr(basis)[0]
    return (turned * torch.logspace(0.5, -2.0, size, dtype=torch.float64)) @ turned.mT


def fed(block: Block, *, moved: float = 0.0, factor: float = 1.0) -> Block:
    """A block with steep factors, moved towards others; statistics are replaced."""
    for name, average in block.averages().items():
        if name.endswith("factor"):
            size = INPUTS if name.startswith("input") else OUTPUTS
            average.value = factor * ((1 - moved) * steep(size, 0) + moved * steep(size, 1))
            average.weight = 1.0
    return block


def factors_of(block: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Each factor, and the matrix that the cached basis and eigenvalues stand for."""
    snapshot, cache = block.snapshot(), block.cache()
    pairs = []
    for side in ("gradient", "input"):
        basis, values = cache[f"{side}_basis"], cache[f"{side}_eigenvalues"]
        rest = cache.get(f"{side}_rest", torch.tensor(0.0, dtype=torch.float64))
        beside = torch.eye(len(basis), dtype=torch.float64) - basis @ basis.mT
        pairs.append((snapshot[f"{side}_factor"], (basis * values) @ basis.mT + rest * beside))
    return pairs


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_what_hardly_moved_is_kept_and_true_to_the_tolerance(make: Callable[[], Block]) -> None:
    block = fed(make())
    block.refresh(DAMPING)
    before = block.cache()
    fed(block, moved=0.01)
    assert not block.refresh_if_moved(DAMPING, TOLERANCE)
    held = [name for name in before if name.endswith("basis") or name.startswith("inverse")]
    assert held
    assert all(block.cache()[name] is before[name] for name in held)
    fresh = fed(make(), moved=0.01)
    fresh.refresh(DAMPING)
    matrix = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    kept, wanted = block.solve(matrix, DAMPING), fresh.solve(matrix, DAMPING)
    # Each of two factors is off by the tolerance at most, and a hundredth of it was moved.
    assert float((kept - wanted).norm() / wanted.norm()) < 2 * TOLERANCE
    assert not torch.equal(kept, wanted)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_what_moved_is_decomposed(make: Callable[[], Block]) -> None:
    block, fresh = fed(make()), fed(make(), moved=0.9)
    block.refresh(DAMPING)
    fed(block, moved=0.9)
    assert block.refresh_if_moved(DAMPING, TOLERANCE)
    fresh.refresh(DAMPING)
    matrix = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(block.solve(matrix, DAMPING), fresh.solve(matrix, DAMPING), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["eigen", "corrected"])
@pytest.mark.parametrize("moved", [0.0, 0.02, 0.05, 0.1, 0.3])
def test_a_kept_basis_stands_for_factors_within_the_tolerance(name: str, moved: float) -> None:
    block = fed(BLOCKS[name]())
    block.refresh(DAMPING)
    fed(block, moved=moved)
    decomposed = block.refresh_if_moved(DAMPING, TOLERANCE)
    assert all(float((a - b).norm() / a.norm()) <= TOLERANCE for a, b in factors_of(block))
    assert decomposed or moved < 0.3


def test_a_kept_part_of_a_basis_stands_for_what_it_did_within_the_tolerance() -> None:
    block = fed(PartialEigenBlock(0.5))
    block.refresh(DAMPING)
    spared = []
    for moved in (0.0, 0.02, 0.05):
        fed(block, moved=moved)
        fresh = fed(PartialEigenBlock(0.5), moved=moved)
        fresh.refresh(DAMPING)
        spared.append(not block.refresh_if_moved(DAMPING, TOLERANCE))
        for (a, kept), (_, best) in zip(factors_of(block), factors_of(fresh), strict=True):
            # What is within the basis and what couples it to the rest, each at most the tolerance.
            assert float((a - kept).norm()) <= float((a - best).norm() + 2 * TOLERANCE * a.norm())
    assert any(spared)


def test_a_direction_that_was_cut_and_grows_is_seen() -> None:
    block = fed(PartialEigenBlock(0.5))
    block.refresh(DAMPING)
    cut = torch.linalg.eigh(block.snapshot()["input_factor"]).eigenvectors[:, 0]
    assert block.input_factor.value is not None
    block.input_factor.value = block.input_factor.value + 3.0 * torch.outer(cut, cut)
    assert block.refresh_if_moved(DAMPING, TOLERANCE)


@pytest.mark.parametrize("name", ["eigen", "corrected", "partial"])
def test_a_basis_stays_where_only_the_size_changes_and_eigenvalues_follow(name: str) -> None:
    block, fresh = fed(BLOCKS[name]()), fed(BLOCKS[name](), factor=3.0)
    block.refresh(DAMPING)
    fed(block, factor=3.0)
    assert not block.refresh_if_moved(DAMPING, 1e-3)
    fresh.refresh(DAMPING)
    matrix = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(block.solve(matrix, DAMPING), fresh.solve(matrix, DAMPING), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["kronecker", "kronecker, root", "outputs"])
def test_an_inverse_is_of_another_damping(name: str) -> None:
    block = fed(BLOCKS[name]())
    block.refresh(DAMPING)
    assert not block.refresh_if_moved(DAMPING, 1e-6)
    assert block.refresh_if_moved(4 * DAMPING, TOLERANCE)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_statistics_that_are_not_finite_leave_the_cache(make: Callable[[], Block]) -> None:
    block = fed(make())
    block.refresh(DAMPING)
    before = block.cache()
    fed(block, factor=float("nan"))
    assert block.refresh_if_moved(DAMPING, TOLERANCE)
    assert block.retries == 1
    assert all(block.cache()[name] is value for name, value in before.items())


@kinds
def test_of_no_tolerance_it_is_the_interval(optimizer: Any) -> None:
    assert Run(optimizer, refresh_every=WhenMoved(3, 1e-300)).go(8).same_as(Run(optimizer, refresh_every=3).go(8))


@kinds
def test_runs_resume_bit_for_bit(optimizer: Any) -> None:
    options = {"refresh_every": WhenMoved(2, 0.3), "lr": 0.01}
    run = Run(optimizer, **options).go(9)
    assert run.optimizer.health()["spared_refreshes"] > 0
    resumed = Run(optimizer, **options)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    resumed.step = 9
    copied = copy.deepcopy(run).go(6)
    assert resumed.go(6).same_as(run.go(6))
    assert copied.same_as(run)
    spared = [one.optimizer.health()["spared_refreshes"] for one in (run, resumed)]
    assert spared[0] == spared[1]


@pytest.mark.parametrize("every", [MaxOverhead(), Background(3), WhenMoved(3)], ids=lambda it: type(it).__name__)
def test_intervals_that_it_does_not_take_are_named(every: Any) -> None:
    with pytest.raises(TypeError, match=rf"not {type(every).__name__}|not <kfacopt"):
        WhenMoved(every)


def test_a_tolerance_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        WhenMoved(3, 0.0)
