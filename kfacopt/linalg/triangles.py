"""Symmetric matrices in half of their memory, for a way that is paid by the byte."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


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
    upper = matrix.triu()
    packed = matrix.new_zeros(packed_shape(matrix.shape))
    packed[..., 1:] = upper[..., :half, :]
    packed[..., : size - half, :-1] += upper[..., half:, :].flip(-1, -2)
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
    matrix[..., :half, :] = packed[..., 1:].triu()
    matrix[..., half:, :] = packed[..., : size - half, :-1].tril().flip(-1, -2)
    return matrix + matrix.triu(1).mT
