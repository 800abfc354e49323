"""The curvature of a step's loss, on top of a linearization: GGN, a sampled or the empirical Fisher, or the Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.likelihoods import FisherType
from kfacopt.likelihoods.fisher import Curvature
from kfacopt.linearization import BatchLinearization, Piece, Tensors


class Metric:
    """Products with the curvature of the mean loss, undamped.

    Args:
        linearization: Of the step's forwards.
        curvature: Which.

    Raises:
        ValueError: If the empirical Fisher is asked of terms whose gradient cannot be known.
    """

    def __init__(self, linearization: BatchLinearization, curvature: Curvature) -> None:
        self.linearization, self.curvature = linearization, curvature
        self._columns = [None if self._exact else self._scaled_columns(p) for p in linearization.pieces]

    @property
    def _exact(self) -> bool:
        return self.curvature in (Curvature.GGN, Curvature.HESSIAN)

    def columns(self, index: int) -> Tensor:
        """Vectors `[k m c]` of one piece: the curvature is the sum over pieces of `Jᵀ (Σ_k v_k v_kᵀ) J`, row by row."""
        found = self._columns[index]
        if found is None:
            found = self._columns[index] = self._scaled_columns(self.linearization.pieces[index])
        return found

    def multiply(self, vectors: Tensors) -> list[Tensor]:
        """Curvature times `vectors`, shaped as the parameters."""
        lin = self.linearization
        if self.curvature is Curvature.HESSIAN:
            rows, bent = lin.both(vectors)
            product = self.pulled_back(rows)
            torch._foreach_add_(product, bent)
            return product
        return self.pulled_back(lin.jacobian(vectors))

    def inner(self, left: Tensors, right: Tensors) -> float:
        """`v'ᵀ C v` from `J v'` and `J v`, rows `[m c]` of each piece."""
        products = [
            (a * self._on_rows(i, b)).sum(dtype=torch.float64) for i, (a, b) in enumerate(zip(left, right, strict=True))
        ]
        return float(torch.stack(products).sum())

    def pulled_back(self, rows: Tensors) -> list[Tensor]:
        """`Jᵀ S Sᵀ w` for rows `w` `[m c]` of each piece, shaped as the parameters."""
        return self.linearization.transposed([self._on_rows(i, w) for i, w in enumerate(rows)])

    def _on_rows(self, index: int, rows: Tensor) -> Tensor:
        piece = self.linearization.pieces[index]
        if self._exact:
            return piece.share * piece.likelihood.hessian_product(piece.terms, rows)
        columns = self.columns(index)
        return torch.einsum("kmc,km->mc", columns, torch.einsum("kmc,mc->km", columns, rows))

    def _scaled_columns(self, piece: Piece) -> Tensor:
        estimator, kind = self.linearization.estimator, self.curvature.fisher_type
        if kind is FisherType.TYPE2:
            columns = piece.likelihood.hessian_sqrt(piece.terms)
        elif kind is FisherType.MC:
            columns = estimator.sampled(piece.likelihood, piece.terms)
        else:
            if piece.terms.gradient is None:
                raise ValueError(
                    f"curvature='empirical': the gradients of the loss terms of {piece.likelihood!r} cannot be read "
                    f"from the gradient of the whole loss; use 'ggn' or 'mc'"
                )
            columns = piece.terms.gradient[None]
        scaled: Tensor = columns * piece.share**0.5
        return scaled
