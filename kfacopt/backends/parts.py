"""Tensors of blocks on their way to other processes, of symmetric ones a half."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.triangles import is_symmetric, pack_triangle, packed_shape, unpack_triangle
from kfacopt.replicas import Readers, delivered
from kfacopt.sharding import Processes

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def kind_of(tensor: Tensor) -> Kind:
    """What others have to know of a tensor that is sent to them.

    >>> kind_of(torch.ones(2))
    ((2,), torch.float32)
    """
    return tuple(tensor.shape), tensor.dtype


class Part(NamedTuple):
    """One tensor of a block.

    Attributes:
        layer: The block's name.
        key: The tensor's, within the block.
        kind: Of the whole tensor.
        is_half: Whether a half of it is sent.
    """

    layer: str
    key: str
    kind: Kind
    is_half: bool

    @classmethod
    def of(cls, layer: str, key: str, kind: Kind, symmetric: Collection[str]) -> Part:
        """Of a symmetric tensor its half, unless it is diagonal and has one axis."""
        return cls(layer, key, kind, key in symmetric and len(kind[0]) > 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the way."""
        return self.empty(torch.device("meta")).nbytes

    def packed(self, tensor: Tensor) -> Tensor:
        """As it is sent."""
        return pack_triangle(tensor) if self.is_half else tensor.contiguous()

    def empty(self, device: torch.device) -> Tensor:
        """Room for what is sent."""
        shape, dtype = self.kind
        return torch.empty(packed_shape(shape) if self.is_half else shape, dtype=dtype, device=device)

    def unpacked(self, arrived: Tensor) -> Tensor:
        """The whole tensor, in memory of its own: a view would keep, and save, all that came with it."""
        return unpack_triangle(arrived) if self.is_half else arrived.clone()

    def as_sent(self, tensor: Tensor) -> Tensor:
        """As it would arrive, numbers and strides: products would round otherwise with others.

        There and back takes a fifth of the time of a Cholesky inverse, which has both halves alike: to see that, a
        twentieth.
        """
        if not self.is_half:
            return tensor.contiguous()
        if not is_symmetric(tensor):
            return self.unpacked(self.packed(tensor))
        return tensor.mT if tensor.mT.is_contiguous() else tensor.contiguous()


def sent(
    parts: Sequence[Sequence[Part]], own: Sequence[Tensor], processes: Processes, readers: Readers | None
) -> list[list[Tensor] | None]:
    """What each process sends, in those that it sends to and in itself; None of what is for others.

    If nobody sends to others, all keep what they have, as it would have come back to them.

    Args:
        parts: By rank.
        own: Whole tensors, of this process's parts.
        processes: Those that train together; all must ask.
        readers: By rank, to whom it sends; None: to all.
    """
    here, ranks = processes.rank, range(processes.size)
    if readers is not None and not any(set(readers(rank)) - {rank} for rank in ranks):
        kept = [part.as_sent(tensor) for part, tensor in zip(parts[here], own, strict=True)]
        return [kept if rank == here else None for rank in ranks]
    read = [readers is None or rank == here or here in readers(rank) for rank in ranks]
    room = processes.device if readers is None else torch.device("meta")
    tensors = [[part.empty(room) for part in of_rank] if rank != here else [] for rank, of_rank in enumerate(parts)]
    tensors[here] = [part.packed(tensor) for part, tensor in zip(parts[here], own, strict=True)]
    arrived = processes.sent(tensors) if readers is None else delivered(processes, tensors, readers)
    return [
        [part.unpacked(tensor) for part, tensor in zip(of_rank, got, strict=True)] if reads else None
        for of_rank, got, reads in zip(parts, arrived, read, strict=True)
    ]
