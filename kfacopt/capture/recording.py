"""What is kept of a covered module's call; and forwards that are an operator's, not the optimizer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfacopt.capture.graph import Uses, uses_within
from kfacopt.capture.records import Site
from kfacopt.capture.tensor_hooks import own
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods.estimator import tensors_of

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
def recorded(layers: Sequence[Layer]) -> Iterator[dict[Site, GradientEdge]]:
    """Within this context the calls of layers are kept, and go unnoticed by optimizers.

    Args:
        layers: What to keep the calls of; all of their parameters are to require gradients.

    Yields:
        The calls so far, and where their outputs are in the graph, which is kept alive.
    """
    edges: dict[Site, GradientEdge] = {}

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
    leaf: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
) -> list[tuple[Site, GradientEdge]]:
    """One call of a module as calls of its layers, and where the gradients of their outputs arrive.

    Layers whose parameters the call did not use (functional_call) or of which the graph shows nothing are left out.
    The graph knows a parameter as its `leaf` (`ShardedModel.leaf`).
    """
    own = [layer for layer in layers if layer.held_by(module)]
    first = output[0] if own and own[0].part is not None and isinstance(output, tuple) else output
    if not (own and isinstance(first, Tensor) and first.requires_grad and first.grad_fn is not None):
        return []
    above = {x.grad_fn for x in tensors_of((inputs, kwargs)) if x.grad_fn is not None}
    uses = uses_within(first.grad_fn, above)
    if own[0].part is not None:
        return _sites_of_parts(own, module, output, above, uses, leaf)
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    named = {name: x.detach() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    edge = get_gradient_edge(first)
    return [
        (Site(layer, module, detached, named, edge.output_nr, first.shape, _uses_of([layer], uses, leaf)), edge)
        for layer in own
    ]


def _sites_of_parts(
    layers: Sequence[Layer],
    module: nn.Module,
    output: Any,
    above: Collection[Node],
    uses: Uses,
    leaf: Callable[[nn.Parameter], Tensor],
) -> list[tuple[Site, GradientEdge]]:
    assert layers[0].part is not None
    calls = layers[0].part.compound.calls(module, output, above)
    result: list[tuple[Site, GradientEdge]] = []
    for layer in layers:
        if layer.part is None or (call := calls.get(layer.part.name)) is None:
            continue
        read = Counter[int]() if result else _uses_of(layers, uses, leaf)
        shape = torch.Size((*call.inputs.shape[:-1], call.columns.stop - call.columns.start))
        number = call.edge.output_nr
        result.append((Site(layer, module, (call.inputs,), {}, number, shape, read, call.arrange), call.edge))
    return result


def _uses_of(layers: Iterable[Layer], uses: Uses, leaf: Callable[[nn.Parameter], Tensor]) -> Uses:
    held = {id(leaf(p)) for layer in layers for p in layer.parameters.values()}
    return Counter({key: count for key, count in uses.items() if key in held})


def without_autocast(device: torch.device) -> torch.autocast:
    """Statistics are never computed in half precision, whatever context the user's backward runs in."""
    return torch.autocast(device.type, enabled=False)
