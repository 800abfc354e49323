"""Dense matrices as operators, ours and curvlinops'."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from kfacopt.linalg.operator import Shapes
from kfacopt.operators import LinearOperator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what curvlinops imports is not ours to mend
    import curvlinops
    from curvlinops.examples import TensorLinearOperator

SHAPES = ((2, 3), (4,), ())  # eleven parameters


class Matrix(LinearOperator):
    """A dense matrix between lists of tensors; by default from one flat vector to another. It counts its products."""

    def __init__(self, matrix: Tensor, in_shape: Shapes | None = None, out_shape: Shapes | None = None) -> None:
        super().__init__(in_shape or [(matrix.shape[1],)], out_shape or [(matrix.shape[0],)])
        assert self.shape == tuple(matrix.shape)
        self.matrix, self.products = matrix, 0
        self.SELF_ADJOINT = self._in_shape == self._out_shape and bool(matrix.allclose(matrix.T))

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([m.reshape(n, m.shape[-1]) for m, n in zip(M, self._in_shape_flat, strict=True)])
        self.products += flat.shape[1]
        parts = (self.matrix @ flat).split(self._out_shape_flat)
        return [p.reshape(*s, flat.shape[1]) for p, s in zip(parts, self._out_shape, strict=True)]

    def _adjoint(self) -> Matrix:
        return Matrix(self.matrix.T, self._out_shape, self._in_shape)


def theirs(matrix: Tensor) -> Any:
    """The matrix as an operator of curvlinops."""
    return TensorLinearOperator(matrix)


def spd(size: int, condition: float = 100.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric positive definite with eigenvalues between 1 and `condition`."""
    return symmetric(torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64), seed).to(
        dtype
    )


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = basis * eigenvalues.double() @ basis.T
    return (matrix + matrix.T) / 2


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


__all__ = ["SHAPES", "Matrix", "curvlinops", "randn", "spd", "symmetric", "theirs"]
