"""Eigendecomposition and damped inverse of symmetric positive semi-definite matrices that do not give up.

A factor that is estimated from a few samples in float32 is often singular to rounding; LAPACK then fails now and then.
Every function here retries in float64 and with a growing multiple of the identity, says how often it had to, and only
raises `LinAlgError` where the input itself is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kfacopt.linalg.gram import gram
from kfacopt.linalg.side_by_side import side_by_side

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""torch's own, under a name that type checkers know."""

# Multiples of the mean diagonal entry that are added to the diagonal on successive float64 attempts. First nothing, as
# float64 alone often does; then from 1e-10, with which a factor estimated in float32 (rounding 6e-8) is still the same,
# to 1e-4, far beyond that rounding and still small beside usual dampings.
_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


# Of smaller matrices a decomposition takes no longer (1 ms) than what would be done to spare or to share it.
_SMALLEST_APART = 128
_SILENT_SHARE = 32
"""Zero rows are taken out from one in so many on: from a tenth of an `eigh` on, and they are found in a hundredth."""

_BEAT, _OFF_BEAT = 2048, 4
"""Bytes between the columns of a matrix from which on multiples of its half are slow; how many columns more are fast.

Measured on one thread, alternately, as they are and with four more, float32: 512 17.4 and 14.5 ms, 768 45.1 and 41.1,
1,024 119.6 and 96.5; float64: 256 6.3 and 5.7, 512 37.4 and 30.7. Below 2,048 bytes it takes longer. It changes the
speed, and the rounding.
"""


class Eigendecomposition(NamedTuple):
    """`matrix = vectors @ diag(values) @ vectors.mT`; `retries` attempts failed before this one."""

    values: Tensor
    vectors: Tensor
    retries: int


class Inverse(NamedTuple):
    """`value = (matrix + damping I)^-1`; `retries` attempts failed before this one."""

    value: Tensor
    retries: int


def eigh(matrix: Tensor) -> Eigendecomposition:
    """Eigendecompose symmetric positive semi-definite matrices, whatever LAPACK says at first.

    Args:
        matrix: Symmetric, `[*k d d]`.

    Returns:
        Eigenvalues `[*k d]` in ascending order, clamped at zero; orthonormal eigenvectors `[*k d d]` in columns.

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> values, vectors, retries = eigh(torch.diag(torch.tensor([3.0, 1.0])))
    >>> values.tolist(), retries
    ([1.0, 3.0], 0)
    """
    silent = _without_silent(matrix)
    if silent is not None:
        return silent
    retries = 0
    try:
        return _finite_eigh(matrix, retries)
    except LinAlgError:
        _require_finite(matrix, "eigendecompose")
    precise = matrix.double()
    for jitter in _JITTERS:
        retries += 1
        try:
            result = _finite_eigh(_add_to_diagonal(precise, jitter * _mean_diagonal(precise)), retries)
        except LinAlgError:
            continue
        return Eigendecomposition(result.values.to(matrix.dtype), result.vectors.to(matrix.dtype), retries)
    # A finite symmetric matrix always has a singular value decomposition by the slower Jacobi-free driver.
    vectors, values, _ = torch.linalg.svd(precise)
    order = values.argsort(dim=-1)
    vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    return Eigendecomposition(values.gather(-1, order).to(matrix.dtype), vectors.to(matrix.dtype), retries + 1)


def eigh_of_each(matrices: Sequence[Tensor]) -> list[Eigendecomposition]:
    """`eigh` of matrices of any sizes; on a processor side by side.

    Raises:
        LinAlgError: If an entry of any is not finite.

    >>> [found.values.tolist() for found in eigh_of_each([torch.eye(1), 2.0 * torch.eye(2)])]
    [[1.0], [2.0, 2.0]]
    """
    if any(matrix.device.type != "cpu" for matrix in matrices):
        return [eigh(matrix) for matrix in matrices]
    large = [i for i, matrix in enumerate(matrices) if matrix.shape[-1] >= _SMALLEST_APART]
    large.sort(key=lambda i: -matrices[i].numel() * matrices[i].shape[-1])
    found = dict(zip(large, side_by_side(eigh, [matrices[i] for i in large]), strict=True))
    return [found[i] if i in found else eigh(matrix) for i, matrix in enumerate(matrices)]


def damped_inverse(matrix: Tensor, damping: Tensor | float) -> Inverse:
    """Invert `matrix + damping I` by Cholesky, and by eigendecomposition where that fails.

    Args:
        matrix: Symmetric positive semi-definite, `[*k d d]`.
        damping: A number, or one number for each of the `*k` matrices (shape `[*k]`).

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> damped_inverse(torch.tensor([[3.0]]), 1.0).value.item()
    0.25
    """
    _require_finite(matrix, "invert")
    for retries, candidate in enumerate((matrix, matrix.double())):
        factor, info = torch.linalg.cholesky_ex(_add_to_diagonal(candidate, damping))
        if not bool(info.any()):
            inverse = torch.cholesky_inverse(factor)
            if bool(inverse.diagonal(dim1=-2, dim2=-1).sum().isfinite()):
                return Inverse(inverse.to(matrix.dtype), retries)
    values, vectors, more = eigh(matrix)
    shifted = values + _column(damping, values)
    # Without damping a singular matrix has no inverse: its null directions are divided by the rounding of the largest
    # eigenvalue. 1e-30 keeps the bound above 0 for a zero matrix, and its reciprocal finite in float32.
    smallest = torch.finfo(values.dtype).eps * shifted.amax(-1, keepdim=True).clamp_min(1e-30)
    return Inverse((vectors / shifted.clamp_min(smallest).unsqueeze(-2)) @ vectors.mT, 2 + more)


def damped_inverse_power(matrix: Tensor, damping: Tensor | float, exponent: float) -> Inverse:
    """`(matrix + damping I)^-exponent` by eigendecomposition; arguments and errors as of `damped_inverse`.

    >>> damped_inverse_power(torch.tensor([[3.0]]), 1.0, 0.5).value
    tensor([[0.5000]])
    """
    values, vectors, retries = eigh(matrix)
    shifted = values + _column(damping, values)
    smallest = torch.finfo(values.dtype).eps * shifted.amax(-1, keepdim=True).clamp_min(1e-30)  # as in damped_inverse
    halves = vectors * shifted.clamp_min(smallest).pow(-0.5 * exponent).unsqueeze(-2)
    return Inverse(gram(halves.mT), retries)


def root(matrix: Tensor) -> Tensor:
    """Some S with `S Sᵀ = matrix`, `[*k d d]`: Cholesky's, or the symmetric one where that fails.

    Args:
        matrix: Symmetric positive semi-definite up to rounding, `[*k d d]`.

    Raises:
        LinAlgError: If the matrix has an entry that is not finite.

    >>> root(torch.tensor([[4.0]])).item()
    2.0
    """
    _require_finite(matrix, "take the root of")
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    values, vectors, _ = eigh(matrix)
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)


def refine_basis(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Bring an eigenbasis nearer to that of a matrix that moved a little: one step of orthogonal iteration by QR.

    One warm-started power step, as SOAP uses between eigendecompositions (Vyas et al. 2024, algorithm 4).

    Args:
        matrix: Symmetric, `[*k d d]`.
        vectors: Orthonormal columns `[*k d d]`, the basis of an earlier state of `matrix`.

    >>> refine_basis(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2)).abs().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    # Dominant directions first: QR keeps the order of the columns, and the first columns converge fastest.
    refined: Tensor = torch.linalg.qr(matrix @ vectors.flip(-1))[0]
    return refined.flip(-1)


def _without_silent(matrix: Tensor) -> Eigendecomposition | None:
    """The eigendecomposition by that of the rows that are not all zero; None: too few are, or it is a batch.

    Such are the directions of a pixel that is always black, of a unit that never fires: they are eigenvectors as they
    stand, and cost the cube of the size otherwise.
    """
    size = matrix.shape[-1]
    if matrix.ndim != 2 or size < _SMALLEST_APART or int((matrix.diagonal() == 0).sum()) * _SILENT_SHARE < size:
        return None
    heard = (matrix != 0).any(-1)
    kept, rest = heard.nonzero().squeeze(-1), (~heard).nonzero().squeeze(-1)
    if len(rest) * _SILENT_SHARE < size:
        return None
    values, vectors = matrix.new_zeros(size), torch.zeros_like(matrix)
    vectors[rest, torch.arange(len(rest), device=rest.device)] = 1.0
    retries = 0
    if len(kept):
        inner, own, retries = eigh(matrix[kept[:, None], kept])
        values[len(rest) :], vectors[kept, len(rest) :] = inner, own
    return Eigendecomposition(values, vectors, retries)


def _finite_eigh(matrix: Tensor, retries: int) -> Eigendecomposition:
    values, vectors = _eigh_off_beat(matrix) if _on_beat(matrix) else torch.linalg.eigh(matrix)
    if not bool((values.sum() + vectors.sum()).isfinite()):  # MKL returns NaN now and then instead of failing
        raise LinAlgError("the eigendecomposition is not finite")
    return Eigendecomposition(values.clamp_min(0.0), vectors, retries)


def _on_beat(matrix: Tensor) -> bool:
    """Whether the columns of a matrix lie on a processor so that they push each other out of its cache."""
    stride = matrix.shape[-1] * matrix.element_size()
    return matrix.device.type == "cpu" and stride >= _BEAT and stride % (_BEAT // 2) == 0


def _eigh_off_beat(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of a positive semi-definite matrix, within one that is a few rows larger.

    The rows that are added are zero but for a negative number on the diagonal, so that they come first. It is
    `-|M|²/tr M`, in size at most the largest eigenvalue and at least that over √d, far from what rounding makes of zero
    ones. LAPACK's reflections leave zeros where they are: what is added splits off without a rounding.
    """
    size, diagonal = matrix.shape[-1], matrix.diagonal(dim1=-2, dim2=-1)
    peak = diagonal.amax(-1)  # no entry is larger: squares of what is divided by it do not overflow
    scaled = matrix / peak[..., None, None]
    apart = peak * scaled.square_().sum((-2, -1)) / (diagonal / peak.unsqueeze(-1)).sum(-1)
    apart = torch.where(peak > 0, apart, 1.0).unsqueeze(-1)
    larger = functional.pad(matrix, (0, _OFF_BEAT, 0, _OFF_BEAT))
    larger.diagonal(dim1=-2, dim2=-1)[..., size:] = -apart
    values, vectors = torch.linalg.eigh(larger)
    if bool((values[..., _OFF_BEAT, None] < -0.5 * apart).any()):  # not so semi-definite after all
        return tuple(torch.linalg.eigh(matrix))
    return values[..., _OFF_BEAT:], vectors[..., :size, _OFF_BEAT:].mT.contiguous().mT


def _require_finite(matrix: Tensor, verb: str) -> None:
    # The sum is quick, and of finite entries it is one, but for an overflow.
    if not bool(matrix.sum().isfinite()) and not bool(matrix.isfinite().all()):
        raise LinAlgError(
            f"cannot {verb} a matrix of shape {tuple(matrix.shape)} that has entries which are not finite"
        )


def _mean_diagonal(matrix: Tensor) -> Tensor:
    mean: Tensor = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(matrix.dtype).tiny)
    return mean


def _column(damping: Tensor | float, like: Tensor) -> Tensor | float:
    return damping.to(like.dtype).unsqueeze(-1) if isinstance(damping, Tensor) else damping


def _add_to_diagonal(matrix: Tensor, damping: Tensor | float) -> Tensor:
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(_column(damping, matrix))
    return result
