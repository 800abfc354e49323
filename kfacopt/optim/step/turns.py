"""Layers whose step takes long beside their gradients take turns: they move less often, and as much further."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from kfacopt.layers.layer import Layer

FIRST = 5
"""For so many steps all layers move in each: training changes fastest then."""
EARLY = 10
"""From this step on layers take the longest turns whose step takes many times as long as their gradients."""
LATE = 150
"""From this step on steps are short enough that all layers may take turns."""
SHORT = 400
"""From this step on they are half as long as at first, and all layers may even take the same turn."""
LONG = 1600
"""From this step on they are a quarter as long, and who takes turns takes the longest."""
CALLS = 3e7
"""So many multiplications take as long as the calls of a step whose matrices are small."""
LONGEST = 6
"""Every so many steps a layer moves at least, by default; two and three divide it."""
_USUAL, _DEAR = 3, 15
_PART = 0.2


def products(shape: torch.Size, of_inputs: bool = False) -> float:
    """How many multiplications the spectral step of a matrix `[*k o i]` takes.

    Three iterations for the polar factor, of which each takes `2 m² n + m³` with m the shorter side, and the root of a
    factor of the outputs twice; where the metric is that of the inputs, too (`of_inputs`), the longer side's factor
    once more.

    >>> products(torch.Size([64, 64])) / 64**3, products(torch.Size([64, 64]), of_inputs=True) / 64**3
    (11.0, 12.0)
    """
    outputs, inputs = shape[-2:]
    short, long = min(outputs, inputs), max(outputs, inputs)
    return shape.numel() * (6 * short + 3 * short**2 / long + 2 * outputs + of_inputs * long)


def cost(shape: torch.Size, rows: float, of_inputs: bool = False) -> float:
    """How much longer the spectral step of a matrix `[*k o i]` takes than its three products with so many rows.

    >>> round(cost(torch.Size([64, 64]), 768.0), 2), round(cost(torch.Size([400, 784]), 250.0), 2)
    (0.31, 5.08)
    """
    return products(shape, of_inputs) / (3.0 * rows * shape.numel())


class Turns:
    """Who moves in which step.

    Where matrices are wide and batches small, the polar factor is most of a step; where both are small, calls are. A
    layer that moves every third time, three times as far, takes a third of it, and its momentum misses no gradient.

    - From step 5 on, where the steps of all layers together take longer than their gradients, each layer moves every
      second or third time, if it costs twice or three times as much as its gradients; from step 10 on every sixth, if
      it costs fifteen times as much. With all of them moving in each of the first 50 steps a perceptron of 784, 800,
      800 and 10 (batches of 128) spent 8 s on 74 steps, and ended at 0.52; so it ends at 0.16 after 220.
    - From step 150 on, as steps are shorter, all layers move every third time, those that cost three times as much as
      their gradients every sixth, where a step takes at least a fifth of the time of its gradients.
    - From step 1600 on who takes turns moves every sixth time.

    What takes long is counted in multiplications (`products`): with a metric of the inputs, too, layers take turns
    sooner than with one of the outputs alone.

    Turns are spread over the steps, those of one shape together: so all take about as long, and few layers move far at
    once (a transformer with turns of six, spread, 1.53 as without, together 1.60).

    Where calls are most of a step that would save nothing. There all layers move in each step before step 400, and in
    every third one from then on: ten residual blocks that all took the same turn from step 50 on ended at 0.051 after
    300 steps, at 0.033 so (spread 0.036).

    Args:
        longest: Every so many steps a layer moves at least; 1: in each.
    """

    def __init__(self, longest: int = LONGEST) -> None:
        if longest not in (1, 2, 3, 6):
            raise ValueError(f"turns must be 1, 2, 3 or 6, got {longest}")
        self._longest = longest
        self._known: tuple[list[Layer], Mapping[str, float], int, bool] | None = None
        self._turns: dict[Layer, tuple[int, int]] = {}

    def strides(
        self, step: int, layers: Sequence[Layer], rows: Mapping[str, float], of_inputs: bool = False
    ) -> dict[Layer, int]:
        """How many times as far as otherwise each layer moves in a step; 0: not at all.

        Args:
            step: Its number.
            layers: All that are stepped.
            rows: How many each layer has in a step, by name; of whom it is not known moves in each. Of all processes
                together: several with a part of the data each go the way of one with all of them.
            of_inputs: Whether the metric is that of the inputs, too.
        """
        if self._longest == 1 or step < FIRST:
            return dict.fromkeys(layers, 1)
        reached = max(first for first in (FIRST, EARLY, LATE, SHORT, LONG) if first <= step)
        if self._known != (list(layers), rows, reached, of_inputs):
            self._known = (list(layers), dict(rows), reached, of_inputs)
            self._turns = self._taken(layers, rows, reached, of_inputs)
        return {layer: every if step % every == turn else 0 for layer, (every, turn) in self._turns.items()}

    def _taken(
        self, layers: Sequence[Layer], rows: Mapping[str, float], step: int, of_inputs: bool
    ) -> dict[Layer, tuple[int, int]]:
        """Each layer's interval, and its turn in it: the dearest shape first, where the least is to be done."""
        work = {layer: products(layer.shape, of_inputs) for layer in layers}
        every = self._intervals(layers, rows, work, step, of_inputs)
        spread = sum(work.values()) > CALLS
        if not spread:
            most = _USUAL if step >= SHORT else 1
            every = {layer: min(most, own) for layer, own in every.items()}
        if step >= LONG:
            every = {layer: self._longest if own > 1 else 1 for layer, own in every.items()}
        # Layers of one shape are one product, so they move together.
        sums: dict[tuple[int, torch.Size], float] = {}
        for layer in layers:
            kind = every[layer], layer.shape
            sums[kind] = sums.get(kind, 0.0) + work[layer]
        load, turns = [0.0] * LONGEST, dict[tuple[int, torch.Size], int]()
        for kind in sorted(sums, key=lambda kind: -sums[kind]):
            interval = kind[0]
            turns[kind] = min(range(interval), key=lambda place: sum(load[place::interval])) if spread else 0
            for place in range(turns[kind], LONGEST, interval):
                load[place] += sums[kind]
        return {layer: (every[layer], turns[every[layer], layer.shape]) for layer in layers}

    def _intervals(
        self,
        layers: Sequence[Layer],
        rows: Mapping[str, float],
        work: Mapping[Layer, float],
        step: int,
        of_inputs: bool,
    ) -> dict[Layer, int]:
        """Every how many steps each layer moves."""
        holders = Counter(id(p) for layer in layers for p in layer.parameters.values())
        # What several layers hold is moved by all of them together; of whom no rows are known moves in each step.
        alone = [layer for layer in layers if all(holders[id(p)] == 1 for p in layer.parameters.values())]
        known = [layer for layer in alone if rows.get(layer.name, 0.0) > 0.0]
        ratios = {layer: cost(layer.shape, rows[layer.name], of_inputs) for layer in known}
        steps = sum(work[layer] for layer in ratios)
        gradients = sum(work[layer] / ratio for layer, ratio in ratios.items())
        every = dict.fromkeys(layers, 1)
        for layer, ratio in ratios.items():
            if step >= LATE and steps + CALLS > _PART * gradients:
                every[layer] = min(self._longest, LONGEST if ratio > _USUAL else _USUAL)
            elif steps > gradients:
                most = LONGEST if step >= EARLY and ratio > _DEAR else _USUAL
                every[layer] = max(1, min(self._longest, most, round(ratio)))
        return every
