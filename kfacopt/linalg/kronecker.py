"""Kronecker algebra on matrices in their own shape: `(G ⊗ A) vec(W)` is `G W A`.

A *factor* is a symmetric matrix `[*k d d]`, or the diagonal `[d]` of one: the input factor of a layer with one-hot
inputs (an embedding) is diagonal, and as large as the vocabulary. A one-dimensional tensor is always a diagonal.
An eigenbasis is `[*k d d]`, or `None` for the identity (the basis of a diagonal factor). So is the factor of a side too
wide to be squared, which is of the inputs or of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import Inverse, damped_inverse, damped_inverse_power, eigh, eigh_of_each
from kfacopt.linalg.symmetric import root as symmetric_root


def multiply(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """`left @ matrix @ right` for factors left `[*k o o]` or `[o]` and right `[*k i i]` or `[i]`; matrix `[*k o i]`.

    >>> multiply(torch.eye(2), torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0])).tolist()
    [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    if right.ndim == 1 and left.ndim > 1:
        return from_left(left, matrix).mul_(right)
    return _scaled_or_product(left, matrix * right if right.ndim == 1 else matrix @ right)


def from_left(left: Tensor, matrix: Tensor) -> Tensor:
    """`left @ matrix` `[*k o i]`, laid out as the matrix is.

    That of an embedding is transposed, as is its weight's gradient: what is computed of it, element by element, with
    the weight and with the step, takes several times as long in another layout.

    >>> from_left(torch.eye(2), torch.ones(3, 2).mT).is_contiguous()
    False
    """
    transposed = matrix.ndim == 2 and matrix.stride(0) == 1 < matrix.shape[1] and matrix.stride(1) > 1
    return (matrix.mT @ left.mT).mT if transposed else left @ matrix


def _scaled_or_product(left: Tensor, fresh: Tensor) -> Tensor:
    """`left @ fresh` for a factor or a diagonal; what is given may be written to."""
    return fresh.mul_(left.unsqueeze(-1)) if left.ndim == 1 else from_left(left, fresh)


def rotate(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """`leftᵀ @ matrix @ right`: coordinates of `matrix` `[*k o i]` in the Kronecker eigenbasis `left ⊗ right`."""
    rotated = matrix if right is None else matrix @ right
    return rotated if left is None else from_left(left.mT, rotated)


def rotate_back(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """`left @ matrix @ rightᵀ`: the inverse of `rotate` for orthonormal bases."""
    if left is not None and right is not None and right.shape[-1] < right.shape[-2]:  # what is shorter first
        return from_left(left, matrix) @ right.mT
    rotated = matrix if right is None else matrix @ right.mT
    return rotated if left is None else from_left(left, rotated)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Eigenvalues `[*k o i]` of `G ⊗ A` from those of its factors, `[*k o]` and `[*k i]`."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def trace(factor: Tensor) -> Tensor:
    """Trace `[*k]` of a factor."""
    return factor.sum(-1) if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def mean_eigenvalue(left: Tensor, right: Tensor) -> Tensor:
    """Mean eigenvalue of `G ⊗ A`, over groups too; a tensor without axes."""
    return (trace(left) / left.shape[-1] * trace(right) / right.shape[-1]).mean()


def squared_norm(factor: Tensor) -> Tensor:
    """Squared Frobenius norm `[*k]` of a factor."""
    return factor.square().sum(-1) if factor.ndim == 1 else factor.square().sum((-2, -1))


class Spectrum(NamedTuple):
    """Eigenvalues `[*k d]`, eigenbasis `[*k d d]` (`None`: the identity) and failed attempts of a factor."""

    values: Tensor
    vectors: Tensor | None
    retries: int


def spectrum(factor: Tensor) -> Spectrum:
    """Eigenvalues `[*k d]`, eigenbasis `[*k d d]` (`None`: the identity) and failed attempts of a factor."""
    if factor.ndim == 1:
        return Spectrum(factor.clamp_min(0.0), None, 0)
    return Spectrum(*eigh(factor))


def spectra(factors: Sequence[Tensor]) -> list[Spectrum]:
    """`spectrum` of each, on a processor side by side.

    >>> [basis is None for _, basis, _ in spectra([torch.eye(2), torch.ones(3)])]
    [False, True]
    """
    found = iter(eigh_of_each([factor for factor in factors if factor.ndim > 1]))
    return [spectrum(factor) if factor.ndim == 1 else Spectrum(*next(found)) for factor in factors]


def inverse(factor: Tensor, damping: Tensor | float, exponent: float = 1.0) -> Inverse:
    """`(factor + damping I)^-exponent`, diagonal where the factor is; `damping` is a number or `[*k]`.

    >>> inverse(torch.tensor([3.0, 8.0]), 1.0, exponent=0.5).value
    tensor([0.5000, 0.3333])
    """
    if factor.ndim == 1:
        return Inverse((factor + damping).pow(-exponent), 0)
    if exponent == 1.0:
        return damped_inverse(factor, damping)
    return damped_inverse_power(factor, damping, exponent)


def root(factor: Tensor) -> Tensor:
    """Some S with `S Sᵀ = factor`, diagonal where the factor is."""
    return factor.sqrt() if factor.ndim == 1 else symmetric_root(factor)


def sandwich(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """`left @ matrix @ rightᵀ` for roots left `[*k o o]` or `[o]` and right `[*k i i]` or `[i]`."""
    return _scaled_or_product(left, matrix * right if right.ndim == 1 else matrix @ right.mT)


def transposed_sandwich(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """`leftᵀ @ matrix @ right`, the adjoint of `sandwich`."""
    adjoint = left if left.ndim == 1 else left.mT
    return _scaled_or_product(adjoint, matrix * right if right.ndim == 1 else matrix @ right)


def product_of_sum(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of the Kronecker product with the partial traces of `F = Σ_j G_j ⊗ A_j`, of equal traces.

    `G ⊗ A` with `G = Σ_j tr(A_j) G_j / √tr F` and `A = Σ_j tr(G_j) A_j / √tr F`. It is F where the G_j, or the A_j, are
    multiples of each other.

    Args:
        pairs: G_j `[o o]`, or all diagonal `[o]`, and A_j `[i i]`, or all diagonal `[i]`; positive semi-definite.

    >>> left, right = product_of_sum([(torch.eye(2), torch.ones(3)), (2 * torch.eye(2), torch.arange(3.0))])
    >>> torch.kron(left, right.diag()).diagonal().round()
    tensor([1., 3., 5., 1., 3., 5.])
    """
    traces = [(trace(left), trace(right)) for left, right in pairs]
    whole = torch.stack([on_left * on_right for on_left, on_right in traces]).sum()
    root = torch.where(whole > 0, whole, 1.0).sqrt()
    joint_left = sum(left * (on_right / root) for (left, _), (_, on_right) in zip(pairs, traces, strict=True))
    joint_right = sum(right * (on_left / root) for (_, right), (on_left, _) in zip(pairs, traces, strict=True))
    assert isinstance(joint_left, Tensor)
    assert isinstance(joint_right, Tensor)
    return joint_left, joint_right


def pi_split(left: Tensor, right: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Damping of the factors G and A whose product stands for `G ⊗ A + damping I`.

    `(G + √damping/π I) ⊗ (A + π √damping I)` with `π² = (tr A / dim A) / (tr G / dim G)`, the choice that balances
    the two factors' mean eigenvalues (Martens & Grosse 2015, equation 31 and section 6.3).

    Returns:
        Damping of `left` (G) and of `right` (A), each `[*k]`.
    """
    pi = _pi(trace(left) / left.shape[-1], trace(right) / right.shape[-1])
    root = damping**0.5
    return root / pi, root * pi


def damp_factored(values: Tensor, left: Tensor, right: Tensor, damping: float) -> Tensor:
    """`values + √damping (π λ_G + λ_A / π) + damping`: the π-split's damping around any eigenvalues of the product.

    With `values = λ_G λ_Aᵀ` these are the eigenvalues of `(G + √damping/π I) ⊗ (A + π √damping I)`.

    Args:
        values: `[*k o i]`.
        left: λ_G, `[*k o]`.
        right: λ_A, `[*k i]`.

    >>> left, right = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    >>> damp_factored(outer(left, right), left, right, 1.0)
    tensor([[ 6.,  6.],
            [12., 12.]])
    """
    return damp_by_means(values, left, right, left.mean(-1), right.mean(-1), damping)


def damp_by_means(
    values: Tensor, left: Tensor, right: Tensor, mean_left: Tensor, mean_right: Tensor, damping: float
) -> Tensor:
    """`damp_factored` where the mean eigenvalues `[*k]` of the factors are not those of `left` and `right`."""
    on_left, on_right = damping_terms(left, right, mean_left, mean_right, damping)
    return values + on_left.unsqueeze(-1) + on_right.unsqueeze(-2)


def damping_terms(
    left: Tensor, right: Tensor, mean_left: Tensor, mean_right: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """What `damp_by_means` adds to the rows of the eigenvalues, `[*k o]`, and to their columns, `[*k i]`."""
    pi = _pi(mean_left, mean_right).unsqueeze(-1)
    root = float(damping**0.5)
    return (root * pi) * left + damping, (root / pi) * right


def _pi(mean_left: Tensor, mean_right: Tensor) -> Tensor:
    """Root of the ratio of the factors' mean eigenvalues, one where a factor is zero (a dead layer has no scale)."""
    tiny = torch.finfo(mean_left.dtype).tiny ** 0.5
    dead = (mean_left <= tiny) | (mean_right <= tiny)
    ratio = (mean_right / mean_left.clamp_min(tiny)).sqrt()
    return torch.where(dead, torch.ones_like(ratio), ratio).clamp(1e-6, 1e6)
