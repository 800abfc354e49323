"""Layers whose step takes longer than their gradients take turns: they move less often, and as much further."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from kfacopt.layers.layer import Layer

FIRST = 50
"""For so many steps all layers move in each: training changes fast then."""
_PERIOD = 6  # which one, two and three divide


def cost(shape: torch.Size, rows: float) -> float:
    """How much longer the spectral step of a matrix `[*k o i]` takes than its three products with so many rows.

    Three iterations for the polar factor, of which each takes `2 m² n + m³` with m the shorter side, and the root of a
    factor of the outputs twice, over `3 rows o i`.

    >>> round(cost(torch.Size([64, 64]), 768.0), 2), round(cost(torch.Size([400, 784]), 250.0), 2)
    (0.31, 5.08)
    """
    outputs, inputs = shape[-2:]
    short, long = min(outputs, inputs), max(outputs, inputs)
    return (6 * short + 3 * short**2 / long + 2 * outputs) / (3 * rows)


class Turns:
    """Who moves in which step.

    Where matrices are wide and batches small, the polar factor is most of a step. A layer that moves every third time,
    three times as far, takes a third of it, and its momentum misses no gradient. Measured at equal steps, that is as
    good for wide layers of small batches (an autoencoder 78.7 to 79.2, digits 0.201 to 0.196, a table 0.326 to 0.314),
    not for all: a chain of narrow ones went from 0.42 to 0.49, a ResNet from 0.088 to 0.097. So they do only where the
    steps of all layers together take longer than their gradients; and so that all steps are of about one length.

    Args:
        longest: Every so many steps a layer moves at least; at most three. 1: in each.
    """

    def __init__(self, longest: int) -> None:
        if longest not in (1, 2, 3):
            raise ValueError(f"turns must be 1, 2 or 3, got {longest}")
        self._longest = longest
        self._known: tuple[list[Layer], Mapping[str, float]] | None = None
        self._turns: dict[Layer, tuple[int, int]] = {}

    def strides(self, step: int, layers: Sequence[Layer], rows: Mapping[str, float]) -> dict[Layer, int]:
        """How many times as far as otherwise each layer moves in a step; 0: not at all.

        Args:
            step: Its number.
            layers: All that are stepped.
            rows: How many each layer has in a step, by name; of whom it is not known moves in each. Of all processes
                together: several with a part of the data each go the way of one with all of them.
        """
        if self._longest == 1 or step < FIRST:
            return dict.fromkeys(layers, 1)
        if self._known != (list(layers), rows):
            self._known, self._turns = (list(layers), dict(rows)), self._taken(layers, rows)
        return {layer: every if step % every == turn else 0 for layer, (every, turn) in self._turns.items()}

    def _taken(self, layers: Sequence[Layer], rows: Mapping[str, float]) -> dict[Layer, tuple[int, int]]:
        """Each layer's interval, and its turn in it: the dearest first, where the least is to be done."""
        holders = Counter(id(p) for layer in layers for p in layer.parameters.values())
        counts = {layer: rows.get(layer.name, 0.0) for layer in layers}
        gradients = {layer: count * layer.shape.numel() for layer, count in counts.items()}
        ratios = {layer: cost(layer.shape, count) if count > 0.0 else 0.0 for layer, count in counts.items()}
        work = {layer: ratio * gradients[layer] for layer, ratio in ratios.items()}
        every = dict.fromkeys(layers, 1)
        for layer, ratio in ratios.items() if sum(work.values()) > sum(gradients.values()) else []:
            # What several layers hold is moved by all of them together.
            if all(holders[id(p)] == 1 for p in layer.parameters.values()):
                every[layer] = max(1, min(self._longest, round(ratio)))
        load, turns = [0.0] * _PERIOD, dict[Layer, tuple[int, int]]()
        for layer in sorted(layers, key=lambda layer: -work[layer]):
            interval = every[layer]
            turn = min(range(interval), key=lambda place: sum(load[place::interval]))
            for place in range(turn, _PERIOD, interval):
                load[place] += work[layer]
            turns[layer] = interval, turn
        return turns
