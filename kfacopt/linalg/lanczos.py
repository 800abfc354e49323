"""Lanczos: Gauss quadrature of a symmetric matrix's spectral measure, and its extreme eigenvalues.

The matrix is known by its products with vectors. Both ways notice, without further products, that it is not symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""`[D] -> [D]`; what it is given is not to be written to."""

Order = Callable[[Tensor], Tensor]
"""Ascending Ritz values `[m]` to their indices, the most wanted first."""


class Tridiagonal(NamedTuple):
    """`Vᵀ A V` of an orthonormal Krylov basis V: its diagonal `[m]`, off-diagonal `[m - 1]`, and V `[D m]` if kept."""

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor | None = None

    def dense(self) -> Tensor:
        """`Vᵀ A V`, `[m m]`."""
        return self.diagonal.diag() + self.off_diagonal.diag(1) + self.off_diagonal.diag(-1)

    def quadrature(self) -> Quadrature:
        """Gauss quadrature: its k-th moments are `vᵀ Aᵏ v`, v being the normalised start, for k < 2 m."""
        values, vectors = torch.linalg.eigh(self.dense().double().cpu())
        like = self.diagonal
        return Quadrature(values.to(like), vectors[0].square().to(like))


class Quadrature(NamedTuple):
    """`Σ_i weights_i f(nodes_i) ≈ vᵀ f(A) v`; the nodes `[m]` ascend, the weights `[m]` have sum 1."""

    nodes: Tensor
    weights: Tensor


class ExtremeEigenvalues(NamedTuple):
    """Eigenvalues `values`, each at most `bounds` away from one of the matrix, found by `products`."""

    values: list[float]
    bounds: list[float]
    products: int
    converged: bool


@torch.no_grad()
def lanczos(multiply: Product, start: Tensor, num_steps: int, reorthogonalize: bool = False) -> Tridiagonal:
    """Tridiagonalise a symmetric matrix (Papyan 2020, algorithm 2).

    Without reorthogonalisation three vectors are held. Rounding then repeats eigenvalues that have converged, sharing
    their weight among the copies, which leaves the quadrature what it is.

    Args:
        multiply: `v -> A v`.
        start: `[D]`, not zero.
        num_steps: Products; fewer are made where the Krylov space ends before.
        reorthogonalize: Keep all vectors, make each new one orthogonal to them, twice, and return them as `basis`.

    Raises:
        ValueError: If the start is zero, `num_steps` not positive, or the matrix not symmetric.
        FloatingPointError: If a product is not finite.

    >>> a = torch.diag(torch.tensor([1.0, 3.0]))
    >>> lanczos(lambda v: a @ v, torch.ones(2), num_steps=5).quadrature().nodes
    tensor([1.0000, 3.0000])
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    v, v_before = _normalised(start), torch.zeros_like(start)
    kept = [v] if reorthogonalize else []
    diagonal: list[float] = []
    beside: list[float] = []
    scale = 0.0
    for step in range(num_steps):
        w = multiply(v)
        if beside:
            _check_symmetric(float(torch.dot(v_before, w)), beside[-1], scale, v.dtype)
            w = w - beside[-1] * v_before
        diagonal.append(float(torch.dot(w, v)))
        w = w - diagonal[-1] * v
        if kept:
            w = _orthogonal(w, torch.stack(kept, dim=1))[0]
        length = _length(w, step)
        scale = max(scale, abs(diagonal[-1]), length)
        if step == num_steps - 1 or length <= 10.0 * torch.finfo(v.dtype).eps * scale:
            break
        beside.append(length)
        v_before, v = v, w / length
        if kept:
            kept.append(v)
    basis = torch.stack(kept, dim=1) if kept else None
    return Tridiagonal(start.new_tensor(diagonal), start.new_tensor(beside), basis)


@torch.no_grad()
def extreme_eigenvalues(
    multiply: Product,
    start: Tensor,
    order: Order,
    number: int,
    accuracy: Callable[[Tensor, Tensor], Tensor],
    *,
    subspace: int | None = None,
    max_products: int = 1000,
) -> ExtremeEigenvalues:
    """The eigenvalues of a symmetric matrix that come first in an order, by thick-restart Lanczos (Wu & Simon 2000).

    Fully orthogonalised. Done when each residual `‖A y - θ y‖`, which bounds the distance to an eigenvalue, is as small
    as `accuracy` asks, or rounding^(2/3) times the largest eigenvalue seen; at the earliest after 20 products.

    Args:
        multiply: `v -> A v`.
        start: `[D]`, not zero.
        order: Which are wanted.
        number: How many.
        accuracy: Wanted Ritz values `[number]` and all of them `[m]` to the bounds that suffice, `[number]` or `[]`.
        subspace: Vectors before a restart, which keeps half of them; default: 300, but 2^24 numbers and 20 vectors.
        max_products: Stop after so many products.

    Raises:
        ValueError: If the start is zero, the subspace too small, or the matrix not symmetric.
        FloatingPointError: If a product is not finite.

    >>> a = torch.diag(torch.arange(100.0))
    >>> found = extreme_eigenvalues(lambda v: a @ v, torch.ones(100), largest, 1, lambda wanted, _: 1e-4 * wanted)
    >>> round(found.values[0], 2), found.converged
    (99.0, True)
    """
    if subspace is None:
        subspace = max(20, min(300, 2**24 // len(start)))
    if subspace < max(4, 2 * number):
        raise ValueError(f"subspace must be at least {max(4, 2 * number)}, got {subspace}")
    krylov = _Krylov(start, min(subspace, len(start)))
    for products in range(1, max_products + 1):
        krylov.extend(multiply)
        whole = krylov.filled == krylov.size or krylov.ended or products == max_products
        if not whole and (products < 20 or products % 10):
            continue
        values, vectors, bounds = krylov.ritz()
        wanted = order(values)
        first = wanted[:number]
        floor = torch.finfo(start.dtype).eps ** (2 / 3) * float(values.abs().max())
        converged = bool((bounds[first] <= accuracy(values[first], values).clamp_min(floor)).all())
        if converged or krylov.ended or products == max_products:
            break
        if krylov.filled == krylov.size:
            krylov.restart(wanted[: krylov.size // 2], values, vectors)
    return ExtremeEigenvalues(values[first].tolist(), bounds[first].tolist(), products, converged)


class _Krylov:
    """An orthonormal basis, the matrix in it, and the direction that comes next."""

    def __init__(self, start: Tensor, size: int) -> None:
        self.next, self.size, self.filled, self.ended = _normalised(start), size, 0, False
        self.basis = start.new_zeros(len(start), size)
        self.inner = torch.zeros(size, size, dtype=torch.float64)
        self.length = 0.0
        # What the next direction's coordinates on the basis will be after a product, by symmetry.
        self.coupling = torch.zeros(0, dtype=torch.float64)

    def extend(self, multiply: Product) -> None:
        """One product: `next` joins the basis."""
        at, eps = self.filled, torch.finfo(self.basis.dtype).eps
        self.basis[:, at] = self.next
        w, coordinates = _orthogonal(multiply(self.next), self.basis[:, : at + 1])
        column = coordinates.double().cpu()
        scale = max(float(self.inner.abs().max()), self.length)
        if at:
            back = float(self.coupling.norm())
            forth = float(column[:-1] @ self.coupling) / max(back, torch.finfo(torch.float64).tiny)
            _check_symmetric(forth, back, scale, self.basis.dtype)
        self.inner[: at + 1, at] = self.inner[at, : at + 1] = column
        self.filled = at + 1
        self.length = _length(w, at)
        self.ended = self.filled == len(self.basis) or self.length <= 10.0 * eps * max(scale, float(column.norm()))
        self.next = w / self.length if self.length > 0.0 else w
        self.coupling = torch.zeros(self.filled, dtype=torch.float64)
        self.coupling[-1] = self.length

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (ascending), vectors in the basis, and bounds on the distance to an eigenvalue."""
        values, vectors = torch.linalg.eigh(self.inner[: self.filled, : self.filled])
        return values, vectors, (0.0 if self.ended else self.length) * vectors[-1].abs()

    def restart(self, kept: Tensor, values: Tensor, vectors: Tensor) -> None:
        """Keep some Ritz vectors and the next direction."""
        self.filled = len(kept)
        self.basis[:, : self.filled] = self.basis @ vectors[:, kept].to(self.basis)
        self.inner.zero_()
        self.inner[: self.filled, : self.filled] = values[kept].diag()
        self.coupling = self.length * vectors[-1, kept]


def smallest(values: Tensor) -> Tensor:
    """Ascending."""
    return values.argsort()


def largest(values: Tensor) -> Tensor:
    """Descending."""
    return values.argsort(descending=True)


def both_ends(values: Tensor) -> Tensor:
    """The smallest, the largest, the second smallest, and so on."""
    ascending = values.argsort()
    return torch.stack([ascending, ascending.flip(0)], dim=1).flatten()[: len(values)]


def smallest_magnitude(values: Tensor) -> Tensor:
    """Nearest to zero first."""
    return values.abs().argsort()


def largest_magnitude(values: Tensor) -> Tensor:
    """Farthest from zero first."""
    return values.abs().argsort(descending=True)


def _normalised(start: Tensor) -> Tensor:
    length = float(torch.linalg.vector_norm(start))
    if start.ndim != 1 or not length > 0.0 or not math.isfinite(length):
        raise ValueError(
            f"Lanczos starts from a finite vector that is not zero, got shape {list(start.shape)}, length {length:g}"
        )
    return start / length


def _length(w: Tensor, step: int) -> float:
    length = float(torch.linalg.vector_norm(w))
    if not math.isfinite(length):
        raise FloatingPointError(f"Lanczos met a number that is not finite at step {step}")
    return length


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of `w` is orthogonal to an orthonormal basis, and the coordinates of the rest; once more for rounding."""
    coordinates = basis.T @ w
    w = w - basis @ coordinates
    more = basis.T @ w
    return w - basis @ more, coordinates + more


def _check_symmetric(forth: float, back: float, scale: float, dtype: torch.dtype) -> None:
    """`v_{j-1}ᵀ A v_j` must be `v_jᵀ A v_{j-1}`, known from the step before."""
    rounding = math.sqrt(torch.finfo(dtype).eps)
    # After a step that was all rounding the two vectors are not orthogonal, and it need not.
    if back > rounding * scale and abs(forth - back) > 10.0 * rounding * max(scale, abs(forth)):
        raise ValueError(
            f"Lanczos needs a symmetric operator: uᵀ A v = {forth:.6g}, but vᵀ A u = {back:.6g}; if it should be "
            "symmetric, it may differ from product to product (dropout, a shuffled data loader)"
        )
