"""What happens where the user's backward has reached a prediction: loss terms, cotangents, rows for the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfacopt.capture.chunks import rows_in_chunks, split_cotangents
from kfacopt.capture.graph import Walk
from kfacopt.capture.guard import Guard
from kfacopt.capture.loss_graph import LossGraph
from kfacopt.capture.passes import CotangentPass, Ends
from kfacopt.capture.records import Forward, Replay, Site, Tally
from kfacopt.capture.roots import refuse_reduced
from kfacopt.capture.scaling import OTHER_LAYERS, own_terms, terms_of
from kfacopt.capture.tensor_hooks import HooksSince
from kfacopt.exchange import whole_of_each
from kfacopt.fsdp import ShardedModel, is_sharded, lent
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.layers.plain import DIFFERENTIATED, RECOMPUTED, USED_ELSEWHERE
from kfacopt.likelihoods import FisherType, LossTerms
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.sharding import shard_of


@dataclass(eq=False)
class Read:
    """A prediction that the user's backward has reached: its node, the gradient there, the forwards that led to it.

    The first of these is its own. `walk` is that of the backward.
    """

    node: Node
    prediction: Tensor
    gradient: Tensor
    forwards: Sequence[Forward]
    walk: Walk


class CurvaturePass:
    """From a prediction's gradient to the rows of the layers below.

    Args:
        layers: Whose rows are delivered.
        estimator: Turns prediction and gradient into cotangents.
        loss_graph: What lies above the predictions in the running backward, where that can be found out.
        sharded: The parts of the model that an engine shards.

    Attributes:
        all_places: Leave reducing over places to `Rows.for_factors`.
        needs_inputs: See `CurvatureBackend.needs_inputs`.
        needs_squares: Whether rows are to have the mean squares of inputs.
        used_elsewhere: Layers of which a parameter was seen to be used outside its module, too, and how, or that a pass
            cannot reach; no rows of them are delivered any more.
        differentiated: Names of layers through whose calls a derivative was taken before the forward had ended.
        hooks_since: Hooks of the user's that a graph may hold.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        estimator: FisherEstimator,
        loss_graph: Callable[[], LossGraph | None],
        sharded: ShardedModel,
    ) -> None:
        self._layers, self._estimator, self._loss_graph, self._sharded = layers, estimator, loss_graph, sharded
        self._bring_down = CotangentPass()
        self.all_places, self.needs_inputs, self.needs_squares = False, True, False
        self.used_elsewhere: dict[Layer, str] = {}
        self.differentiated: set[str] = set()
        self.hooks_since = HooksSince()
        read = [m for la in layers if la.part is not None and la.part.compound.reads_parameters for m in la.modules]
        self._read_parameters = list(dict.fromkeys(p for m in read for p in m.parameters() if is_sharded(p)))

    def __call__(self, read: Read, tally: Tally, deliver: Callable[[Layer, Rows], None]) -> None:
        """Count the loss terms in `tally` and deliver the rows."""
        if read.gradient.numel() == 0:
            self.attend(read)
            return
        forward, terms = read.forwards[0], self._terms(read)
        sole = all(one.of is forward.of for one in read.forwards)
        tally.passes += 1
        if not bool(terms.count > 0):
            self.attend(read)
            return
        name, likelihoods = forward.name, self._estimator.likelihoods
        if not self._reads_no_gradient(forward):
            terms = tally.scale.weighed(name, likelihoods, terms, read.gradient, read.node, self._loss_graph)
        if not likelihoods[name].is_level:
            refuse_reduced(terms, read.prediction, read.gradient, type(forward.root).__name__)
        tally.terms = tally.terms + terms.count
        tally.verified &= terms.reads_target
        if forward.call is not None:
            tally.replays.append(Replay(forward.call, terms, read.gradient, forward.name, sole))
            scaled = forward.call.autocast_dtype is torch.float16 and not terms.reads_target
            tally.replayable &= sole and not scaled
        is_empirical = self._estimator.fisher_type is FisherType.EMPIRICAL
        if name and terms.weights is None and is_empirical and likelihoods[name].is_known:
            raise ValueError(
                f"curvature='empirical' with several losses: what {name!r} ({likelihoods[name]!r}) counts in the whole "
                f"loss is not told by its gradient. Let the loop call the very loss module that the optimizer was "
                f"given, so that its target is seen; or use 'mc' or 'ggn'"
            )
        relative, divisor = tally.scale.relative(name, likelihoods[name], terms, self._estimator.weights[name])
        if edges := self._edges(read):
            own = self._estimator.cotangents(relative, *((name,) if name else ()))
            cotangents = split_cotangents(own, edges)
            self._deliver_rows(read, edges, cotangents, divisor, deliver)

    def _deliver_rows(
        self,
        read: Read,
        edges: dict[Site, Ends],
        cotangents: Iterator[Tensor],
        divisor: Tensor,
        deliver: Callable[[Layer, Rows], None],
    ) -> None:
        guard, approx = self._guard(read, edges), self._estimator.kfac_approx
        reach = partial(self._bring_down, GradientEdge(read.node, read.forwards[0].output_nr), edges, guard=guard)
        chunks = self._in_step(cotangents, read.prediction)
        needs = self.all_places, self.needs_inputs, self.needs_squares
        for _, rows in rows_in_chunks(chunks, reach, divisor, approx, *needs):
            for layer, some in rows.items():
                deliver(layer, some)
        guard.watch()

    def attend(self, read: Read) -> None:
        """Take part in the passes of the other processes, where they need this one's shards of the parameters."""
        if self._sharded and (edges := self._edges(read)):
            guard, root = self._guard(read, edges), GradientEdge(read.node, read.forwards[0].output_nr)
            for nothing in self._in_step(iter(()), read.prediction):
                self._bring_down(root, edges, nothing, guard=guard)
            guard.watch()

    def _guard(self, read: Read, edges: dict[Site, Ends]) -> Guard:
        ends = [edge.node for some in edges.values() for edge in some if edge is not None]
        root = read.forwards[0].root
        return Guard([read.node], self.hooks_since, root, warnings.warn, ends, self._sharded.left_as_is)

    def _in_step(self, chunks: Iterator[Tensor], prediction: Tensor) -> Iterator[Tensor]:
        """Chunks of cotangents; of a sharded model as many in all processes, and as long, filled up with zeros.

        As all processes take part, this is where parameters can be gathered that rows are computed from.
        """
        lacks_parameters = bool(self._read_parameters)
        with ExitStack() as stack:
            while self._sharded:
                own = next(chunks, prediction.new_zeros(0, *prediction.shape))
                if (wanted := self._sharded.largest(len(own))) == 0:
                    return
                if lacks_parameters:
                    stack.enter_context(lent(self._whole()))
                    lacks_parameters = False
                lacking = prediction.new_zeros(wanted - len(own), *prediction.shape)
                yield torch.cat([own, lacking]) if len(lacking) else own
        yield from chunks

    def _whole(self) -> dict[Tensor, Tensor]:
        asked = self._read_parameters
        return dict(zip(asked, whole_of_each([shard_of(p.detach()) for p in asked], asked), strict=True))

    def _edges(self, read: Read) -> dict[Site, Ends]:
        """The calls that led to a prediction, of layers that act by their calls alone."""
        walk, leaf = read.walk, self._sharded.leaf
        for layer in self._layers:
            is_differentiated = layer.name in self.differentiated
            held = list(map(leaf, layer.parameters.values()))
            if any((is_differentiated or walk.explained[id(p)]) and walk.used_elsewhere(p) for p in held):
                self.used_elsewhere[layer] = DIFFERENTIATED if is_differentiated else USED_ELSEWHERE
        # The tensors of an ambiguous output may each have kept the same call.
        marks = {site: references for one in read.forwards for site, references in one.sites.items()}
        edges: dict[Site, Ends] = {}
        out_of_reach = walk.out_of_reach() if walk.recomputed else set()
        for site, references in marks.items():
            nodes = [walk.nodes.get(mark) if (mark := reference()) is not None else None for reference in references]
            if not out_of_reach.isdisjoint(nodes):
                self.used_elsewhere[site.layer] = RECOMPUTED
            if any(nodes) and site.layer not in self.used_elsewhere:
                ends = zip(nodes, site.output_nrs, strict=True)
                edges[site] = tuple(None if node is None else GradientEdge(node, number) for node, number in ends)
        return edges

    def _reads_no_gradient(self, forward: Forward) -> bool:
        """Whether the gradient at a prediction is not the loss' own."""
        return self._estimator.extra_terms or forward.leads_on

    def _terms(self, read: Read) -> LossTerms:
        """The loss terms of a prediction, unless the gradient shows that the loss is taken of something else."""
        forward = read.forwards[0]
        name = type(forward.root).__name__
        likelihood = self._estimator.likelihoods[forward.name].beside(forward.beside)
        if self._reads_no_gradient(forward):
            return own_terms(likelihood, read.prediction, read.gradient, forward.targets)
        try:
            terms = terms_of(likelihood, read.prediction, read.gradient, forward.targets)
        except ValueError as error:
            graph = self._loss_graph()
            softmax = graph is not None and graph.is_of_softmax(read.node)
            if softmax and (own := likelihood.terms_of_softmax(read.prediction, read.gradient)) is not None:
                return own
            raise ValueError(
                f"{error}. (The loss is thought to be taken of the output of {name} as it is: where it is of one "
                f"output of several, pass prediction=lambda output: ... Where something else is added to the loss that "
                f"depends on this output too, as a z-loss or an entropy bonus, pass extra_terms=True. {OTHER_LAYERS})"
            ) from error
        return terms
