"""The only file that registers hooks: what the layers saw, and the curvature's own backward pass.

A forward hook on every module keeps, on steps where rows are wanted, each covered layer's input and its output's
gradient edge. When the user's own backward reaches the prediction, the graph below is still whole: there the
likelihood turns prediction and gradient into cotangents, and one nested `torch.autograd.grad` brings them to the
layers' outputs. No parameter gradient is computed and none is touched; hooks that the user put on tensors in between do
see the nested pass as well.

Ownership: what a forward kept hangs on the prediction's graph node, so that it lives exactly as long as the graph; a
forward without a backward (a validation that forgot `no_grad`) leaves nothing behind.
"""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from kfacopt.estimator import FisherEstimator, tensors_of
from kfacopt.forwards import Call, Forward, Replay, Site, Tally
from kfacopt.hooks import drop_inert_hooks, hook_type
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.passes import CotangentPass
from kfacopt.rows import rows_of_layer

# Set while any curvature pass runs: the pass must not trigger another, not even that of a second optimizer.
_in_curvature_pass: ContextVar[bool] = ContextVar("kfacopt_curvature_pass", default=False)


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
        self._backward = CotangentPass()
        self._sites: list[Site] = []
        self._numbers = itertools.count()
        self._outputs: list[weakref.ref[Tensor]] = []
        self._call: Call | None = None
        self._alive: weakref.WeakSet[Forward] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        hook = hook_type()
        for module in model.modules():
            drop_inert_hooks(module)
            enter = module.register_forward_pre_hook(hook(self._enter), with_kwargs=True)
            leave = module.register_forward_hook(hook(self._leave), with_kwargs=True, always_call=True)
            self._handles += [enter, leave]

    def close(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()

    def reset(self) -> None:
        """Forget what arrived since the last step, and forwards whose backward has not come."""
        self.reset_tally()
        for forward in self._alive:
            forward.sites.clear()
            forward.call = None
            forward.prediction = None
        self._alive.clear()
        self._sites, self._call, self._depth, self._root = [], None, 0, None

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
        elsewhere = _in_curvature_pass.get()  # an operator's forward over its own data
        return self._paused or elsewhere or not torch.is_grad_enabled() or recomputed or transformed

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or torch._C._current_graph_task_id() != -1:
            return
        if module is self._root and not _calls_itself(module):
            self._depth = 0  # a forward that was interrupted (KeyboardInterrupt) never left
        if self._depth == 0:
            self._root, self._sites, self._call = module, [], None
            self._outputs = [reference for reference in self._outputs if reference() is not None]
            if self.wants_replays and not self._idle:
                self._call = Call.now(module, inputs, kwargs)
        self._depth += 1

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused or torch._C._current_graph_task_id() != -1 or self._depth == 0:
            return
        self._depth -= 1
        if self.wants_rows and output is not None and not self._idle:
            if isinstance(output, Tensor):
                self._outputs.append(weakref.ref(output))
            for layer in self._layers.get(module, ()):
                self._keep_site(layer, module, inputs, kwargs, output)
        if self._depth == 0:
            sites, call, self._root = self._sites, self._call, None
            self._sites, self._call = [], None
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
        site = _site(next(self._numbers), layer, module, inputs, kwargs, output)
        if site is not None:
            self._sites.append(site)

    def _keep_forward(self, root: nn.Module, sites: list[Site], call: Call | None, output: Any) -> None:
        if not sites and next(root.parameters(), None) is None:
            return  # a loss or metric module held by the model is no root
        refusal = ""
        try:
            named = list(self._estimator.predictions(output).items())
        except ValueError as error:
            named, refusal = [("", tensor) for tensor in tensors_of(output)], str(error)
        for name, tensor in named:
            node = tensor.grad_fn
            if node is None:
                continue
            # Only what leads to the prediction may hang on its node: an edge to a later node would be a cycle.
            before = set(_ancestors(node)) if sites else set()
            led = [s for s in sites if s.node in before]
            own = [replace(s, node=None) for s in sites if s.node is node]
            forward = Forward(root, led + own, call, refusal=refusal, name=name)
            if not refusal:
                forward.prediction, forward.version = tensor.detach(), tensor._version
                forward.output_nr = tensor.output_nr
            _metadata(node).setdefault("kfacopt", []).append(forward)
            reference, capture = weakref.ref(forward), weakref.ref(self)
            node.register_prehook(lambda gradients, r=reference, c=capture: _arrive(c(), r(), gradients))
            self._alive.add(forward)

    def arrived(self, forward: Forward, gradients: Sequence[Tensor | None]) -> None:
        """The user's backward has reached the prediction of `forward`: run the curvature pass."""
        if self._paused or _in_curvature_pass.get() or forward not in self._alive:
            return
        self._alive.discard(forward)
        prediction, node = forward.prediction, torch._C._current_autograd_node()
        if prediction is None:
            if forward.sites:  # no later root used them: this was the prediction after all
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
        token, started = _in_curvature_pass.set(True), time.perf_counter()
        try:
            with torch.no_grad(), without_autocast(prediction.device), self._kept_gradients():
                self._curvature_pass(forward, node, prediction, gradient.detach())
        except BaseException:
            self._discard()
            self.reset_tally()
            raise
        finally:
            _in_curvature_pass.reset(token)
            self.tally.seconds += time.perf_counter() - started

    @contextmanager
    def _kept_gradients(self) -> Iterator[None]:
        """Outputs on which the user called `retain_grad` keep the gradient of the user's backward alone."""
        outputs = [tensor for tensor in (reference() for reference in self._outputs) if tensor is not None]
        kept = [(tensor, tensor.grad) for tensor in outputs if tensor.retains_grad]
        try:
            for tensor, _ in kept:
                tensor.grad = None
            yield
        finally:
            for tensor, gradient in kept:
                tensor.grad = gradient

    def _curvature_pass(self, forward: Forward, node: Node, prediction: Tensor, gradient: Tensor) -> None:
        likelihood = self._estimator.likelihoods[forward.name]
        terms = likelihood.terms(prediction, gradient=gradient)
        forwards = [forward, *self._upstream(node, forward.call)]
        self.tally.passes += 1
        if not bool(terms.count > 0):
            return
        self.tally.terms = self.tally.terms + terms.count
        if forward.call is not None:
            self.tally.replays.append(Replay(forward.call, terms, gradient, forward.name, len(forwards) == 1))
            scaled = forward.call.autocast_dtype is torch.float16 and not terms.reads_target
            self.tally.replayable &= len(forwards) == 1 and not scaled
        # The tensors of an ambiguous output may each have kept the same call.
        sites = list({site.number: site for one in forwards for site in one.sites}.values())
        edges = {s: GradientEdge(s.node, s.output_nr) for s in sites if s.node is not None}
        own = GradientEdge(node, forward.output_nr)
        owners = self._own_nodes(node, forwards, [site for site in sites if site.node is None])
        edges |= {site: GradientEdge(owner, site.output_nr) for site, owner in owners.items()}
        if sites:
            first = True
            for cotangents in self._estimator.cotangents(terms):
                for layer, reached in self._backward(own, edges, cotangents).items():
                    rows = rows_of_layer(layer, reached, terms.count, self._estimator.kfac_approx, self.all_places)
                    self._deliver(layer, rows if first else replace(rows, first=False))
                first = False
        for one in forwards:
            one.sites.clear()

    def _upstream(self, node: Node, call: Call | None) -> list[Forward]:
        """Forwards of other roots whose outputs lead to this prediction (an encoder called before its decoder).

        They are no predictions themselves: their own backward is not waited for any more.
        """
        found: list[Forward] = []
        for ancestor in _ancestors(node) if self._alive else ():
            for kept in _metadata(ancestor).get("kfacopt", ()):
                # A term that another term of the same call is computed from is a prediction of its own.
                if kept in self._alive and (call is None or kept.call is not call):
                    self._alive.discard(kept)
                    found.append(kept)
            if not self._alive:
                break
        return found

    @staticmethod
    def _own_nodes(node: Node, forwards: Sequence[Forward], sites: Sequence[Site]) -> dict[Site, Node]:
        """Nodes of the sites whose output is their root's own prediction, the first of `forwards` being at `node`."""
        result = {site: node for site in sites if site in forwards[0].sites}
        missing = [(f, s) for f in forwards[1:] for s in sites if s in f.sites]
        if missing:
            kept = [(ancestor, _metadata(ancestor).get("kfacopt", ())) for ancestor in _ancestors(node)]
            result |= {s: ancestor for f, s in missing for ancestor, held in kept if f in held}
        return result


@contextmanager
def unnoticed() -> Iterator[None]:
    """Within this context no optimizer's capture takes note of a forward: it is another's (an operator's)."""
    token = _in_curvature_pass.set(True)
    try:
        yield
    finally:
        _in_curvature_pass.reset(token)


@contextmanager
def recorded(layers: Sequence[Layer]) -> Iterator[list[Site]]:
    """Within this context the calls of layers are kept, and go unnoticed by optimizers.

    Args:
        layers: What to keep the calls of; all of their parameters are to require gradients.

    Yields:
        The calls so far; they keep the graph alive.
    """
    sites: list[Site] = []

    def keep(layer: Layer, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        site = _site(len(sites), layer, module, inputs, kwargs, output)
        if site is not None:
            sites.append(site)

    handles = [
        module.register_forward_hook(partial(keep, layer), with_kwargs=True)
        for layer in layers
        for module in layer.modules
    ]
    try:
        with unnoticed():
            yield sites
    finally:
        for handle in handles:
            handle.remove()


def _site(
    number: int, layer: Layer, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Site | None:
    """A call of a covered module, unless it ran with other parameters (functional_call) or without a graph."""
    own = all(module._parameters.get(role) is p for role, p in layer.parameters.items())
    if not (own and isinstance(output, Tensor) and output.requires_grad and output.grad_fn is not None):
        return None
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    return Site(number, layer, module, detached, kwargs, output.grad_fn, output.output_nr, output.shape)


def without_autocast(device: torch.device) -> torch.autocast:
    """Statistics are never computed in half precision, whatever context the user's backward runs in."""
    return torch.autocast(device.type, enabled=False)


def _arrive(capture: Capture | None, forward: Forward | None, gradients: Sequence[Tensor | None]) -> None:
    if capture is not None and forward is not None:
        capture.arrived(forward, gradients)


def _calls_itself(module: nn.Module) -> bool:
    """Whether a call of `module` is under way further up the Python stack, besides the one that begins."""
    calls, frame = 0, sys._getframe()
    while frame is not None and calls < 2:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2


def _metadata(node: Node) -> dict[str, list[Forward]]:
    metadata: dict[str, list[Forward]] = node.metadata  # type: ignore[assignment]
    return metadata


def _ancestors(node: Node) -> Iterator[Node]:
    """The nodes that a node's gradient flows on to, itself not included."""
    seen, queue = {node}, [node]
    while queue:
        for following, _ in queue.pop().next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
                yield following
