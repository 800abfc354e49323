"""Derivatives of a network that the user's loop takes with their graph, and whether the step's loss is of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from kfacopt.capture.graph import nodes_below


class Derivatives:
    """Notices that a backward which leaves gradients goes through a derivative that an earlier one took.

    `autograd.grad(model(x).sum(), x, create_graph=True)` makes a graph of its own beside that of the forward. What is
    computed of it acts on the parameters in a way that neither the prediction nor its gradient shows.

    Args:
        parameters: Whose gradients count.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.in_the_loss = False
        """Whether such a backward has come since this was last set to False."""
        self._parameters = parameters
        self._leaves: tuple[int, bool] = (-1, False)  # the last backward asked about, and the answer

    def takes_one(self, node: Node) -> bool:
        """Whether the backward that has reached a forward's node only takes a derivative; it is followed if so."""
        if not torch.is_grad_enabled() or self._leaves_gradients():
            return False
        for below in nodes_below(node, set()):
            below.register_hook(partial(_follow, weakref.ref(self)))
        return True

    def _leaves_gradients(self) -> bool:
        """Whether the backward that runs now adds to `.grad` of a parameter."""
        task = torch._C._current_graph_task_id()
        if self._leaves[0] != task:
            self._leaves = task, any(_accumulates(p) for p in self._parameters if p.requires_grad)
        return self._leaves[1]

    def _goes_through(self) -> None:
        self.in_the_loss = self.in_the_loss or self._leaves_gradients()


def _follow(watch: weakref.ref[Derivatives], cotangents: Sequence[Tensor | None], _: Any) -> None:
    """After a node's backward: whoever differentiates what it made goes through the derivative."""
    for cotangent in cotangents:
        if cotangent is not None and (made := cotangent.grad_fn) is not None:
            made.register_prehook(partial(_reached, watch))


def _reached(watch: weakref.ref[Derivatives], _: Any) -> None:
    held = watch()
    if held is not None:
        held._goes_through()


def _accumulates(parameter: nn.Parameter) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
    except RuntimeError:  # what autograd.grad returns is not accumulated, and torch refuses the question
        return False
