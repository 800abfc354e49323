"""Damped least squares, factored once and solved many times: from a kernel, or from the matrix itself."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import LinAlgError, eigh


class DampedKernel:
    """`(K + damping I)⁻¹` by Cholesky, and by eigendecomposition where that fails.

    Args:
        kernel: Symmetric positive semi-definite, `[d d]`; it may be overwritten.
        damping: Not negative.

    Attributes:
        retries: How many factorisations failed.

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> DampedKernel(torch.tensor([[3.0]]), 1.0).solve(torch.tensor([8.0]))
    tensor([2.])
    """

    def __init__(self, kernel: Tensor, damping: float) -> None:
        _require_finite(kernel)
        self.retries = 0
        self._cholesky: Tensor | None = None
        self._damped = kernel
        diagonal = kernel.diagonal().clone()
        for dtype in (torch.float64,) if kernel.dtype == torch.float64 else (kernel.dtype, torch.float64):
            matrix = kernel.to(dtype)
            matrix.diagonal().copy_(diagonal).add_(damping)
            factor, info = torch.linalg.cholesky_ex(matrix)
            if not bool(info.any()):
                self._cholesky = factor
                return
            self.retries += 1
        kernel.diagonal().copy_(diagonal)
        values, self._vectors, more = eigh(kernel.double())
        self.retries += more
        # What rounding left of eigenvalues below it is not divided by.
        floor = torch.finfo(kernel.dtype).eps * values.amax().clamp_min(torch.finfo(torch.float64).tiny)
        self._values = (values + damping).clamp_min(floor)

    def solve(self, right: Tensor) -> Tensor:
        """For `[d]` or `[d k]`."""
        columns = right if right.ndim == 2 else right.unsqueeze(-1)
        if self._cholesky is not None:
            value = torch.cholesky_solve(columns.to(self._cholesky.dtype), self._cholesky)
        else:
            value = self._vectors @ ((self._vectors.mT @ columns.double()) / self._values.unsqueeze(-1))
        return value.to(right.dtype).view_as(right)


class DampedLeastSquares:
    """`(AᵀA + damping I)⁻¹ (Aᵀ right + outside)` by QR, which does not square the condition of `A`.

    Args:
        matrix: `A`, `[n d]`.
        damping: Positive.

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> DampedLeastSquares(torch.tensor([[1.0], [1.0]]), 2.0).solve(torch.tensor([1.0, 3.0])).round(decimals=4)
    tensor([1.])
    """

    def __init__(self, matrix: Tensor, damping: float) -> None:
        _require_finite(matrix)
        dimension = matrix.shape[1]
        root = damping**0.5 * torch.eye(dimension, dtype=matrix.dtype, device=matrix.device)
        q, self._r = torch.linalg.qr(torch.cat([matrix, root]))
        self._q = q[: len(matrix)]

    def solve(self, right: Tensor, outside: Tensor | None = None) -> Tensor:
        """For `right` `[n]` and `outside` `[d]` (default: zero), `[d]`."""
        projected = (self._q.mT @ right).unsqueeze(-1)
        if outside is not None:
            projected = projected + torch.linalg.solve_triangular(self._r.mT, outside.unsqueeze(-1), upper=False)
        solution: Tensor = torch.linalg.solve_triangular(self._r, projected, upper=True).squeeze(-1)
        return solution


def _require_finite(matrix: Tensor) -> None:
    if not bool(matrix.isfinite().all()):
        raise LinAlgError(f"cannot solve with a matrix of shape {tuple(matrix.shape)} with entries that are not finite")
