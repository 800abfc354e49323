"""Sub-matrices of linear operators."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import Tensor

from kfacopt.linalg.operator import LinearOperator


class SubmatrixLinearOperator(LinearOperator):
    """`A[row_idxs, :][:, col_idxs]`: rows and columns of an operator, in the order given.

    A product costs one product with A. Indices are those of A as a matrix, its tensors flattened one after another.

    Args:
        A: The operator.
        row_idxs: Rows to keep.
        col_idxs: Columns to keep.

    Raises:
        ValueError: If an index is not an integer, given twice, or out of bounds.

    >>> from kfacopt.operators import IdentityLinearOperator
    >>> SubmatrixLinearOperator(IdentityLinearOperator([(3,)]), [0, 2], [2, 1]) @ torch.tensor([1.0, 2.0])
    tensor([0., 1.])
    """

    def __init__(self, A: LinearOperator, row_idxs: Iterable[SupportsIndex], col_idxs: Iterable[SupportsIndex]) -> None:
        self._A = A
        self.set_submatrix(row_idxs, col_idxs)

    @property
    def device(self) -> torch.device:
        return self._A.device

    @property
    def dtype(self) -> torch.dtype:
        return self._A.dtype

    def set_submatrix(self, row_idxs: Iterable[SupportsIndex], col_idxs: Iterable[SupportsIndex]) -> None:
        """Choose other rows and columns; the operator's shape changes.

        Raises:
            ValueError: As the constructor; the operator then stays as it was.
        """
        rows = _checked("row_idxs", row_idxs, self._A.shape[0])
        columns = _checked("col_idxs", col_idxs, self._A.shape[1])
        super().__init__([(len(columns),)], [(len(rows),)])
        self._row_idxs, self._col_idxs = rows, columns
        self.SELF_ADJOINT = self._A.SELF_ADJOINT and rows == columns

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        (columns,) = M
        padded = columns.new_zeros(self._A.shape[1], columns.shape[-1])
        padded[self._col_idxs] = columns
        product: Tensor = self._A @ padded
        return [product[self._row_idxs]]

    def _adjoint(self) -> SubmatrixLinearOperator:
        return SubmatrixLinearOperator(self._A.adjoint(), self._col_idxs, self._row_idxs)


def _checked(name: str, indices: Iterable[SupportsIndex], size: int) -> list[int]:
    checked = []
    for index in indices:
        # A mask is no list of indices, though its entries count as integers.
        mask = isinstance(index, bool) or str(getattr(index, "dtype", "")).endswith("bool")
        if mask or not hasattr(index, "__index__"):
            raise ValueError(f"{name} must contain integers, got {index!r}")
        checked.append(operator.index(index))
    outside = [i for i in checked if not 0 <= i < size]
    if outside:
        raise ValueError(f"{name} must lie between 0 and {size - 1}, got {outside[:5]}, which is out of bounds")
    if len(set(checked)) != len(checked):
        # Counting is quadratic: of long lists the message names none, rather than take seconds to refuse them.
        twice = sorted({i for i in checked if checked.count(i) > 1}) if len(checked) < 1000 else []
        raise ValueError(f"{name} must not contain duplicates, got {twice[:5] or 'some'} twice")
    return checked
