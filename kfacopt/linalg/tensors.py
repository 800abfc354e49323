"""Lists of tensors as one vector: inner product, finiteness, flattening and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Size, Tensor

ELEMENTS_IN_CACHE = 2**18
"""How many elements a temporary had better have on a processor: 1 MiB in float32.

It stays in the cache then, and the allocator has it at hand. Squared per-datum gradients of a head of 50,000 words took
36 ms so, and 124 ms in one piece; of usual layers (128 x 512, 64 places) 66 and 150.
"""


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of the inner products of pairs of tensors; pairs may differ in dtype, the pairs' sum is float64.

    >>> inner_product([torch.ones(2)], [torch.tensor([1.0, 2.0])])
    3.0
    """
    return float(inner_products(left, right).sum()) if left else 0.0


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Those of pairs of tensors, `[pairs]` in float64; pairs may differ in dtype.

    >>> inner_products([torch.ones(2)], [torch.tensor([1.0, 2.0])])
    tensor([3.], dtype=torch.float64)
    """
    products = [_dot(a, b.to(a.dtype)) for a, b in zip(left, right, strict=True)]
    return stacked(products).double() if products else torch.zeros(0, dtype=torch.float64)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    if left.is_contiguous() and right.is_contiguous():
        return torch.dot(left.view(-1), right.view(-1))
    return (left * right).sum()  # flattening would copy, too, and be one call more


def magnitude(tensor: Tensor) -> Tensor:
    """Sum of the absolute values of all entries, without axes; on a processor in pieces that stay in its cache.

    >>> magnitude(torch.tensor([1.0, -2.0]))
    tensor(3.)
    """
    if tensor.device.type != "cpu" or tensor.numel() <= ELEMENTS_IN_CACHE or not tensor.is_contiguous():
        return tensor.abs().sum()
    return torch.stack([piece.abs().sum() for piece in tensor.flatten().split(ELEMENTS_IN_CACHE)]).sum()


def row_pieces(rows: Tensor) -> list[slice]:
    """Slices of rows `[m c]` of which a temporary stays in a processor's cache; elsewhere one slice, of all.

    >>> row_pieces(torch.zeros(3, 200_000))
    [slice(0, 1, None), slice(1, 2, None), slice(2, 3, None)]
    """
    return pieces(len(rows), rows.shape[1], rows.device)


def pieces(count: int, elements: int, device: torch.device) -> list[slice]:
    """Slices of `count` things of so many elements each, of which a temporary stays in a processor's cache.

    >>> pieces(3, 100_000, torch.device("cpu"))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    size = max(1, ELEMENTS_IN_CACHE // max(1, elements)) if device.type == "cpu" else max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, max(1, count), size)]


class _HasRows(Protocol):
    def __getitem__(self, some: slice, /) -> Tensor: ...


def row_products(left: Tensor, right: _HasRows) -> tuple[Tensor, Tensor, Tensor]:
    """`l·l`, `r·r` and `l·r` of each row of two matrices, `[m]` each from `[m c]`; met once, some rows at a time.

    >>> row_products(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
    (tensor([25.]), tensor([4.]), tensor([8.]))
    """
    found = []
    for some in row_pieces(left):
        one, other = left[some], right[some]
        squares = (torch.linalg.vector_norm(rows, dim=-1).square() for rows in (one, other))
        found.append((*squares, torch.linalg.vecdot(one, other)))
    own, others, along = (torch.cat(parts) for parts in zip(*found, strict=True))
    return own, others, along


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every entry of every tensor is finite; one synchronisation with the device.

    >>> all_finite([torch.tensor([1.0, float("nan")])])
    False
    """
    return math.isfinite(checksum(tensors))


def checksum(tensors: Sequence[Tensor]) -> float:
    """Sum of the tensors' norms: finite exactly if every entry is (barring overflow); one synchronisation.

    >>> checksum([torch.tensor([3.0, -4.0])])
    5.0
    """
    return sum(lengths(tensors), 0.0)


def lengths(tensors: Sequence[Tensor]) -> list[float]:
    """The norm of each of some tensors as a number, finite exactly if its entries are; one synchronisation.

    >>> lengths([torch.tensor([3.0, 4.0]), torch.full((2,), 1e30)])[0]
    5.0
    """
    # Roots of squares: an eighth of the time that torch takes to sum absolute values. Where squares overflow, but the
    # entries do not, they are taken of smaller ones.
    found: list[float] = norms(tensors).tolist() if tensors else []
    if all(map(math.isfinite, found)):
        return found
    return [own if math.isfinite(own) else _scaled_norm(t) for own, t in zip(found, tensors, strict=True)]


def _scaled_norm(tensor: Tensor) -> float:
    largest = float(tensor.abs().max())
    return largest * float(torch.linalg.vector_norm(tensor / largest)) if math.isfinite(largest) else largest


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each of some tensors, `[p]`.

    >>> norms([torch.tensor([3.0, 4.0]), torch.ones(1)])
    tensor([5., 1.])
    """
    return stacked(torch._foreach_norm(list(tensors))) if tensors else torch.zeros(0)


def stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one; in float32 at least where their dtypes differ.

    >>> stacked([torch.ones((), dtype=torch.bfloat16), torch.ones(())]).dtype
    torch.float32
    """
    if any(number.dtype != numbers[0].dtype for number in numbers):
        numbers = [as_statistic(number) for number in numbers]
    return torch.stack(list(numbers))


def tensor_of_rows(rows: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows, all of them and in their order, some tensors are; None: there is none.

    Who wants many tensors as one at every step lets their owners hold views of it: nothing is copied until an owner
    holds something else (a loaded state, a renewed inverse), which is told by itself.

    >>> whole = torch.ones(2, 2)
    >>> tensor_of_rows(whole.unbind()) is whole, tensor_of_rows([whole[0], whole[1].clone()])
    (True, None)
    """
    whole: Tensor | None = rows[0]._base
    if whole is None or whole.shape != (len(rows), *rows[0].shape):
        return None
    first, stride = whole.storage_offset(), whole.stride(0)
    for place, row in enumerate(rows):
        if row._base is not whole or row.storage_offset() != first + place * stride:
            return None
    return whole


def held_as_rows(tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Tensors of one shape as one, and what their owners are to hold from then on: views of it (`tensor_of_rows`).

    >>> whole, views = held_as_rows([torch.ones(2), torch.zeros(2)])
    >>> held_as_rows(views)[0] is whole
    True
    """
    if (whole := tensor_of_rows(tensors)) is not None:
        return whole, tensors
    whole = torch.stack(list(tensors))
    return whole, whole.unbind()


def rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as the rows of one; of a single one a view, which spares to copy it.

    >>> rows_of([torch.ones(2)]).shape, rows_of([torch.ones(2), torch.ones(2)]).shape
    (torch.Size([1, 2]), torch.Size([2, 2]))
    """
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def tensor_of_parts(parts: Sequence[Tensor]) -> Tensor | None:
    """The vector of which some tensors, of any shapes, are views after each other; None: there is none.

    >>> whole = torch.ones(5)
    >>> first, second = whole.split([2, 3])
    >>> tensor_of_parts([first.view(2, 1), second]) is whole, tensor_of_parts([second, first])
    (True, None)
    """
    whole: Tensor | None = parts[0]._base
    if whole is None or whole.ndim != 1:
        return None
    place = whole.storage_offset()
    end = place + len(whole)
    for part in parts:
        if part._base is not whole or part.storage_offset() != place:
            return None
        place += part.numel()
    return whole if place == end else None


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector `[p]`.

    >>> flat([torch.zeros(2, 1), torch.ones(1)])
    tensor([0., 0., 1.])
    """
    return torch.cat([t.reshape(-1) for t in tensors])


def split_like(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector `[p]` as tensors shaped as those of `like`: the inverse of `flat`, as views.

    >>> [t.shape for t in split_like(torch.zeros(5), [torch.zeros(2, 2), torch.zeros(1)])]
    [torch.Size([2, 2]), torch.Size([1])]
    """
    return [part.view(t.shape) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def as_statistic(tensor: Tensor) -> Tensor:
    """In the precision that statistics have: at least float32.

    >>> as_statistic(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def flat_columns(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors with columns along their last axis, `[*shape k]`, as one matrix `[p k]`.

    >>> flat_columns([torch.zeros(2, 1, 3), torch.ones(3)]).shape
    torch.Size([3, 3])
    """
    return torch.cat([t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in tensors])


def split_columns(matrix: Tensor, shapes: Sequence[Size]) -> list[Tensor]:
    """A matrix `[p k]` as tensors `[*shape k]`: the inverse of `flat_columns`.

    >>> [t.shape for t in split_columns(torch.zeros(5, 3), [torch.Size([2, 2]), torch.Size([])])]
    [torch.Size([2, 2, 3]), torch.Size([3])]
    """
    parts = matrix.split([shape.numel() for shape in shapes])
    return [part.reshape(*shape, matrix.shape[1]) for part, shape in zip(parts, shapes, strict=True)]


def real_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves, of complex ones `[..., 2]` real numbers in the same memory.

    >>> real_views([torch.tensor([1.0 + 2.0j])])
    [tensor([[1., 2.]])]
    """
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
