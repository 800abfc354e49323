"""The curvature of a step's loss, on top of a linearization: GGN, a sampled or the empirical Fisher, or the Hessian."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kfacopt.likelihoods import FisherType
from kfacopt.likelihoods.fisher import Curvature
from kfacopt.linalg.operator import LinearOperator, by_columns
from kfacopt.replay.linearization import BatchLinearization, Piece, Tensors


class Metric(LinearOperator):
    """The curvature of the mean loss on a step's own batches, undamped: a linear operator on the parameters.

    Inverses, traces and spectra of `kfacopt.operators` apply to it as to an operator over a data set. It is valid until
    the parameters change.

    Args:
        linearization: Of the step's forwards.
        curvature: Which.

    Raises:
        ValueError: If the empirical Fisher is asked of terms whose gradient cannot be known.
    """

    SELF_ADJOINT = True

    def __init__(self, linearization: BatchLinearization, curvature: Curvature) -> None:
        shapes = [p.shape for p in linearization.parameters]
        super().__init__(shapes, shapes)
        self.linearization, self.curvature = linearization, curvature
        self._roots = [None if self._exact else self._scaled_columns(p) for p in linearization.pieces]

    @property
    def device(self) -> torch.device:
        return self.linearization.parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        return functools.reduce(torch.promote_types, (p.dtype for p in self.linearization.parameters))

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        own = [m.to(p.dtype) for m, p in zip(M, self.linearization.parameters, strict=True)]
        return [x.to(m.dtype) for x, m in zip(by_columns(self.multiply, own), M, strict=True)]

    @property
    def _exact(self) -> bool:
        return self.curvature in (Curvature.GGN, Curvature.HESSIAN)

    def columns(self, index: int) -> Tensor:
        """Vectors `[k m c]` of one piece: the curvature is the sum over pieces of `Jᵀ (Σ_k v_k v_kᵀ) J`, row by row."""
        found = self._roots[index]
        if found is None:
            found = self._roots[index] = self._scaled_columns(self.linearization.pieces[index])
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
        return self.linearization.processes.mean([float(torch.stack(products).sum())])[0]

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
            # The user's gradient, brought to the scale of the parameters' own, carries no loss scale or accumulation.
            scores = piece.terms.scores if piece.told else piece.gradient / piece.share
            assert scores is not None
            columns = scores[None]
        scaled: Tensor = columns * piece.share**0.5
        return scaled
