"""Eigenvectors of a covariance that has fewer rows than dimensions, without forming it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import eigh

_POLISHING_STEPS = 4


class ThinBasis(NamedTuple):
    """The range of `rowsᵀ rows / count`, as far as it is more than rounding.

    Attributes:
        values: Eigenvalues, ascending, `[r]`.
        vectors: Orthonormal eigenvectors in columns, `[d r]`; all other eigenvalues are zero.
        coordinates: `rows @ vectors`, `[n r]`.
    """

    values: Tensor
    vectors: Tensor
    coordinates: Tensor


def thin_basis(rows: Tensor, count: float) -> ThinBasis:
    """Eigendecompose `rowsᵀ rows / count` by way of `rows rowsᵀ`, for rows `[n d]` with n < d.

    An eigh of n instead of d, and the rows' coordinates come for free. The vectors of small eigenvalues lose
    orthogonality to rounding that way: Newton-Schulz steps towards the polar factor bring it back.

    Raises:
        LinAlgError: If the rows are not finite.

    >>> basis = thin_basis(torch.tensor([[3.0, 4.0, 0.0]]), 1.0)
    >>> basis.values, basis.vectors.shape
    (tensor([25.]), torch.Size([3, 1]))
    """
    values, left, _ = eigh(rows @ rows.mT / count)
    precision = torch.finfo(rows.dtype).eps
    kept = values > rows.shape[0] * precision * values[-1]
    values, left = values[kept], left[:, kept]
    norms = (values * count).sqrt()
    vectors = rows.mT @ (left / norms)
    gram = vectors.mT @ vectors
    identity = torch.eye(len(values), dtype=rows.dtype, device=rows.device)
    tolerance = 8 * precision * max(len(values), 1) ** 0.5
    polished = False
    for _ in range(_POLISHING_STEPS):
        if not bool((gram - identity).norm() > tolerance):
            break
        vectors, polished = vectors @ (1.5 * identity - 0.5 * gram), True
        gram = vectors.mT @ vectors
    return ThinBasis(values, vectors, rows @ vectors if polished else left * norms)
