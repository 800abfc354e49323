"""KFAC of a Fisher over a data set, as a linear operator."""

from __future__ import annotations

from kfacopt.blocks import KroneckerBlock
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.likelihoods import FisherType
from kfacopt.operators.empirical_risk import Batches
from kfacopt.operators.kronecker.statistics import KroneckerLinearOperator


class KFACLinearOperator(KroneckerLinearOperator):
    """KFAC: one Kronecker product `G ⊗ A` a layer (Martens & Grosse 2015; Eschenhagen et al. 2023 for weight sharing).

    Arguments are those of `KroneckerLinearOperator`.

    >>> import torch
    >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    >>> data = [(torch.eye(3), torch.zeros(3, 2))]
    >>> kfac = KFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type="type-2")
    >>> round(float(kfac.trace), 4)
    4.0
    """

    FISHER_TYPES = tuple(FisherType)

    def _make_block(self) -> FactoredBlock:
        return KroneckerBlock()

    def compute_kronecker_factors(self) -> None:
        """Compute the Kronecker factors now, if they are not there yet."""
        self.compute()

    def _compute(self) -> None:
        self._add(None)

    def _more(self, data: Batches) -> None:
        self._add(data)

    def _add(self, data: Batches | None) -> None:
        for chunk in self._new_rows(data):
            for layer, rows in chunk.rows.items():
                self.blocks[layer.name].update(rows)
        self._finish()

    def _merge(self, other: KroneckerLinearOperator) -> None:
        for name, block in self.blocks.items():
            block.merge(other.blocks[name])
