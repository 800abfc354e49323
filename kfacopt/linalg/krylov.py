"""A Krylov space of a symmetric operator with its basis, by Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class KrylovSpace(NamedTuple):
    """Orthonormal `basis` `[p k]` and the operator's image in it, `basisᵀ A basis = diag + off-diagonals` `[k k]`."""

    basis: Tensor
    image: Tensor


def krylov_space(multiply: Callable[[Tensor], Tensor], start: Tensor, rank: int) -> KrylovSpace:
    """An orthonormal basis of the span of `start, A start, ..., A^(k-1) start`, fully reorthogonalised.

    Args:
        multiply: A, symmetric, of vectors `[p]`.
        start: First direction `[p]`, not zero.
        rank: k, at most; less where the space is exhausted before.

    >>> space = krylov_space(lambda v: torch.tensor([1.0, 2.0, 3.0]) * v, torch.ones(3), rank=3)
    >>> [round(x, 4) for x in torch.linalg.eigvalsh(space.image).tolist()]
    [1.0, 2.0, 3.0]
    """
    vectors = [start / start.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for k in range(min(rank, start.numel())):
        product = multiply(vectors[k])
        diagonal.append(product @ vectors[k])
        size = product.norm()
        basis = torch.stack(vectors, dim=1)
        for _ in range(2):
            product = product - basis @ (basis.mT @ product)
        rest = product.norm()
        if k + 1 == min(rank, start.numel()) or not bool(rest > 1e-10 * size):
            break
        beside.append(rest)
        vectors.append(product / rest)
    basis, image = torch.stack(vectors, dim=1), torch.diag(torch.stack(diagonal))
    if beside:
        steps = torch.stack(beside)
        image = image + torch.diag(steps, 1) + torch.diag(steps, -1)
    return KrylovSpace(basis, image)
