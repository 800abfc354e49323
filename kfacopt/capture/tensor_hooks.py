"""The hooks that the user put on tensors and nodes of the graph: found, and silent for a while."""

from __future__ import annotations

import gc
import itertools
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import BackwardHook, RemovableHandle

from kfacopt.fsdp import is_engines

Hooks = dict[int, Callable[..., Any]]
"""What torch keeps the hooks of one tensor or node in: by the `id` of their handles."""


class _Own:
    """The numbers of this package's latest hooks, and how many there ever were."""

    def __init__(self) -> None:
        self.latest: deque[int] = deque(maxlen=4096)
        self.total = 0


_own = _Own()


def own(handle: RemovableHandle) -> RemovableHandle:
    """Remember that a hook is this package's; returns the handle."""
    _own.latest.append(handle.id)
    _own.total += 1
    return handle


class HooksSince:
    """The hooks that others than this package register from now on.

    torch numbers all hooks in one sequence, and keeps those of a tensor in a dictionary that outlives the tensor, so
    that whether there are any takes no time to say. Where they are is asked of the garbage collector, as the graph
    does not tell: 1 ms mostly, 25 ms for 170,000 objects where a hook was removed since or is old.

    >>> since = HooksSince()
    >>> since.found()
    []
    >>> x = torch.ones(2, requires_grad=True) * 2
    >>> handle = x.register_hook(print)
    >>> [list(hooks.values()) for hooks in since.found()]
    [[<built-in function print>]]
    """

    def __init__(self) -> None:
        self._first, self._owned = RemovableHandle.next_id, _own.total

    def found(self, modules: Iterable[nn.Module] = ()) -> list[Hooks]:
        """The dictionaries that hold such hooks: those of tensors and nodes, not those of modules."""
        awaited = RemovableHandle.next_id - self._first - (_own.total - self._owned)
        found: list[Hooks] = []
        for generation in range(3):  # the youngest first, which mostly has them all
            if awaited <= 0:
                break
            for item in gc.get_objects(generation):
                if type(item) is OrderedDict and item and (new := self._new(item)):
                    awaited -= new
                    found.append(item)
        if not found:
            return found
        namespaces = [vars(torch.nn.modules.module), *map(vars, modules)]
        of_modules = {id(value) for namespace in namespaces for value in namespace.values()}
        return [item for item in found if id(item) not in of_modules]

    def _new(self, item: OrderedDict[Any, Any]) -> int:
        """How many such hooks a dictionary holds, if it holds hooks."""
        last = next(reversed(item))
        if type(last) is not int or last < self._first or not callable(item[last]):
            return 0
        return sum(1 for number in item if type(number) is int and number >= self._first and number not in _own.latest)


@contextmanager
def silent(hooks: Iterable[Hooks]) -> Iterator[None]:
    """Within this context none of the hooks is called; afterwards they are what they were.

    Those of an engine that brings the parameters are called all the same.
    """
    kept = [(held, dict(held)) for held in hooks]
    try:
        for held, before in kept:
            for number, hook in before.items():
                if not is_engines(hook):
                    held.pop(number, None)  # one of a model that is garbage may be gone by now
        yield
    finally:
        for held, before in kept:
            held.clear()
            held.update(before)


class Retaining:
    """The tensors on which the user called `retain_grad`: every backward adds to what they hold.

    The graph does not tell which they are. Those that some module took or returned are looked at every time; of others
    the garbage collector is asked in the first backward, the second, the fourth, the eighth, and in each once it has
    known of any. Asking takes 1 ms, or 25 ms for 170,000 objects where those of the forward may have grown old.

    >>> retaining = Retaining()
    >>> square = torch.ones(2, requires_grad=True) ** 2
    >>> square.retain_grad()
    >>> [tensor is square for tensor in retaining.among([])]
    [True]
    """

    def __init__(self) -> None:
        self._asked, self._has_others = 0, False
        self.start()

    def start(self) -> None:
        """Tensors that are made from now on are looked for."""
        self._collections = _collections()

    def among(self, known: Iterable[Tensor]) -> list[Tensor]:
        """Those among some tensors, and others; to be called once a backward."""
        found = {id(tensor): tensor for tensor in known if tensor.retains_grad}
        self._asked += 1
        if self._has_others or self._asked.bit_count() == 1:
            young = _collections() == self._collections  # nothing has been moved to the oldest generation meanwhile
            objects = itertools.chain.from_iterable(map(gc.get_objects, range(2 if young else 3)))
            others = {id(item): item for item in objects if type(item) is Tensor and item.retains_grad}
            self._has_others = self._has_others or not others.keys() <= found.keys()
            found |= others
        return list(found.values())


def _collections() -> int:
    """How often the garbage collector has moved what is alive to its oldest generation."""
    return sum(generation["collections"] for generation in gc.get_stats()[1:])


class Watched:
    """A hook of the user's whose result is looked at when it is next called, and warned of if it is another gradient.

    Args:
        hooks: Where it is.
        number: Its key there.
    """

    def __init__(self, hooks: Hooks, number: int) -> None:
        self._hooks, self._number, self._hook = hooks, number, hooks[number]
        hooks[number] = self

    def __call__(self, *gradients: Any) -> Any:
        if isinstance(self._hooks.get(self._number), Watched):
            self._hooks[self._number] = self._hook
        given = _tensors(gradients[0])
        versions = [t._version for t in given]
        result = self._hook(*gradients)
        written = [t._version for t in given] != versions
        if written or (result is not None and not _equal(_tensors(result), given)):
            warnings.warn(
                f"the hook {name_of(self._hook)} changes the gradient on its way down. The curvature of the layers "
                f"below is taken without it, for the model as its forward is",
                stacklevel=2,
            )
        return result


def watch(hooks: Iterable[Hooks]) -> None:
    """Look at what each hook returns when the user's own backward calls it."""
    for held in hooks:
        for number, hook in list(held.items()):
            if not isinstance(hook, Watched) and not is_engines(hook):
                Watched(held, number)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, Sequence) else (value,)) if isinstance(t, Tensor)]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b or torch.equal(a, b) for a, b in zip(some, others, strict=True))


def name_of(function: Any) -> str:
    """What the user may know some code by: its name and where it is written."""
    holder = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for inner in holder:
        if isinstance(inner, BackwardHook):  # torch's own, around what the user put on a module
            users = [*inner.user_pre_hooks, *inner.user_hooks]
            return f"{', '.join(map(name_of, users))} of a {type(inner.module).__name__}"
    while hasattr(function, "func"):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"
