"""What is kept of a covered module's call; and forwards that are an operator's, not the optimizer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfacopt.capture.graph import Uses, uses_within
from kfacopt.capture.records import Site
from kfacopt.capture.tensor_hooks import own
from kfacopt.layers.compound import CompoundHandler, ModuleCall
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods.estimator import tensors_of

Leaf = Callable[[nn.Parameter], Tensor]
"""What the graph knows a parameter as: itself, or the whole copy of a sharded one."""

# Set while a forward or backward is nobody's: a curvature pass must not trigger another, nor a second optimizer's.
_unnoticed: ContextVar[bool] = ContextVar("kfacopt_unnoticed", default=False)


@contextmanager
def unnoticed() -> Iterator[None]:
    """Within this context no optimizer's capture takes note of forwards or backwards: they are another's."""
    token = _unnoticed.set(True)
    try:
        yield
    finally:
        _unnoticed.reset(token)


def goes_unnoticed() -> bool:
    """Whether this is within `unnoticed`."""
    return _unnoticed.get()


@contextmanager
def recorded(layers: Sequence[Layer]) -> Iterator[dict[Site, tuple[GradientEdge, ...]]]:
    """Within this context the calls of layers are kept, and go unnoticed by optimizers.

    Args:
        layers: What to keep the calls of; all of their parameters are to require gradients.

    Yields:
        The calls so far, and where their outputs are in the graph, which is kept alive.
    """
    edges: dict[Site, tuple[GradientEdge, ...]] = {}

    held = layers_of_modules(layers)

    def keep(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        edges.update(sites_of(held[module], module, inputs, kwargs, output))

    handles = [own(module.register_forward_hook(keep, with_kwargs=True)) for module in held]
    try:
        with unnoticed():
            yield edges
    finally:
        for handle in handles:
            handle.remove()


def layers_of_modules(layers: Iterable[Layer]) -> dict[nn.Module, list[Layer]]:
    """The layers that a call of each module is a call of."""
    result: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        for module in layer.modules:
            result.setdefault(module, []).append(layer)
    return result


def sites_of(
    layers: Iterable[Layer],
    module: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    leaf: Leaf = lambda parameter: parameter,
) -> list[tuple[Site, tuple[GradientEdge, ...]]]:
    """One call of a module as calls of its layers, and where the gradients that they depend on arrive.

    Layers whose parameters the call did not use (functional_call) or of which the graph shows nothing are left out.
    The graph knows a parameter as its `leaf` (`ShardedModel.leaf`).
    """
    own = [layer for layer in layers if layer.held_by(module)]
    if own and own[0].part is not None:
        return _sites_of_parts(own, own[0].part.compound, module, inputs, kwargs, output, leaf)
    if not (own and isinstance(output, Tensor) and output.requires_grad and output.grad_fn is not None):
        return []
    uses = _uses_within([output], (inputs, kwargs))
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    named = {name: x.detach() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    edge = get_gradient_edge(output)
    return [
        (Site(layer, module, detached, named, (edge.output_nr,), output.shape, _uses_of([layer], uses, leaf)), (edge,))
        for layer in own
    ]


def _sites_of_parts(
    layers: Sequence[Layer],
    compound: CompoundHandler,
    module: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    leaf: Leaf,
) -> list[tuple[Site, tuple[GradientEdge, ...]]]:
    outputs = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
    done = ModuleCall(inputs, kwargs, output, _above((inputs, kwargs)))
    calls = compound.calls(module, done) if outputs else {}
    uses = _uses_within(outputs, (inputs, kwargs)) if calls else Counter[int]()
    result: list[tuple[Site, tuple[GradientEdge, ...]]] = []
    for layer in layers:
        if layer.part is None or (call := calls.get(layer.part.name)) is None:
            continue
        read = Counter[int]() if result else _uses_of(layers, uses, leaf)
        numbers = tuple(edge.output_nr for edge in call.edges)
        result.append((Site(layer, module, call.inputs, {}, numbers, call.shape, read, call.arrange), call.edges))
    return result


def _above(inputs: Any) -> set[Node]:
    """The nodes that made the inputs of a call."""
    return {x.grad_fn for x in tensors_of(inputs) if x.grad_fn is not None}


def _uses_within(outputs: Sequence[Tensor], inputs: Any) -> Uses:
    """What the operations of a call read, from the nodes of its outputs down to those of its inputs."""
    return uses_within([x.grad_fn for x in outputs if x.grad_fn is not None], _above(inputs))


def _uses_of(layers: Iterable[Layer], uses: Uses, leaf: Leaf) -> Uses:
    held = {id(leaf(p)) for layer in layers for p in layer.parameters.values()}
    return Counter({key: count for key, count in uses.items() if key in held})


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Statistics are never computed in half precision, whatever context the user's backward runs in."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
