"""What every block promises, against its operator written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kfacopt.blocks import (
    Block,
    CorrectedEigenBlock,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    PartialEigenBlock,
)
from kfacopt.blocks.coordinates import squared_coordinates
from kfacopt.blocks.sides import Diagonals
from kfacopt.layers.base import OneHot, Rows

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
DATA, PLACES, OUTPUTS, INPUTS, VECTORS, GROUPS = 7, 2, 3, 4, 2, 2
DAMPING = 0.3


def rows(kind: str, seed: int = 0, data: int = DATA) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    terms = torch.tensor(float(data), dtype=torch.float64)
    if kind == "plain":
        return Rows(random(data, 1, INPUTS), random(VECTORS, data, 1, OUTPUTS), terms)
    if kind == "shared":
        return Rows(random(data, PLACES, INPUTS), random(VECTORS, data, PLACES, OUTPUTS), terms)
    if kind == "many-places":
        return Rows(random(data, 9, INPUTS), random(VECTORS, data, 9, OUTPUTS), terms)
    if kind == "groups":
        shape = (GROUPS, data, PLACES)
        return Rows(random(*shape, INPUTS), random(VECTORS, *shape, OUTPUTS), terms)
    if kind == "words":
        indices = torch.randint(INPUTS - 1, (data, 3), generator=generator)  # the last word is never seen
        return Rows(OneHot(indices, INPUTS), random(VECTORS, data, 3, OUTPUTS), terms)
    mask = torch.rand(data, 3, generator=generator) > 0.4
    indices = torch.where(mask, torch.randint(1, INPUTS, (data, 3), generator=generator), 0)
    return Rows(OneHot(indices, INPUTS, mask), random(VECTORS, data, 3, OUTPUTS), terms)


def elementwise(seed: int = 0) -> Rows:
    torch.manual_seed(seed)
    inputs = torch.randn(DATA, PLACES, OUTPUTS, 2, dtype=torch.float64)
    gradients = torch.randn(VECTORS, DATA, PLACES, OUTPUTS, dtype=torch.float64)
    return Rows(inputs, gradients, torch.tensor(float(DATA), dtype=torch.float64))


OUTER = ("plain", "shared", "many-places", "groups", "words", "padded-words")
MAKERS: dict[str, Callable[[], Block]] = {
    "kronecker": KroneckerBlock,
    "eigen": EigenBlock,
    "corrected": CorrectedEigenBlock,
    "partial": lambda: PartialEigenBlock(0.3),
    "diagonal": DiagonalBlock,
}
# Sides too wide to be squared: G's, A's, both.
for _diagonals in (Diagonals(True, False), Diagonals(False, True), Diagonals(True, True)):
    MAKERS |= {
        f"kronecker, {_diagonals.named()}": partial(KroneckerBlock, diagonals=_diagonals),
        f"eigen, {_diagonals.named()}": partial(EigenBlock, _diagonals),
        f"corrected, {_diagonals.named()}": partial(CorrectedEigenBlock, diagonals=_diagonals),
    }
KINDS = {"diagonal": ("elementwise",), "partial": ("plain", "shared")}
PAIRS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in MAKERS
    for kind in KINDS.get(name, [kind for kind in OUTER if kind != "groups" or "," not in name])
]
pairs = pytest.mark.parametrize(("name", "kind"), PAIRS)


def rows_for(kind: str, seed: int = 0) -> Rows:
    return elementwise(seed) if kind == "elementwise" else rows(kind, seed)


def filled(name: str, kind: str, seeds: tuple[int, ...] = (0, 1), decay: float = 0.6) -> Any:
    """A block after a few steps, refreshed in the first and in the last."""
    block = MAKERS[name]()
    for seed in seeds:
        block.update(rows_for(kind, seed))
        block.fold(decay)
        if seed == seeds[0]:
            block.refresh(DAMPING)
    block.refresh(DAMPING)
    return block


def shape_of(kind: str) -> tuple[int, ...]:
    if kind == "elementwise":
        return (OUTPUTS, 2)
    return (GROUPS, OUTPUTS, INPUTS) if kind == "groups" else (OUTPUTS, INPUTS)


def unit_matrices(shape: tuple[int, ...]) -> Tensor:
    return torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(-1, *shape)


def written_out(block: Block, kind: str) -> Tensor:
    """The undamped operator as a matrix, column by column."""
    shape = shape_of(kind)
    return torch.stack([block.matvec(unit).flatten() for unit in unit_matrices(shape)], dim=1)


def kronecker_of(g: Tensor, a: Tensor) -> Tensor:
    """`G ⊗ A` of factors as they are kept, block-diagonal over groups."""
    a, g = (f.diag() if f.ndim == 1 else f for f in (a, g))
    if g.ndim == 2:
        return torch.kron(g.contiguous(), a.contiguous())
    return torch.block_diag(*(torch.kron(x.contiguous(), y.contiguous()) for x, y in zip(g, a, strict=True)))


@pairs
def test_it_is_symmetric_and_positive(name: str, kind: str) -> None:
    dense = written_out(filled(name, kind), kind)
    torch.testing.assert_close(dense, dense.mT, **CLOSE)
    assert torch.linalg.eigvalsh(dense).min() > -1e-10


@pairs
def test_its_scalars_are_those_of_the_operator(name: str, kind: str) -> None:
    block = filled(name, kind)
    dense = written_out(block, kind)
    damped = dense + DAMPING * torch.eye(len(dense), dtype=dense.dtype)
    values = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(block.eigenvalues().flatten().sort().values, values, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(block.trace(), dense.trace(), **CLOSE)
    torch.testing.assert_close(block.frobenius_norm(), dense.norm(), **CLOSE)
    torch.testing.assert_close(block.logdet(DAMPING), damped.logdet(), **CLOSE)
    torch.testing.assert_close(block.det(DAMPING), damped.det(), **CLOSE)
    if hasattr(block, "mean_eigenvalue") and name.startswith(("kronecker", "eigen", "diagonal")):
        torch.testing.assert_close(block.mean_eigenvalue(), dense.trace() / len(dense), **CLOSE)
    condition = float(block.condition(DAMPING))
    assert condition >= 1.0
    if name.startswith(("eigen", "diagonal")):
        assert condition == pytest.approx(float((values.max() + DAMPING) / (values.min() + DAMPING)), rel=1e-6)


@pairs
def test_solving_undoes_the_damped_operator(name: str, kind: str) -> None:
    """Exactly for exact damping; for the π-split the damped operator is that of the damped factors."""
    block = filled(name, kind)
    shape = shape_of(kind)
    units = unit_matrices(shape)
    inverse = torch.stack([block.solve(unit.clone(), DAMPING).flatten() for unit in units], dim=1)
    torch.testing.assert_close(inverse, inverse.mT, **CLOSE)
    dense = written_out(block, kind)
    identity = torch.eye(len(dense), dtype=dense.dtype)
    if name.startswith(("eigen", "diagonal")):
        torch.testing.assert_close(inverse @ (dense + DAMPING * identity), identity, **CLOSE)
    else:  # the damping adds at least `damping` everywhere
        assert torch.linalg.eigvalsh(torch.linalg.inv(inverse) - dense).min() > DAMPING * (1 - 1e-9)


@pairs
def test_solving_writes_to_nothing(name: str, kind: str) -> None:
    block = filled(name, kind)
    matrix = torch.randn(*shape_of(kind), dtype=torch.float64)
    kept, state = matrix.clone(), copy.deepcopy(block.state_dict())
    first = block.solve(matrix, DAMPING)
    block.solve(matrix, 2 * DAMPING)
    block.matvec(matrix)
    assert torch.equal(block.solve(matrix, DAMPING), first)
    assert torch.equal(matrix, kept)
    for key, value in state["cache"].items():
        assert value is None or torch.equal(value, block.state_dict()["cache"][key])


@pairs
def test_a_state_resumes_bit_for_bit(name: str, kind: str) -> None:
    one = filled(name, kind)
    one.update(rows_for(kind, 5))  # waits
    two = MAKERS[name]()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    matrix = torch.randn(*shape_of(kind), dtype=torch.float64)
    assert torch.equal(one.solve(matrix, DAMPING), two.solve(matrix, DAMPING))
    for block in (one, two):
        block.fold(0.5)
        block.refresh(DAMPING)
    assert torch.equal(one.solve(matrix, DAMPING), two.solve(matrix, DAMPING))
    assert torch.equal(one.eigenvalues(), two.eigenvalues())


@pairs
def test_an_empty_block_says_so(name: str, kind: str) -> None:
    block = MAKERS[name]()
    assert not block.ready
    assert not block.estimated
    for call in (
        lambda: block.refresh(DAMPING),
        lambda: block.solve(torch.zeros(shape_of(kind)), DAMPING),
        lambda: block.eigenvalues(),
    ):
        with pytest.raises(RuntimeError, match="yet"):
            call()


@pairs
def test_a_poisoned_batch_shows_in_the_checksum(name: str, kind: str) -> None:
    for poisoned in ("inputs", "gradients"):
        for bad in (float("nan"), float("inf")):
            block = filled(name, kind)
            given = rows_for(kind, 3)
            if poisoned == "inputs":
                if isinstance(given.inputs, OneHot):
                    continue
                given.inputs.flatten()[-1] = bad
                assert not given.inputs.isfinite().all()
            else:
                given.gradients[..., -1, :] = bad
            block.update(given)
            checksum = block.pending_checksum()
            assert checksum is not None
            assert not checksum.isfinite()
            block.discard()
            assert block.pending_checksum() is None


def test_a_poisoned_scale_shows_in_the_checksum_of_a_square_statistic() -> None:
    """Two channels, scale and shift: the statistic is square, but no covariance."""
    inputs = torch.ones(4, 1, 2, 2)
    inputs[0, 0, 1, 0] = float("nan")
    block = DiagonalBlock()
    block.update(Rows(inputs, torch.ones(1, 4, 1, 2), torch.tensor(4.0)))
    checksum = block.pending_checksum()
    assert checksum is not None
    assert not checksum.isfinite()


@pytest.mark.parametrize(
    ("name", "kind"), [pair for pair in PAIRS if pair.values[0].split(",")[0] in ("kronecker", "eigen", "corrected")]
)
def test_factors_are_those_of_the_rows(name: str, kind: str) -> None:
    block = MAKERS[name]()
    given = rows(kind)
    block.update(given)
    block.fold(0.0)
    inputs = given.inputs.dense(torch.float64) if isinstance(given.inputs, OneHot) else given.inputs
    a = torch.einsum("...nsi,...nsj->...ij", inputs, inputs) / (inputs.shape[-3] * inputs.shape[-2])
    g = torch.einsum("v...nso,v...nsp->...op", given.gradients, given.gradients) / DATA
    left, right = block.factors()  # type: ignore[attr-defined]
    torch.testing.assert_close(left, g.diagonal() if block.diagonals.gradient else g, **CLOSE)
    one_axis = block.diagonals.input or isinstance(given.inputs, OneHot)
    torch.testing.assert_close(right, a.diagonal() if one_axis else a, **CLOSE)
    if not name.startswith("corrected"):
        block.refresh(DAMPING)
        torch.testing.assert_close(written_out(block, kind), kronecker_of(left, right), **CLOSE)


@pytest.mark.parametrize("kind", OUTER)
@pytest.mark.parametrize("identity", ["", "left", "right", "both", "dominant"])
def test_squared_coordinates_are_those_of_per_datum_gradients(kind: str, identity: str) -> None:
    given = rows(kind)
    leading = (GROUPS,) if kind == "groups" else ()
    words = isinstance(given.inputs, OneHot)
    left = right = None
    if identity not in ("left", "both"):
        left = torch.linalg.qr(torch.randn(*leading, OUTPUTS, OUTPUTS, dtype=torch.float64))[0]
    if identity not in ("right", "both") and not words:
        right = torch.linalg.qr(torch.randn(*leading, INPUTS, INPUTS, dtype=torch.float64))[0]
    if identity == "dominant":
        assert left is not None
        left, right = left[..., : OUTPUTS - 1], None if right is None else right[..., : INPUTS - 2]
    inputs = given.inputs.dense(torch.float64) if isinstance(given.inputs, OneHot) else given.inputs
    per_datum = torch.einsum("v...nso,...nsi->v...noi", given.gradients, inputs)
    rotated = per_datum if left is None else left.mT.unsqueeze(-3) @ per_datum
    rotated = rotated if right is None else rotated @ right.unsqueeze(-3)
    expected = rotated.square().sum((0, -3))
    torch.testing.assert_close(squared_coordinates(given, left, right), expected, **CLOSE)


def test_squared_coordinates_in_chunks() -> None:
    given = rows("many-places")
    left = torch.eye(OUTPUTS, dtype=torch.float64)
    right = torch.eye(INPUTS, dtype=torch.float64)
    whole = squared_coordinates(given, left, right)
    chunked = squared_coordinates(given, left, right, budget=2 * OUTPUTS * INPUTS)
    torch.testing.assert_close(chunked, whole, **CLOSE)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair.values[0].startswith("corrected")])
def test_a_new_basis_takes_the_corrected_eigenvalues_along(name: str, kind: str) -> None:
    """As the diagonal of the operator there was, in the new directions."""
    block = MAKERS[name]()
    assert isinstance(block, CorrectedEigenBlock)
    for seed in (0, 1):
        block.update(rows(kind, seed))
        block.fold(0.6)
        if seed == 0:
            block.refresh(DAMPING)
    before = written_out(block, kind)
    block.update(rows(kind, 2))
    block.corrected.discard()
    block.fold(0.6)
    block.refresh(DAMPING)
    sides = zip(block.basis(), (OUTPUTS, INPUTS), strict=True)
    left, right = (torch.eye(size, dtype=torch.float64) if side is None else side for side, size in sides)
    basis = kronecker_of(left, right)
    expected = (basis.mT @ before @ basis).diagonal()
    torch.testing.assert_close(block.eigenvalues().flatten(), expected, **CLOSE)


def test_refining_keeps_near_the_statistics() -> None:
    block = filled("corrected", "plain", seeds=(0, 1, 2))
    assert isinstance(block, CorrectedEigenBlock)
    block.update(rows("plain", 3))
    block.fold(0.9)

    def off_diagonal() -> float:
        total = 0.0
        for factor, basis in zip(block.factors(), block.basis(), strict=True):
            assert basis is not None
            rotated = basis.mT @ factor @ basis
            total += float((rotated - rotated.diagonal().diag()).norm() / factor.norm())
        return total

    before = off_diagonal()
    for _ in range(100):
        block.refine()
    assert off_diagonal() < 0.1 * before
    left, right = block.basis()
    assert right is not None
    torch.testing.assert_close(left.mT @ left, torch.eye(OUTPUTS, dtype=torch.float64), **CLOSE)


# -- blocks that keep the dominant eigenvectors ----------------------------------------------------


def steep(data: int, size: int, power: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    turn, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (torch.randn(data, size, dtype=torch.float64, generator=generator) * scale) @ turn


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 80), (70, 5), (5, 80), (70, 80.5)])
def test_a_cut_basis_is_the_whole_with_its_tail_averaged(outputs: int, inputs: float, exponent: float) -> None:
    flat = inputs != int(inputs)  # a spectrum that cannot be cut
    size = int(inputs)
    tail, data = 0.3, 200
    a, g = steep(data, size, 0.0 if flat else 1.5, 0), steep(data, outputs, 1.5, 1)
    given = Rows(a.unsqueeze(1), g[None, :, None], torch.tensor(float(data), dtype=torch.float64))
    block = PartialEigenBlock(tail, exponent)
    for _ in range(2):
        block.update(given)
        block.fold(0.0)
        if not block.ready:
            block.refresh(DAMPING)
    factors = (g.mT @ g / data, a.mT @ a / data)
    bases, averaged, kept = [], [], []
    for factor in factors:
        values, basis = torch.linalg.eigh(factor)
        keep = values > tail * values.mean()
        if len(values) <= 64 or 2 * int(keep.sum()) > len(values):
            keep = torch.ones_like(keep)
        bases.append(basis)
        averaged.append(torch.where(keep, values, values[~keep].mean() if bool((~keep).any()) else values))
        kept.append(keep)
    assert flat or not all(k.all() for k in kept)
    products = averaged[0][:, None] * averaged[1]
    corrected = ((g @ bases[0]).square().mT @ (a @ bases[1]).square()) / data
    table = torch.where(kept[0][:, None] & kept[1], corrected, products)
    matrix = torch.randn(outputs, size, dtype=torch.float64)
    coordinates = bases[0].mT @ matrix @ bases[1]
    expected = bases[0] @ (table * coordinates) @ bases[1].mT
    torch.testing.assert_close(block.matvec(matrix), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(block.trace(), table.sum(), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(
        block.eigenvalues().flatten().sort().values, table.flatten().sort().values, rtol=1e-8, atol=1e-12
    )
    mean_g, mean_a = (factor.trace() / len(factor) for factor in factors)
    pi, root = (mean_a / mean_g).sqrt(), DAMPING**0.5
    damped = table + root * (pi * averaged[0][:, None] + averaged[1] / pi) + DAMPING
    expected = bases[0] @ (coordinates / damped**exponent) @ bases[1].mT
    torch.testing.assert_close(block.solve(matrix, DAMPING), expected, rtol=1e-8, atol=1e-10)
    two = PartialEigenBlock(tail, exponent)
    two.load_state_dict(copy.deepcopy(block.state_dict()))
    assert torch.equal(two.solve(matrix, DAMPING), block.solve(matrix, DAMPING))


def test_an_exponent_is_that_of_the_damped_operator() -> None:
    whole, root = CorrectedEigenBlock(), CorrectedEigenBlock(0.5)
    for block in (whole, root):
        for seed in (0, 1):
            block.update(rows("shared", seed))
            block.fold(0.5)
            block.refresh(DAMPING)
    matrix = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    twice = root.solve(root.solve(matrix, DAMPING), DAMPING)
    torch.testing.assert_close(twice, whole.solve(matrix, DAMPING), **CLOSE)
    torch.testing.assert_close(root.matvec(matrix), whole.matvec(matrix), **CLOSE)


def test_a_cut_that_moves_takes_the_corrected_eigenvalues_along() -> None:
    """More directions kept, or fewer: still finite, positive and of the same trace but for the averaging."""
    block = PartialEigenBlock(0.3)
    for turn, power in enumerate((1.5, 1.5, 0.8, 2.0, 0.0)):
        a, g = steep(200, 80, power, turn), steep(200, 70, 1.5, 10 + turn)
        given = Rows(a.unsqueeze(1), g[None, :, None], torch.tensor(200.0, dtype=torch.float64))
        block.update(given)
        block.fold(0.5)
        block.refresh(DAMPING)
        values = block.eigenvalues()
        assert values.shape == (70, 80)
        assert values.isfinite().all()
        assert (values >= 0).all()
        solved = block.solve(torch.randn(70, 80, dtype=torch.float64), DAMPING)
        assert solved.isfinite().all()


# -- decompositions that fail ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kronecker", "eigen", "corrected", "partial"])
def test_a_refresh_that_fails_keeps_the_cache_and_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = filled(name, "plain")
    matrix = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    before = block.solve(matrix, DAMPING)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("as told")

    with monkeypatch.context() as patched:
        for routine in ("eigh", "cholesky_ex", "svd"):
            patched.setattr(torch.linalg, routine, fails)
        block.refresh(DAMPING)
    assert block.retries >= 1
    torch.testing.assert_close(block.solve(matrix, DAMPING), before)
    block.refresh(DAMPING)


@pytest.mark.parametrize("name", ["kronecker", "eigen", "corrected", "partial"])
def test_retries_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = filled(name, "plain")
    inner, calls = torch.linalg.eigh, []

    def first_fails(matrix: Tensor) -> Any:
        calls.append(matrix.dtype)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("as told")
        return inner(matrix)

    def no_cholesky(matrix: Tensor) -> Any:
        return matrix, torch.ones(1)

    monkeypatch.setattr(torch.linalg, "eigh", first_fails)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_cholesky)
    block.refresh(DAMPING)
    assert block.retries >= 1
    assert block.solve(torch.ones(OUTPUTS, INPUTS, dtype=torch.float64), DAMPING).isfinite().all()
