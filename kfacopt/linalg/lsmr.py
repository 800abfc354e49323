"""LSMR: linear systems and least squares by products with a matrix and its transpose (Fong & Saunders 2011).

Golub-Kahan bidiagonalisation of all right-hand sides at once; a column that has converged leaves the batch, so that no
product is spent on it. Vectors keep their device and dtype; the scalars of the recurrences are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""`[n k] -> [m k]`; what it is given is not to be written to."""

_CONVERGED = frozenset({0, 1, 2, 4, 5})


class LSMRInfo(NamedTuple):
    """How the solution of one column was found; the names and meanings of SciPy's `lsmr`.

    Attributes:
        istop: 0: x = 0 (or `x0`) is the solution; 1: `A x = b` to `atol` and `btol`; 2: the least-squares problem to
            `atol`; 3: the condition number exceeds `conlim`; 4, 5, 6: as 1, 2, 3 to rounding; 7: `maxiter` reached.
        itn: Iterations, each a product with the matrix and one with its transpose.
        normr: Estimate of `‖b - A x‖`, with damping of the norm of the extended residual.
        normar: Estimate of `‖Aᵀ (b - A x)‖`.
        norma: Estimate of A's Frobenius norm.
        conda: Estimate of A's condition number.
        normx: `‖x‖`.
    """

    istop: int
    itn: int
    normr: float
    normar: float
    norma: float
    conda: float
    normx: float

    @property
    def converged(self) -> bool:
        """Whether the tolerances asked for, or those of rounding, were reached."""
        return self.istop in _CONVERGED


class LSMRResult(NamedTuple):
    """Solutions `[n k]` and how each column was found."""

    solution: Tensor
    info: list[LSMRInfo]


@torch.no_grad()
def lsmr(
    multiply: Product,
    multiply_transposed: Product,
    right: Tensor,
    *,
    damp: float = 0.0,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    maxiter: int | None = None,
    x0: Tensor | None = None,
) -> LSMRResult:
    """Minimise `‖b - A x‖² + damp² ‖x - x0‖²` for each column of `right`; the shortest such x where there are several.

    Args:
        multiply: `A`, `[n k] -> [m k]`.
        multiply_transposed: `Aᵀ`, `[m k] -> [n k]`.
        right: b in columns, `[m k]`.
        damp: Regularisation.
        atol: Relative error of A that is tolerated.
        btol: Relative error of b that is tolerated; stop when `‖b - A x‖ ≤ atol ‖A‖ ‖x‖ + btol ‖b‖`.
        conlim: Stop when the estimated condition number exceeds it; 0: never.
        maxiter: Default: `min(m, n)`.
        x0: Where to start, `[n k]`; default: zero.

    Raises:
        ValueError: If `right` has not two axes, or a tolerance is negative.
        FloatingPointError: If the right-hand side or a product is not finite.

    >>> a = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    >>> result = lsmr(lambda x: a @ x, lambda y: a.T @ y, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    >>> result.solution.flatten().round(decimals=6).tolist(), result.info[0].istop
    ([1.0, -1.0], 1)
    """
    if right.ndim != 2:
        raise ValueError(f"right must have shape [m k], got {list(right.shape)}")
    negative = [f"{k} = {v}" for k, v in {"atol": atol, "btol": btol, "conlim": conlim}.items() if not v >= 0.0]
    if negative:
        raise ValueError(f"tolerances of LSMR must not be negative, got {', '.join(negative)}")
    if x0 is not None and damp == 0.0:  # zero solves A x = 0: no start is nearer
        x0 = torch.where((right == 0.0).all(dim=0), 0.0, x0)
    run = _Run(multiply, multiply_transposed, right, damp, x0)
    limit = min(len(right), len(run.v)) if maxiter is None else maxiter
    solution = torch.zeros_like(run.v)
    info: list[LSMRInfo | None] = [None] * right.shape[1]
    istop = torch.where(run.normar == 0.0, 0, -1)
    while True:
        for column in (istop >= 0).nonzero().flatten().tolist():
            place = int(run.columns[column])
            solution[:, place] = run.x[:, column]
            info[place] = run.info(column, int(istop[column]))
        if not run.keep(istop < 0):
            break
        if run.iteration >= limit:
            istop = torch.full_like(run.columns, 7)
            continue
        run.step()
        istop = run.stop(torch.linalg.vector_norm(right, dim=0).double().cpu(), atol, btol, conlim, limit)
    return LSMRResult(solution, [i for i in info if i is not None])


class _Run:
    """The state of the columns that have not converged: vectors `[· k]` and the scalars of the recurrences `[k]`.

    Names as in the paper (figures 2 and 3): a bar is `_bar`, a tilde `_tilde`, a dot `_dot`.
    """

    def __init__(
        self, multiply: Product, multiply_transposed: Product, right: Tensor, damp: float, x0: Tensor | None
    ) -> None:
        self.multiply, self.multiply_transposed = multiply, multiply_transposed
        self.iteration = 0
        self.columns = torch.arange(right.shape[1])
        self.u, self.beta = _normalised(right if x0 is None else right - multiply(x0))
        self.v, self.alpha = _normalised(multiply_transposed(self.u))
        self.x = torch.zeros_like(self.v) if x0 is None else x0
        self.h, self.h_bar = self.v, torch.zeros_like(self.v)
        zero, one = torch.zeros_like(self.beta), torch.ones_like(self.beta)
        self.damp = damp * one
        self.alpha_bar, self.zeta_bar = self.alpha, self.alpha * self.beta
        self.rho, self.rho_bar, self.c_bar, self.s_bar, self.zeta = one, one, one, zero, zero
        # For ‖r‖.
        self.beta_dd, self.beta_dot, self.rho_dot, self.tau_tilde, self.theta_tilde = self.beta, zero, one, zero, zero
        self.damped_part = zero
        # For ‖A‖ and cond(A).
        self.norma_squared, self.largest, self.smallest = self.alpha**2, zero, one * torch.inf
        self.norma, self.conda = self.norma_squared.sqrt(), one
        self.normr, self.normar, self.normx = self.beta, self.zeta_bar, _norm(self.x)

    def info(self, column: int, istop: int) -> LSMRInfo:
        estimates = (self.normr, self.normar, self.norma, self.conda, self.normx)
        return LSMRInfo(istop, self.iteration, *(float(e[column]) for e in estimates))

    def keep(self, which: Tensor) -> bool:
        """Drop the other columns; whether any is left."""
        if not bool(which.all()):
            index = which.nonzero().flatten()
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.index_select(-1, index.to(value.device)))
        return len(self.columns) > 0

    def step(self) -> None:
        """One iteration: bidiagonalise further, rotate, and move the solution."""
        self.iteration += 1
        self._bidiagonalise()
        c_hat, s_hat, alpha_hat = _rotation(self.alpha_bar, self.damp)
        rho_old, rho_bar_old, zeta_old = self.rho, self.rho_bar, self.zeta
        c, s, self.rho = _rotation(alpha_hat, self.beta)
        theta_new = s * self.alpha
        self.alpha_bar = c * self.alpha
        theta_bar, rho_temp = self.s_bar * self.rho, self.c_bar * self.rho
        self.c_bar, self.s_bar, self.rho_bar = _rotation(rho_temp, theta_new)
        self.zeta, self.zeta_bar = self.c_bar * self.zeta_bar, -self.s_bar * self.zeta_bar

        self.h_bar = self.h - _to(theta_bar * self.rho / (rho_old * rho_bar_old), self.h) * self.h_bar
        self.x = self.x + _to(self.zeta / (self.rho * self.rho_bar), self.x) * self.h_bar
        self.h = self.v - _to(theta_new / self.rho, self.h) * self.h
        self._estimate_residual(c_hat, s_hat, c, s, theta_bar, zeta_old)
        self._estimate_matrix(rho_bar_old, rho_temp)
        self.normar, self.normx = self.zeta_bar.abs(), _norm(self.x)

    def _bidiagonalise(self) -> None:
        self.u, self.beta = _normalised(self.multiply(self.v) - _to(self.alpha, self.u) * self.u)
        v, alpha = _normalised(self.multiply_transposed(self.u) - _to(self.beta, self.v) * self.v)
        if not bool((self.beta + alpha).isfinite().all()):
            raise FloatingPointError(f"LSMR met a number that is not finite at iteration {self.iteration}")
        # Where beta is zero the system is solved exactly, and v and alpha stay as they are.
        ended = self.beta == 0.0
        self.alpha = torch.where(ended, self.alpha, alpha)
        self.v = torch.where(ended.to(v.device), self.v, v)

    def _estimate_residual(
        self, c_hat: Tensor, s_hat: Tensor, c: Tensor, s: Tensor, theta_bar: Tensor, zeta_old: Tensor
    ) -> None:
        """‖r‖ by one more QR factorisation (section 5 of the paper)."""
        beta_acute, beta_check = c_hat * self.beta_dd, -s_hat * self.beta_dd
        beta_hat, self.beta_dd = c * beta_acute, -s * beta_acute
        theta_tilde_old = self.theta_tilde
        c_tilde, s_tilde, rho_tilde = _rotation(self.rho_dot, theta_bar)
        self.theta_tilde, self.rho_dot = s_tilde * self.rho_bar, c_tilde * self.rho_bar
        self.beta_dot = c_tilde * beta_hat - s_tilde * self.beta_dot
        self.tau_tilde = (zeta_old - theta_tilde_old * self.tau_tilde) / rho_tilde
        tau_dot = (self.zeta - self.theta_tilde * self.tau_tilde) / self.rho_dot
        self.damped_part = self.damped_part + beta_check**2
        self.normr = (self.damped_part + (self.beta_dot - tau_dot) ** 2 + self.beta_dd**2).sqrt()

    def _estimate_matrix(self, rho_bar_old: Tensor, rho_temp: Tensor) -> None:
        """‖A‖ and cond(A) from the bidiagonal matrix's entries."""
        self.norma_squared = self.norma_squared + self.beta**2
        self.norma = self.norma_squared.sqrt()
        self.norma_squared = self.norma_squared + self.alpha**2
        self.largest = torch.maximum(self.largest, rho_bar_old)
        if self.iteration > 1:  # the first is no entry of the matrix
            self.smallest = torch.minimum(self.smallest, rho_bar_old)
        self.conda = torch.maximum(self.largest, rho_temp) / torch.minimum(self.smallest, rho_temp)

    def stop(self, normb: Tensor, atol: float, btol: float, conlim: float, limit: int) -> Tensor:
        """Why each column stops now; -1: it does not."""
        normb, product = normb[self.columns], self.norma * self.normx
        gradient = self.normar / (self.norma * self.normr)
        gradient = gradient.nan_to_num(nan=torch.inf)
        # What one cannot see beside 1 in the vectors' own precision is rounding.
        eps = torch.finfo(self.v.dtype).eps / 2
        reasons = (
            (7, torch.full_like(self.normr, self.iteration >= limit, dtype=torch.bool)),
            (6, 1.0 / self.conda <= eps),
            (5, gradient <= eps),
            (4, self.normr <= eps * (normb + product)),
            (3, 1.0 / self.conda <= (1.0 / conlim if conlim > 0.0 else 0.0)),
            (2, gradient <= atol),
            (1, self.normr <= btol * normb + atol * product),
        )
        istop = torch.full_like(self.columns, -1)
        for code, holds in reasons:
            istop = torch.where(holds, code, istop)
        return istop


def _norm(columns: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return lengths.double().cpu()


def _to(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.to(device=like.device, dtype=like.dtype)


def _normalised(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of length 1, and their lengths; a zero column stays zero."""
    lengths = _norm(columns)
    return columns / _to(torch.where(lengths > 0.0, lengths, 1.0), columns), lengths


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`c, s, r` with `[c s; -s c] (a, b) = (r, 0)`."""
    r = torch.hypot(a, b)
    safe = torch.where(r > 0.0, r, 1.0)
    return a / safe, b / safe, r
