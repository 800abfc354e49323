"""Which layers' rows arrived since the last step, and how many a step has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer


class Reached:
    """Counts by layer name.

    Attributes:
        batches: That were delivered since the last step.
        rows: Of them.
        waiting: Whether something may have been, be it in a state.
        most: Rows in all processes together, of the step that had most so far.
    """

    def __init__(self) -> None:
        self.batches: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.most: dict[str, float] = {}
        self.waiting = True

    def add(self, layer: Layer, rows: Rows) -> None:
        """Count what was delivered."""
        self.waiting = True
        self.batches[layer.name] += rows.first
        self.rows[layer.name] += rows.new_rows

    def batches_of(self, layers: Iterable[Layer]) -> dict[Layer, int]:
        """How many batches were delivered of those layers of which any were."""
        return {layer: self.batches[layer.name] for layer in layers if layer.name in self.batches}

    def settle(self, totals: Mapping[str, float]) -> None:
        """Take in how many rows a step had in all processes."""
        self.most |= {name: max(total, self.most.get(name, 0.0)) for name, total in totals.items()}

    def clear(self) -> None:
        """Forget what was delivered since the last step."""
        self.waiting = False
        self.batches.clear()
        self.rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python."""
        return {"pending_reached": dict(self.batches), "pending_rows": dict(self.rows), "most_rows": dict(self.most)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; of one from before rows were counted none is known."""
        self.waiting = True
        self.batches = Counter(state.get("pending_reached", {}))
        self.rows, self.most = Counter(state.get("pending_rows", {})), dict(state.get("most_rows", {}))
