"""What EKFAC keeps of its first sweep over the data, so that the corrected eigenvalues need no second one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from kfacopt.blocks.data_set import DataSetEigenBlock
from kfacopt.blocks.squares import per_datum
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer


class DatumGradients(NamedTuple):
    """Per-datum gradients `[*k n o i]` of one cotangent, and the loss terms that no earlier ones have counted."""

    gradients: Tensor
    terms: Tensor | float


class KeptRows:
    """Rows by layer, batch and chunk; where a datum has more places than inputs, its gradient, which is smaller.

    Rows of the latter kind update their block's factors at once, the others with `feed`.

    Attributes:
        size: In bytes.
        gradients: By layer.
    """

    def __init__(self) -> None:
        self.size = 0
        self.gradients: dict[Layer, list[DatumGradients]] = {}
        self._batches: list[dict[Layer, list[Rows]]] = []
        self._counted: set[int] = set()

    def begin_batch(self) -> None:
        """The rows from now on are of another batch."""
        self._batches.append({})

    def take(self, layer: Layer, block: DataSetEigenBlock, rows: Rows) -> None:
        """Keep a chunk's rows of a layer."""
        inputs = rows.inputs
        if not isinstance(inputs, Tensor) or rows.gradients.shape[-2] <= inputs.shape[-1]:
            self._batches[-1].setdefault(layer, []).append(rows)
            self.size += self._new_bytes(rows)
            return
        block.update(rows)
        for number, one in enumerate(rows.gradients):
            found = per_datum(one, inputs)
            self.gradients.setdefault(layer, []).append(DatumGradients(found, rows.new_terms if number == 0 else 0.0))
            self.size += found.numel() * found.element_size()

    def layers(self) -> set[Layer]:
        """Those of which anything is kept."""
        return set(self.gradients).union(*self._batches)

    def rows(self, layer: Layer) -> list[Rows]:
        """All rows of a layer."""
        return [rows for batch in self._batches for rows in batch.get(layer, ())]

    def replace(self, layer: Layer, rows: Sequence[Rows]) -> None:
        """Put others in the place of what `rows` returned, in their order."""
        remaining = iter(rows)
        for batch in self._batches:
            if layer in batch:
                batch[layer] = [next(remaining) for _ in batch[layer]]

    def batches(self) -> Iterator[dict[Layer, list[Rows]]]:
        """The rows of each batch, in chunks."""
        return iter(self._batches)

    def _new_bytes(self, rows: Rows) -> int:
        """What keeping rows takes beside those kept before: weight and bias of a module have their gradients in common.

        As those kept stay where they are, no other tensor gets the same address.
        """
        size, gradients = 0, rows.gradients
        if gradients.data_ptr() not in self._counted:
            self._counted.add(gradients.data_ptr())
            size += gradients.numel()
        if rows.first and isinstance(rows.inputs, Tensor):
            size += rows.inputs.numel()
        return size * gradients.element_size()
