"""EKFAC of a Fisher over a data set, as a linear operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

from torch import Tensor

from kfacopt.blocks.coordinates import cotangents_of, squared_gradients
from kfacopt.blocks.data_set import DataSetEigenBlock, refresh_together
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import FisherType
from kfacopt.operators.empirical_risk import Batches
from kfacopt.operators.kronecker.kept import KeptRows
from kfacopt.operators.kronecker.statistics import KroneckerLinearOperator


class EKFACLinearOperator(KroneckerLinearOperator):
    """EKFAC: KFAC's eigenbasis with the curvature's own second moments along it (George et al. 2018).

    The corrected eigenvalues are those of per-datum gradients, for weight sharing and masks too. They take a second
    sweep over the data, unless all rows fit into `byte_budget`. Arguments are those of `KroneckerLinearOperator`.

    >>> import torch
    >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    >>> data = [(torch.eye(3), torch.zeros(3, 2))]
    >>> ekfac = EKFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type="type-2")
    >>> round(float(ekfac.trace), 4)
    4.0
    """

    FISHER_TYPES = (FisherType.TYPE2, FisherType.MC, FisherType.EMPIRICAL)
    _all_places = True

    def _make_block(self) -> FactoredBlock:
        return DataSetEigenBlock(self._elements_at_once)

    def compute_eigenvalue_correction(self) -> None:
        """Compute eigenbases and corrected eigenvalues now, if they are not there yet."""
        self.compute()

    def _eigen_blocks(self) -> dict[Layer, DataSetEigenBlock]:
        """The blocks of layers with factors; a module's first block comes before those that share with it."""
        named = {layer: self.blocks[layer.name] for layer in self._layers}
        return {layer: block for layer, block in named.items() if isinstance(block, DataSetEigenBlock)}

    def _compute(self) -> None:
        kept = self._sweep_for_factors()
        if kept is None:
            self._finish()
            self._correct_by_sweep()
            return
        found, known = kept.layers(), set()
        blocks = {layer: block for layer, block in self._eigen_blocks().items() if layer in found}
        for layer, block in blocks.items():
            block.feed(kept.rows(layer))
        refresh_together(list(blocks.values()))
        for layer, block in blocks.items():
            coordinates = block.in_coordinates(kept.rows(layer))
            if coordinates is not None:
                kept.replace(layer, coordinates)
                known.add(layer)
        self._finish()
        for rows in kept.batches():
            self._correct(rows, known)
        for layer, parts in kept.gradients.items():
            for gradients, terms in parts:
                blocks[layer].correct_by_datum(gradients, terms)
        self._finish_corrections()

    def _sweep_for_factors(self, data: Batches | None = None, keep: bool = True) -> KeptRows | None:
        """Update the factors; or keep what the corrections need beside them, if it fits into the budget."""
        blocks = self._eigen_blocks()
        kept = KeptRows() if keep else None
        for chunk in self._new_rows(data):
            if kept is not None and chunk.first:
                kept.begin_batch()
            for layer, rows in chunk.rows.items():
                if kept is None or layer not in blocks:
                    self.blocks[layer.name].update(rows)
                else:
                    kept.take(layer, blocks[layer], rows)
            if kept is not None and kept.size > self._byte_budget:
                for layer in kept.layers():
                    for rows in kept.rows(layer):
                        blocks[layer].update(rows)
                kept = None
        return kept

    def _correct_by_sweep(self) -> None:
        """Eigenbases of the factors as they are, and the corrected eigenvalues by another sweep over all data."""
        refresh_together(list(self._eigen_blocks().values()))
        self._restart_sampling()
        for _, chunk in self._rows("eigenvalue correction"):
            self._correct({layer: [rows] for layer, rows in chunk.rows.items()}, ())
        self._finish_corrections()

    def _correct(self, batch: Mapping[Layer, Sequence[Rows]], known: Collection[Layer]) -> None:
        """Add a batch's rows, in chunks, to the corrected eigenvalues; `known` have coordinates for inputs already."""
        squared: dict[object, Tensor] = {}
        for layer, block in self._eigen_blocks().items():
            if layer not in batch:
                continue
            chunks, (left, right) = batch[layer], block.basis()
            on_inputs = None if layer in known else right
            if chunks[0].gradients.shape[-2] > 1 or isinstance(chunks[0].inputs, OneHot):
                block.correct(chunks, left, on_inputs)
                continue
            # Weight and bias of a module have the same gradients: rotate and square them once.
            if layer.outputs not in squared:
                squared[layer.outputs] = squared_gradients(cotangents_of(chunks), left)
            block.correct_by_squares(squared[layer.outputs], chunks, on_inputs)

    def _finish_corrections(self) -> None:
        for block in self._eigen_blocks().values():
            block.corrected.accumulate()
            if block.corrected.value is None:  # no row reached the layer
                block.refresh(0.0)
                left, right = block.factor_eigenvalues()
                block.corrected.value = left.new_zeros(*left.shape, right.shape[-1])

    def _more(self, data: Batches) -> None:
        for block in self._eigen_blocks().values():
            block.drop_corrections()
        self._sweep_for_factors(data, keep=False)
        self._finish()
        self._correct_by_sweep()

    def _merge(self, other: KroneckerLinearOperator) -> None:
        """In one basis (of a common state, say) all averages add up; else the new basis takes a sweep over all data."""
        theirs = cast(EKFACLinearOperator, other)._eigen_blocks().values()
        pairs = list(zip(self._eigen_blocks().values(), theirs, strict=True))
        aligned = all(mine.same_basis(others) for mine, others in pairs)
        for mine, others in pairs:
            mine.factors()
            others.factors()
            if not aligned:
                mine.drop_corrections()
        rest = {block for block, _ in pairs}
        for name, block in self.blocks.items():
            if aligned or block not in rest:
                block.merge(other.blocks[name])
        if not aligned:
            for mine, others in pairs:
                mine.merge_factors(others)
            self._correct_by_sweep()
