"""The curvature's backward pass: from a prediction to the outputs of the layers below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfacopt.capture.records import Site
from kfacopt.layers.layer import Layer


class CotangentPass:
    """Brings cotangents of a prediction to the sites it depends on; no parameter gradient is computed.

    Many cotangents go through one batched backward, unless the graph has an operation that cannot: that is remembered.
    """

    def __init__(self) -> None:
        self._batched = True

    def __call__(
        self,
        root: GradientEdge,
        edges: Mapping[Site, GradientEdge],
        cotangents: Tensor,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[Layer, list[tuple[Site, Tensor]]]:
        """Cotangents `[v, *output]` at every site, by layer.

        Args:
            root: The prediction.
            edges: Where the sites' outputs are in the graph.
            cotangents: `[v, *prediction.shape]`.
            guard: A context for each backward (see `kfacopt.capture.guard`).
        """
        result: dict[Layer, list[tuple[Site, Tensor]]] = {}
        for site, gradient in self._gradients(root, edges, cotangents, guard).items():
            result.setdefault(site.layer, []).append((site, site.arranged(gradient)))
        return result

    def _gradients(
        self,
        root: GradientEdge,
        edges: Mapping[Site, GradientEdge],
        cotangents: Tensor,
        guard: Callable[[], AbstractContextManager[None]],
    ) -> dict[Site, Tensor]:
        same = {s: cotangents for s, e in edges.items() if e.node is root.node and e.output_nr == root.output_nr}
        rest = {site: edge for site, edge in edges.items() if site not in same}
        if not rest:
            return same
        inputs = tuple(rest.values())
        found: list[Tensor | None] | None = None
        if len(cotangents) > 1 and self._batched:
            try:
                found = list(_backward(root, inputs, cotangents, guard, batched=True))
            except RuntimeError:  # an operation without a batching rule: one pass a cotangent from now on
                self._batched = False
        if found is None:
            passes = [_backward(root, inputs, v, guard, batched=False) for v in cotangents]
            found = [None if p[0] is None else torch.stack(p) for p in zip(*passes, strict=True)]
        return same | {site: g for site, g in zip(rest, found, strict=True) if g is not None}


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
