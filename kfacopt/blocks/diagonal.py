"""A diagonal approximation, for layers that scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.blocks.base import Block, chunks_of_data
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import Rows


class DiagonalBlock(Block):
    """The exact diagonal of an elementwise layer's curvature, `E = (1/M) Σ_vn (Σ_s g · a)²` of shape `[c i]`.

    Normalisation layers scale by a weight (`a` is the normalised input) and shift by a bias (`a` is one): `i` is one
    column for each.

    Args:
        diagonal: Running average of E, `[c i]`.
    """

    title = "diagonal Fisher"

    def __init__(self) -> None:
        super().__init__()
        self.diagonal = RunningAverage()
        self._values: Tensor | None = None

    def averages(self) -> dict[str, RunningAverage]:
        return {"diagonal": self.diagonal}

    def update(self, rows: Rows) -> None:
        inputs = rows.inputs
        if not isinstance(inputs, Tensor):
            raise TypeError("a diagonal block takes elementwise rows [n s c i], got one-hot rows")
        total = inputs.new_zeros(inputs.shape[-2:])
        for part in chunks_of_data(inputs.shape[0], total.numel()):
            for cotangent in rows.gradients:
                per_datum = torch.einsum("nsc,nsci->nci", cotangent[part], inputs[part])
                total += per_datum.square_().sum(0)
        self.diagonal.add(total, rows.new_terms)

    def refresh(self, damping: float) -> None:
        if self.diagonal.value is None:
            raise RuntimeError("this block has no statistics yet: update() and fold() come first")
        self._values = self.diagonal.value.clone()

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        return matrix / (self.eigenvalues() + damping)

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        return matrix * (self.eigenvalues() + damping).rsqrt()

    unwhiten = whiten  # S is diagonal

    def matvec(self, matrix: Tensor) -> Tensor:
        return matrix * self.eigenvalues()

    def mean_eigenvalue(self) -> Tensor:
        if self.diagonal.value is None:
            raise RuntimeError("this block has no statistics yet: update() and fold() come first")
        return self.diagonal.value.mean()

    def eigenvalues(self) -> Tensor:
        if self._values is None:
            raise RuntimeError("this block has no cache yet: refresh() comes first")
        return self._values

    def cache(self) -> dict[str, Tensor | None]:
        return {"values": self._values}

    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        self._values = cache["values"]
