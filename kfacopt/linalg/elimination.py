"""Eliminating a block of unknowns from a symmetric, perhaps indefinite system: factor, inertia, Schur complement."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import LinAlgError


class Elimination(ABC):
    """What is left of a block `T x + F y = r` after x is expressed by y.

    Attributes:
        size: Rows of T.
        negative: Negative eigenvalues of T, which add up over successive eliminations (Haynsworth 1968).
        logabsdet: `log |det T|`, which adds up likewise.
    """

    size: int
    negative: int
    logabsdet: float

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
    """Factor a symmetric block: by Cholesky if it is positive definite, else by LU and, for its inertia, LDLᵀ.

    Cholesky is tried first because it costs a third: LAPACK's solve with LDLᵀ runs at a sixth of the speed of its
    solve with LU.

    Args:
        matrix: T, symmetric, `[k k]`.
        coupling: F `[k a]`; `None` if nothing else is coupled to it.

    Raises:
        LinAlgError: If T is singular or has entries that are not finite.

    >>> step = eliminate(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.eye(2))
    >>> step.negative, step.schur().tolist(), round(step.logabsdet, 4)
    (1, [[-0.3333333432674408, 0.6666666865348816], [0.6666666865348816, -0.3333333432674408]], 1.0986)
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and bool(lower.diagonal().sum().isfinite()):
        return _Definite(lower, coupling)
    return _Indefinite(matrix, coupling)


def inertia_of_pivots(compact: Tensor, pivots: Tensor) -> int:
    """Negative eigenvalues of a symmetric matrix from `torch.linalg.ldl_factor`.

    D has blocks of one and two rows; a negative pivot marks a row of the latter. Bunch-Kaufman pivoting takes two rows
    only where their block is indefinite, so each counts one negative eigenvalue (Sylvester's law of inertia).

    >>> inertia_of_pivots(*torch.linalg.ldl_factor(torch.tensor([[0.0, 2.0], [2.0, 0.0]])))
    1
    """
    single = pivots > 0
    pairs = int((~single).sum()) // 2
    return pairs + int((compact.diagonal()[single] < 0).sum())


class _Definite(Elimination):
    """`T = L Lᵀ`; kept are L and `L⁻¹ F`."""

    def __init__(self, lower: Tensor, coupling: Tensor | None) -> None:
        self.size, self.negative = lower.shape[0], 0
        self._lower = lower
        self._half = None if coupling is None else torch.linalg.solve_triangular(lower, coupling, upper=False)

    @property
    def logabsdet(self) -> float:  # type: ignore[override]
        return 2.0 * float(self._lower.diagonal().log().sum())

    def schur(self) -> Tensor:
        assert self._half is not None
        return self._half.mT @ self._half

    def adjoint(self, r: Tensor) -> Tensor:
        assert self._half is not None
        return self._half.mT @ torch.linalg.solve_triangular(self._lower, r, upper=False)

    def recover(self, r: Tensor, y: Tensor | None) -> Tensor:
        half = torch.linalg.solve_triangular(self._lower, r, upper=False)
        if y is not None and self._half is not None:
            half = half - self._half @ y
        return torch.linalg.solve_triangular(self._lower.mT, half, upper=True)


class _Indefinite(Elimination):
    """`P T = L U`; kept are the factors and the gain `T⁻¹ F`."""

    def __init__(self, matrix: Tensor, coupling: Tensor | None) -> None:
        self._factors, self._pivots, info = torch.linalg.lu_factor_ex(matrix)
        if int(info) != 0 or not bool(self._factors.diagonal().sum().isfinite()):
            finite = bool(matrix.isfinite().all())
            raise LinAlgError(
                f"a block of {matrix.shape[0]} unknowns cannot be eliminated: it is "
                + ("singular at this damping, change the damping a little" if finite else "not finite")
            )
        self.size = matrix.shape[0]
        self.negative = inertia_of_pivots(*torch.linalg.ldl_factor(matrix))
        self.logabsdet = float(self._factors.diagonal().abs().log().sum())
        self._coupling = coupling
        self._gain = None if coupling is None else self._solve(coupling)

    def _solve(self, r: Tensor) -> Tensor:
        result: Tensor = torch.linalg.lu_solve(self._factors, self._pivots, r)
        return result

    def schur(self) -> Tensor:
        assert self._coupling is not None
        assert self._gain is not None
        product = self._coupling.mT @ self._gain
        self._coupling = None  # the gain is all that is needed from here on
        return product.add(product.mT).mul_(0.5)

    def adjoint(self, r: Tensor) -> Tensor:
        assert self._gain is not None
        return self._gain.mT @ r

    def recover(self, r: Tensor, y: Tensor | None) -> Tensor:
        x = self._solve(r)
        return x if y is None or self._gain is None else x - self._gain @ y
