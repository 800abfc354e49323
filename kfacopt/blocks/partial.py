"""EKFAC of the dominant eigenvectors: cheaper than KFAC where the spectra are steep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfacopt.blocks.base import Block, Renewal
from kfacopt.blocks.coordinates import squared_coordinates
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import Rows
from kfacopt.linalg import kronecker
from kfacopt.linalg.moved import along_basis, largest_beside
from kfacopt.linalg.partial_basis import (
    Coefficients,
    WholeSide,
    apply,
    gram_of_long,
    steepest_of_long,
    whole_sides,
)
from kfacopt.linalg.polar import NewtonSchulz, PolarFactor
from kfacopt.linalg.symmetric import LinAlgError
from kfacopt.linalg.tensors import rows_of

# Below this size the whole basis costs less than handling two parts of it: products this small take as long as the
# calls that make them, and two parts take more calls. It changes speed, and that nothing of so small a side is cut.
_SMALLEST_CUT = 64


class PartialEigenBlock(FactoredBlock):
    """EKFAC in the eigenvectors whose eigenvalue is not small; the others are taken together, at their mean.

    The eigenvectors of A and of G with eigenvalues above `tail` times the factor's mean eigenvalue are kept. In the
    directions `u vᵀ` of two kept ones the eigenvalues are corrected (George et al. 2018), elsewhere they are the
    Kronecker product's, with the mean of the cut eigenvalues in place of each. The damping is that of
    `CorrectedEigenBlock`, `E + √damping (π λ_G + λ_A/π) + damping`, with the mean of the cut eigenvalues for each of
    them: it depends on λ_G and λ_A singly, so what is cut on one side only still has the other side's own. Where the
    spectra are steep a solve costs a fraction of the exact block's; where neither can be cut it is the exact block.

    Args:
        tail: Cut eigenvalues up to this multiple of the mean.
        exponent: Power of the damped eigenvalues to divide by.
        input_factor: Running average of A, `[i i]`.
        gradient_factor: Running average of G, `[o o]`.
        corrected: Running average of the corrected eigenvalues, `[k l]`, in the present basis.
    """

    title = "EKFAC, dominant part"
    rows_need_cache = True

    def __init__(self, tail: float, exponent: float = 1.0) -> None:
        super().__init__()
        self._tail, self._exponent = tail, exponent
        self.corrected = RunningAverage()
        self._left: _Side | None = None
        self._right: _Side | None = None
        self._powers: dict[tuple[float, float], tuple[Coefficients, WholeSide]] = {}

    def averages(self) -> dict[str, RunningAverage]:
        return super().averages() | {"corrected": self.corrected}

    def sides(self) -> tuple[_Side, _Side]:
        """What is kept of G's and of A's eigendecomposition."""
        if self._left is None or self._right is None:
            raise RuntimeError("this block has no eigenbasis yet: refresh() comes first")
        return self._left, self._right

    def update(self, rows: Rows) -> None:
        super().update(rows)
        if self._left is not None and self._right is not None:
            squares = squared_coordinates(rows, self._left.basis, self._right.basis)
            self.corrected.add(squares, rows.new_terms)

    def fold(self, decay: float) -> None:
        super().fold(decay)
        self._powers.clear()

    def decomposed(self, snapshot: Mapping[str, Tensor], damping: float) -> Renewal:
        try:
            found = kronecker.spectra([snapshot["gradient_factor"], snapshot["input_factor"]])
        except LinAlgError:
            return Renewal(None, 1)
        left, right = (_Side.of(values, basis, self._tail) for values, basis, _ in found if basis is not None)
        renewal = Renewal(_as_cache(left, right), sum(retries for *_, retries in found))
        if self._left is None or self._right is None:
            return renewal
        return renewal._replace(overlaps=(self._left.overlaps(left), self._right.overlaps(right)))

    def unmoved(self, snapshot: Mapping[str, Tensor], damping: float, tolerance: float) -> Renewal | None:
        old, names = self.sides(), ("gradient_factor", "input_factor")
        sides = [side.along(snapshot[name], self._tail, tolerance) for side, name in zip(old, names, strict=True)]
        left, right = sides
        return None if left is None or right is None else Renewal(_as_cache(left, right), 0)

    def renew(self, renewal: Renewal) -> None:
        (left, right), held = renewal.overlaps, self.corrected.value
        if held is not None and left is not None and right is not None:
            # diag of the held operator in the new directions: squared overlaps with the old ones and with their rest.
            self.corrected.value = left @ self._extended(held) @ right.mT
        super().renew(renewal)

    def _kept(self) -> Tensor:
        left, right = self.sides()
        return kronecker.outer(left.values, right.values) if self.corrected.value is None else self.corrected.value

    def _extended(self, kept: Tensor) -> Tensor:
        """Eigenvalues `[k + 1, l + 1]`: the kept ones, and in the last row and column those of the rest."""
        left, right = self.sides()
        values = kronecker.outer(left.with_rest(), right.with_rest())
        values[:-1, :-1] = kept
        return values

    def _coefficients(self, damping: float) -> Coefficients:
        """Damped eigenvalues."""
        left, right = self.sides()
        mean_left, mean_right = left.mean(), right.mean()
        values = kronecker.damp_by_means(
            self._extended(self._kept()), left.with_rest(), right.with_rest(), mean_left, mean_right, damping
        )
        return Coefficients(values[:-1, :-1], values[:-1, -1], values[-1, :-1], values[-1, -1])

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        return self._power(matrix, damping, -self._exponent)

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        left, right = self.sides()
        if left.cut or right.cut:  # S is the symmetric root
            return self._power(matrix, damping, -0.5 * self._exponent)
        at, _ = self._powers_of(damping, -0.5 * self._exponent)
        return kronecker.rotate(left.basis, matrix, right.basis).mul_(at.both)  # S ends in coordinates

    def unwhiten(self, matrix: Tensor, damping: float) -> Tensor:
        left, right = self.sides()
        if left.cut or right.cut:
            return self._power(matrix, damping, -0.5 * self._exponent)
        at, _ = self._powers_of(damping, -0.5 * self._exponent)
        return kronecker.rotate_back(left.basis, matrix * at.both, right.basis)

    @staticmethod
    def steepest(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float], polar: PolarFactor) -> Tensor:
        is_wide = matrices.shape[-2] < matrices.shape[-1]
        long = matrices.mT if is_wide else matrices
        held = [block for block in blocks if isinstance(block, PartialEigenBlock)]
        cut = all(any(side.cut for side in block.sides()) for block in held)
        if not cut or not isinstance(polar, NewtonSchulz) or not polar.is_long(long):
            return Block.steepest(blocks, matrices, dampings, polar)
        wide = matrices if is_wide else matrices.mT
        parts = [block._along(damping, is_wide) for block, damping in zip(held, dampings, strict=True)]
        found = [gram_of_long(matrix, *part) for matrix, part in zip(wide, parts, strict=True)]
        roots = polar.inverse_root(rows_of([one.gram for one in found]))
        ends = zip(wide, parts, found, roots, strict=True)
        result = rows_of([steepest_of_long(matrix, *part[:3], one, root) for matrix, part, one, root in ends])
        return result if is_wide else result.mT

    def _along(self, damping: float, is_wide: bool) -> tuple[Tensor, Tensor, Coefficients, WholeSide]:
        """Bases, coefficients and whole side of S, or of a tall matrix' transposed one."""
        (left, right), (at, whole) = self.sides(), self._powers_of(damping, -0.5 * self._exponent)
        if is_wide:
            return left.basis, right.basis, at, whole
        turned = Coefficients(at.both.mT, at.right, at.left, at.neither)
        return right.basis, left.basis, turned, WholeSide(whole.on_right, whole.on_left)

    def _power(self, matrix: Tensor, damping: float, exponent: float) -> Tensor:
        """A power of the damped operator times `matrix`."""
        left, right = self.sides()
        return apply(matrix, left.basis, right.basis, *self._powers_of(damping, exponent))

    def _powers_of(self, damping: float, exponent: float) -> tuple[Coefficients, WholeSide]:
        """Coefficients of a power of the damped operator; they are kept while statistics and damping stay."""
        left, right = self.sides()
        key = damping, exponent
        if key not in self._powers:
            self._powers = {k: v for k, v in self._powers.items() if k[0] == damping}
            at = Coefficients(*(value.pow(exponent) for value in self._coefficients(damping)))
            self._powers[key] = at, whole_sides(left.basis, right.basis, at)
        return self._powers[key]

    def matvec(self, matrix: Tensor) -> Tensor:
        left, right = self.sides()
        values = self._extended(self._kept())
        at = Coefficients(values[:-1, :-1], values[:-1, -1], values[-1, :-1], values[-1, -1])
        return apply(matrix, left.basis, right.basis, at, whole_sides(left.basis, right.basis, at))

    def eigenvalues(self) -> Tensor:
        left, right = self.sides()
        values = self._extended(self._kept())
        return values.repeat_interleave(left.multiplicity(), 0).repeat_interleave(right.multiplicity(), 1)

    def trace(self) -> Tensor:
        left, right = self.sides()
        values = self._extended(self._kept())
        return left.multiplicity().to(values) @ values @ right.multiplicity().to(values)

    def condition(self, damping: float) -> Tensor:
        values = torch.cat([value.flatten() for value in self._coefficients(damping)])
        return values.max() / values.min()

    def renewed(self) -> dict[str, Tensor | None]:
        return super().renewed() | {"corrected": self.corrected.value}

    def take_renewed(self, renewed: dict[str, Tensor | None]) -> None:
        super().take_renewed(renewed)
        self.corrected.value = renewed["corrected"]

    def cache(self) -> dict[str, Tensor | None]:
        return _as_cache(self._left, self._right)

    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        sides = []
        for name in ("gradient", "input"):
            basis, values, rest = (cache[f"{name}_{part}"] for part in ("basis", "eigenvalues", "rest"))
            whole = basis is not None and values is not None and rest is not None
            sides.append(_Side(basis, values, rest) if whole else None)  # type: ignore[arg-type]
        self._left, self._right = sides
        self._powers.clear()


def _as_cache(left: _Side | None, right: _Side | None) -> dict[str, Tensor | None]:
    result: dict[str, Tensor | None] = {}
    for name, side in (("gradient", left), ("input", right)):
        result[f"{name}_basis"] = None if side is None else side.basis
        result[f"{name}_eigenvalues"] = None if side is None else side.values
        result[f"{name}_rest"] = None if side is None else side.rest
    return result


class _Side:
    """What is kept of a factor's eigendecomposition: basis `[d k]`, values `[k]`, the mean `rest` of the others."""

    def __init__(self, basis: Tensor, values: Tensor, rest: Tensor) -> None:
        self.basis, self.values, self.rest = basis, values, rest

    @classmethod
    def of(cls, values: Tensor, basis: Tensor, tail: float) -> _Side:
        size = len(values)
        kept = int((values > tail * values.mean()).sum())
        # More than half kept saves nothing: then the whole side goes into one product.
        if size <= _SMALLEST_CUT or 2 * kept > size or kept == 0:
            return cls(basis, values, values.new_zeros(()))
        cut = size - kept
        return cls(basis[:, cut:].contiguous(), values[cut:].contiguous(), values[:cut].mean())

    def along(self, factor: Tensor, tail: float, tolerance: float) -> _Side | None:
        """The same directions with the eigenvalues of a factor that moved; None if they have become others.

        They have if more than the share `tolerance` of the factor's norm is beside them, or if in what was cut there is
        a direction that would be kept, by more than that.
        """
        values, share = along_basis(factor, self.basis)
        if not bool(share <= tolerance):
            return None
        trace, size = factor.diagonal().sum(), len(factor)
        if not self.cut:
            return _Side(self.basis, values.clamp_min(0.0), self.rest)
        allowed = tail * trace / size + tolerance * factor.norm()
        if not bool(largest_beside(factor, self.basis) <= allowed):
            return None
        return _Side(self.basis, values.clamp_min(0.0), ((trace - values.sum()) / self.cut).clamp_min(0.0))

    @property
    def cut(self) -> int:
        """How many eigenvectors are not kept."""
        return self.basis.shape[0] - self.basis.shape[1]

    def with_rest(self) -> Tensor:
        return torch.cat([self.values, self.rest.reshape(1)])

    def multiplicity(self) -> Tensor:
        ones = torch.ones(len(self.values) + 1, dtype=torch.long, device=self.values.device)
        ones[-1] = self.cut
        return ones

    def mean(self) -> Tensor:
        return (self.values.sum() + self.cut * self.rest) / self.basis.shape[0]

    def overlaps(self, new: _Side) -> Tensor:
        """Squared lengths `[k', k + 1]` of the new kept directions along each old one, and in the old ones' rest."""
        along = (new.basis.mT @ self.basis).square()
        return torch.cat([along, (1.0 - along.sum(-1, keepdim=True)).clamp_min(0.0)], dim=-1)
