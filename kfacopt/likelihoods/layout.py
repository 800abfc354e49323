"""How a prediction of any shape is laid out as rows, one row per loss term, and how rows go back.

>>> import torch
>>> layout = RowLayout.of(torch.zeros(4, 3, 5), axis=1)         # [n c d], torch's layout of classes
>>> layout.rows(torch.zeros(4, 3, 5)).shape, layout.terms_per_datum
(torch.Size([20, 3]), 5)
>>> layout.restore(torch.zeros(2, 20, 3)).shape
torch.Size([2, 4, 3, 5])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfacopt.likelihoods.precision import wide_enough


@dataclass(frozen=True)
class RowLayout:
    """The rows of a prediction.

    Attributes:
        shape: Shape of the prediction.
        axis: The axis that holds one term's outputs; `None` when every number is a term of its own.
        dtype: Data type of the prediction.
        outputs: Those along `axis` that the loss is taken of; None: all.
    """

    shape: torch.Size
    axis: int | None
    dtype: torch.dtype
    outputs: tuple[int, ...] | None = None

    @classmethod
    def of(cls, prediction: Tensor, axis: int | None) -> RowLayout:
        """The layout of `prediction` whose outputs of one term lie along `axis`."""
        return cls(prediction.shape, axis, prediction.dtype)

    def without(self, outputs: Sequence[int]) -> RowLayout:
        """The layout of a loss that does not depend on these outputs of every term.

        >>> layout = RowLayout.of(torch.zeros(2, 3), axis=1).without([1])
        >>> layout.restore(torch.ones(1, 2, 2)).tolist()
        [[[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]]
        """
        assert self.axis is not None
        return replace(self, outputs=tuple(i for i in range(self.shape[self.axis]) if i not in outputs))

    @property
    def data(self) -> int:
        """Number of data: the length of the first axis, 1 if that is the axis of the outputs."""
        return 1 if self.axis == 0 or not self.shape else self.shape[0]

    @property
    def terms_per_datum(self) -> int:
        """Number of rows that belong to one datum; they are contiguous."""
        outputs = 1 if self.axis is None else self.shape[self.axis]
        return self.shape.numel() // (outputs * self.data)

    def rows(self, tensor: Tensor) -> Tensor:
        """Read a tensor of the prediction's shape as rows `[m c]`, half precision cast up."""
        tensor = tensor.to(wide_enough(tensor.dtype))
        if self.axis is None:
            return tensor.reshape(-1, 1)
        rows = tensor.movedim(self.axis, -1).reshape(-1, self.shape[self.axis])
        return rows if self.outputs is None else rows[:, list(self.outputs)]

    def restore(self, vectors: Tensor) -> Tensor:
        """Bring vectors `[v m c]` to `[v, *prediction.shape]`, in the prediction's dtype."""
        vectors = vectors.to(self.dtype)
        if self.axis is None:
            return vectors.reshape(-1, *self.shape)
        if self.outputs is not None:
            some, vectors = vectors, vectors.new_zeros(*vectors.shape[:-1], self.shape[self.axis])
            vectors[..., list(self.outputs)] = some
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        moved = vectors.reshape(-1, *rest, self.shape[self.axis])
        return moved.movedim(-1, self.axis + 1)
