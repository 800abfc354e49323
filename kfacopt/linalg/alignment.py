"""Zeros up to sizes at which matrix products are fast.

With the bias's column a size is odd more often than not, and products whose result has an odd number of columns run at
two thirds of the speed (1000 x 785 times 785 x 785: 28.9 ms, to 800 columns 17.7, alternately measured on two cores).
Sixteen float32 fill the widest vector register of a CPU. Below 128 the padding is a large part of the matrix (at 17 it
would nearly quadruple a square one), and products are short anyway. Both numbers change the speed only.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_MULTIPLE, _SMALLEST = 16, 128


def missing(size: int) -> int:
    """How many zeros a size lacks.

    >>> missing(785), missing(800), missing(17)
    (15, 0, 0)
    """
    return 0 if size < _SMALLEST else -size % _MULTIPLE


def square(matrix: Tensor) -> Tensor:
    """`[*k d d]` with zero rows and columns; a diagonal `[d]` as it is."""
    lacking = missing(matrix.shape[-1])
    return matrix if matrix.ndim == 1 or not lacking else functional.pad(matrix, (0, lacking, 0, lacking))


def wide(matrix: Tensor) -> Tensor:
    """`[.. d]` with zero columns."""
    size = matrix.shape[-1]
    if not (lacking := missing(size)):
        return matrix
    result = matrix.new_empty(*matrix.shape[:-1], size + lacking)  # torch's pad writes all of it twice
    result[..., :size], result[..., size:] = matrix, 0.0
    return result


def tall(matrix: Tensor) -> Tensor:
    """`[.. d c]` with zero rows."""
    lacking = missing(matrix.shape[-2])
    return functional.pad(matrix, (0, 0, 0, lacking)) if lacking else matrix
