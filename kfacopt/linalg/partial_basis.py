"""Functions of `G ⊗ A`-like operators of which only the dominant eigenvectors are kept, the rest stand for one value.

With orthonormal U `[o k]`, V `[i l]` the operator on matrices `[o i]` is

    coefficient `both[a, b]` on `u_a v_bᵀ`, `left[a]` on `u_a (rest of V)`, `right[b]` on `(rest of U) v_b`, and
    `neither` on what is left.

A side that is kept whole has no rest. The cost is that of products with U and V only: `4 o i (k + l)` instead of
`4 o i (o + i)` floating-point operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg import alignment

# From so many kept outputs on, products as wide as the matrix take longer than to fill it up with zeros to a width at
# which they are fast: 784 of 784 (1,001 inputs) 32.0 ms and 24.5, 392 of 1,000 (501) 19.8 and 13.0, 12 of 1,000 (785)
# 11.0 and 11.8, processor time at one thread.
_LONG = 128


class Coefficients(NamedTuple):
    """Values of a spectral function: `both` `[k l]`, `left` `[k]`, `right` `[l]`, `neither` `[]`."""

    both: Tensor
    left: Tensor
    right: Tensor
    neither: Tensor


class WholeSide(NamedTuple):
    """What stands for a side that is kept whole: `U diag(left) Uᵀ` `[o o]`, or `V diag(right) Vᵀ` `[i i]`."""

    on_left: Tensor | None
    on_right: Tensor | None


def whole_sides(left_basis: Tensor, right_basis: Tensor, at: Coefficients) -> WholeSide:
    """Products that `apply` needs where exactly one side is kept whole; to be kept while the coefficients stay."""
    left_whole, right_whole = _whole(left_basis), _whole(right_basis)
    if left_whole == right_whole:
        return WholeSide(None, None)
    if left_whole:
        return WholeSide((left_basis * at.left) @ left_basis.mT, None)
    return WholeSide(None, (right_basis * at.right) @ right_basis.mT)


def apply(matrix: Tensor, left_basis: Tensor, right_basis: Tensor, at: Coefficients, whole: WholeSide) -> Tensor:
    """The operator with coefficients `at` times `matrix` `[o i]`.

    Args:
        matrix: `[o i]`.
        left_basis: U, `[o k]`.
        right_basis: V, `[i l]`.
        at: The coefficients.
        whole: Of `whole_sides` with the same bases and coefficients.

    >>> eye = torch.eye(3)
    >>> at = Coefficients(torch.full((1, 1), 2.0), torch.ones(1), torch.ones(1), torch.tensor(1.0))
    >>> apply(torch.ones(3, 3), eye[:, :1], eye[:, :1], at, WholeSide(None, None)).tolist()
    [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if _whole(left_basis) and _whole(right_basis):
        coordinates = left_basis.mT @ (matrix @ right_basis)
        return left_basis @ (coordinates.mul_(at.both) @ right_basis.mT)
    size = matrix.shape[-1]
    if left_basis.shape[-1] >= _LONG and whole.on_right is None and alignment.missing(size):
        padded = alignment.wide(matrix), left_basis, alignment.tall(right_basis), at, whole
        return _of_parts(*padded)[..., :size]
    return _of_parts(matrix, left_basis, right_basis, at, whole)


class Long(NamedTuple):
    """What of `S M`, with a wide matrix M, is met again in `S polar(S M)` by the Gram matrix."""

    along: Tensor
    """`M V`, `[o l]`."""
    whitened: Tensor
    """`S M V`, `[o l]`."""
    beside: Tensor | None
    """N `[o o]` with `S M = N M` beside V; None: V is whole."""
    gram: Tensor
    """`S M (S M)ᵀ`, `[o o]`."""


def gram_of_long(matrix: Tensor, left_basis: Tensor, right_basis: Tensor, at: Coefficients, whole: WholeSide) -> Long:
    """The Gram matrix of the operator S times a wide `matrix` `[o i]`; see `apply`."""
    along = matrix @ right_basis
    whitened = _times_columns(along, left_basis, at)
    gram = whitened @ whitened.mT
    if _whole(right_basis):
        return Long(along, whitened, None, gram)
    beside = whole.on_left
    if beside is None:
        beside = (left_basis * (at.left - at.neither)) @ left_basis.mT
        beside.diagonal().add_(at.neither)
    rest = matrix @ matrix.mT - along @ along.mT
    return Long(along, whitened, beside, gram + beside @ rest @ beside)


def steepest_of_long(
    matrix: Tensor, left_basis: Tensor, right_basis: Tensor, at: Coefficients, found: Long, inverse_root: Tensor
) -> Tensor:
    """`S gram^(-1/2) S M` of what `gram_of_long` found, and the inverse root of its Gram matrix, `[o i]`.

    S is met in V's coordinates and beside them, so that of products as long as the matrix there is one with V and one
    back, where S is applied twice by twice as many.
    """
    columns = _times_columns(inverse_root @ found.whitened, left_basis, at)
    if found.beside is None:
        return columns @ right_basis.mT
    beside = found.beside @ inverse_root @ found.beside
    return (beside @ matrix).addmm_(columns.addmm_(beside, found.along, alpha=-1.0), right_basis.mT)


def _times_columns(columns: Tensor, left_basis: Tensor, at: Coefficients) -> Tensor:
    """The operator on coordinates `[o l]` along V."""
    coordinates = left_basis.mT @ columns
    if _whole(left_basis):
        return left_basis @ coordinates.mul_(at.both)
    return (columns * at.right).addmm_(left_basis, coordinates.mul_(at.both - at.right))


def _of_parts(matrix: Tensor, left_basis: Tensor, right_basis: Tensor, at: Coefficients, whole: WholeSide) -> Tensor:
    """`apply` where a side at least is not kept whole; of a matrix and V with zeros for further inputs, too."""
    if whole.on_left is not None:
        inner = (left_basis.mT @ (matrix @ right_basis)).mul_(at.both - at.left.unsqueeze(-1))
        return _added(whole.on_left @ matrix, left_basis @ inner, right_basis.mT)
    if whole.on_right is not None:
        inner = ((left_basis.mT @ matrix) @ right_basis).mul_(at.both - at.right)
        return _added(matrix @ whole.on_right, left_basis, inner @ right_basis.mT)
    rows = left_basis.mT @ matrix
    columns = matrix @ right_basis
    inner = rows @ right_basis
    inner.mul_(at.both - at.left.unsqueeze(-1) - at.right + at.neither)
    rows = _added(rows.mul_((at.left - at.neither).unsqueeze(-1)), inner, right_basis.mT)
    result = _added(matrix * at.neither, left_basis, rows)
    return _added(result, columns.mul_(at.right - at.neither), right_basis.mT)


def _added(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left @ right`, written to the total, which is ours, unless autocast takes products in another dtype."""
    if torch.is_autocast_enabled(total.device.type):
        return torch.addmm(total, left, right)
    return total.addmm_(left, right)


def _whole(basis: Tensor) -> bool:
    return basis.shape[-1] == basis.shape[-2]
