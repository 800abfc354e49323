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
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from kfacopt.capture.candidates import ambiguity, candidates_of, reached
from kfacopt.capture.curvature_pass import CurvaturePass, Read
from kfacopt.capture.derivatives import Derivatives
from kfacopt.capture.destination import Destination, Gradients, Returned
from kfacopt.capture.graph import Mark, Uses, Walk, leave_mark, marks_on
from kfacopt.capture.hooks import Rest, drop_inert_hooks, hook_type, is_recorded, may_hook
from kfacopt.capture.loss_graph import LossGraph, RunningLoss
from kfacopt.capture.recording import goes_unnoticed, layers_of_modules, sites_of, unnoticed, without_autocast
from kfacopt.capture.records import Call, Forward, Marks, Site, Tally
from kfacopt.capture.roots import OpenCall
from kfacopt.capture.targets import Targets
from kfacopt.capture.tensor_hooks import HooksSince, Retaining, own
from kfacopt.fsdp import ShardedModel
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
        sharded: The parts of the model that an engine shards.

    Attributes:
        tally: What arrived since the last step.
        passes: What happens at a prediction.
        derivatives: Notices a loss of derivatives of the model.

    While `is_paused`, forwards and backwards are not ours.
    `wants_rows`, `wants_terms` and `wants_replays` are set by the owner for the coming step, by `arm`; where none is
    wanted the hooks only look.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        estimator: FisherEstimator,
        deliver: Callable[[Layer, Rows], None],
        discard: Callable[[], None],
        sharded: ShardedModel | None = None,
    ) -> None:
        self.wants_rows = True
        self.wants_terms = False
        self.wants_replays = False
        self.tally = Tally()
        sharded = ShardedModel(model) if sharded is None else sharded
        self._sharded = sharded
        self._gradients = Gradients(list(model.parameters()), sharded)
        self._loss = RunningLoss()
        self._returned = Returned(self._gradients)
        self._task = -1
        self.derivatives = Derivatives(self._gradients)
        self._estimator = estimator
        self.passes = CurvaturePass(layers, estimator, self._loss_graph, sharded)
        self._deliver, self._discard = deliver, discard
        self._layers = layers_of_modules(layers)
        self._open: list[OpenCall] = []
        self._root: nn.Module | None = None
        self.is_paused = False
        self._backward: _Backward | None = None
        self._sites: dict[Site, Marks] = {}
        self._within: weakref.WeakKeyDictionary[Mark, Uses] = weakref.WeakKeyDictionary()
        self._passed = WeakTensorKeyDictionary()
        self._retaining = Retaining()
        self._call: Call | None = None
        self._alive: weakref.WeakKeyDictionary[Mark, Forward] = weakref.WeakKeyDictionary()
        self._targets = Targets(estimator.loss_modules, self._alive)
        self._handles: list[RemovableHandle] = []
        self._rest, hook = Rest(), hook_type()
        for module in filter(may_hook, model.modules()):
            drop_inert_hooks(module)
            enter = module.register_forward_pre_hook(hook(self._enter, self._rest), with_kwargs=True)
            leave = module.register_forward_hook(hook(self._leave, self._rest), with_kwargs=True, always_call=True)
            self._handles += [enter, leave]
        self._watch()

    def arm(self, rows: bool, terms: bool, replays: bool) -> None:
        """Say what the forwards from now on are to be kept for: rows, the number of loss terms, to be run again."""
        self.wants_rows, self.wants_terms, self.wants_replays = rows, terms, replays
        self._rest.on = not (rows or terms or replays)  # of most steps: all that hooks do would be for nothing
        if not self._rest.on:
            self._watch()

    def _watch(self) -> None:
        """Take note of what the user hangs on tensors from now on."""
        self.passes.hooks_since = HooksSince()
        self._retaining.start()

    def close(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._targets.close()
        self.reset()

    def reset(self) -> None:
        """Forget what arrived since the last step, and forwards whose backward has not come."""
        self.reset_tally()
        self._returned.forget()
        for forward in self._alive.values():
            forward.consume()
            forward.call = None
        self._alive.clear()
        self._sites, self._call, self._open, self._root = {}, None, [], None
        self._backward = None

    def reset_tally(self) -> None:
        """Forget what arrived since the last step."""
        self.tally, self.derivatives.in_the_loss = Tally(), False

    @property
    def within_forward(self) -> bool:
        """Whether a forward has begun and not ended."""
        return bool(self._open)

    @property
    def _idle(self) -> bool:
        # A forward inside a backward is a recomputation (activation checkpointing), not a new forward.
        # Under a torch.func transform it is not the model's own parameters that are differentiated.
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        recomputed = torch._C._current_graph_task_id() != -1
        return self.is_paused or goes_unnoticed() or not torch.is_grad_enabled() or recomputed or transformed

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_paused or torch._C._current_graph_task_id() != -1 or is_recorded():
            return
        if module is self._root and not _calls_itself(module):
            self._open.clear()  # a forward that was interrupted (KeyboardInterrupt) never left
        if not self._open:
            self._root, self._sites, self._call = module, {}, None
            self._backward = None  # one that raised has not said that it ended
            if self.wants_replays and not self._idle:
                self._call = Call.now(module, inputs, kwargs)
        self._open.append(OpenCall())

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._open or self.is_paused or torch._C._current_graph_task_id() != -1 or is_recorded():
            return
        ended, listens = self._open.pop(), output is not None and not self._idle  # None: the forward raised
        found = ended.found(module, output) if listens else None
        if self.wants_rows and listens:
            for tensor in tensors_of((inputs, kwargs, output)):
                if tensor.grad_fn is not None:
                    self._passed[tensor] = None
            held, leaf = self._layers.get(module, ()), self._sharded.leaf
            for site, edges in sites_of(held, module, inputs, kwargs, output, leaf):
                marks = [leave_mark(edge.node) for edge in edges]
                self._within.update(dict.fromkeys(marks, site.uses))
                self._sites[site] = tuple(map(weakref.ref, marks))
                for edge in edges:
                    own(edge.node.register_prehook(partial(_passed_through, weakref.ref(self), site.layer.name)))
        if self._open:
            self._open[-1].note(found, keep=len(self._open) == 1 and not isinstance(self._root, nn.Sequential))
            return
        sites, call, self._root = self._sites, self._call, None
        self._sites, self._call = {}, None
        if listens:
            self._keep_forward(module, sites, call, output, ended)

    def _keep_forward(
        self,
        root: nn.Module,
        sites: dict[Site, Marks],
        call: Call | None,
        output: Any,
        ended: OpenCall,
    ) -> None:
        if not sites and next(root.parameters(), None) is None:
            return  # a loss or metric module held by the model is no root
        found = candidates_of(self._estimator, root, call, output, ended)
        led, together = {site: marks for site, marks in sites.items() if any(m() is not None for m in marks)}, object()
        for one in found:
            mark = leave_mark(one.edge.node)
            self._alive[mark] = one.forward(led, together)
            own(one.edge.node.register_prehook(partial(_arrive, weakref.ref(self), mark)))

    def settle(self) -> None:
        """Before the step: what counts is what left its gradient."""
        self._forget_thrown_away()
        self._returned.settle(self.tally, self._deliver)

    def arrived(self, mark: Mark, gradients: Sequence[Tensor | None]) -> None:
        """A backward of the user's has reached the prediction that was marked: run the curvature pass if it is due."""
        if self.is_paused or goes_unnoticed() or mark not in self._alive:
            return
        node, destination = torch._C._current_autograd_node(), self._gradients.destination()
        if destination is not Destination.GRAD and torch.is_grad_enabled():
            self.derivatives.follow(node)
        if destination is Destination.RETURNED and mark not in self._returned.marks:
            with self._returned.taking_in(mark):
                took_part = self._take(mark, node, gradients, self._returned.tally, self._returned.keep)
                self._returned.marks.update(took_part)
        elif destination is Destination.GRAD:
            if (task := torch._C._current_graph_task_id()) > self._task:  # one within it has a greater number
                self._task = task
                self._returned.look()
                self._forget_thrown_away()
            try:
                for led in self._take(mark, node, gradients, self.tally, self._deliver):
                    self._alive.pop(led).consume()
            except BaseException:
                self._alive.pop(mark)
                self._discard()
                self.reset_tally()
                self._backward = None
                self._sharded.recover()
                raise

    def _forget_thrown_away(self) -> None:
        if self.tally.passes and self._gradients.thrown_away:
            self._discard()
            self.reset_tally()

    def _take(
        self, mark: Mark, node: Node, gradients: Sequence[Tensor | None], tally: Tally, deliver: Callable[..., None]
    ) -> list[Mark]:
        """A curvature pass, unless no gradient of a loss has come; the marks of the forwards that took part."""
        forward = self._alive[mark]
        prediction, gradient = forward.prediction, gradients[forward.output_nr]
        if prediction is None:
            # No later root used it. If calls led to it, it was the prediction after all.
            if self._leads_to_calls(forward, node):
                raise ValueError(forward.refusal)
            return [mark]
        if gradient is None or (gradient.numel() == 0 and not self._sharded):
            return [mark]
        if forward.rivals is not None and not self._is_chosen(forward, node, gradients):
            return []
        if prediction._version != forward.version:
            raise RuntimeError(
                f"the prediction of {type(forward.root).__name__} was modified in place after the forward: "
                f"curvature would be that of another prediction; use an out-of-place operation"
            )
        started = time.perf_counter()
        walk = self._this_backward().walk
        upstream = self._upstream(forward, node, walk)
        with unnoticed(), torch.no_grad(), without_autocast(prediction.device), self._kept_gradients():
            forwards = [forward, *(self._alive[led] for led in upstream)]
            # Of a copy in a higher precision the loss may be taken of the original.
            read = Read(node, prediction.to(gradient.dtype), gradient.detach(), forwards, walk)
            self.passes(read, tally, deliver)
        tally.seconds += time.perf_counter() - started
        rivals = [
            led for led, one in self._alive.items() if forward.rivals is not None and one.rivals is forward.rivals
        ]
        return list(dict.fromkeys([mark, *upstream, *rivals]))

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

    def _loss_graph(self) -> LossGraph | None:
        """What lies above the predictions, in the backward of the user's that runs now."""
        predictions = {mark for mark, forward in self._alive.items() if forward.prediction is not None}
        return self._loss.graph(lambda node: not predictions.isdisjoint(marks_on(node)))

    def _this_backward(self) -> _Backward:
        """The backward of the user's that runs now."""
        task = torch._C._current_graph_task_id()
        if self._backward is None or self._backward.task != task:
            self._backward = _Backward(task, Walk(self._within), self._retaining.among(self._passed))
            ended = partial(_ended, weakref.ref(self), weakref.ref(self._backward))
            # Twice queued, it comes after DistributedDataParallel's own, which brings the gradients into .grad.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(engine.queue_callback, ended))
        return self._backward

    def _upstream(self, forward: Forward, node: Node, walk: Walk) -> list[Mark]:
        """Forwards of other roots whose outputs lead to this prediction (an encoder called before its decoder).

        They are no predictions themselves: their own backward is not waited for any more.
        """
        found: list[Mark] = []
        if not (len(self._alive) > 1 or forward.sites):
            return found
        for mark in walk.onwards(node):
            if (kept := self._alive.get(mark)) is None or kept is forward:
                continue
            if kept.of is forward.of and (kept.rivals is None or kept.rivals is not forward.rivals):
                # A term that another term of the same call is computed from is a prediction of its own; but another
                # call's prediction that comes later may lead there, and is to find it.
                self._backward, kept.leads_on = None, True
                continue
            found.append(mark)
        return found

    def _is_chosen(self, forward: Forward, node: Node, gradients: Sequence[Tensor | None]) -> bool:
        """Whether of several tensors that may be the prediction the loss is taken of this one.

        Raises:
            ValueError: If it is taken of several, or cannot be seen.
        """
        found = reached(forward, node, gradients, self._loss_graph(), self._alive)
        if found is None or (forward in found and len(found) > 1):
            if self._leads_to_calls(forward, node):
                raise ValueError(ambiguity(forward, 0 if found is None else len(found)))
            return False
        return forward in found

    def _leads_to_calls(self, forward: Forward, node: Node) -> bool:
        """Whether one of a forward's calls of covered modules led to one of its outputs."""
        walk = Walk({})
        walk.onwards(node)
        return any(reference() in walk.nodes for references in forward.sites.values() for reference in references)


@dataclass(eq=False)
class _Backward:
    """A backward of the user's, while it runs: what it has reached, and whose gradients the user asked for."""

    task: int
    walk: Walk
    retained: list[Tensor]


def _ended(capture: weakref.ref[Capture], backward: weakref.ref[_Backward]) -> None:
    """A backward has ended: the gradients are what it leaves, and it must not keep the graph alive."""
    held = capture()
    if held is not None:
        held._returned.remember()
        held.tally.scale.note_gradients(held._gradients.held())
        held._loss.forget()
        if held._backward is backward():
            held._backward = None


def _passed_through(capture: weakref.ref[Capture], name: str, _: Sequence[Tensor | None]) -> None:
    """A backward goes through a layer's call: within a forward, and with a graph, it takes a derivative."""
    held = capture()
    if held is not None and held.within_forward and torch.is_grad_enabled():
        held.passes.differentiated.add(name)


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
