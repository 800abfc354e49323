"""Eliminating a block of unknowns from a symmetric, perhaps indefinite system: factor, inertia, Schur complement."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import LinAlgError


class Elimination(ABC):
    """What is left of a block `T x + F y = r` after x is expressed by y.

    Attributes:
        size: Rows of T.
        logabsdet: `log |det T|`, which adds up over successive eliminations.
    """

    size: int
    logabsdet: float

    @property
    @abstractmethod
    def negative(self) -> int:
        """Negative eigenvalues of T, which add up over successive eliminations (Haynsworth 1968)."""

    @abstractmethod
    def schur(self) -> Tensor:
        """`Fᵀ T⁻¹ F`, `[a a]`: what the elimination takes away from the rest."""

    @abstractmethod
    def adjoint(self, r: Tensor) -> Tensor:
        """`Fᵀ T⁻¹ r`, `[a m]`."""

    @abstractmethod
    def recover(self, r: Tensor, y: Tensor | None) -> Tensor:
        """`x = T⁻¹ (r - F y)`, `[k m]`; without F no `y`."""


def eliminate(matrix: Tensor, coupling: Tensor | None = None) -> Elimination:
    """Factor a symmetric block: by Cholesky if it is positive definite, else by LDLᵀ, or LU where it is small.

    LAPACK's own solve with LDLᵀ runs at a sixth of the speed of its solve with LU; with L as a plain triangular matrix
    it takes two thirds of the time, but unpacking that costs a Python loop over the rows.

    Args:
        matrix: T, symmetric, `[k k]`.
        coupling: F `[k a]`; `None` if nothing else is coupled to it. It may be overwritten.

    Raises:
        LinAlgError: If T is singular or has entries that are not finite.

    >>> step = eliminate(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.eye(2))
    >>> step.negative, step.schur().tolist(), round(step.logabsdet, 4)
    (1, [[-0.3333333432674408, 0.6666666865348816], [0.6666666865348816, -0.3333333432674408]], 1.0986)
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and bool(lower.diagonal().sum().isfinite()):
        return _Definite(lower, coupling)
    return _Indefinite(matrix, coupling) if matrix.shape[0] >= _LARGE else _SmallIndefinite(matrix, coupling)


_LARGE = 256
"""Rows from which on LDLᵀ with an unpacked factor is faster than LU."""


def inertia_of_pivots(compact: Tensor, pivots: Tensor) -> int:
    """Negative eigenvalues of a symmetric matrix from `torch.linalg.ldl_factor`.

    D has blocks of one and two rows; a negative pivot marks a row of the latter. Bunch-Kaufman pivoting takes two rows
    only where their block is indefinite, so each counts one negative eigenvalue (Sylvester's law of inertia).

    >>> inertia_of_pivots(*torch.linalg.ldl_factor(torch.tensor([[0.0, 2.0], [2.0, 0.0]])))
    1
    """
    single = pivots > 0
    return int(((compact.diagonal() < 0) & single).sum()) + int((~single).sum()) // 2


def _cannot_eliminate(matrix: Tensor) -> RuntimeError:
    finite = bool(matrix.isfinite().all())
    return LinAlgError(
        f"a block of {matrix.shape[0]} unknowns cannot be eliminated: it "
        + ("is singular at this damping; change the damping a little" if finite else "has entries that are not finite")
    )


def _symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ right` where that is symmetric: of large ones only the lower panels are computed, and mirrored."""
    size = left.shape[1]
    if size < _LARGE:
        return left.mT @ right
    result = left.new_empty(size, size)
    # Six panels compute 7/12 of the entries; more would come nearer to 1/2, with products too narrow to be fast.
    panel = -(-size // 6)
    for start in range(0, size, panel):
        end = min(start + panel, size)
        torch.mm(left[:, start:end].mT, right[:, :end], out=result[start:end, :end])
        result[:start, start:end] = result[start:end, :start].mT
    return result


def _triangular(lower: Tensor, r: Tensor, transposed: bool = False, unit: bool = False) -> Tensor:
    """`L⁻¹ r` or `L⁻ᵀ r`."""
    factor = lower.mT if transposed else lower
    result: Tensor = torch.linalg.solve_triangular(factor, r, upper=transposed, unitriangular=unit)
    return result


class _Definite(Elimination):
    """`T = L Lᵀ`; kept are L and `L⁻¹ F`."""

    negative = 0

    def __init__(self, lower: Tensor, coupling: Tensor | None) -> None:
        self.size = lower.shape[0]
        self.logabsdet = 2.0 * float(lower.diagonal().log().sum())
        self._lower = lower
        self._half = None if coupling is None else _triangular(lower, coupling)

    def schur(self) -> Tensor:
        assert self._half is not None
        return _symmetric_product(self._half, self._half)

    def adjoint(self, r: Tensor) -> Tensor:
        assert self._half is not None
        return self._half.mT @ _triangular(self._lower, r)

    def recover(self, r: Tensor, y: Tensor | None) -> Tensor:
        half = _triangular(self._lower, r)
        if y is not None and self._half is not None:
            half = half - self._half @ y
        return _triangular(self._lower, half, transposed=True)


class _Indefinite(Elimination):
    """`T = Pᵀ L D Lᵀ P`, D of blocks of one and two rows; kept are L, D and `L⁻¹ P F`."""

    def __init__(self, matrix: Tensor, coupling: Tensor | None) -> None:
        compact, pivots, _ = torch.linalg.ldl_factor_ex(matrix)
        self.size, self._negative = compact.shape[0], inertia_of_pivots(compact, pivots)
        self._diagonal = compact.diagonal().clone().unsqueeze(-1)
        self._order, self._lower, self._pairs, self._beside = _unpack(compact, pivots)
        following = self._pairs + 1
        first, second = self._diagonal[self._pairs], self._diagonal[following]
        self._determinants = first * second - self._beside.square()
        single = torch.ones_like(self._diagonal, dtype=torch.bool)
        single[self._pairs] = single[following] = False
        sizes = torch.cat([self._diagonal[single], self._determinants.view(-1)]).abs()
        if not bool(((sizes > 0.0) & sizes.isfinite()).all()):
            raise _cannot_eliminate(matrix)
        self.logabsdet = float(sizes.log().sum())
        self._half = None if coupling is None else self._forward(coupling)

    @property
    def negative(self) -> int:
        return self._negative

    def _forward(self, r: Tensor) -> Tensor:
        return _triangular(self._lower, r[self._order], unit=True)

    def _divide(self, half: Tensor) -> Tensor:
        """`D⁻¹ half`."""
        result: Tensor = half / self._diagonal
        upper, lower = half[self._pairs], half[self._pairs + 1]
        first, second = self._diagonal[self._pairs], self._diagonal[self._pairs + 1]
        result[self._pairs] = (second * upper - self._beside * lower) / self._determinants
        result[self._pairs + 1] = (first * lower - self._beside * upper) / self._determinants
        return result

    def schur(self) -> Tensor:
        assert self._half is not None
        return _symmetric_product(self._half, self._divide(self._half))

    def adjoint(self, r: Tensor) -> Tensor:
        assert self._half is not None
        return self._half.mT @ self._divide(self._forward(r))

    def recover(self, r: Tensor, y: Tensor | None) -> Tensor:
        half = self._forward(r)
        if y is not None and self._half is not None:
            half = half - self._half @ y
        x = torch.empty_like(half)
        x[self._order] = _triangular(self._lower, self._divide(half), transposed=True, unit=True)
        return x


class _SmallIndefinite(Elimination):
    """`P T = L U`; kept are the factors, the gain `T⁻¹ F`, and T for its inertia."""

    def __init__(self, matrix: Tensor, coupling: Tensor | None) -> None:
        factors, swaps, info = torch.linalg.lu_factor_ex(matrix)
        pivots = factors.diagonal().abs()
        total = float(pivots.log().sum())
        if int(info) != 0 or not math.isfinite(total):
            raise _cannot_eliminate(matrix)
        self.size, self.logabsdet = matrix.shape[0], total
        self._matrix, self._factors = matrix, factors
        permutation, _, _ = torch.lu_unpack(factors, swaps, unpack_data=False)
        self._order = permutation.argmax(0)
        self._coupling = coupling
        self._gain: Tensor | None = None
        if coupling is not None:
            self._gain = torch.linalg.lu_solve(factors, swaps, coupling)

    @property
    def negative(self) -> int:
        """Counted when asked for: a solve does not need it."""
        return inertia_of_pivots(*torch.linalg.ldl_factor(self._matrix))

    def _solve(self, r: Tensor) -> Tensor:
        # For single columns an eighth of the time of LAPACK's getrs.
        half = torch.linalg.solve_triangular(self._factors, r[self._order], upper=False, unitriangular=True)
        result: Tensor = torch.linalg.solve_triangular(self._factors, half, upper=True)
        return result

    def schur(self) -> Tensor:
        assert self._coupling is not None
        assert self._gain is not None
        product = _symmetric_product(self._coupling, self._gain)
        self._coupling = None  # the gain is all that is needed from here on
        return product.add(product.mT).mul_(0.5)

    def adjoint(self, r: Tensor) -> Tensor:
        assert self._gain is not None
        return self._gain.mT @ r

    def recover(self, r: Tensor, y: Tensor | None) -> Tensor:
        x = self._solve(r)
        return x if y is None or self._gain is None else x - self._gain @ y


def _unpack(compact: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LAPACK's compact LDLᵀ as an order of rows, unit lower L, first rows of the blocks of two, their off-diagonals.

    `sytrf` leaves each row swap undone in the columns before it; here they are done (as `syconv` does).
    """
    size, swaps = compact.shape[0], pivots.tolist()
    lower, order, pairs, row = compact.clone(), list(range(compact.shape[0])), [], 0
    while row < size:
        width = 1 if swaps[row] > 0 else 2
        moved, other = row + width - 1, abs(swaps[row]) - 1
        if width == 2:
            pairs.append(row)
        if moved != other:
            order[moved], order[other] = order[other], order[moved]
            before = lower[:, :row]
            kept = before[moved].clone()
            before[moved] = before[other]
            before[other] = kept
        row += width
    first = torch.tensor(pairs, dtype=torch.long, device=compact.device)
    beside = compact[first + 1, first].unsqueeze(-1)
    lower[first + 1, first] = 0.0
    return torch.tensor(order, device=compact.device), lower, first, beside
