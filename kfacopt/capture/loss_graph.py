"""What a backward started from: the value of the user's loss, and what lies between it and the predictions.

Only a loss whose target its gradient does not tell (squared errors, soft labels) is looked at. Torch hands the roots of
a backward to nobody, so they are taken from the frame of its `_engine_run_backward`, which runs at the time: on this
thread, or (hooks of an accelerator's nodes run on a thread of the engine's) on the only other one that is in it. Where
that fails nothing is known of the loss, which is said (`kfacopt.optim.scaling`).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, _engine_run_backward

from kfacopt.capture.graph import leaf_of

_LOSSES = {
    *("MseLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "NllLoss", "NllLoss2D", "SmoothL1Loss"),
    *("HuberLoss", "SoftMarginLoss"),
}
_PARTS = {"Index", "IndexSelect", "Select", "Slice"}
_SCALES = {"Add", "Sub", "Rsub", "Mul", "Div", "Neg"}
Names = tuple[str, ...]
"""What torch calls nodes of the graph, without \"Backward0\"."""

_SQUARES: Names = ("MseLoss",)
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "T", "Transpose", "Permute", "Alias", "ToCopy"}
_VIEWS |= {"_DDPSink"}  # of DistributedDataParallel: hands its outputs on, which may be several


@dataclass(eq=False)
class LossValue:
    """The user's loss: its value, and whether it depends on nothing differentiable but the predictions."""

    value: float
    alone: bool = True


class LossGraph:
    """The graph above the predictions of one backward.

    Args:
        roots: What is differentiated, and the gradient that the backward starts with.
        is_prediction: Whether a node is that of a prediction; what is below is not looked at.

    Attributes:
        loss: The sum over the roots, each times its gradient.
        predictions: The nodes of the predictions that it depends on.

    >>> f = torch.ones(2, 3, requires_grad=True) * 1.0
    >>> loss = 5.0 * torch.nn.functional.mse_loss(f, torch.zeros(2, 3))
    >>> graph = LossGraph([(loss, torch.tensor(1.0))], lambda node: node is f.grad_fn)
    >>> graph.loss.value, graph.loss.alone, graph.is_uniform(f.grad_fn), graph.added(f.grad_fn)
    (5.0, True, True, None)
    """

    def __init__(self, roots: list[tuple[Tensor, Tensor]], is_prediction: Callable[[Node], bool]) -> None:
        self.loss = LossValue(sum(float((root.detach() * seed).sum()) for root, seed in roots))
        self.predictions: set[Node] = set()
        self._scalar = len(roots) == 1 and roots[0][0].numel() == 1
        self._above: dict[Node, list[Node]] = {root.grad_fn: [] for root, _ in roots if root.grad_fn is not None}
        queue = list(self._above)
        while queue:
            node = queue.pop()
            if is_prediction(node):
                self.predictions.add(node)
                continue
            self.loss.alone &= not isinstance(node, torch._C._functions.AccumulateGrad)  # type: ignore[attr-defined]
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if following not in self._above:
                    self._above[following] = []
                    queue.append(following)
                self._above[following].append(node)

    def other_loss(self, prediction: Node, loss_nodes: Names) -> str | None:
        """The name of the node of a loss of torch's that is taken of a prediction alone and is none of `loss_nodes`."""
        kinds = map(_name, self._path(prediction) or [])
        return next((name for name in kinds if name in _LOSSES and name not in loss_nodes), None)

    def layer_above(self, prediction: Node) -> str | None:
        """The name of a layer's node through which alone the loss depends on a prediction; None: it needs none.

        A bias or a kernel shows a layer, be it frozen; of a bare product the other factor has to train.

        >>> f, head = torch.ones(2, 3, requires_grad=True) * 1.0, torch.nn.Linear(3, 1)
        >>> for loss in (head(f).mean(), head(f).mean() + f.mean()):
        ...     LossGraph([(loss, torch.tensor(1.0))], lambda node: node is f.grad_fn).layer_above(f.grad_fn)
        'Addmm'
        """
        found, queue, seen = None, [prediction], {prediction}
        while queue:
            above = self._above.get(node := queue.pop(), [])
            if not above and node is not prediction:
                return None  # the loss, without a layer on the way
            for one in above:
                if _is_layer(one):
                    found = found or _name(one)
                elif one not in seen:
                    seen.add(one)
                    queue.append(one)
        return found

    def is_uniform(self, prediction: Node, loss_nodes: Names = _SQUARES) -> bool:
        """Whether the loss is a constant times the mean or sum of torch's losses `loss_nodes` of a prediction.

        Of squared errors, also of those written out: the last operations before the loss multiply or divide a number,
        those before them add numbers up, and nothing comes in between. A weight of data or outputs would.
        """
        path = self._path(prediction)
        if path is None or not self._scalar or not self.loss.alone or self.predictions != {prediction}:
            return False
        if loss_nodes != _SQUARES and not any(_name(node) in loss_nodes for node in path):
            return False
        kinds = [_kind_of(node, loss_nodes) for node in path]
        return re.fullmatch(r"s*r+v*(qv*d?|n)?v*", "".join(kinds)) is not None

    def added(self, prediction: Node, loss_nodes: Names = _SQUARES) -> str | None:
        """The reduction, `"mean"` or `"sum"`, of a loss of `loss_nodes` of a prediction that is but added to the whole.

        None: the prediction is used otherwise, or the loss multiplied.
        """
        path = self._path(prediction)
        if path is None or not self._scalar:
            return None
        own = list(itertools.dropwhile(_adds, path))
        if not own or re.fullmatch(r"r(v*(qv*d?|n))?", "".join(_kind_of(node, loss_nodes) for node in own)) is None:
            return None
        if _name(own[0]) in loss_nodes:
            return {1: "mean", 2: "sum"}[_reduction(own[0])]
        # Those with another number are of some axes.
        return {"MeanBackward0": "mean", "SumBackward0": "sum"}.get(own[0].name()) if len(own) > 1 else None

    def is_of_softmax(self, prediction: Node) -> bool:
        """Whether the loss is of the logarithm of a softmax of a prediction, or a part, at most scaled and shifted.

        The gradient of such a loss sums to zero over the classes, whatever its rounding makes of that.

        >>> f = torch.ones(2, 3, requires_grad=True) * 1.0
        >>> loss = torch.nn.functional.cross_entropy(f / 0.5, torch.tensor([0, 1]))
        >>> LossGraph([(loss, torch.tensor(1.0))], lambda node: node is f.grad_fn).is_of_softmax(f.grad_fn)
        True
        """
        below = prediction
        while len(above := set(self._above.get(below, ()))) == 1:
            (node,) = above
            name = _name(node)
            # Of a product with itself both factors are the prediction.
            if name == "LogSoftmax" or [one for one, _ in node.next_functions].count(below) != 1:
                return name == "LogSoftmax"
            if name not in _SCALES | _PARTS | _VIEWS:
                return False
            below = node
        return False

    def _path(self, prediction: Node) -> list[Node] | None:
        """The nodes from the loss to a prediction, neither included, if there is but one way; None otherwise."""
        path: list[Node] = []
        node = prediction
        while above := set(self._above.get(node, ())):
            if len(above) > 1:
                return None
            (node,) = above
            path.append(node)
        return path[::-1] or None


class RunningLoss:
    """The graph above the predictions of the backward that runs now: looked at when it reaches the first of them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The backward has ended: its graph must not be kept alive."""
        self._task = -1
        self._graph: LossGraph | None = None

    def graph(self, is_prediction: Callable[[Node], bool]) -> LossGraph | None:
        """The graph, or None if what is differentiated cannot be seen; to be asked within a backward."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            roots = roots_of_backward()
            self._task, self._graph = task, None if roots is None else LossGraph(roots, is_prediction)
        return self._graph


def roots_of_backward() -> list[tuple[Tensor, Tensor]] | None:
    """What the backward that runs now differentiates, and the gradients it starts with; None: it is not to be seen."""
    frame = next(_frames_of(sys._getframe()), None)
    if frame is None:
        others = [next(_frames_of(top), None) for top in sys._current_frames().values()]
        running = [one for one in others if one is not None]
        frame = running[0] if len(running) == 1 else None
    if frame is None:
        return None
    outputs, arguments = frame.f_locals.get("t_outputs", ()), frame.f_locals.get("args", ())
    seeds: Any = arguments[0] if arguments else ()
    pairs = list(zip(outputs, seeds, strict=False))
    fine = len(pairs) == len(outputs) and all(
        isinstance(root, Tensor) and isinstance(seed, Tensor) and root.shape == seed.shape for root, seed in pairs
    )
    return pairs if fine and pairs else None


def _frames_of(top: FrameType) -> Iterator[FrameType]:
    frame: FrameType | None = top
    while frame is not None:
        if frame.f_code is _engine_run_backward.__code__:
            yield frame
        frame = frame.f_back


def is_view(node: Node) -> bool:
    """Whether a node only arranges numbers anew."""
    return _name(node) in _VIEWS


def _adds(node: Node) -> bool:
    return _name(node) == "Add" and node._saved_alpha == 1  # type: ignore[attr-defined]


def _name(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _is_layer(node: Node) -> bool:
    name = _name(node)
    if name in ("Addmm", "Convolution"):
        return True
    return name in ("Mm", "Bmm", "Mv") and any(one and leaf_of(one) is not None for one, _ in node.next_functions)


def _reduction(node: Node) -> int:
    """0: none, 1: mean, 2: sum."""
    return int(node._saved_reduction)  # type: ignore[attr-defined]


def _is_weighted(node: Node) -> bool:
    """Whether a loss was given weights; one that its node has let go of was given."""
    for name in ("_saved_weight", "_saved_pos_weight"):
        try:
            if getattr(node, name, None) is not None:
                return True
        except RuntimeError:
            return True
    return False


def _kind_of(node: Node, loss_nodes: Names) -> str:
    """One letter for what a node does, as `LossGraph.is_uniform` reads them."""
    name = _name(node)
    if name in loss_nodes and not _is_weighted(node):
        return "r" if _reduction(node) else "n"
    if name in ("Mean", "Sum"):
        return "r"
    following = [one for one, _ in node.next_functions]
    if loss_nodes != _SQUARES:
        return {"Mul": "s", "Div": "s"}.get(name, "v" if is_view(node) else "x")
    squared = name == "Pow" and node._saved_exponent == 2  # type: ignore[attr-defined]
    if squared or (name == "Mul" and len(set(following)) == 1):
        return "q"
    if name in ("Mul", "Div"):
        return "s"
    if name in ("Sub", "Rsub"):
        return "d"
    return "v" if is_view(node) else "x"
