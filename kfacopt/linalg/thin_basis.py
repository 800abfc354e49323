"""Eigenvectors of a covariance that has fewer rows than dimensions, without forming it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.gram import gram
from kfacopt.linalg.symmetric import Eigendecomposition, eigh

_POLISHING_STEPS = 6
"""Newton-Schulz steps at most. One turns a relative error e of a column's length into 1.5 e²: from 0.3, six reach the
rounding of float64. Columns that are further off than that had no business here."""

_ROUNDINGS = 4.0, 0.25
"""How many roundings of the largest eigenvalue another has to be more than, at least, and times the root of the rows.

From there on the error of an eigenvalue, which grows as that root, is a part of it, and columns are orthonormal enough
for `orthonormal` (the Gram matrices of 1,000 and 2,000 were off by 0.7 at most, in norm). One for each row, as is usual
for a rank, leaves out what is no rounding: of float32, 250 rows of 300 after a ReLU, in all 7e-4 of the trace (with 4:
2e-6), and products are off by 1e-4 (4e-6, as by an `eigh` of A), inverses at a damping of 1e-3 by 2e-2 (7e-4).
"""


class ThinBasis(NamedTuple):
    """The range of `rowsᵀ rows / count`, as far as it is more than rounding.

    Attributes:
        values: Eigenvalues, ascending, `[r]`.
        vectors: Eigenvectors in columns, `[d r]`; all other eigenvalues are zero.
        coordinates: `rows @ vectors`, `[n r]`.
    """

    values: Tensor
    vectors: Tensor
    coordinates: Tensor


def thin_basis(rows: Tensor, count: float, spectrum: Eigendecomposition | None = None) -> ThinBasis:
    """Eigendecompose `rowsᵀ rows / count` by way of `rows rowsᵀ`, for rows `[n d]` with n < d.

    With R the rows, both products have the same eigenvalues but for zeros: if `R Rᵀ w = count λ w`, then multiplying by
    Rᵀ gives `(RᵀR) (Rᵀw) = count λ (Rᵀw)`. As `|Rᵀw|² = wᵀ R Rᵀ w = count λ`, the unit eigenvector is
    `u = Rᵀ w / √(count λ)`, and the rows' coordinates along it come for free, `R u = √(count λ) w`. An eigh of n
    instead of d.

    The price is that the small eigenvalues' vectors are divided by small numbers.
    `uᵢᵀ uⱼ = wᵢᵀ R Rᵀ wⱼ / (count √(λμ))` is zero up to the eigh's error, rounding times the largest eigenvalue: two
    vectors with eigenvalues λ, μ are orthogonal up to rounding times (largest eigenvalue) / √(λμ). No matter for
    products with the matrix, where they count by their eigenvalues; for its inverse, `orthonormal` brings orthogonality
    back.

    Args:
        rows: R.
        count: What the sum over the rows is divided by.
        spectrum: Of `rows rowsᵀ / count`, if that was decomposed elsewhere.

    Raises:
        LinAlgError: If the rows are not finite.

    >>> basis = thin_basis(torch.tensor([[3.0, 4.0, 0.0]]), 1.0)
    >>> basis.values, basis.vectors.shape
    (tensor([25.]), torch.Size([3, 1]))
    """
    values, left, _ = eigh(gram(rows.mT).div_(count)) if spectrum is None else spectrum
    roundings = max(_ROUNDINGS[0], _ROUNDINGS[1] * rows.shape[0] ** 0.5)
    kept = values > roundings * torch.finfo(rows.dtype).eps * values[-1:]  # of no rows there is no largest
    values, left = values[kept], left[:, kept]
    norms = (values * count).sqrt()
    return ThinBasis(values, rows.mT @ (left / norms), left * norms)


def orthonormal(vectors: Tensor) -> Tensor:
    """The nearest orthonormal columns to nearly orthonormal ones `[d r]`, by Newton-Schulz steps.

    A step replaces each singular value σ by `σ (3 - σ²) / 2`, whose fixed point 1 it approaches quadratically, and
    leaves the singular vectors: the limit is the polar factor (Higham 2008, Functions of Matrices, section 8.3).

    >>> orthonormal(torch.tensor([[1.01], [0.0]])).round(decimals=6).tolist()
    [[1.0], [0.0]]
    """
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    # The Gram matrix of exactly orthonormal columns is off by a few roundings in each of r diagonal entries. Less than
    # that would never be reached, and all steps be made.
    tolerance = 8 * torch.finfo(vectors.dtype).eps * vectors.shape[-1] ** 0.5
    for _ in range(_POLISHING_STEPS):
        product = gram(vectors)
        if bool((product - identity).norm() <= tolerance):
            break
        vectors = vectors @ (1.5 * identity - 0.5 * product)
    return vectors
