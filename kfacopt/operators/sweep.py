"""From a mini-batch to the rows of a model's layers, for statistics over a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from kfacopt.capture import recorded, without_autocast
from kfacopt.estimator import FisherEstimator, find_prediction
from kfacopt.forwards import Site
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import FisherType, LossTerms
from kfacopt.operators.fisher import empirical_gradients
from kfacopt.passes import CotangentPass
from kfacopt.rows import rows_of_layer

# Cotangents go through the graph together as long as they fit into a processor's cache; beyond, a batched pass is the
# slower one (CNN 16/32/32, batch 128, ten cotangents of 14 MB: 147 ms batched, 81 ms one by one).
_CACHED = 2**24


@dataclass(frozen=True, eq=False)
class Chunk:
    """What came of some of a mini-batch's cotangents.

    Attributes:
        rows: Each layer's rows; layers that the prediction does not depend on are left out.
        cotangents: `[v, *prediction]`.
        terms: The mini-batch's loss terms.
        first: Whether it is the mini-batch's first chunk.
    """

    rows: dict[Layer, Rows]
    cotangents: Tensor
    terms: LossTerms
    first: bool


class Sweep:
    """Runs mini-batches through a model and yields the rows of its layers.

    Args:
        model: Run as it is; its buffers are left as they are.
        loss_func: torch's loss.
        layers: Their parameters require gradients.
        estimator: Draws the cotangents.
        forward_only: Zero cotangents: only the inputs of the rows mean anything.
        all_places: See `CurvatureBackend.all_places`.
        byte_budget: Bound on what the cotangents at the layers' outputs take at once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module,
        layers: Sequence[Layer],
        estimator: FisherEstimator,
        *,
        forward_only: bool,
        all_places: bool,
        byte_budget: int,
    ) -> None:
        self._model, self._loss_func, self._layers, self._estimator = model, loss_func, layers, estimator
        self._forward_only, self._all_places, self._byte_budget = forward_only, all_places, byte_budget
        self._backward = CotangentPass()

    @torch.no_grad()
    def chunks(self, X: Any, y: Tensor) -> Iterator[Chunk]:
        """The rows of one mini-batch, in chunks of cotangents; none if every target is ignored."""
        with recorded(self._layers) as sites, torch.enable_grad():
            buffers = {name: b.clone() for name, b in self._model.named_buffers()}
            output = functional_call(self._model, buffers, (X,)) if buffers else self._model(X)
        prediction = find_prediction(output, self._estimator.prediction)
        terms = self._estimator.likelihood.terms(prediction.detach(), target=y)
        if not bool(terms.count > 0):
            return
        approx = self._estimator.kfac_approx
        with without_autocast(prediction.device):
            inputs: dict[Layer, Tensor | OneHot] = {}
            for number, cotangents in enumerate(self._cotangents(terms, prediction, sites)):
                rows = {
                    layer: rows_of_layer(layer, some, terms.count, approx, self._all_places, inputs.get(layer))
                    for layer, some in self._reached(prediction, sites, cotangents).items()
                }
                first = number == 0
                if first:
                    inputs = {layer: r.inputs for layer, r in rows.items()}
                yield Chunk(
                    rows if first else {layer: replace(r, first=False) for layer, r in rows.items()},
                    cotangents,
                    terms,
                    first,
                )

    def _cotangents(self, terms: LossTerms, prediction: Tensor, sites: Sequence[Site]) -> Iterator[Tensor]:
        if self._forward_only:
            yield torch.zeros_like(prediction).unsqueeze(0)
            return
        if self._estimator.fisher_type == FisherType.EMPIRICAL:
            yield terms.restore(empirical_gradients(self._loss_func, terms))
            return
        bytes_each = sum(site.shape.numel() for site in sites) * prediction.element_size()
        together = max(1, min(self._byte_budget, _CACHED) // max(1, bytes_each))
        for cotangents in self._estimator.cotangents(terms):
            yield from cotangents.split(together)

    def _reached(
        self, prediction: Tensor, sites: Sequence[Site], cotangents: Tensor
    ) -> Mapping[Layer, list[tuple[Site, Tensor]]]:
        if self._forward_only:
            result: dict[Layer, list[tuple[Site, Tensor]]] = {}
            for site in sites:
                nothing = prediction.new_zeros(()).expand(1, *site.shape)
                result.setdefault(site.layer, []).append((site, nothing))
            return result
        edges = {site: GradientEdge(site.node, site.output_nr) for site in sites if site.node is not None}
        return self._backward(get_gradient_edge(prediction), edges, cotangents) if edges else {}
