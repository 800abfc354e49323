"""Which layers' rows arrived since the last step, how many a step has, and how large their inputs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.optim.step.inputs import large_inputs
from kfacopt.sharding import Processes

# Inputs change as the layers below train; those of raw data do not.
_DECAY = 0.8


class Reached:
    """Counts by layer name.

    Attributes:
        batches: That were delivered since the last step.
        rows: Of them.
        waiting: Whether something may have been, be it in a state.
        most: Rows in all processes together, of the step that had most so far.
        measures: Whether rows come with the mean squares of their inputs.
        squares: Running averages of the mean square of each input, `[*k i]`, of all processes, where rows have them.
        large: `large_inputs` of them, and
        sizes: the mean square of all inputs of a layer.
    """

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.most: dict[str, float] = {}
        self.squares: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self.large: dict[str, Tensor] = {}
        self.sizes: dict[str, float] = {}
        self.waiting, self.measures, self._changed = True, False, False

    def add(self, layer: Layer, rows: Rows) -> None:
        """Count what was delivered."""
        self.waiting = True
        self.batches[layer.name] += rows.first
        self.rows[layer.name] += rows.new_rows
        if rows.squares is not None:
            total = rows.new_rows * rows.squares
            self._sums[layer.name] = self._sums[layer.name] + total if layer.name in self._sums else total

    def batches_of(self, layers: Iterable[Layer]) -> dict[Layer, int]:
        """How many batches were delivered of those layers of which any were."""
        return {layer: self.batches[layer.name] for layer in layers if layer.name in self.batches}

    def settle(self, totals: Mapping[str, float], layers: Sequence[Layer], processes: Processes) -> None:
        """Take in how many rows a step had in all processes, by name, and what their inputs were."""
        self.most |= {name: max(total, self.most.get(name, 0.0)) for name, total in totals.items()}
        for name, total in self._everywhere(totals, layers, processes).items():
            batch, known = total / totals[name], self.squares.get(name)
            if known is None or known.shape != batch.shape:
                known = batch = torch.where(batch.isfinite(), batch, 1.0)
            # One batch that is not finite, whose step is skipped, would be remembered for ever.
            moved = torch.lerp(batch, known.to(batch), _DECAY)
            self.squares[name] = torch.where(moved.isfinite(), moved, known.to(batch))
            self._changed = True
        if self._changed:
            (self.large, self.sizes), self._changed = large_inputs(layers, self.squares), False

    def _everywhere(
        self, totals: Mapping[str, float], layers: Sequence[Layer], processes: Processes
    ) -> dict[str, Tensor]:
        """The sums of squares of all processes together, of the layers that had any."""
        if processes.size == 1:
            return self._sums
        reached = [la for la in layers if la.name in totals and la.handler.structure == "outer"]
        if not reached or not self.measures:
            return {}
        told = processes.sum_vector([float(la.name in self._sums) for la in reached])
        known = [layer for layer, number in zip(reached, told, strict=True) if number]
        shapes = [(*layer.shape[:-2], layer.shape[-1]) for layer in known]
        held = [self._sums.get(layer.name) for layer in known]
        own = [
            torch.zeros(shape, dtype=torch.float64, device=processes.device) if total is None else total.double()
            for shape, total in zip(shapes, held, strict=True)
        ]
        return dict(zip((layer.name for layer in known), processes.sum(own), strict=True))

    def told(self) -> dict[str, Any]:
        """What a `Step` is told of it, by that name."""
        return {"rows": self.most, "large": self.large, "input_sizes": self.sizes}

    def clear(self) -> None:
        """Forget what was delivered since the last step."""
        self.waiting = False
        self.batches.clear()
        self.rows.clear()
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python."""
        pending = {"pending_reached": dict(self.batches), "pending_rows": dict(self.rows)}
        squares = {"pending_squares": dict(self._sums), "input_squares": dict(self.squares)}
        return pending | squares | {"most_rows": dict(self.most)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | None = None) -> None:
        """Take over a state; of one from before rows were counted none is known."""
        self.waiting = self._changed = True
        self.batches = Counter(state.get("pending_reached", {}))
        self.rows, self.most = Counter(state.get("pending_rows", {})), dict(state.get("most_rows", {}))
        self._sums, self.squares = (
            {name: squares.to(device, copy=True) for name, squares in state.get(key, {}).items()}
            for key in ("pending_squares", "input_squares")
        )
