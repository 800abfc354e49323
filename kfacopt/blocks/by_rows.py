"""Products with a matrix of which one side is long and does not mix: row by row, in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kfacopt.blocks.base import at_once, chunks_of_data
from kfacopt.linalg.polar import NewtonSchulz


def times_by_rows(
    matrix: Tensor, basis: Tensor | None, values: Callable[[slice], Tensor], to: bool, back: bool
) -> Tensor:
    """`(matrix Q ∘ values) Qᵀ`, `[*b m d]`, for a basis Q `[d d]`, None for the identity: rows do not mix.

    In pieces, so that of a vocabulary's rows nothing else is held, and what is held is in the cache.

    Args:
        matrix: `[*b m d]`.
        basis: Q.
        values: Of some rows, `[m' d]`, to multiply their coordinates by.
        to: Whether to multiply by Q first; if not, `matrix` holds coordinates.
        back: Whether to multiply by Qᵀ then.

    >>> times_by_rows(torch.ones(2, 1), None, lambda some: torch.tensor([[2.0], [3.0]])[some], to=True, back=True)
    tensor([[2.],
            [3.]])
    """
    result = matrix.new_empty(matrix.shape)
    if basis is not None:
        into, onto = _lying(basis), _lying(basis.mT)
    for some in _pieces(matrix, 4):
        place, coordinates = result[..., some, :], matrix[..., some, :]
        if basis is not None and to:
            coordinates = coordinates @ into
        if basis is not None and back:
            torch.matmul(coordinates * values(some), onto, out=place)
        else:
            torch.mul(coordinates, values(some), out=place)
    return result


def steepest_by_rows(matrix: Tensor, basis: Tensor, values: Tensor, polar: NewtonSchulz) -> Tensor:
    """`(polar(matrix Q ∘ values) ∘ values) Qᵀ`, `[m d]`, of a matrix with more rows than columns; they are met twice.

    What takes a matrix to its polar factor is known from its Gram matrix, of which each piece adds a part.

    Args:
        matrix: `[m d]`.
        basis: Q, `[d d]`.
        values: `[m d]`.
        polar: Whose `squares(matrix)` holds.

    >>> found = steepest_by_rows(torch.eye(4, 2), torch.eye(2), torch.full((4, 2), 2.0), NewtonSchulz())
    >>> torch.allclose(found, 2.0 * torch.eye(4, 2), atol=0.03)
    True
    """
    whitened, into = matrix.new_empty(matrix.shape), _lying(basis)
    parts, sizes = [], []
    for some in _pieces(matrix, 2):
        place = torch.mul(matrix[some] @ into, values[some], out=whitened[some])
        # Brought to size one first: the Gram matrix of a tiny or huge one would leave the range of its dtype.
        size = place.abs().amax().clamp_min_(torch.finfo(place.dtype).tiny)
        scaled = place / size
        parts.append(scaled.mT @ scaled)
        sizes.append(size)
    relative = torch.stack(sizes)
    size = relative.amax()
    gram = torch.einsum("pij,p->ij", torch.stack(parts), relative.div_(size).square_())
    root, back, inverse = _lying(polar.inverse_root(gram)), _lying(basis.mT), size.reciprocal()
    result = whitened
    for some in _pieces(matrix, 2):
        factor = (whitened[some] * inverse) @ root
        torch.mm(factor.mul_(values[some]), back, out=result[some])
    return result


def in_pieces(values: Callable[[slice], Tensor], shape: Sequence[int]) -> Tensor:
    """All of what `values` has of some rows, `[m d]`: its own temporaries are of so many rows at a time only.

    >>> in_pieces(lambda some: torch.arange(3.0)[some, None], (3, 1)).flatten()
    tensor([0., 1., 2.])
    """
    first = values(slice(0, 1))
    result = first.new_empty(tuple(shape))
    for some in _pieces(result, 4):
        result[some] = values(some)
    return result


def _pieces(matrix: Tensor, temporaries: int) -> Iterator[slice]:
    """Slices of rows, so many temporaries of which are fast together."""
    width = matrix.shape[:-2].numel() * matrix.shape[-1]
    return chunks_of_data(matrix.shape[-2], width, at_once(matrix.device) // temporaries)


def _lying(factor: Tensor) -> Tensor:
    """The same as a factor on the right that lies transposed.

    A product with few columns takes a third of the time (32: 2.0 ms instead of 6.1 for 50,000 rows), with many as long.
    """
    return factor.mT.contiguous().mT
