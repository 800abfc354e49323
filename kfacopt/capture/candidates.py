"""Which tensors of a forward a loss may be taken of; where there are several, its backward tells.

An output of several tensors (logits and a hidden state, a dict with features in it) does not say which of them is the
prediction; a forward that returns its loss alone has calls within it that may have made it; and where the output is a
copy in another precision, the loss may be taken of the original within the forward. They are rivals then, and the
prediction is the one that the loss' graph reaches by itself, not by way of another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from kfacopt.capture.graph import marks_on
from kfacopt.capture.loss_graph import LossGraph
from kfacopt.capture.records import Alive, Call, Forward, Marks, Site
from kfacopt.capture.roots import Found, OpenCall, returns_losses
from kfacopt.likelihoods.estimator import FisherEstimator, may_be_prediction, tensors_of


@dataclass(frozen=True, eq=False)
class Candidate:
    """A tensor that a loss may be taken of.

    Attributes:
        tensor: As the forward left it; of a copy's original, the copy.
        edge: Where its gradient arrives.
        root: The module whose call returned it.
        call: How to have it again.
        name: Of the loss term.
        rivals: The same for those of which one alone is the prediction; None: it has none.
        refusal: Why nothing says which one is; of one without rivals, why it is none.
        beside: All predictions of the call, by name, where there are several.
        may_be_several: Whether all rivals that the loss is taken of are predictions, not one alone.
    """

    tensor: Tensor
    edge: GradientEdge
    root: nn.Module
    call: Call | None
    name: str = ""
    rivals: object = None
    refusal: str = ""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    may_be_several: bool = False

    def forward(self, sites: Mapping[Site, Marks], of: object) -> Forward:
        """What is kept of the forward for this tensor; `of` is the same for all of one call."""
        kept = Forward(self.root, dict(sites), self.call, refusal=self.refusal, name=self.name, of=of)
        kept.rivals, kept.output_nr, kept.beside = self.rivals, self.edge.output_nr, dict(self.beside)
        kept.may_be_several = self.may_be_several
        if self.rivals is not None or not self.refusal:
            kept.prediction, kept.version = self.tensor.detach(), self.tensor._version
        return kept


def candidates_of(
    estimator: FisherEstimator, root: nn.Module, call: Call | None, output: Any, ended: OpenCall
) -> list[Candidate]:
    """The tensors of a forward that a loss may be taken of.

    Args:
        estimator: Of the loss.
        root: The module that was called.
        call: How to run it again, if that is kept.
        output: What it returned.
        ended: The calls within it.
    """
    which = f"the output of {type(root).__name__} is ambiguous: "
    if estimator.guesses and returns_losses(output):
        if ended.sole is None:
            within = _rivals(ended.outputs, call, which + ended.refusal(), True, several=False)
            return within or _refused(root, call, output, which + ended.refusal())
        root, output = ended.sole
        call = None if call is None else replace(call, inside=root)
    try:
        named = estimator.predictions(output)
    except ValueError as error:
        if not estimator.guesses:
            return _refused(root, call, output, f"{which}{error}")
        inside = call is not None and call.inside is not None
        return _rivals([(root, output)], call, f"{which}{error}", inside, not estimator.likelihood.is_known)
    found: list[Candidate] = []
    beside = {name: tensor.detach() for name, tensor in named.items()} if len(named) > 1 else {}
    for name, tensor in named.items():
        if tensor.grad_fn is not None:
            original = _original(tensor)
            rivals = None if original is None else object()
            edges = [get_gradient_edge(tensor), *([] if original is None else [original])]
            refusal = "" if rivals is None else which + _COPIED
            found += [Candidate(tensor, edge, root, call, name, rivals, refusal, beside) for edge in edges]
    return found


_COPIED = (
    "it is a copy in another precision, and the loss is taken of the copy and of the original as well: take it of one "
    "of them"
)


def _refused(root: nn.Module, call: Call | None, output: Any, why: str) -> list[Candidate]:
    some = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
    return [Candidate(tensor, get_gradient_edge(tensor), root, call, refusal=why) for tensor in some]


def _rivals(outputs: Sequence[Found], call: Call | None, why: str, inside: bool, several: bool) -> list[Candidate]:
    rivals, found = object(), dict[tuple[Node, int], Candidate]()
    for module, output in outputs:
        for place, tensor in enumerate(tensors_of(output)):
            if may_be_prediction(tensor) and tensor.grad_fn is not None:
                own = None if call is None else replace(call, place=place, inside=module if inside else None)
                edge = get_gradient_edge(tensor)
                one = Candidate(tensor, edge, module, own, rivals=rivals, refusal=why, may_be_several=several)
                found.setdefault((edge.node, edge.output_nr), one)
    return list(found.values())


def _original(tensor: Tensor) -> GradientEdge | None:
    """Where the gradient of what a tensor is a copy of in a higher precision arrives; None: it is no such copy.

    >>> import torch
    >>> half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 1.0
    >>> _original(half.float()).node is half.grad_fn, _original(half) is None
    (True, True)
    """
    node = tensor.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    below, output_nr = node.next_functions[0]
    # What AccumulateGrad accumulates is a leaf: no model has made it.
    metadata = None if below is None or not below.next_functions else below._input_metadata[output_nr]
    if below is None or metadata is None or tuple(metadata.shape) != tuple(tensor.shape):
        return None
    return GradientEdge(below, output_nr) if metadata.dtype.itemsize < tensor.dtype.itemsize else None


def reached(
    forward: Forward, node: Node, gradients: Sequence[Tensor | None], graph: LossGraph | None, alive: Alive
) -> Collection[Forward] | None:
    """The rivals of a forward's prediction, itself included, that the loss reaches not by way of another prediction.

    Args:
        forward: That a backward has reached.
        node: Its prediction's.
        gradients: That have arrived there.
        graph: What lies above the predictions.
        alive: All forwards, by their marks.

    Returns:
        None where the graph cannot be seen. Of a copy and its original the first that a backward reaches is taken then:
        it comes to the copy first, if at all.
    """
    if graph is None:
        return {forward} if forward.refusal.endswith(_COPIED) else None
    found = {alive[mark] for place in graph.predictions for mark in marks_on(place) if mark in alive}
    beside = {alive[mark] for mark in marks_on(node) if mark in alive}
    # Tensors of one node (a chunk each) arrive together: those without a gradient are not in the loss.
    idle = {one for one in beside if gradients[one.output_nr] is None}
    direct = [one for one in alive.values() if one in found - idle and one.rivals is forward.rivals]
    if forward in direct and forward.may_be_several:
        for place, one in enumerate(direct):
            one.rivals, one.name = None, str(place)
        return {forward}
    return set(direct)


def ambiguity(forward: Forward, count: int) -> str:
    """Why a rival cannot be told to be the prediction: the loss is taken of so many (0: its graph cannot be seen)."""
    if count == 0 or forward.refusal.endswith(_COPIED):
        return forward.refusal
    return (
        f"{forward.refusal}. The loss is taken of {count} of them: to have the curvature of all, return them, and pass "
        f"a loss for each, as a dict by their names or a tuple by their places; a loss that is a function of all of "
        f"them will do with curvature='empirical'"
    )
