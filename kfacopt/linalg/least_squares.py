"""Damped least squares, from a kernel or from the matrix itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import LinAlgError, eigh


class Solution(NamedTuple):
    """`value = (matrix + damping I)^-1 right`; `retries` attempts failed before this one."""

    value: Tensor
    retries: int


def damped_solve(matrix: Tensor, damping: float, right: Tensor) -> Solution:
    """Solve with `matrix + damping I` by Cholesky, and by eigendecomposition where that fails.

    Args:
        matrix: Symmetric positive semi-definite, `[d d]`.
        damping: Not negative.
        right: `[d]` or `[d k]`.

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> damped_solve(torch.tensor([[3.0]]), 1.0, torch.tensor([8.0])).value.item()
    2.0
    """
    if not bool(matrix.isfinite().all()):
        raise LinAlgError(f"cannot solve with a matrix of shape {tuple(matrix.shape)} that has entries not finite")
    columns = right if right.ndim == 2 else right.unsqueeze(-1)
    attempts = (torch.float64,) if matrix.dtype == torch.float64 else (matrix.dtype, torch.float64)
    for retries, dtype in enumerate(attempts):
        factor, info = torch.linalg.cholesky_ex(_damped(matrix.to(dtype), damping))
        if not bool(info.any()):
            value = torch.cholesky_solve(columns.to(dtype), factor)
            if bool(value.sum().isfinite()):
                return Solution(value.to(right.dtype).view_as(right), retries)
    values, vectors, more = eigh(matrix.double())
    # What rounding left of eigenvalues below it is not divided by.
    floor = torch.finfo(matrix.dtype).eps * values.amax().clamp_min(torch.finfo(torch.float64).tiny)
    value = vectors @ ((vectors.mT @ columns.double()) / (values + damping).clamp_min(floor).unsqueeze(-1))
    return Solution(value.to(right.dtype).view_as(right), len(attempts) + more)


def damped_least_squares(matrix: Tensor, damping: float, right: Tensor, outside: Tensor | None = None) -> Tensor:
    """`(AᵀA + damping I)⁻¹ (Aᵀ right + outside)` by QR, without squaring the condition of `A`.

    Args:
        matrix: `A`, `[n d]`.
        damping: Positive.
        right: `[n]`.
        outside: `[d]`; default: zero.

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> damped_least_squares(torch.tensor([[1.0], [1.0]]), 2.0, torch.tensor([1.0, 3.0])).abs().round(decimals=4)
    tensor([1.])
    """
    if not bool(matrix.isfinite().all()):
        raise LinAlgError(f"no least squares with a matrix of shape {tuple(matrix.shape)} that has entries not finite")
    dimension = matrix.shape[1]
    root = damping**0.5 * torch.eye(dimension, dtype=matrix.dtype, device=matrix.device)
    q, r = torch.linalg.qr(torch.cat([matrix, root]))
    projected = q[: len(matrix)].mT @ right
    if outside is not None:
        projected = projected + torch.linalg.solve_triangular(r.mT, outside.unsqueeze(-1), upper=False).squeeze(-1)
    solution: Tensor = torch.linalg.solve_triangular(r, projected.unsqueeze(-1), upper=True).squeeze(-1)
    return solution


def _damped(matrix: Tensor, damping: float) -> Tensor:
    result = matrix.clone()
    result.diagonal().add_(damping)
    return result
