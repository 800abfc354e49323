"""From a mini-batch to the rows of a model's layers, for statistics over a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from kfacopt.capture.buffers import copied_buffers
from kfacopt.capture.chunks import Reached, rows_in_chunks, split_cotangents
from kfacopt.capture.graph import Uses, nodes_below
from kfacopt.capture.guard import Guard
from kfacopt.capture.passes import CotangentPass, Ends
from kfacopt.capture.recording import recorded, without_autocast
from kfacopt.capture.records import Site
from kfacopt.capture.tensor_hooks import HooksSince
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import FisherType, LossTerms
from kfacopt.likelihoods.estimator import FisherEstimator, find_prediction
from kfacopt.operators.matrix_free.fisher import empirical_gradients


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
        since = HooksSince()
        with recorded(self._layers) as edges, torch.enable_grad(), copied_buffers(self._model):
            output = self._model(X)
        prediction = find_prediction(output, self._estimator.prediction)
        _refuse_other_uses(self._layers, prediction, edges)
        terms = self._estimator.likelihood.terms(prediction.detach(), target=y)
        if not bool(terms.count > 0):
            return
        reach = partial(self._reach, prediction, edges, Guard([prediction.grad_fn], since, self._model))
        approx = self._estimator.kfac_approx
        with without_autocast(prediction.device):
            chunks = rows_in_chunks(
                self._cotangents(terms, prediction, edges), reach, terms.count, approx, self._all_places
            )
            for number, (cotangents, rows) in enumerate(chunks):
                yield Chunk(rows, cotangents, terms, number == 0)

    def _cotangents(self, terms: LossTerms, prediction: Tensor, sites: Iterable[Site]) -> Iterator[Tensor]:
        if self._forward_only:
            return iter((torch.zeros_like(prediction).unsqueeze(0),))
        if self._estimator.fisher_type == FisherType.EMPIRICAL:
            return iter((terms.restore(empirical_gradients(self._loss_func, terms)),))
        return split_cotangents(self._estimator.cotangents(terms), sites, self._byte_budget)

    def _reach(self, prediction: Tensor, edges: Mapping[Site, Ends], guard: Guard, cotangents: Tensor) -> Reached:
        if self._forward_only:
            result: dict[Layer, list[tuple[Site, Tensor]]] = {}
            for site in edges:
                nothing = prediction.new_zeros(()).expand(1, *site.shape)
                result.setdefault(site.layer, []).append((site, nothing))
            return result
        return self._backward(get_gradient_edge(prediction), edges, cotangents, guard) if edges else {}


def _refuse_other_uses(layers: Sequence[Layer], prediction: Tensor, edges: Mapping[Site, Ends]) -> None:
    """Refuse layers that act on the prediction otherwise than by calls of their modules.

    Raises:
        NotImplementedError: If there is one, by name.
    """
    node = get_gradient_edge(prediction).node
    reached: set[Node] = set()
    uses: Uses = Counter()
    for _ in nodes_below(node, reached, uses):
        pass
    for site, ends in edges.items():
        if any(edge is not None and edge.node in reached for edge in ends):
            uses.subtract(site.uses)
    names = [repr(layer.name) for layer in layers if any(uses[id(p)] > 0 for p in layer.parameters.values())]
    if names:
        raise NotImplementedError(
            f"the weights of {', '.join(names)} are used outside their modules, too (F.linear of a weight, "
            f"layer.forward(x), or a derivative taken in the forward), and that is not in the Kronecker factors: leave "
            f"them out of params, call the module itself, or use GGNLinearOperator"
        )
