"""The curvature's backward pass: from a prediction to the outputs of the layers below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfacopt.capture.records import Site
from kfacopt.layers.layer import Layer

Ends = tuple[GradientEdge | None, ...]
"""Where the gradients that a site depends on arrive; None: not above the prediction."""

_Place = tuple[Node, int]


def _place(edge: GradientEdge) -> _Place:
    return edge.node, edge.output_nr


class CotangentPass:
    """Brings cotangents of a prediction to the sites it depends on; no parameter gradient is computed.

    Many cotangents go through one batched backward, unless the graph has an operation that cannot: that is remembered.
    """

    def __init__(self) -> None:
        self._batched = True

    def __call__(
        self,
        root: GradientEdge,
        edges: Mapping[Site, Ends],
        cotangents: Tensor,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[Layer, list[tuple[Site, Tensor]]]:
        """Cotangents `[v, *output]` at every site, by layer.

        Args:
            root: The prediction.
            edges: Where the sites' outputs are in the graph; None: nowhere above the prediction.
            cotangents: `[v, *prediction.shape]`.
            guard: A context for each backward (see `kfacopt.capture.guard`).
        """
        result: dict[Layer, list[tuple[Site, Tensor]]] = {}
        found = self._gradients(root, [e for some in edges.values() for e in some], cotangents, guard)
        for site, ends in edges.items():
            arrived = [None if end is None else found.get(_place(end)) for end in ends]
            if any(gradient is not None for gradient in arrived):
                result.setdefault(site.layer, []).append((site, site.arranged(arrived)))
        return result

    def _gradients(
        self,
        root: GradientEdge,
        edges: Iterable[GradientEdge | None],
        cotangents: Tensor,
        guard: Callable[[], AbstractContextManager[None]],
    ) -> dict[_Place, Tensor]:
        """Cotangents `[v ...]` by the place in the graph; of those that none reaches there are none."""
        places = {_place(edge): edge for edge in edges if edge is not None}
        same = {_place(root): cotangents} if places.pop(_place(root), None) is not None else {}
        if not places:
            return same
        inputs = tuple(places.values())
        found: list[Tensor | None] | None = None
        if len(cotangents) > 1 and self._batched:
            try:
                found = list(_backward(root, inputs, cotangents, guard, batched=True))
            except RuntimeError:  # an operation without a batching rule: one pass a cotangent from now on
                self._batched = False
        if found is None:
            passes = [_backward(root, inputs, v, guard, batched=False) for v in cotangents]
            found = [None if p[0] is None else _stacked(p) for p in zip(*passes, strict=True)]
        return same | {place: g for place, g in zip(places, found, strict=True) if g is not None}


def _stacked(gradients: tuple[Tensor, ...]) -> Tensor:
    """`[v *output]`; a view where there is one cotangent, which spares a copy of every output's gradient."""
    return gradients[0].unsqueeze(0) if len(gradients) == 1 else torch.stack(gradients)


def _backward(
    root: GradientEdge,
    inputs: tuple[GradientEdge, ...],
    cotangents: Tensor,
    guard: Callable[[], AbstractContextManager[None]],
    batched: bool,
) -> tuple[Tensor | None, ...]:
    with guard():
        return torch.autograd.grad(
            (root,),
            inputs,
            (cotangents,),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
