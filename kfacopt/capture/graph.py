"""Finding places of the autograd graph again, from a later place of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.autograd.graph import Node

_KEY = "kfacopt"


class Mark:
    """Left on a node, to be found again.

    It lives as long as the node and holds nothing: what hangs on a node must not lead to a later one (by way of a
    module that keeps its output, say), as a cycle through the graph is never collected.
    """

    __slots__ = ("__weakref__",)


def leave_mark(node: Node) -> Mark:
    """A new mark on a node of the graph.

    >>> squared = torch.ones(2, requires_grad=True) ** 2
    >>> mark = leave_mark(squared.grad_fn)
    >>> list(marks_on(squared.grad_fn)) == [mark]
    True
    """
    mark = Mark()
    _metadata(node).setdefault(_KEY, []).append(mark)
    return mark


def marks_on(node: Node) -> Iterator[Mark]:
    """The marks that were left on a node, the oldest first."""
    yield from _metadata(node).get(_KEY, ())


def _metadata(node: Node) -> dict[str, list[Mark]]:
    metadata: dict[str, list[Mark]] = node.metadata  # type: ignore[assignment]
    return metadata


Uses = Counter[int]
"""How many operations read a parameter, each as often as it does, by the parameter's `id`."""


class Walk:
    """What one backward's gradient flows on to, from prediction after prediction; no node is visited twice.

    Predictions must come in the order in which the backward reaches them: one that leads to another comes after it.
    A walk keeps the graph alive.

    Args:
        within: For those marks that stand for a call of a layer, what that call itself reads (`uses_within`); marks on
            several outputs of one call have the very same.

    Attributes:
        nodes: Where every mark is that was come by.
        uses: Of every leaf that was come by. A parameter that autocast casts is used as often as the cast is.
        explained: What of that the calls of layers account for. Less: a parameter is used outside its module, too.
        recomputed: Calls of `torch.utils.checkpoint` with `use_reentrant=True`, through which torch lets no pass but a
            whole backward.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> walk = Walk({})
    >>> walk.onwards((weight * weight + weight).sum().grad_fn)
    []
    >>> walk.uses[id(weight)]
    3
    """

    def __init__(self, within: Mapping[Mark, Uses]) -> None:
        self.nodes: dict[Mark, Node] = {}
        self.uses: Uses = Counter()
        self.explained: Uses = Counter()
        self.recomputed: list[Node] = []
        self._within = within
        self._counted: set[int] = set()
        self._visited: set[Node] = set()

    def onwards(self, start: Node) -> list[Mark]:
        """Go on from a prediction's node to all nodes that no earlier prediction led to.

        Returns:
            The marks on them, those on `start` itself left out.
        """
        found: list[Mark] = []
        own = set(marks_on(start))
        for node in nodes_below(start, self._visited, self.uses):
            if node.name() == "CheckpointFunctionBackward":
                self.recomputed.append(node)
            for mark in marks_on(node):
                self.nodes[mark] = node
                found.append(mark)
                reads = self._within.get(mark)
                if reads is not None and id(reads) not in self._counted:  # a call with several outputs reads once
                    self._counted.add(id(reads))
                    self.explained.update(reads)
        return [mark for mark in found if mark not in own]

    def out_of_reach(self) -> set[Node]:
        """The nodes that a pass from the predictions comes to through `recomputed` ones, if not only so."""
        visited: set[Node] = set()
        for node in self.recomputed:
            for _ in nodes_below(node, visited):
                pass
        return visited

    def used_elsewhere(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is used otherwise than by its layer's calls: by a function, or in a derivative."""
        return self.uses[id(parameter)] > self.explained[id(parameter)]


def uses_within(outputs: Iterable[Node], inputs: Iterable[Node]) -> Uses:
    """What the operations of one call read, from its outputs' nodes down to those of its inputs.

    >>> x, weight = torch.ones(2, requires_grad=True) * 1.0, torch.ones(2, requires_grad=True)
    >>> dict(uses_within([(weight * (x + weight)).grad_fn], [x.grad_fn])) == {id(weight): 2}
    True
    """
    uses: Uses = Counter()
    visited = set(inputs)
    for output in outputs:
        for _ in nodes_below(output, visited, uses):
            pass
    return uses


def nodes_below(start: Node, visited: set[Node], uses: Uses | None = None) -> Iterator[Node]:
    """The nodes from `start` on that were not visited; they are added to `visited`, their uses of leaves to `uses`."""
    uses = Counter() if uses is None else uses
    queue = [] if start in visited else [start]
    visited.update(queue)
    while queue:
        node = queue.pop()
        yield node
        for following, _ in node.next_functions:
            if following is None:
                continue
            if (leaf := leaf_of(following)) is not None:
                uses[id(leaf)] += 1
            elif following not in visited:
                visited.add(following)
                queue.append(following)


_REARRANGE = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias",
        "Expand",
        "Permute",
        "ReshapeAlias",
        "T",
        "ToCopy",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
)


def leaf_of(node: Node) -> torch.Tensor | None:
    """The leaf whose gradient a node accumulates, or of which it is another arrangement or type.

    Of such a node several operations may read: autocast casts a weight once for all uses, and a derivative reads the
    transposed weight that the forward made.
    """
    while node.name() in _REARRANGE and (below := node.next_functions[0][0]) is not None:
        node = below
    is_leaf = isinstance(node, torch._C._functions.AccumulateGrad)  # type: ignore[attr-defined]
    return node.variable if is_leaf else None  # type: ignore[attr-defined]
