"""Backward passes of ours in a graph that holds code of the user's.

A pass besides the user's own runs what the user put into the backward once more, with cotangents that are not the
user's. Three kinds of code are there, and none may leave a trace:

- Hooks on tensors, nodes and modules need not run: they are silent in our passes. If one changes the gradient, which
  shows when the user's own backward calls it, a warning names it.
- Custom functions, and what unpacks saved tensors, must run. What they do is undone: attributes of the context,
  Python state that they can get at (`kfacopt.capture.reach`), writes to tensors (`kfacopt.capture.writes`), buffers of
  modules that they run, random numbers.
- A backward inside the backward (reversible networks) gathers gradients in leaves: `.grad` of whatever is within reach
  is set aside for the pass. The gradients of those leaves do not pass through the graph, so that their layers have
  no curvature; they are named.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from kfacopt.capture.buffers import buffers_copied
from kfacopt.capture.reach import Reach
from kfacopt.capture.tensor_hooks import Hooks, HooksSince, name_of, silent, watch
from kfacopt.capture.writes import KeptTensors

_HARMLESS = ("torch.", "kfacopt.replay.")
_RUN_USERS = ("torch._library", "torch.utils.checkpoint")


def _refuse(reason: str) -> None:
    raise RuntimeError(reason)


class Guard:
    """A context around backward passes that start from some nodes; it may be entered any number of times.

    Args:
        roots: Where the passes start; None, of a tensor without a graph, is left out.
        since: Hooks that were registered since then may be in the graph.
        model: Its parameters' gradients are set aside wherever code of the user's runs.
        refuse: Called with the reason after a pass that held a backward inside the backward. By default it raises a
            RuntimeError.
        ends: Where the passes end; none: at the leaves.
        engine: A context around each pass, in which an engine that shards the model is kept as it is.

    >>> class Log(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x, seen):
    ...         ctx.seen = seen
    ...         return x.clone()
    ...     @staticmethod
    ...     def backward(ctx, gradient):
    ...         ctx.seen.append(float(gradient))
    ...         return gradient, None
    >>> seen, x = [], torch.ones((), requires_grad=True)
    >>> y = Log.apply(x, seen)
    >>> with Guard([y.grad_fn], HooksSince())():
    ...     _ = torch.autograd.grad(y, x, retain_graph=True)
    >>> y.backward()
    >>> seen
    [1.0]
    """

    def __init__(
        self,
        roots: Iterable[Node | None],
        since: HooksSince,
        model: nn.Module | None = None,
        refuse: Callable[[str], Any] = _refuse,
        ends: Iterable[Node] = (),
        engine: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._refuse, self._engine = model, refuse, engine
        self._hooks = since.found(() if model is None else model.modules())
        found = _Code([node for node in roots if node is not None], ends)
        self._functions, self._code = found.functions, [*found.functions, *found.unpacking]
        self._reach: Reach | None = None
        if self._code:
            self._reach = Reach(chain(found.unpacking, *map(_given, found.functions)))
            own = () if model is None else model.parameters()
            leaves = chain(self._reach.leaves, found.leaves, own)
            self._leaves = list({id(leaf): leaf for leaf in leaves}.values())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around one pass."""
        with silent(self._hooks):
            if self._reach is None:
                with self._engine():
                    yield
            else:
                with self._undone(self._reach), self._engine():
                    yield

    @property
    def functions(self) -> str:
        """The custom functions in the graph, by name."""
        return ", ".join(dict.fromkeys(map(_name, self._functions)))

    def watch(self) -> None:
        """After the last pass inside the user's backward: see what the silent hooks do in that."""
        watch(self._hooks)

    @contextmanager
    def _undone(self, reach: Reach) -> Iterator[None]:
        """Around one pass in which code of the user's runs."""
        kept, saved = KeptTensors(), reach.saved()
        with ExitStack() as stack:
            stack.enter_context(silent(chain.from_iterable(map(_hooks_of, self._leaves))))
            stack.enter_context(_same_random_numbers())
            stack.callback(reach.restore, saved)
            stack.enter_context(buffers_copied(reach.modules))
            stack.callback(kept.restore)
            for function, method in product(self._functions, ("apply", "apply_boxed")):
                if (apply := getattr(function, method, None)) is not None:  # the engine asks the object for one of them
                    setattr(function, method, partial(_keeping, kept, apply))
            with self._set_aside():
                yield

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """What is gathered in leaves meanwhile is thrown away, and said."""
        before = [leaf.grad for leaf in self._leaves]
        gathered: list[Tensor] = []
        try:
            for leaf in self._leaves:
                leaf.grad = None
            yield
            gathered = [leaf for leaf in self._leaves if leaf.grad is not None]
        finally:
            for leaf, gradient in zip(self._leaves, before, strict=True):
                leaf.grad = gradient
        if gathered:
            self._refuse(self._refusal(gathered))

    def _refusal(self, gathered: Iterable[Tensor]) -> str:
        called = {} if self._model is None else {id(p): name for name, p in self._model.named_parameters()}
        names = ", ".join(called.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}") for leaf in gathered)
        return (
            f"{', '.join(dict.fromkeys(map(_name, self._code)))}: calls backward inside the backward, which gathers "
            f"gradients of {names}. How the prediction depends on them is not in the graph, so that they have no "
            f"curvature. Differentiate through the layers (torch.utils.checkpoint with use_reentrant=False saves as "
            f"much memory), or leave those parameters to AdamW"
        )


class _Code:
    """The user's code that a backward from some nodes to others runs, and the leaves that it may reach."""

    def __init__(self, roots: Sequence[Node], ends: Iterable[Node]) -> None:
        # What was made before the first of the ends does not lead to one: a module stepped T times costs T, not T².
        oldest = min((node._sequence_nr() for node in ends), default=0)
        self.functions: list[Any] = []
        self.unpacking: list[Any] = []
        self.leaves: list[Tensor] = []
        queue = list(roots)
        visited = set(queue)
        while queue:
            node = queue.pop()
            self._take_in(node)
            for following, _ in node.next_functions:
                if following is not None and following not in visited and following._sequence_nr() >= oldest:
                    visited.add(following)
                    queue.append(following)
        self.unpacking = list({id(hook): hook for hook in self.unpacking}.values())

    def _take_in(self, node: Node) -> None:
        if isinstance(node, BackwardCFunction):
            if _is_users(node._forward_cls):
                self.functions.append(node)
        elif isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            self.leaves.append(node.variable)
        for name in _saved_by(type(node)):
            try:
                saved = getattr(node, name)
            except RuntimeError:  # an earlier backward has freed them: no pass goes here
                continue
            for one in saved if isinstance(saved, (tuple, list)) else (saved,):
                hook = getattr(one, "unpack_hook", None)
                if hook is not None and _is_users(hook):
                    self.unpacking.append(hook)


@cache
def _saved_by(kind: type) -> tuple[str, ...]:
    """Where nodes of some kind show the tensors that they save."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _is_users(code: Any) -> bool:
    """Whether code may keep state of the user's. torch's own does not, but for what runs functions of the user's."""
    home = str(getattr(code, "__module__", None))
    return home.startswith(_RUN_USERS) or not home.startswith(_HARMLESS)


def _given(function: Any) -> Iterator[Any]:
    """What a custom function's backward can get at: its context, its class, itself."""
    kind = function._forward_cls
    yield from (function.__dict__, kind, kind.backward, kind.vjp)


def _name(code: Any) -> str:
    kind = getattr(code, "_forward_cls", None)
    return name_of(code) if kind is None else f"{kind.__qualname__}.backward"


def _hooks_of(leaf: Tensor) -> Iterator[Hooks]:
    """The hooks that run when a gradient is gathered in a leaf."""
    for hooks in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks):
        if hooks:
            yield hooks


def _keeping(kept: KeptTensors, apply: Callable[..., Any], *gradients: Any) -> Any:
    with kept:
        return apply(*gradients)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Random numbers drawn in this context are drawn again after it."""
    numpy = sys.modules.get("numpy")
    state, numpys = random.getstate(), numpy and numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpys)
