"""Derivatives of a network that the user's loop takes with their graph, and whether the step's loss is of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from kfacopt.capture.destination import Destination, Gradients
from kfacopt.capture.graph import nodes_below
from kfacopt.capture.tensor_hooks import own


class Derivatives:
    """Notices that a backward which leaves gradients goes through a derivative that an earlier one took.

    `autograd.grad(model(x).sum(), x, create_graph=True)` makes a graph of its own beside that of the forward. What is
    computed of it acts on the parameters in a way that neither the prediction nor its gradient shows.

    Args:
        gradients: Of the model.

    Attributes:
        in_the_loss: Whether such a backward has come since this was last set to False.
    """

    def __init__(self, gradients: Gradients) -> None:
        self.in_the_loss = False
        self._gradients = gradients

    def follow(self, node: Node) -> None:
        """The running backward, which takes a derivative, has reached a forward's node: watch what it makes."""
        for below in nodes_below(node, set()):
            own(below.register_hook(partial(_follow, weakref.ref(self))))

    def reached(self) -> None:
        """A backward goes through what was made."""
        self.in_the_loss = self.in_the_loss or self._gradients.destination() is Destination.GRAD


def _follow(watch: weakref.ref[Derivatives], cotangents: Sequence[Tensor | None], _: Any) -> None:
    """After a node's backward: whoever differentiates what it made goes through the derivative."""
    for cotangent in cotangents:
        if cotangent is not None and (made := cotangent.grad_fn) is not None:
            own(made.register_prehook(partial(_reached, watch)))


def _reached(watch: weakref.ref[Derivatives], _: Any) -> None:
    held = watch()
    if held is not None:
        held.reached()
