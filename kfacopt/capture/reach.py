"""The Python state that some functions can get at, to be brought back to what it was.

Code in a backward (custom functions, what unpacks saved tensors) keeps its state where Python code does: in what it
was given, in closures, globals and classes, in the attributes of modules, in generators of random numbers.
"""

from __future__ import annotations

import functools
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = 20_000
"""So many objects are looked at, the nearest first: what is further away is not a backward's state."""
_LONGEST = 1_000
"""The elements of longer containers are not looked into: they are data."""
_FOREIGN = (sys.stdlib_module_names | {"torch", "numpy", "triton", "kfacopt"}) - {"__main__"}
_OPAQUE = {"kfacopt", "logging", "threading", "multiprocessing", "asyncio", "concurrent", "io", "_io", "queue"}
_MISSING: Any = object()

Place = tuple[Callable[[], Any], Callable[[Any], object]]
"""Reads a copy of what is there, and writes it back."""


class Reach:
    """What code can get at, from the functions and objects that it starts from.

    Followed are attributes, elements, closures, defaults and the globals that a function names. Not followed are the
    globals of torch, numpy and the standard library, and what optimizers of this package hold.

    Args:
        roots: Functions, or what they are given.

    Attributes:
        leaves: Tensors that gather gradients.
        modules: Their buffers are not among the state: tensors are no Python state.

    >>> seen = []
    >>> state = Reach([seen.append])
    >>> before = state.saved()
    >>> seen.append(1.0)
    >>> state.restore(before)
    >>> seen
    []
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.leaves: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self._places: list[Place] = []
        self._looks: dict[type, _Look] = {}
        self._bound: set[tuple[int, str]] = set()
        queue = deque(roots)
        held: dict[int, Any] = {}  # keeps what was looked at, so that no id is given twice
        while queue and len(held) < _LARGEST:
            item = queue.popleft()
            if type(item) not in _PLAIN and id(item) not in held:
                held[id(item)] = item
                queue.extend(self._look_at(item))

    def saved(self) -> list[Any]:
        """A copy of all that is reached, container by container."""
        return [read() for read, _ in self._places]

    def restore(self, saved: list[Any]) -> None:
        """Bring back what `saved` returned; what has not changed is not written to."""
        for (read, write), before in zip(self._places, saved, strict=True):
            if not _same(read(), before):
                write(before)

    def _look_at(self, item: Any) -> Iterable[Any]:
        """Take an object in, and return what can be got at from there."""
        kind = type(item)
        if kind not in self._looks:
            opaque = _home(kind) in _OPAQUE or str(kind.__module__).startswith("torch.distributed.")
            otherwise: _Look = _parts_of_nothing if opaque else Reach._instance
            self._looks[kind] = next((look for base, look in _KINDS.items() if issubclass(kind, base)), otherwise)
        return self._looks[kind](self, item)

    def _tensor(self, item: Tensor) -> Iterable[Any]:
        if item.is_leaf and item.requires_grad:
            self.leaves.append(item)
        return ()

    def _mapping(self, item: dict[Any, Any]) -> Iterable[Any]:
        self._places.append((functools.partial(_contents_of, item), functools.partial(_refill, item)))
        values = tuple(_contents_of(item).values()) if dict.__len__(item) <= _LONGEST else ()
        return (*values, *getattr(item, "__dict__", {}).values())

    def _collection(self, item: Any) -> Iterable[Any]:
        self._places.append((functools.partial(_contents_of, item), functools.partial(_refill, item)))
        return tuple(_contents_of(item)) if _builtin(item).__len__(item) <= _LONGEST else ()

    def _fixed(self, item: Any) -> Iterable[Any]:
        kind = tuple if isinstance(item, tuple) else frozenset
        return tuple(kind.__iter__(item)) if kind.__len__(item) <= _LONGEST else ()

    def _function(self, item: types.FunctionType) -> Iterable[Any]:
        yield from (item.__closure__ or ())
        yield from (item.__defaults__ or ())
        yield from (item.__kwdefaults__ or {}).values()
        if _home(item) not in _FOREIGN:
            names = set(_names(item.__code__))
            for value in self._bindings(item.__globals__, names):
                yield value
                if type(value) is types.ModuleType and value.__name__.partition(".")[0] not in _FOREIGN:
                    yield from self._bindings(vars(value), names)

    def _bindings(self, namespace: dict[str, Any], names: set[str]) -> Iterator[Any]:
        for name in sorted(names & namespace.keys()):
            if (id(namespace), name) not in self._bound:
                self._bound.add((id(namespace), name))
                read = functools.partial(namespace.get, name, _MISSING)
                self._places.append((read, functools.partial(_bind, namespace, name)))
                yield namespace[name]

    def _cell(self, item: types.CellType) -> Iterable[Any]:
        self._places.append((functools.partial(_contents, item), functools.partial(_fill, item)))
        return (_contents(item),)

    def _class(self, item: type) -> Iterable[Any]:
        if _home(item) in _FOREIGN:
            return ()
        self._places.append((lambda: dict(vars(item)), functools.partial(_redefine, item)))
        return (*vars(item).values(), *item.__bases__)

    def _instance(self, item: Any) -> Iterable[Any]:
        if isinstance(item, nn.Module):
            self.modules.append(item)
        elif "numpy" in sys.modules and isinstance(item, sys.modules["numpy"].ndarray):
            self._places.append((item.copy, functools.partial(_write, item)))
        yield type(item)
        attributes = getattr(item, "__dict__", None)
        if type(attributes) is dict:
            yield attributes
        for name in _slots(type(item)):
            read = functools.partial(getattr, item, name, _MISSING)
            self._places.append((read, functools.partial(_set, item, name)))
            yield getattr(item, name, None)

    def _random_state(self, item: Any) -> Iterable[Any]:
        getter, setter = ("get_state", "set_state") if isinstance(item, torch.Generator) else ("getstate", "setstate")
        self._places.append((getattr(item, getter), getattr(item, setter)))
        return ()


def _home(item: Any) -> str:
    """The top-level module that something was defined in."""
    return str(getattr(item, "__module__", None) or "").partition(".")[0]


def _names(code: types.CodeType) -> Iterator[str]:
    """The names that code uses, functions defined within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if not name.startswith("__"):
                yield name


def _same(now: Any, before: Any) -> bool:
    """Whether two copies hold the very same objects."""
    if isinstance(before, dict):
        return list(now) == list(before) and all(a is b for a, b in zip(now.values(), before.values(), strict=True))
    if type(before) is list:
        return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
    if type(before) is set:
        return bool(now == before)
    return now is before


def _builtin(container: Any) -> Any:
    """What a container is at bottom: a subclass may compute what it shows, as transformers' table of activations."""
    return next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(container, kind))


def _contents_of(container: Any) -> Any:
    """What a container holds, as a plain dict, set or list."""
    kind = _builtin(container)
    if issubclass(kind, dict):
        return dict(kind.items(container))
    return set(set.__iter__(container)) if kind is set else list(kind.__iter__(container))


def _refill(container: Any, contents: Any) -> None:
    kind = _builtin(container)
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in contents.items():
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, contents)


def _bind(namespace: dict[str, Any], name: str, value: Any) -> None:
    namespace.pop(name, None) if value is _MISSING else namespace.__setitem__(name, value)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING


def _fill(cell: types.CellType, value: Any) -> None:
    if value is _MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _redefine(kind: type, before: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name in now.keys() - before.keys():
        delattr(kind, name)
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            setattr(kind, name, value)


def _write(array: Any, before: Any) -> None:
    if array.flags.writeable:
        array[...] = before


def _set(item: Any, name: str, value: Any) -> None:
    delattr(item, name) if value is _MISSING else setattr(item, name, value)


def _parts_of_nothing(*_: Any) -> Iterable[Any]:
    return ()


def _parts_of_method(_: Reach, item: Any) -> Iterable[Any]:
    return item.__self__, getattr(item, "__func__", None)


def _parts_of_partial(_: Reach, item: functools.partial[Any]) -> Iterable[Any]:
    return item.func, *item.args, *item.keywords.values()


_PLAIN = {type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype, torch.device, torch.Size}
_Look = Callable[[Reach, Any], Iterable[Any]]
_KINDS: dict[Any, _Look] = {
    Tensor: Reach._tensor,
    dict: Reach._mapping,
    (list, set, deque): Reach._collection,
    (tuple, frozenset): Reach._fixed,
    types.FunctionType: Reach._function,
    (types.MethodType, types.BuiltinMethodType): _parts_of_method,
    functools.partial: _parts_of_partial,
    (staticmethod, classmethod): lambda _, item: (item.__func__,),
    property: lambda _, item: (item.fget,),
    weakref.ref: lambda _, item: (item(),),
    types.CellType: Reach._cell,
    type: Reach._class,
    types.ModuleType: _parts_of_nothing,
    (torch.Generator, random.Random): Reach._random_state,
}
