"""Module hooks that do nothing in a copy of the model, nor in what torch.jit makes of it."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn


class Rest:
    """Whether all hooks of one owner have nothing to look at for the time being."""

    on = False


class Hook:
    """A hook that is inert in copies and pickles of the model: they are not what the optimizer watches.

    Args:
        method: What to call; None: nothing.
        rest: While it is on nothing is called, which spares most of what a hook costs.
    """

    def __init__(self, method: Callable[..., None] | None = None, rest: Rest | None = None) -> None:
        _leave_out_of_scripts()
        self._method = None if method is None else weakref.WeakMethod(method)
        self._rest = Rest() if rest is None else rest

    @property
    def inert(self) -> bool:
        """Whether there is nobody to call: a copy, or an optimizer that is gone."""
        return self._method is None or self._method() is None

    def __call__(self, *args: Any) -> None:
        if self._rest.on:
            return
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

    if _Uncompiled.in_between is Hook.__call__:
        _Uncompiled.in_between = torch.compiler.disable(Hook.__call__)
    return _Uncompiled


class _Uncompiled(Hook):
    """A hook that a compiled module calls in between its graphs; where nothing is compiled it costs a look."""

    in_between: ClassVar[Callable[..., None]] = Hook.__call__

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():
            _Uncompiled.in_between(self, *args)
        elif not self._rest.on:
            super().__call__(*args)


def drop_inert_hooks(module: nn.Module) -> None:
    """Remove what a copied or unpickled module kept of the hooks of the original."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [k for k, hook in hooks.items() if isinstance(hook, Hook) and hook.inert]:
            del hooks[key]
            for flags in (f"{kind}_with_kwargs", f"{kind}_always_called"):
                getattr(module, flags, {}).pop(key, None)


def may_hook(module: nn.Module) -> bool:
    """Whether a module takes hooks in Python: what torch.jit made does not."""
    return not isinstance(module, torch.jit.ScriptModule)


def is_recorded() -> bool:
    """Whether torch.jit.trace writes down what runs: a forward of nobody's, in which we must leave no operation."""
    return torch._C._get_tracing_state() is not None


def _leave_out_of_scripts() -> None:
    """Let torch.jit.script pass over our hooks: it compiles every hook, and asks none whether it can be."""
    recursive = torch.jit._recursive
    stubs_of = recursive.get_hook_stubs
    if getattr(stubs_of, "passes_over", None) is Hook:
        return

    @functools.wraps(stubs_of)
    def stubs_of_others(module: nn.Module) -> Any:
        with _set_aside(module):
            return stubs_of(module)  # type: ignore[no-untyped-call]

    stubs_of_others.passes_over = Hook  # type: ignore[attr-defined]
    recursive.get_hook_stubs = stubs_of_others


@contextmanager
def _set_aside(module: nn.Module) -> Iterator[None]:
    kept = [(hooks, dict(hooks)) for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    for hooks, before in kept:
        for key, hook in before.items():
            if isinstance(hook, Hook):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
