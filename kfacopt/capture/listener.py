"""The listener of an optimizer: what the layers saw, and the curvature's own backward pass.

A forward hook on every module keeps, on steps where rows are wanted, each covered layer's input and its output's
gradient edge. When the user's own backward reaches the prediction, the graph below is still whole: there the
likelihood turns prediction and gradient into cotangents, and one nested `torch.autograd.grad` brings them to the
layers' outputs. No parameter gradient is computed and none is touched, and what the user put into the backward sees the
user's pass alone (`kfacopt.capture.guard`).

Ownership: a forward leaves empty marks on nodes of the graph, and what it kept is kept for a mark, so that it lives
exactly as long as the graph; a forward without a backward (a validation that forgot `no_grad`) leaves nothing behind.
What led to a prediction is found out when the backward reaches it, by one walk through the graph a backward.
"""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from kfacopt.capture.chunks import rows_in_chunks, split_cotangents
from kfacopt.capture.graph import Mark, Walk, leave_mark
from kfacopt.capture.guard import Guard
from kfacopt.capture.hooks import drop_inert_hooks, hook_type
from kfacopt.capture.passes import CotangentPass
from kfacopt.capture.recording import goes_unnoticed, site_of, unnoticed, without_autocast
from kfacopt.capture.records import Call, Forward, Replay, Site, Tally
from kfacopt.capture.tensor_hooks import HooksSince, Retaining, own
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods.estimator import FisherEstimator, tensors_of


class Capture:
    """Hooks on a model that deliver rows to a consumer.

    Args:
        model: Every module of the tree is hooked.
        layers: What to capture.
        estimator: Turns prediction and gradient into cotangents.
        deliver: Called with each layer's rows, inside the user's backward.
        discard: Called when a pass fails half-way: what was delivered since the last step is not to be used.

    `wants_rows`, `wants_terms` and `wants_replays` are set by the owner for the coming step, `all_places` once.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        estimator: FisherEstimator,
        deliver: Callable[[Layer, Rows], None],
        discard: Callable[[], None],
    ) -> None:
        self.wants_rows = True
        self.wants_terms = False
        self.all_places = False
        self.wants_replays = False
        self.tally = Tally()
        self._estimator = estimator
        self._deliver, self._discard = deliver, discard
        self._layers: dict[nn.Module, list[Layer]] = {}
        for layer in layers:
            for module in layer.modules:
                self._layers.setdefault(module, []).append(layer)
        self._depth = 0
        self._root: nn.Module | None = None
        self._paused = False
        self._pass = CotangentPass()
        self._backward: _Backward | None = None
        self._sites: dict[Site, weakref.ref[Mark]] = {}
        self._layer_of: weakref.WeakKeyDictionary[Mark, Layer] = weakref.WeakKeyDictionary()
        self._passed = WeakTensorKeyDictionary()
        self._retaining = Retaining()
        self._call: Call | None = None
        self._alive: weakref.WeakKeyDictionary[Mark, Forward] = weakref.WeakKeyDictionary()
        self._handles: list[RemovableHandle] = []
        hook = hook_type()
        for module in model.modules():
            drop_inert_hooks(module)
            enter = module.register_forward_pre_hook(hook(self._enter), with_kwargs=True)
            leave = module.register_forward_hook(hook(self._leave), with_kwargs=True, always_call=True)
            self._handles += [enter, leave]
        self._hooks_since = HooksSince()
        self._retaining.start()

    def close(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()

    def reset(self) -> None:
        """Forget what arrived since the last step, and forwards whose backward has not come."""
        self.reset_tally()
        for forward in self._alive.values():
            forward.sites.clear()
            forward.call = None
            forward.prediction = None
        self._alive.clear()
        self._sites, self._call, self._depth, self._root = {}, None, 0, None
        self._backward = None
        self._hooks_since = HooksSince()
        self._retaining.start()

    def reset_tally(self) -> None:
        """Forget what arrived since the last step."""
        self.tally = Tally()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forwards and backwards are not ours."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def _idle(self) -> bool:
        # A forward inside a backward is a recomputation (activation checkpointing), not a new forward.
        # Under a torch.func transform it is not the model's own parameters that are differentiated.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        recomputed = torch._C._current_graph_task_id() != -1
        return self._paused or goes_unnoticed() or not torch.is_grad_enabled() or recomputed or transformed

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or torch._C._current_graph_task_id() != -1:
            return
        if module is self._root and not _calls_itself(module):
            self._depth = 0  # a forward that was interrupted (KeyboardInterrupt) never left
        if self._depth == 0:
            self._root, self._sites, self._call = module, {}, None
            self._backward = None  # one that raised has not said that it ended
            if self.wants_replays and not self._idle:
                self._call = Call.now(module, inputs, kwargs)
        self._depth += 1

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused or torch._C._current_graph_task_id() != -1 or self._depth == 0:
            return
        self._depth -= 1
        if self.wants_rows and output is not None and not self._idle:
            for tensor in (*inputs, output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    self._passed[tensor] = None
            for layer in self._layers.get(module, ()):
                self._keep_site(layer, module, inputs, kwargs, output)
        if self._depth == 0:
            sites, call, self._root = self._sites, self._call, None
            self._sites, self._call = {}, None
            wanted = self.wants_rows or self.wants_terms or self.wants_replays
            if wanted and output is not None and not self._idle:  # None: the forward raised
                self._keep_forward(module, sites, call, output)

    def _keep_site(
        self,
        layer: Layer,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        site = site_of(layer, module, inputs, kwargs, output)
        if site is not None:
            mark = leave_mark(output.grad_fn)
            self._layer_of[mark] = layer
            self._sites[site] = weakref.ref(mark)

    def _keep_forward(
        self, root: nn.Module, sites: dict[Site, weakref.ref[Mark]], call: Call | None, output: Any
    ) -> None:
        if not sites and next(root.parameters(), None) is None:
            return  # a loss or metric module held by the model is no root
        refusal = ""
        try:
            named = list(self._estimator.predictions(output).items())
        except ValueError as error:
            named, refusal = [("", tensor) for tensor in tensors_of(output)], str(error)
        led = {site: mark for site, mark in sites.items() if mark() is not None}
        for name, tensor in named:
            node = tensor.grad_fn
            if node is None:
                continue
            forward = Forward(root, dict(led), call, refusal=refusal, name=name)
            if not refusal:
                forward.prediction, forward.version = tensor.detach(), tensor._version
                forward.output_nr = tensor.output_nr
            mark = leave_mark(node)
            self._alive[mark] = forward
            own(node.register_prehook(partial(_arrive, weakref.ref(self), mark)))

    def arrived(self, mark: Mark, gradients: Sequence[Tensor | None]) -> None:
        """The user's backward has reached the prediction that was marked: run the curvature pass."""
        if self._paused or goes_unnoticed() or mark not in self._alive:
            return
        forward = self._alive.pop(mark)
        prediction, node = forward.prediction, torch._C._current_autograd_node()
        if prediction is None:
            # No later root used it. If calls led to it, it was the prediction after all.
            if self._leads_to_calls(forward, node):
                raise ValueError(f"the output of {type(forward.root).__name__} is ambiguous: {forward.refusal}")
            return
        gradient = gradients[forward.output_nr]
        if gradient is None:
            return
        if prediction._version != forward.version:
            raise RuntimeError(
                f"the prediction of {type(forward.root).__name__} was modified in place after the forward: "
                f"curvature would be that of another prediction; use an out-of-place operation"
            )
        forward.prediction = None
        started = time.perf_counter()
        try:
            with unnoticed(), torch.no_grad(), without_autocast(prediction.device), self._kept_gradients():
                self._curvature_pass(forward, node, prediction, gradient.detach())
        except BaseException:
            self._discard()
            self.reset_tally()
            self._backward = None
            raise
        finally:
            self.tally.seconds += time.perf_counter() - started

    @contextmanager
    def _kept_gradients(self) -> Iterator[None]:
        """Tensors on which the user called `retain_grad` keep the gradient of the user's backward alone."""
        kept = [(tensor, tensor.grad) for tensor in self._this_backward().retained]
        try:
            for tensor, _ in kept:
                tensor.grad = None
            yield
        finally:
            for tensor, gradient in kept:
                tensor.grad = gradient

    def _curvature_pass(self, forward: Forward, node: Node, prediction: Tensor, gradient: Tensor) -> None:
        estimator = self._estimator
        likelihood = estimator.likelihoods[forward.name]
        terms = likelihood.terms(prediction, gradient=gradient)
        walk = self._this_backward().walk
        forwards = [forward, *self._upstream(forward, node)]
        self.tally.passes += 1
        if not bool(terms.count > 0):
            return
        self.tally.terms = self.tally.terms + terms.count
        if forward.call is not None:
            self.tally.replays.append(Replay(forward.call, terms, gradient, forward.name, len(forwards) == 1))
            scaled = forward.call.autocast_dtype is torch.float16 and not terms.reads_target
            self.tally.replayable &= len(forwards) == 1 and not scaled
        # The tensors of an ambiguous output may each have kept the same call.
        marks = {site: reference() for one in forwards for site, reference in one.sites.items()}
        edges = {
            site: GradientEdge(walk.nodes[mark], site.output_nr)
            for site, mark in marks.items()
            if mark is not None and mark in walk.nodes
        }
        if edges:
            ends = [edge.node for edge in edges.values()]
            guard = Guard([node], self._hooks_since, forward.root, warnings.warn, ends)
            reach = partial(self._pass, GradientEdge(node, forward.output_nr), edges, guard=guard)
            cotangents = split_cotangents(estimator.cotangents(terms), edges)
            approx = estimator.kfac_approx
            for _, rows in rows_in_chunks(cotangents, reach, terms.count, approx, self.all_places):
                for layer, some in rows.items():
                    self._deliver(layer, some)
            guard.watch()
        for one in forwards:
            one.sites.clear()

    def _this_backward(self) -> _Backward:
        """The backward of the user's that runs now."""
        task = torch._C._current_graph_task_id()
        if self._backward is None or self._backward.task != task:
            self._backward = _Backward(task, Walk(self._layer_of), self._retaining.among(self._passed))
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(_ended, weakref.ref(self), weakref.ref(self._backward)))
        return self._backward

    def _upstream(self, forward: Forward, node: Node) -> list[Forward]:
        """Forwards of other roots whose outputs lead to this prediction (an encoder called before its decoder).

        They are no predictions themselves: their own backward is not waited for any more.
        """
        found: list[Forward] = []
        if not (self._alive or forward.sites):
            return found
        for mark in self._this_backward().walk.onwards(node):
            if (kept := self._alive.get(mark)) is None:
                continue
            if forward.call is not None and kept.call is forward.call:
                # A term that another term of the same call is computed from is a prediction of its own; but another
                # call's prediction that comes later may lead there, and is to find it.
                self._backward = None
                continue
            found.append(self._alive.pop(mark))
        return found

    def _leads_to_calls(self, forward: Forward, node: Node) -> bool:
        """Whether one of a forward's calls of covered modules led to one of its outputs."""
        walk = Walk({})
        walk.onwards(node)
        return any(reference() in walk.nodes for reference in forward.sites.values())


@dataclass(eq=False)
class _Backward:
    """A backward of the user's, while it runs: what it has reached, and whose gradients the user asked for."""

    task: int
    walk: Walk
    retained: list[Tensor]


def _ended(capture: weakref.ref[Capture], backward: weakref.ref[_Backward]) -> None:
    """A backward has ended: it must not keep the graph alive."""
    held = capture()
    if held is not None and held._backward is backward():
        held._backward = None


def _arrive(capture: weakref.ref[Capture], mark: Mark, gradients: Sequence[Tensor | None]) -> None:
    held = capture()
    if held is not None:
        held.arrived(mark, gradients)


def _calls_itself(module: nn.Module) -> bool:
    """Whether a call of `module` is under way further up the Python stack, besides the one that begins."""
    calls, frame = 0, sys._getframe()
    while frame is not None and calls < 2:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2
