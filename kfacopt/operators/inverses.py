"""Inverses that are computed anew in every product: conjugate gradients, LSMR, truncated Neumann series.

The interface is that of curvlinops 3.0.1, without its dependencies. Each operator says in `stats` how the last product
went, and warns with a `ConvergenceWarning` where that is not what was asked for.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.column_cg import conjugate_gradient_columns
from kfacopt.linalg.lsmr import LSMRInfo, lsmr
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.tensors import flat_columns, split_columns
from kfacopt.operators.convergence import ConvergenceWarning

Preconditioner = LinearOperator | Callable[[Tensor], Tensor]


class InverseStats(NamedTuple):
    """How one column of the last product was found.

    Attributes:
        iterations: Products with the operator (terms of the series).
        residual: `‖b - A x‖ / ‖b‖`, computed from the solution, not by recurrence; 0 for b = 0.
        converged: Whether that is within the tolerance.
        negative_curvature: Whether a direction without positive curvature ended the iteration.
    """

    iterations: int
    residual: float
    converged: bool
    negative_curvature: bool = False


class _InverseLinearOperator(LinearOperator):
    """The inverse of a square operator, whose device and dtype it has."""

    def __init__(self, A: LinearOperator) -> None:
        if A._in_shape != A._out_shape:
            raise ValueError(
                f"only a square operator has an inverse: {type(A).__name__} is applied to shapes "
                f"{[list(s) for s in A._in_shape]} and returns {[list(s) for s in A._out_shape]}"
            )
        super().__init__(A._in_shape, A._out_shape)
        self._A = A
        self.SELF_ADJOINT = A.SELF_ADJOINT

    @property
    def device(self) -> torch.device:
        return self._A.device

    @property
    def dtype(self) -> torch.dtype:
        return self._A.dtype

    @property
    @abstractmethod
    def stats(self) -> Sequence[NamedTuple]:
        """How each column of the last product was found; empty before the first."""

    def _guess(self, guess: Tensor | Sequence[Tensor] | None, number: int, name: str) -> list[Tensor] | None:
        """A start for each of the columns, from one vector for all or a matrix."""
        if guess is None:
            return None
        columns = self._A._columns(guess)[0]
        given = columns[0].shape[-1]
        if given not in (1, number):
            raise ValueError(
                f"{name} has {given} columns, but the operator is applied to {number}: give one or {number}"
            )
        return [c.expand(*c.shape[:-1], number) for c in columns]

    def _relative(self, difference: Sequence[Tensor], M: Sequence[Tensor]) -> list[float]:
        """Lengths of the columns of `difference`, in units of those of `M`; 0 / 0 = 0."""
        lengths, units = (torch.linalg.vector_norm(flat_columns(x), dim=0).double() for x in (difference, M))
        ratios: list[float] = torch.where(units > 0.0, lengths / units, lengths).tolist()
        return ratios

    def _warn_unconverged(self, residuals: Sequence[float], asked: str, cause: str) -> None:
        warnings.warn(
            f"{type(self).__name__}: {len(residuals)} of {len(self.stats)} columns did not converge (largest relative "
            f"residual {max(residuals):.1e}, {asked}); {cause}. See its `stats`.",
            ConvergenceWarning,
            stacklevel=5,  # past _warn, _matmat and LinearOperator.__matmul__, to the user
        )


class CGInverseLinearOperator(_InverseLinearOperator):
    """The inverse of a symmetric positive definite operator by conjugate gradients.

    The keywords are those of linear_operator's `linear_cg`, which curvlinops hands them to. Three things differ. A
    column is done, and costs no more products, when *its own* residual is within the tolerance; there it is the mean
    over all columns, and 11 iterations at least. `tolerance` has a default that means something; there it is 1,
    whatever 11 iterations gave. And the residual that is judged is computed from the solution, by one more product.

    Args:
        A: Symmetric positive definite.
        tolerance: Stop a column at `‖b - A x‖ ≤ tolerance ‖b‖`; None: the square root of the dtype's rounding.
        eps: There it guards divisions; here nothing is divided by a number that may be zero. It changes nothing.
        stop_updating_after: Leave a column alone at this relative residual, even if `tolerance` is smaller.
        max_iter: Iterations for each column; None: 1000.
        initial_guess: Where to start: a vector for all columns or a matrix, flat or as a list.
        preconditioner: An operator near to A⁻¹, e.g. the inverse of a KFAC operator; or a function of flat matrices
            `[D, K]`. Symmetric positive definite.
        n_tridiag: Only 0: the tridiagonal matrices have no place in what a product returns.
        max_tridiag_iter: Of no effect without tridiagonal matrices.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> from kfacopt.operators import IdentityLinearOperator
    >>> inverse = CGInverseLinearOperator(4.0 * IdentityLinearOperator([(2,)]), tolerance=1e-6)
    >>> inverse @ torch.ones(2), inverse.stats[0].iterations
    (tensor([0.2500, 0.2500]), 1)
    """

    def __init__(
        self,
        A: LinearOperator,
        *,
        tolerance: float | None = None,
        eps: float = 1e-10,
        stop_updating_after: float = 1e-10,
        max_iter: int | None = None,
        initial_guess: Tensor | Sequence[Tensor] | None = None,
        preconditioner: Preconditioner | None = None,
        n_tridiag: int = 0,
        max_tridiag_iter: int | None = None,
    ) -> None:
        super().__init__(A)
        if n_tridiag != 0:
            raise ValueError(f"n_tridiag must be 0, got {n_tridiag}: for the spectrum use lanczos_approximate_spectrum")
        bounds = {"tolerance": tolerance, "eps": eps, "stop_updating_after": stop_updating_after}
        for name, value in bounds.items():
            if value is not None and not value >= 0.0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if max_iter is not None and max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        if initial_guess is not None:
            A._columns(initial_guess)  # its shape is refused here, not in the first product
        if isinstance(preconditioner, LinearOperator):
            _check_preconditioner(A, preconditioner)
        self._tolerance = torch.finfo(A.dtype).eps ** 0.5 if tolerance is None else tolerance
        self._stop_updating_after = stop_updating_after
        self._max_iter = 1000 if max_iter is None else max_iter
        self._initial_guess, self._preconditioner = initial_guess, preconditioner
        self._eps, self._max_tridiag_iter = eps, max_tridiag_iter
        self._stats: list[InverseStats] = []

    @property
    def stats(self) -> list[InverseStats]:
        """How each column of the last product was found; empty before the first."""
        return self._stats

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        right = flat_columns(M)
        guess = self._guess(self._initial_guess, right.shape[1], "initial_guess")
        found, columns = conjugate_gradient_columns(
            lambda p: self._A @ p,
            right,
            x0=None if guess is None else flat_columns(guess),
            preconditioner=None if self._preconditioner is None else self._precondition,
            max_iterations=self._max_iter,
            tolerance=max(self._tolerance, self._stop_updating_after),
        )
        solution = split_columns(found, self._in_shape)
        # The recurrence's residual drifts from the true one: a column that it called done may miss by its rounding.
        missing = [m - p for m, p in zip(M, self._A._matmat(solution), strict=True)]
        self._stats = [
            InverseStats(f.iterations, r, r <= self._tolerance * (2.0 if f.converged else 1.0), f.negative_curvature)
            for f, r in zip(columns, self._relative(missing, M), strict=True)
        ]
        self._warn()
        return solution

    def _precondition(self, residual: Tensor) -> Tensor:
        assert self._preconditioner is not None
        if isinstance(self._preconditioner, LinearOperator):
            return self._preconditioner @ residual
        result = self._preconditioner(residual)
        if result.shape != residual.shape:
            raise ValueError(f"preconditioner turned shape {list(residual.shape)} into {list(result.shape)}")
        return result

    def _warn(self) -> None:
        failed = [s for s in self._stats if not s.converged]
        if not failed:
            return
        if any(s.negative_curvature for s in failed):
            cause = "the operator or its preconditioner is not positive definite: add damping, or use LSMR"
        elif any(s.iterations >= self._max_iter for s in failed):
            cause = f"max_iter = {self._max_iter} was reached: precondition, add damping, or raise it"
        elif self._stop_updating_after > self._tolerance:
            cause = f"stop_updating_after = {self._stop_updating_after:.1e} is larger: lower it"
        else:
            cause = f"rounding in {self.dtype} allows no more: loosen the tolerance, or use a wider dtype"
        self._warn_unconverged([s.residual for s in failed], f"tolerance {self._tolerance:.1e}", cause)

    def _adjoint(self) -> CGInverseLinearOperator:
        return CGInverseLinearOperator(
            self._A.adjoint(),
            tolerance=self._tolerance,
            eps=self._eps,
            stop_updating_after=self._stop_updating_after,
            max_iter=self._max_iter,
            initial_guess=self._initial_guess,
            preconditioner=self._preconditioner,
            max_tridiag_iter=self._max_tridiag_iter,
        )


def _check_preconditioner(A: LinearOperator, preconditioner: LinearOperator) -> None:
    for what in ("_in_shape", "_out_shape", "device", "dtype"):
        wanted, found = getattr(A, what), getattr(preconditioner, what)
        if wanted != found:
            raise ValueError(
                f"preconditioner ({type(preconditioner).__name__}) and operator ({type(A).__name__}) differ in "
                f"{what.strip('_')}: {found} and {wanted}"
            )


class LSMRInverseLinearOperator(_InverseLinearOperator):
    """The inverse of a square operator by LSMR; it need not be symmetric, and its adjoint is used.

    Where A is singular this is its pseudo-inverse (`istop` 2 in `stats`); with `damp`, `(AᵀA + damp² I)⁻¹ Aᵀ`. All
    columns are solved together, on A's device and in its dtype (curvlinops solves one by one on the CPU, in float64).

    Args:
        A: The operator.
        damp: Regularisation, added in the square.
        atol: Relative error of A that is tolerated.
        btol: Relative error of the right-hand side that is tolerated.
        conlim: Stop when A's estimated condition number exceeds it; 0: never.
        maxiter: Iterations, each a product with A and one with its adjoint; None: A's dimension.
        x0: Where to start: a vector for all columns or a matrix, flat or as a list; with `damp`, also what the solution
            is drawn to.
        show: Only False: `stats` says what SciPy prints.

    Raises:
        ValueError: If A is not square, or an argument is out of range.

    >>> from kfacopt.operators import IdentityLinearOperator
    >>> inverse = LSMRInverseLinearOperator(-4.0 * IdentityLinearOperator([(2,)]))
    >>> inverse @ torch.ones(2), inverse.stats[0].istop
    (tensor([-0.2500, -0.2500]), 1)
    """

    def __init__(
        self,
        A: LinearOperator,
        *,
        damp: float = 0.0,
        atol: float | None = 1e-6,
        btol: float | None = 1e-6,
        conlim: float | None = 1e8,
        maxiter: int | None = None,
        show: bool = False,
        x0: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(A)
        if show:
            raise ValueError("show=True is not supported: the library prints nothing; read `stats` after a product")
        if x0 is not None:
            A._columns(x0)
        # SciPy takes None for its defaults.
        self._damp, self._maxiter, self._x0 = damp or 0.0, maxiter, x0
        self._atol, self._btol = (1e-6 if tol is None else tol for tol in (atol, btol))
        self._conlim = 1e8 if conlim is None else conlim
        self._stats: list[LSMRInfo] = []

    @property
    def stats(self) -> list[LSMRInfo]:
        """How each column of the last product was found; empty before the first."""
        return self._stats

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        right, adjoint = flat_columns(M), self._A.adjoint()
        guess = self._guess(self._x0, right.shape[1], "x0")
        solution, self._stats = lsmr(
            lambda x: self._A @ x,
            lambda y: adjoint @ y,
            right,
            damp=self._damp,
            atol=self._atol,
            btol=self._btol,
            conlim=self._conlim,
            maxiter=self._maxiter,
            x0=None if guess is None else flat_columns(guess),
        )
        self._warn(right)
        return split_columns(solution, self._in_shape)

    def _warn(self, right: Tensor) -> None:
        failed = [(s, b) for s, b in zip(self._stats, right.norm(dim=0).tolist(), strict=True) if not s.converged]
        if not failed:
            return
        if any(s.istop == 7 for s, _ in failed):
            cause = "maxiter was reached: raise it, or add `damp`"
        else:
            cause = f"the condition number exceeds conlim = {self._conlim:.1e}: raise it, or add `damp`"
        asked = f"atol {self._atol:.1e}, btol {self._btol:.1e}"
        self._warn_unconverged([s.normr / b for s, b in failed], asked, cause)

    def _adjoint(self) -> LSMRInverseLinearOperator:
        return LSMRInverseLinearOperator(
            self._A.adjoint(),
            damp=self._damp,
            atol=self._atol,
            btol=self._btol,
            conlim=self._conlim,
            maxiter=self._maxiter,
            x0=self._x0,
        )


class NeumannInverseLinearOperator(_InverseLinearOperator):
    """The inverse by the truncated Neumann series `scale Σ_k (I - scale A)^k`, k = 0 to `num_terms`.

    It converges where all eigenvalues of A lie between 0 and `2 / scale` (Lorraine et al. 2020 use it for
    hypergradients), and slowly where one is near either end; conjugate gradients need fewer products.

    Args:
        A: The operator.
        num_terms: Products with A.
        scale: Of A in the series.
        check_nan: Stop with an error as soon as the sum is not a number.

    Raises:
        ValueError: If A is not square or `num_terms` negative; in a product, with `check_nan`, at a NaN.

    >>> from kfacopt.operators import IdentityLinearOperator
    >>> NeumannInverseLinearOperator(0.5 * IdentityLinearOperator([(2,)])) @ torch.ones(2)
    tensor([2., 2.])
    """

    def __init__(self, A: LinearOperator, num_terms: int = 100, scale: float = 1.0, check_nan: bool = True) -> None:
        super().__init__(A)
        if num_terms < 0:
            raise ValueError(f"num_terms must not be negative, got {num_terms}")
        self._num_terms, self._scale, self._check_nan = num_terms, scale, check_nan
        self._stats: list[InverseStats] = []

    @property
    def stats(self) -> list[InverseStats]:
        """How each column of the last product was found; `residual` is that without the last term."""
        return self._stats

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        total, term = [m.clone() for m in M], [m.clone() for m in M]
        for k in range(self._num_terms):
            for t, product in zip(term, self._A._matmat(term), strict=True):
                t.sub_(product, alpha=self._scale)
            torch._foreach_add_(total, term)
            if self._check_nan and any(bool(t.isnan().any()) for t in total):
                raise ValueError(
                    f"NaN after term {k} of the Neumann series, which probably diverges: all eigenvalues of scale * A "
                    f"must lie between 0 and 2, here scale = {self._scale}; decrease it"
                )
        # The k-th term is what k terms leave over: b - A (scale times their sum).
        residuals = self._relative(term, M)
        self._stats = [InverseStats(self._num_terms, r, r <= 1.0) for r in residuals]
        self._warn()
        return [t.mul_(self._scale) for t in total]

    def _warn(self) -> None:
        failed = [s.residual for s in self._stats if not s.converged]
        if failed:
            self._warn_unconverged(failed, f"scale {self._scale}", "the series diverges: decrease the scale")

    def _adjoint(self) -> NeumannInverseLinearOperator:
        return NeumannInverseLinearOperator(self._A.adjoint(), self._num_terms, self._scale, self._check_nan)
