"""KFAC: one Kronecker product a layer, inverted factor by factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kfacopt.blocks.base import Block, Renewal
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.blocks.sides import Diagonals
from kfacopt.linalg import alignment, kronecker
from kfacopt.linalg.moved import inverse_error
from kfacopt.linalg.polar import NewtonSchulz, PolarFactor, product
from kfacopt.linalg.symmetric import LinAlgError
from kfacopt.linalg.tensors import held_as_rows


class KroneckerBlock(FactoredBlock):
    """`G ⊗ A` with the damped inverse `(G + √damping/π I)^-1 ⊗ (A + π √damping I)^-1`.

    Kronecker factors of Martens & Grosse 2015 (for weight sharing: Eschenhagen et al. 2023), inverted by Cholesky with
    the π-split of the damping (`kfacopt.linalg.kronecker.pi_split`). The damping of the last `refresh` counts.

    Args:
        exponent: Power of the damped factors to divide by; other powers than 1 take an eigendecomposition.
        diagonals: Which factors are their diagonals.
        input_factor: Running average of A, `[*k i i]` or the diagonal `[i]`.
        gradient_factor: Running average of G, `[*k o o]` or the diagonal `[o]`.
    """

    title = "KFAC"
    symmetric_cache = frozenset({"inverse_gradient_factor", "inverse_input_factor"})

    def __init__(self, exponent: float = 1.0, diagonals: Diagonals = Diagonals()) -> None:  # noqa: B008
        super().__init__(diagonals)
        self._exponent = exponent
        self._inverses: tuple[Tensor, Tensor] | None = None
        self._roots: list[Tensor | None] = [None, None]

    def decomposed(self, snapshot: Mapping[str, Tensor], damping: float) -> Renewal:
        left, right = snapshot["gradient_factor"], snapshot["input_factor"]
        damping_left, damping_right = kronecker.pi_split(left, right, damping)
        try:
            inverse_left = kronecker.inverse(left, damping_left, self._exponent)
            inverse_right = kronecker.inverse(right, damping_right, self._exponent)
        except LinAlgError:
            return Renewal(None, 1)
        aligned = alignment.square(inverse_right.value)
        cache = {"inverse_gradient_factor": inverse_left.value, "inverse_input_factor": aligned}
        return Renewal(cache, inverse_left.retries + inverse_right.retries)

    def unmoved(self, snapshot: Mapping[str, Tensor], damping: float, tolerance: float) -> Renewal | None:
        factors = snapshot["gradient_factor"], snapshot["input_factor"]
        for factor, shift, inverse in zip(factors, kronecker.pi_split(*factors, damping), self._cached(), strict=True):
            size = factor.shape[-1]
            own = inverse if factor.ndim == 1 else inverse[..., :size, :size]
            error = inverse_error(factor, shift, own, self._exponent)
            if error is None or not bool(error <= tolerance):
                return None
        return Renewal(None, 0)

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        return _solved(*self._cached(), matrix)

    @staticmethod
    def solve_together(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float]) -> Tensor:
        if any(blocks[0].diagonals):  # of one shape: so are all
            return Block.solve_together(blocks, matrices, dampings)
        held = [block for block in blocks if isinstance(block, KroneckerBlock)]
        if len(held) == 1:
            return _solved(*held[0]._cached(), matrices[0]).unsqueeze(0)
        return _solved(*_inverses_of(held), matrices)

    @staticmethod
    def steepest(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float], polar: PolarFactor) -> Tensor:
        is_wide = matrices.shape[-2] < matrices.shape[-1]
        long = matrices.mT if is_wide else matrices
        if any(blocks[0].diagonals) or not isinstance(polar, NewtonSchulz) or not polar.is_long(long):
            return Block.steepest(blocks, matrices, dampings, polar)
        held = [block for block in blocks if isinstance(block, KroneckerBlock)]
        left, right = _inverses_of(held)
        # Of a wide M, S polar(Sᵀ M) = S_G (S_Gᵀ M S_A S_Aᵀ Mᵀ S_G)^(-1/2) S_Gᵀ M S_A S_Aᵀ: where whitening and its
        # adjoint each multiply with a root of the long side's inverse, this meets the inverse once.
        solved = _from_right(matrices, right) if is_wide else product(left, matrices)
        gram = product(solved, matrices.mT) if is_wide else product(matrices.mT, solved)
        root = _short_roots(held, 0 if is_wide else 1)
        inverse_root = polar.inverse_root(product(product(root.mT, gram), root))
        factor = product(product(root, inverse_root), root.mT)
        return product(factor, solved) if is_wide else product(solved, factor)

    def _cached(self) -> tuple[Tensor, Tensor]:
        if self._inverses is None:
            raise RuntimeError("this block has no inverse yet: refresh() comes before solve()")
        return self._inverses

    @property
    def ready(self) -> bool:
        return self._inverses is not None

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        return kronecker.transposed_sandwich(self._root(0), matrix, self._root(1))

    def unwhiten(self, matrix: Tensor, damping: float) -> Tensor:
        return kronecker.sandwich(self._root(0), matrix, self._root(1))

    def _root(self, side: int) -> Tensor:
        """S_G (side 0) or S_A (side 1), whose Kronecker product is the S of `whiten`; made when first asked for."""
        root = self._roots[side]
        if root is None:
            inverse = self._cached()[side]
            if side == 1 and inverse.ndim > 1:
                size = self.factors()[1].shape[-1]
                inverse = inverse[..., :size, :size]  # without the zeros of its alignment
            self._roots[side] = root = kronecker.root(inverse)
        return root

    def matvec(self, matrix: Tensor) -> Tensor:
        left, right = self.factors()
        return kronecker.multiply(left, matrix, right)

    def eigenvalues(self) -> Tensor:
        left, right = self.factors()
        return kronecker.outer(kronecker.spectrum(left)[0], kronecker.spectrum(right)[0])

    def trace(self) -> Tensor:
        left, right = self.factors()
        return (kronecker.trace(left) * kronecker.trace(right)).sum()

    def frobenius_norm(self) -> Tensor:
        left, right = self.factors()
        return (kronecker.squared_norm(left) * kronecker.squared_norm(right)).sum().sqrt()

    def condition(self, damping: float) -> Tensor:
        # An estimate that costs no decomposition: the norms of the damped factors and of their cached inverses.
        if self._inverses is None:
            return super().condition(damping)
        (left, right), (inverse_left, inverse_right) = self.factors(), self._inverses
        dampings = kronecker.pi_split(left, right, damping)
        largest = [_row_norm(f) + d.max() for f, d in zip((left, right), dampings, strict=True)]
        reciprocals = [_row_norm(inverse).pow(1.0 / self._exponent) for inverse in (inverse_left, inverse_right)]
        return largest[0] * reciprocals[0] * largest[1] * reciprocals[1]

    def cache(self) -> dict[str, Tensor | None]:
        left, right = self._inverses if self._inverses is not None else (None, None)
        return {"inverse_gradient_factor": left, "inverse_input_factor": right}

    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        left, right = cache["inverse_gradient_factor"], cache["inverse_input_factor"]
        self._inverses = None if left is None or right is None else (left, right)
        self._roots = [None, None]


def _inverses_of(blocks: Sequence[KroneckerBlock]) -> tuple[Tensor, Tensor]:
    """The inverse factors of each as one `[b ..]`; the blocks hold views of it then: it is made once a refresh."""
    lefts, rights = zip(*(block._cached() for block in blocks), strict=True)
    if len(blocks) == 1:
        return lefts[0].unsqueeze(0), rights[0].unsqueeze(0)
    (left, on_left), (right, on_right) = held_as_rows(lefts), held_as_rows(rights)
    for block, inverses in zip(blocks, zip(on_left, on_right, strict=True), strict=True):
        block._inverses = inverses
    return left, right


def _short_roots(blocks: Sequence[KroneckerBlock], side: int) -> Tensor:
    """The roots of one side as one `[b ..]`, held as in `_inverses_of`."""
    whole, views = held_as_rows([block._root(side) for block in blocks])
    for block, view in zip(blocks, views, strict=True):
        block._roots[side] = view
    return whole


def _from_right(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix @ right` `[*k o i]`, of a right side with zeros for further inputs, too."""
    size = matrix.shape[-1]
    if right.shape[-1] == size:
        return product(matrix, right)
    return product(alignment.wide(matrix), right)[..., :size]


def _solved(left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    size = matrix.shape[-1]
    padded = alignment.wide(matrix) if right.shape[-1] > size else matrix
    return kronecker.multiply(left, padded, right)[..., :size]


def _row_norm(factor: Tensor) -> Tensor:
    """Largest absolute row sum: a bound on the spectral norm."""
    return factor.abs().max() if factor.ndim == 1 else factor.abs().sum(-1).max()
