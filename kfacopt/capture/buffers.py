"""A model's buffers are left as they are: copies take their place for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def copied_buffers(root: nn.Module) -> Iterator[None]:
    """Within this context the buffers of a model are copies; afterwards, however it ends, they are the originals again.

    Nothing is written to the originals, not even their own values, so a graph that saved them stays valid. A tensor
    that several modules hold as a buffer has one copy. Contexts of one model may be nested, not interleaved.

    Args:
        root: Its own buffers and those of all modules below it.

    >>> import torch
    >>> norm = nn.BatchNorm1d(2)
    >>> with copied_buffers(norm):
    ...     _ = norm(torch.randn(4, 2))
    ...     int(norm.num_batches_tracked)
    1
    >>> int(norm.num_batches_tracked)
    0
    """
    with buffers_copied(root.modules()):
        yield


@contextmanager
def buffers_copied(modules: Iterable[nn.Module]) -> Iterator[None]:
    """`copied_buffers` of some modules, without those below them."""
    copies: dict[int, Tensor] = {}
    places = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    try:
        for module, name, buffer in places:
            if buffer is not None:
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        yield
    finally:
        for module, name, buffer in places:
            module._buffers[name] = buffer
