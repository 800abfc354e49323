"""Writes to tensors that were there before, undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KeptTensors(TorchDispatchMode):
    """Keeps what operations run in this context are about to overwrite, for `restore`.

    Whole storages are kept, each before it is first written to, so that views are right; those that an operation in
    the context made are not. Kernels that write without an operation of torch saying so are not seen.

    >>> x = torch.ones(3)
    >>> kept = KeptTensors()
    >>> with kept:
    ...     _ = x[1:].mul_(5.0)
    >>> kept.restore()
    >>> x, x._version
    (tensor([1., 1., 1.]), 0)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()
        self._kept: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            self._keep(tensor)
        result = func(*args, **kwargs)
        if not _returns_given(func):
            self._made.update(storage._cdata for storage in _storages(result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        for storage in _storages(tensor):
            if storage._cdata in self._made:
                return
            if storage._cdata not in self._kept:
                self._kept[storage._cdata] = storage, storage.clone()
        if not tensor.is_inference():
            self._versions.setdefault(id(tensor), (tensor, tensor._version))

    def restore(self) -> None:
        """Bring back what was overwritten, so that a graph which saved it does not notice."""
        for storage, before in self._kept.values():
            storage.copy_(before)
        if self._versions:
            tensors, versions = zip(*self._versions.values(), strict=True)
            torch._C._autograd._unsafe_set_version_counter(tensors, versions)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for place, name in _writes(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


@cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def _returns_given(func: Any) -> bool:
    """Whether an operation returns views of its arguments, or them."""
    return any(value.alias_info is not None for value in func._schema.returns)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()
