"""Symmetric matrices in half of their memory, for a way that is paid by the byte."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_BLOCK = 128
"""Rows that are mirrored at a time on a processor: a transposed matrix would leave its cache at every entry. A side of
769 takes 0.9 ms so, and 7.7 in one piece."""


def pack_triangle(matrix: Tensor) -> Tensor:
    """The upper triangles of symmetric matrices `[*k d d]` as full rectangles `[*k (d+1)//2 d+1]`.

    The rows of the lower half of the triangle, turned by 180°, fill what the rows of the upper half leave free (the
    idea of LAPACK's rectangular full packed format). No index tensors are needed, which are larger than the matrix.

    >>> import torch
    >>> pack_triangle(torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]))
    tensor([[6., 1., 2., 3.],
            [0., 0., 4., 5.]])
    """
    size = matrix.shape[-1]
    half = (size + 1) // 2
    packed = matrix.new_empty(packed_shape(matrix.shape))
    packed[..., 0] = 0.0
    packed[..., 1:] = matrix[..., :half, :].triu()
    packed[..., : size - half, :-1] += matrix[..., half:, :].triu(half).flip(-1, -2)
    return packed


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which `pack_triangle` leaves matrices of a shape.

    >>> packed_shape((5, 3, 3))
    (5, 2, 4)
    """
    *groups, size, _ = shape
    return (*groups, (size + 1) // 2, size + 1)


def unpack_triangle(packed: Tensor) -> Tensor:
    """The symmetric matrices `[*k d d]` that `pack_triangle` packed.

    >>> import torch
    >>> matrix = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    >>> bool((unpack_triangle(pack_triangle(matrix)) == matrix).all())
    True
    """
    size = packed.shape[-1] - 1
    half = (size + 1) // 2
    matrix = packed.new_empty(*packed.shape[:-2], size, size)
    matrix[..., :half, :] = packed[..., 1:]
    matrix[..., half:, :] = packed[..., : size - half, :-1].flip(-1, -2)
    step = _BLOCK if packed.device.type == "cpu" else size
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        matrix[..., rows, :start] = matrix[..., :start, rows].mT
        upper = matrix[..., rows, rows].triu()
        matrix[..., rows, rows] = upper + upper.triu(1).mT
    return matrix


def is_symmetric(matrix: Tensor) -> bool:
    """Whether matrices `[*k d d]` are so to the last bit; waits for the device.

    >>> import torch
    >>> is_symmetric(torch.ones(2, 2)), is_symmetric(torch.tensor([[1.0, 2.0], [2.1, 1.0]]))
    (True, False)
    """
    starts = range(0, matrix.shape[-1], _BLOCK)
    return all(_block(matrix, a, b).equal(_block(matrix, b, a).mT) for a in starts for b in starts if b >= a)


def _block(matrix: Tensor, row: int, column: int) -> Tensor:
    return matrix[..., row : row + _BLOCK, column : column + _BLOCK]
