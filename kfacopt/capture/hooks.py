"""Module hooks that do nothing in a copy of the model, nor in what torch.jit makes of it."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


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
        else:
            super().__call__(*args)


class ModuleHooks:
    """An owner's hooks before and after the forwards of some modules, which rest while there is nothing to look at.

    Hooks that rest are off their modules: torch takes a longer way through a module that has any, of a small network a
    fifth of its forward. Put back, each is where it was among the hooks of others. What torch.compile made calls the
    hooks that there were when it was made, and does not look again; where anything was compiled they stay and do
    nothing, and what was compiled while they were away is made anew.

    Args:
        modules: Those of torch.jit are left out.
        enter: Of a module, its arguments and keyword arguments.
        leave: Of the same and the output, None if the forward raised.
    """

    def __init__(self, modules: Iterable[nn.Module], enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self._rest, self._away, hook = Rest(), False, hook_type()
        self._places: list[_Place] = []
        for module in filter(may_hook, modules):
            drop_inert_hooks(module)
            before = module.register_forward_pre_hook(hook(enter, self._rest), with_kwargs=True)
            after = module.register_forward_hook(hook(leave, self._rest), with_kwargs=True, always_call=True)
            self._places += [_Place(module._forward_pre_hooks, before), _Place(module._forward_hooks, after)]

    def rest(self, on: bool) -> None:
        """Rest, or look again."""
        self._rest.on = on
        compiled = _frames_compiled() > 0
        if self._away and (compiled or not on):
            for place in self._places:
                place.put_back()
            self._away = False
            if compiled:
                torch.compiler.reset()
        elif on and not compiled and not self._away:
            for place in self._places:
                place.take_away()
            self._away = True

    def remove(self) -> None:
        """Remove them for good; a second call does nothing."""
        for place in self._places:
            place.handle.remove()
        self._places.clear()


class _Place:
    """A hook's place among those of a module."""

    def __init__(self, hooks: dict[int, Any], handle: RemovableHandle) -> None:
        self.handle = handle
        self._hooks, self._hook = hooks, hooks[handle.id]
        self._earlier: frozenset[int] = frozenset()

    def take_away(self) -> None:
        keys = list(self._hooks)
        if self.handle.id in self._hooks:
            self._earlier = frozenset(keys[: keys.index(self.handle.id)])
            del self._hooks[self.handle.id]

    def put_back(self) -> None:
        later = {key: hook for key, hook in self._hooks.items() if key not in self._earlier}
        for key in later:
            del self._hooks[key]
        self._hooks[self.handle.id] = self._hook
        self._hooks.update(later)


def _frames_compiled() -> int:
    """How many frames torch.compile has made anything of in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["frames"]["total"])


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
