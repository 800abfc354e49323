"""Module hooks that do nothing in a copy of the model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A hook that is inert in copies and pickles of the model: they are not what the optimizer watches."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    @property
    def inert(self) -> bool:
        """Whether there is nobody to call: a copy, or an optimizer that is gone."""
        return self._method is None or self._method() is None

    def __call__(self, *args: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def hook_type() -> type[Hook]:
    """Hooks that torch.compile does not look into; only where it was used, as it takes seconds to import."""
    if "torch._dynamo" not in sys.modules:
        return Hook

    class Uncompiled(Hook):
        __call__ = torch.compiler.disable(Hook.__call__)

    return Uncompiled


def drop_inert_hooks(module: nn.Module) -> None:
    """Remove what a copied or unpickled module kept of the hooks of the original."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [k for k, hook in hooks.items() if isinstance(hook, Hook) and hook.inert]:
            del hooks[key]
            for flags in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                getattr(module, flags, {}).pop(key, None)
