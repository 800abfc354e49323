"""Finding places of the autograd graph again, from a later place of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch.autograd.graph import Node

from kfacopt.layers.layer import Layer

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


class Walk:
    """What one backward's gradient flows on to, from prediction after prediction; no node is visited twice.

    Predictions must come in the order in which the backward reaches them: one that leads to another comes after it.
    A walk keeps the graph alive.

    Args:
        layers: The covered layer that was called where a mark is, of those marks that stand for a call.

    Attributes:
        nodes: Where every mark is that was come by.
        calls: How many calls of each layer were come by.
        uses: How many edges lead into a leaf (a parameter), by its `id`: the number of operations that read it, each
            as often as it does. More than its layer's calls: it is used outside its module too.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> walk = Walk({})
    >>> walk.onwards((weight * weight + weight).sum().grad_fn)
    []
    >>> walk.uses[id(weight)]
    3
    """

    def __init__(self, layers: Mapping[Mark, Layer]) -> None:
        self.nodes: dict[Mark, Node] = {}
        self.calls: Counter[Layer] = Counter()
        self.uses: Counter[int] = Counter()
        self._layers = layers
        self._visited: set[Node] = set()

    def onwards(self, start: Node) -> list[Mark]:
        """Go on from a prediction's node to all nodes that no earlier prediction led to.

        Returns:
            The marks on them, those on `start` itself left out.
        """
        found: list[Mark] = []
        own = set(marks_on(start))
        queue = [] if start in self._visited else [start]
        self._visited.update(queue)
        while queue:
            node = queue.pop()
            for mark in marks_on(node):
                self.nodes[mark] = node
                found.append(mark)
                if (layer := self._layers.get(mark)) is not None:
                    self.calls[layer] += 1
            for following, _ in node.next_functions:
                if isinstance(following, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
                    self.uses[id(following.variable)] += 1
                elif following is not None and following not in self._visited:
                    self._visited.add(following)
                    queue.append(following)
        return [mark for mark in found if mark not in own]
