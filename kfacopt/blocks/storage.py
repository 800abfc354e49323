"""How running averages of symmetric matrices are kept: their halves, and in which numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.linalg.triangles import pack_triangle, unpack_triangle


@dataclass(frozen=True)
class Storage:
    """Kronecker factors in half of their memory or less, at the price of bringing them back whenever they are read.

    Halves are exact. In bfloat16 each entry is off by up to 2⁻⁹ of itself after every update, and so the running
    average by up to `2⁻⁹ / (1 - ema_decay)`, 4% at 0.95; what a batch changes by less than that may be lost. Everything
    that is computed is in the statistics' own precision, and state dicts hold whole factors in it: they go from any
    storage to any other, and resume bit for bit.

    Args:
        packed: Keep the upper triangles only.
        dtype: Keep them in `torch.bfloat16`, or `torch.float32`; None: in the precision that they have.

    Raises:
        ValueError: Another dtype. In float16 small factors would be zero.

    >>> kept = Storage(dtype=torch.bfloat16).kept(torch.eye(4))
    >>> kept.shape, kept.dtype
    (torch.Size([2, 5]), torch.bfloat16)
    """

    packed: bool = True
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"dtype={self.dtype} of Storage: Kronecker factors are kept in torch.bfloat16 or torch.float32, or, "
                f"with None, in the precision that they have"
            )

    def kept(self, value: Tensor) -> Tensor:
        """What is kept of symmetric matrices `[*k d d]`, or of a diagonal `[d]`."""
        half = pack_triangle(value) if self.packed and value.ndim > 1 else value
        return half if self.dtype is None else half.to(self.dtype)

    def restored(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrices again, in the precision that they had; a tensor of its own.

        >>> storage = Storage()
        >>> storage.restored(storage.kept(torch.eye(3)), torch.float32).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
        """
        wide = kept.to(dtype, copy=True)
        return unpack_triangle(wide) if self.packed and kept.ndim > 1 else wide
