"""How far a symmetric matrix has moved from what was once decomposed, for less than another decomposition."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

_PROBES = 4
_ROUNDS = 4
"""Vectors, and products by which they turn to the largest eigenvalue. From so few the estimate is a little low where
two eigenvalues are nearly the largest, by less than a tenth as a rule; it decides when to decompose, and no digit."""


def along_basis(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of `basisᵀ matrix basis`, and the share of the matrix beside it.

    With orthonormal columns Q and the diagonal D, `A Q - Q D = (Q Qᵀ A Q - Q D) + (I - Q Qᵀ) A Q`: what is beside the
    diagonal within Q, and what couples Q to the rest. If Q is whole, that is the off-diagonal mass, and
    `|A - Q D Qᵀ| = share · |A|` in Frobenius norm.

    Args:
        matrix: A, symmetric, `[*k d d]`.
        basis: Q, `[*k d q]`.

    Returns:
        D `[*k q]`, and `|A Q - Q D| / |A|`, the largest of the k; 0 for matrices of zeros.

    >>> values, share = along_basis(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))
    >>> values.tolist(), share.item()
    ([1.0, 2.0], 0.0)
    """
    image = matrix @ basis
    values = (basis * image).sum(-2)
    rest = torch.addcmul(image, basis, values.unsqueeze(-2), value=-1.0)
    return values, _ratio(rest.norm(dim=(-2, -1)), matrix.norm(dim=(-2, -1)))


def largest_beside(matrix: Tensor, basis: Tensor) -> Tensor:
    """The largest eigenvalue of `P matrix P`, `P = I - basis basisᵀ`, estimated from below by block power iteration.

    Args:
        matrix: Symmetric positive semi-definite, `[d d]`.
        basis: Orthonormal columns, `[d q]`.

    >>> largest_beside(torch.diag(torch.tensor([1.0, 5.0, 2.0])), torch.eye(3)[:, 1:2]).round(decimals=1).item()
    2.0
    """

    def beside(columns: Tensor) -> Tensor:
        return columns - basis @ (basis.mT @ columns)

    columns = torch.linalg.qr(beside(_probes(matrix)))[0]
    for _ in range(_ROUNDS):
        image = beside(matrix @ columns)
        columns = torch.linalg.qr(image)[0]
    found: Tensor = (columns * beside(matrix @ columns)).sum(-2).amax()
    return found


def inverse_error(matrix: Tensor, damping: Tensor | float, inverse: Tensor, exponent: float = 1.0) -> Tensor | None:
    """Largest singular value of `(matrix + damping I) inverse - I`, estimated from below by block power iteration.

    It is by how much of itself the worst direction is off that the inverse leads back.

    Args:
        matrix: Symmetric, `[*k d d]`; or the diagonal `[d]` of one, whose inverse is a diagonal.
        damping: A number or `[*k]`.
        inverse: Symmetric, `[*k d d]`; of a power, `(matrix + damping I)^-exponent` as it once was.
        exponent: One over a whole number m: then the inverse is multiplied with m times.

    Returns:
        The largest of the k; None for another exponent, of which products do not tell.

    >>> round(float(inverse_error(torch.eye(3), 1.0, 0.45 * torch.eye(3))), 4)
    0.1
    """
    times = round(1.0 / exponent)
    if abs(times * exponent - 1.0) > 1e-6:
        return None
    if matrix.ndim == 1:
        return ((matrix + damping) * inverse.pow(times) - 1.0).abs().amax()
    shift = damping[..., None, None] if isinstance(damping, Tensor) else damping

    def lead_back(columns: Tensor) -> Tensor:
        for _ in range(times):
            columns = inverse @ columns
        return columns

    def error(columns: Tensor) -> Tensor:
        turned = lead_back(columns)
        return matrix @ turned + shift * turned - columns

    def adjoint(columns: Tensor) -> Tensor:
        return lead_back(matrix @ columns + shift * columns) - columns

    columns = torch.linalg.qr(_probes(matrix))[0]
    for _ in range(_ROUNDS):
        columns = torch.linalg.qr(adjoint(error(columns)))[0]
    found: Tensor = error(columns).norm(dim=-2).amax()
    return found


def _probes(matrix: Tensor) -> Tensor:
    """The same random columns `[*k d p]` for matrices of one shape, whatever else draws numbers."""
    size = matrix.shape[-1]
    drawn = torch.randn(size, min(_PROBES, size), generator=Generator().manual_seed(size), dtype=torch.float64)
    return drawn.to(matrix).expand(*matrix.shape[:-1], -1)


def _ratio(rest: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, rest / whole).amax()
