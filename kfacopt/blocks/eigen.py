"""Kronecker eigenbases: KFAC with exact damping, and EKFAC's corrected eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfacopt.blocks.base import Block, Renewal
from kfacopt.blocks.by_rows import in_pieces, steepest_by_rows, times_by_rows
from kfacopt.blocks.coordinates import squared_coordinates
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.blocks.sides import Diagonals
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import Rows
from kfacopt.linalg import kronecker
from kfacopt.linalg.moved import along_basis
from kfacopt.linalg.polar import NewtonSchulz, PolarFactor
from kfacopt.linalg.symmetric import LinAlgError, refine_basis
from kfacopt.linalg.tensors import rows_of

_ALL = slice(None)


class EigenBlock(FactoredBlock):
    """`(Q_G ⊗ Q_A) diag(λ_G λ_Aᵀ) (Q_G ⊗ Q_A)ᵀ`: KFAC whose damping is added to the eigenvalues, exactly.

    Args:
        diagonals: Which factors are their diagonals; their eigenbasis is the identity.
        input_factor: Running average of A, `[*k i i]` or the diagonal `[i]`.
        gradient_factor: Running average of G, `[*k o o]` or the diagonal `[o]`.
    """

    title = "KFAC, eigenbasis"

    def __init__(self, diagonals: Diagonals = Diagonals()) -> None:  # noqa: B008 - it is immutable
        super().__init__(diagonals)
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._values_left: Tensor | None = None
        self._values_right: Tensor | None = None
        self._reciprocal: tuple[float, Tensor] | None = None  # of `_reciprocals`, or of `_roots`

    def basis(self) -> tuple[Tensor | None, Tensor | None]:
        """Eigenbases Q_G `[*k o o]` and Q_A `[*k i i]` (None: the identity)."""
        if self._values_left is None:
            raise RuntimeError("this block has no eigenbasis yet: refresh() comes first")
        return self._left, self._right

    def factor_eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues λ_G `[*k o]` and λ_A `[*k i]` of the factors at the last change of the basis."""
        if self._values_left is None or self._values_right is None:
            raise RuntimeError("this block has no eigenvalues yet: refresh() comes first")
        return self._values_left, self._values_right

    def fold(self, decay: float) -> None:
        super().fold(decay)
        self._reciprocal = None

    def decomposed(self, snapshot: Mapping[str, Tensor], damping: float) -> Renewal:
        try:
            left, right = kronecker.spectra([snapshot["gradient_factor"], snapshot["input_factor"]])
        except LinAlgError:
            return Renewal(None, 1)
        (values_left, basis_left, retries_left), (values_right, basis_right, retries_right) = left, right
        cache = {
            "gradient_basis": basis_left,
            "input_basis": basis_right,
            "gradient_eigenvalues": values_left,
            "input_eigenvalues": values_right,
        }
        return Renewal(cache, retries_left + retries_right)

    def unmoved(self, snapshot: Mapping[str, Tensor], damping: float, tolerance: float) -> Renewal | None:
        cache = self.cache()
        for side in ("gradient", "input"):
            factor, basis = snapshot[f"{side}_factor"], cache[f"{side}_basis"]
            if basis is None:
                cache[f"{side}_eigenvalues"] = factor.clamp_min(0.0)
                continue
            values, share = along_basis(factor, basis)
            if not bool(share <= tolerance):
                return None
            cache[f"{side}_eigenvalues"] = values.clamp_min(0.0)
        return Renewal(cache, 0)

    def refine(self) -> None:
        """Bring the basis nearer to the statistics by one warm-started QR step, at about half an eigh's cost."""
        left, right = self.factors()
        basis_left, basis_right = self.basis()
        (values_left, new_left), (values_right, new_right) = _refined(left, basis_left), _refined(right, basis_right)
        self._change_basis(new_left, new_right, values_left, values_right)

    def _change_basis(
        self, left: Tensor | None, right: Tensor | None, values_left: Tensor, values_right: Tensor
    ) -> None:
        self._left, self._right = left, right
        self._values_left, self._values_right = values_left, values_right
        self._reciprocal = None

    def divisors(self, damping: float) -> Callable[[slice, slice], Tensor]:
        """What `solve` divides the coordinates by, `[*k o i]`, of some outputs and inputs."""
        left, right = self.factor_eigenvalues()
        return lambda outputs, inputs: kronecker.outer(left[..., outputs], right[..., inputs]).add_(damping)

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        left, right = self.basis()
        if left is None or right is None:
            return self._by_rows(matrix, damping, torch.Tensor.reciprocal_, to=True, back=True)
        coordinates = kronecker.rotate(left, matrix, right)
        return kronecker.rotate_back(left, coordinates.mul_(self._reciprocals(damping)), right)

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        left, right = self.basis()
        if left is None or right is None:
            return self._by_rows(matrix, damping, torch.Tensor.rsqrt_, to=True, back=False)
        return kronecker.rotate(left, matrix, right) * self._reciprocals(damping).sqrt()

    def unwhiten(self, matrix: Tensor, damping: float) -> Tensor:
        left, right = self.basis()
        if left is None or right is None:
            return self._by_rows(matrix, damping, torch.Tensor.rsqrt_, to=False, back=True)
        return kronecker.rotate_back(left, matrix * self._reciprocals(damping).sqrt(), right)

    @staticmethod
    def steepest(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float], polar: PolarFactor) -> Tensor:
        held = [block for block in blocks if isinstance(block, EigenBlock)]
        left, right = held[0].basis()  # of blocks of one shape: so are all
        turned, long = right is None, matrices.mT if right is None else matrices
        if (left is None) == (right is None) or not isinstance(polar, NewtonSchulz) or not polar.is_long(long):
            return Block.steepest(blocks, matrices, dampings, polar)
        found = []
        for block, matrix, damping in zip(held, long, dampings, strict=True):
            basis = next(q for q in block.basis() if q is not None)
            found.append(steepest_by_rows(matrix, basis, block._roots(damping), polar))
        return rows_of(found).mT if turned else rows_of(found)

    def _by_rows(
        self, matrix: Tensor, damping: float, power: Callable[[Tensor], Tensor], to: bool, back: bool
    ) -> Tensor:
        """Where one basis is the identity: coordinates (if not `to`, they are given) times a power of `divisors`."""
        left, right = self.basis()
        values = self._of_rows(damping, power)
        if left is None:
            return times_by_rows(matrix, right, values, to, back)
        return times_by_rows(matrix.mT, left, values, to, back).mT

    def _of_rows(self, damping: float, power: Callable[[Tensor], Tensor]) -> Callable[[slice], Tensor]:
        """A power of `divisors` along some entries of the side whose basis is the identity, `[m' d]`."""
        divisors = self.divisors(damping)
        if self._left is None:
            return lambda some: power(divisors(some, _ALL))
        return lambda some: power(divisors(_ALL, some)).mT

    def _roots(self, damping: float) -> Tensor:
        """What `whiten` multiplies coordinates with, `[m d]` with the side first whose basis is the identity; kept.

        Of a vocabulary it is as large as the parameters once more, and a step takes three quarters of the time.
        """
        if self._reciprocal is None or self._reciprocal[0] != damping:
            left, right = self.factor_eigenvalues()
            sides = (len(left), len(right)) if self._left is None else (len(right), len(left))
            self._reciprocal = damping, in_pieces(self._of_rows(damping, torch.Tensor.rsqrt_), sides)
        return self._reciprocal[1]

    def _reciprocals(self, damping: float) -> Tensor:
        """What `solve` multiplies the coordinates with, `[*k o i]`; kept while statistics and damping stay."""
        if self._reciprocal is None or self._reciprocal[0] != damping:
            self._reciprocal = damping, self.divisors(damping)(_ALL, _ALL).reciprocal_()
        return self._reciprocal[1]

    def matvec(self, matrix: Tensor) -> Tensor:
        left, right = self.basis()
        return kronecker.rotate_back(left, kronecker.rotate(left, matrix, right) * self.eigenvalues(), right)

    def eigenvalues(self) -> Tensor:
        return kronecker.outer(*self.factor_eigenvalues())

    def cache(self) -> dict[str, Tensor | None]:
        return {
            "gradient_basis": self._left,
            "input_basis": self._right,
            "gradient_eigenvalues": self._values_left,
            "input_eigenvalues": self._values_right,
        }

    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        self._left, self._right = cache["gradient_basis"], cache["input_basis"]
        self._values_left, self._values_right = cache["gradient_eigenvalues"], cache["input_eigenvalues"]
        self._reciprocal = None


class CorrectedEigenBlock(EigenBlock):
    """EKFAC: the Kronecker eigenbasis with the curvature's own second moments along it (George et al. 2018).

    The corrected eigenvalues `E = (1/M) Σ_vn ((Q_Gᵀ (Σ_s g aᵀ) Q_A)²)` are a running average of their own, updated with
    every batch of rows between two changes of the basis; they start as the Kronecker eigenvalues. When the basis
    changes, the diagonal of the operator held so far is taken over into the new basis, exactly.

    The damping acts as KFAC's does (Martens & Grosse 2015, section 6.3), with E in place of the product of the factors'
    eigenvalues. KFAC damps each factor, for its inverse is then again a Kronecker product. Both damped factors have the
    eigenvectors of the undamped ones, so that in the direction of one eigenvector of each the eigenvalue is

        (λ_G + √damping/π) (λ_A + π √damping) = λ_G λ_A + √damping (π λ_G + λ_A/π) + damping

    EKFAC says that λ_G λ_A is wrong there and E right. Putting E in its place, and leaving the rest, gives

        E + √damping (π λ_G + λ_A/π) + damping

    which is KFAC's damped operator where E = λ_G λ_A. π balances the two terms in the middle (`kronecker.pi_split`):
    on the average eigenvalue of each factor they are equal. They are small only where both eigenvalues are, so that
    directions in which E is small because one of them is are held back far more than by adding `damping` alone; without
    that EKFAC trained worse than KFAC on the deep autoencoder.

    Args:
        exponent: Power of the damped eigenvalues to divide by.
        diagonals: Which factors are their diagonals: E is of the curvature itself all the same, along the identity.
        corrected: Running average of E, `[*k o i]`, in the present basis.
    """

    title = "EKFAC"
    rows_need_cache = True

    def __init__(self, exponent: float = 1.0, diagonals: Diagonals = Diagonals()) -> None:  # noqa: B008
        super().__init__(diagonals)
        self._exponent = exponent
        self.corrected = RunningAverage()

    def averages(self) -> dict[str, RunningAverage]:
        return super().averages() | {"corrected": self.corrected}

    def update(self, rows: Rows) -> None:
        super().update(rows)
        if self._values_left is not None:
            self.corrected.add(squared_coordinates(rows, *self.basis()), rows.new_terms)

    def decomposed(self, snapshot: Mapping[str, Tensor], damping: float) -> Renewal:
        found = super().decomposed(snapshot, damping)
        if found.cache is None:
            return found
        return found._replace(overlaps=self._overlaps(found.cache["gradient_basis"], found.cache["input_basis"]))

    def renew(self, renewal: Renewal) -> None:
        self._carry_over(renewal.overlaps)
        super().renew(renewal)

    def renewed(self) -> dict[str, Tensor | None]:
        return super().renewed() | {"corrected": self.corrected.value}

    def take_renewed(self, renewed: dict[str, Tensor | None]) -> None:
        super().take_renewed(renewed)
        self.corrected.value = renewed["corrected"]

    def eigenvalues(self) -> Tensor:
        return super().eigenvalues() if self.corrected.value is None else self.corrected.value

    def divisors(self, damping: float) -> Callable[[slice, slice], Tensor]:
        left, right = self.factor_eigenvalues()
        on_left, on_right = kronecker.damping_terms(left, right, left.mean(-1), right.mean(-1), damping)
        held, exponent = self.corrected.value, self._exponent

        def of(outputs: slice, inputs: slice) -> Tensor:
            if held is None:
                values = kronecker.outer(left[..., outputs], right[..., inputs])
            else:
                values = held[..., outputs, inputs]
            values = (values + on_left[..., outputs].unsqueeze(-1)).add_(on_right[..., inputs].unsqueeze(-2))
            return values if exponent == 1.0 else values.pow_(exponent)

        return of

    def _change_basis(
        self, left: Tensor | None, right: Tensor | None, values_left: Tensor, values_right: Tensor
    ) -> None:
        if self.corrected.value is not None:
            self._carry_over(self._overlaps(left, right))
        super()._change_basis(left, right, values_left, values_right)

    def _overlaps(self, left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Squared overlaps `[*k d d]` of the directions of a new basis with those of the present one."""
        pairs = ((left, self._left), (right, self._right))
        on_left, on_right = (None if a is None or b is None else (a.mT @ b).square() for a, b in pairs)
        return on_left, on_right

    def _carry_over(self, overlaps: tuple[Tensor | None, Tensor | None]) -> None:
        """The corrected eigenvalues in a new basis: the diagonal that the operator held so far has there."""
        (left, right), held = overlaps, self.corrected.value
        if held is None:
            return
        if left is not None:
            held = kronecker.from_left(left, held)
        if right is not None:
            held = held @ right.mT
        self.corrected.value = held


def _refined(factor: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenbasis of a factor after one more QR step; of a diagonal one there is nothing to refine."""
    if basis is None:
        return factor.clamp_min(0.0), None
    better = refine_basis(factor, basis)
    return (better * (factor @ better)).sum(-2), better
