"""What is kept of a covered module's call; and forwards that are an operator's, not the optimizer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kfacopt.capture.graph import uses_within
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

    def keep(layer: Layer, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        site = site_of(layer, module, inputs, kwargs, output)
        if site is not None:
            edges[site] = get_gradient_edge(output)

    handles = [
        own(module.register_forward_hook(partial(keep, layer), with_kwargs=True))
        for layer in layers
        for module in layer.modules
    ]
    try:
        with unnoticed():
            yield edges
    finally:
        for handle in handles:
            handle.remove()


def site_of(
    layer: Layer, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Site | None:
    """A call of a covered module, unless it ran with other parameters (functional_call) or without a graph."""
    own = all(module._parameters.get(role) is p for role, p in layer.parameters.items())
    if not (own and isinstance(output, Tensor) and output.requires_grad and output.grad_fn is not None):
        return None
    own_ids = {id(p) for p in layer.parameters.values()}
    above = [x.grad_fn for x in tensors_of((inputs, kwargs)) if x.grad_fn is not None]
    uses = Counter({key: n for key, n in uses_within(output.grad_fn, above).items() if key in own_ids})
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    named = {name: x.detach() if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    return Site(layer, module, detached, named, output.output_nr, output.shape, uses)


def without_autocast(device: torch.device) -> torch.autocast:
    """Statistics are never computed in half precision, whatever context the user's backward runs in."""
    return torch.autocast(device.type, enabled=False)
