"""Random test vectors for the estimators of trace, diagonal and norm, and what they all check."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.operator import LinearOperator

Matrix = LinearOperator | Tensor
Distribution = Literal["rademacher", "normal"]


def probes(
    number: int, length: int, distribution: Distribution, like: Matrix, generator: torch.Generator | None
) -> Tensor:
    """Independent entries of mean 0 and variance 1, `[length number]`, drawn column by column as curvlinops does.

    Raises:
        ValueError: If the distribution is unknown.

    >>> probes(2, 3, "rademacher", torch.zeros(3, 3), torch.Generator().manual_seed(0)).abs().tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    if distribution not in ("rademacher", "normal"):
        raise ValueError(f"distribution must be 'rademacher' or 'normal', got {distribution!r}")
    drawn = torch.empty(number, length, dtype=like.dtype, device=like.device)
    for vector in drawn:
        if distribution == "normal":
            vector.copy_(torch.randn(length, dtype=like.dtype, device=like.device, generator=generator))
        else:
            vector.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)
    return drawn.T


def checked_budget(A: Matrix, num_matvecs: int, divisor: int = 1, square: bool = True) -> int:
    """The vectors of each of `divisor` shares of a budget of products.

    Raises:
        ValueError: If A is no (square) real matrix, or the budget not positive, not divisible or not below A's size.
    """
    name = type(A).__name__
    if len(A.shape) != 2 or (square and A.shape[0] != A.shape[1]):
        raise ValueError(f"A must be a {'square ' if square else ''}matrix, got {name} of shape {list(A.shape)}")
    if not A.dtype.is_floating_point:
        raise ValueError(f"A must have real floating-point entries, got {A.dtype}")
    if num_matvecs < 1 or num_matvecs % divisor:
        multiple = f" multiple of {divisor}" if divisor > 1 else " number"
        raise ValueError(f"num_matvecs must be a positive{multiple}, got {num_matvecs}")
    if num_matvecs >= min(A.shape):
        raise ValueError(
            f"num_matvecs must be less than the dimension {min(A.shape)}, got {num_matvecs}: as many "
            "products with unit vectors give the exact value"
        )
    return num_matvecs // divisor


class Range(NamedTuple):
    """An orthonormal basis of the span of some columns, and how each column contributes.

    Attributes:
        basis: Q, `[D r]`.
        left_out: `[r k]`. Without column i the span is that of `Q (I - s sᵀ)`, s being this matrix's column i: a unit
            vector, or zero if the other columns span all the same.
    """

    basis: Tensor
    left_out: Tensor


def range_of(columns: Tensor) -> Range:
    """Basis and leave-one-out directions of `columns` `[D k]`, of whatever rank (section 2.2 of XTrace for full rank).

    With the singular value decomposition `R = U Σ Vᵀ` of the triangular factor, cut to its rank r, column i is needed
    for the span exactly if `e_i` lies in V's range; the direction it adds is then `Σ⁻¹ Vᵀ e_i`. Where all columns are
    independent that is `R⁻ᵀ e_i`, which for dependent ones, as of an operator of low rank, does not exist.
    """
    orthonormal, triangular = torch.linalg.qr(columns)
    left, values, right = torch.linalg.svd(triangular)
    eps = torch.finfo(columns.dtype).eps
    rank = int((values > max(columns.shape) * eps * values.max()).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    directions = right / values.unsqueeze(-1)
    # Columns of V are exactly of length 1 where a column is needed, shorter elsewhere. √eps is far from both roundings.
    needed = 1.0 - right.square().sum(dim=0) < eps**0.5
    directions = torch.where(needed, directions, 0.0)
    lengths = torch.linalg.vector_norm(directions, dim=0)
    return Range(orthonormal @ left, directions / torch.where(needed, lengths, 1.0))


def without_own_column(coordinates: Tensor, left_out: Tensor) -> Tensor:
    """`(I - s_i s_iᵀ) c_i` for the columns of both, `[r k]`."""
    return coordinates - left_out * (left_out * coordinates).sum(dim=0)
