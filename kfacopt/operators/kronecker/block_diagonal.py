"""A block-diagonal operator: one block a layer, a diagonal for parameters outside layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfacopt.blocks import Block
from kfacopt.layers.layer import Layer, by_parameter
from kfacopt.operators.empirical_risk import CurvatureLinearOperator


class BlockDiagonalLinearOperator(CurvatureLinearOperator):
    """Products, trace, determinant and norm of the blocks that a subclass fills.

    Attributes:
        blocks: By the name of their layer.
    """

    SELF_ADJOINT = True
    blocks: Mapping[str, Block]
    _layers: Sequence[Layer]
    _position: Mapping[int, int]
    """Where a parameter (by id) is in `params`."""
    _loose: Sequence[int]
    """Positions of the parameters that are in no layer."""

    @abstractmethod
    def compute(self) -> None:
        """Fill the blocks, if they are not filled yet."""

    @property
    @abstractmethod
    def _scale(self) -> float:
        """What the blocks are to be multiplied by."""

    @property
    @abstractmethod
    def _diagonals(self) -> Sequence[Tensor]:
        """The diagonals of parameters outside layers, shaped as they are, in the order of `_loose`."""

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        self.compute()
        result = self.apply(M, lambda block, matrices: block.matvec(matrices), lambda diagonal, m: diagonal * m)
        return result if self._scale == 1.0 else [self._scale * r for r in result]

    def apply(
        self,
        M: list[Tensor],
        by_block: Callable[[Block, Tensor], Tensor],
        by_diagonal: Callable[[Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        """Apply a function of each block to its share of K columns.

        Args:
            M: Tensors `[*parameter, K]`.
            by_block: `(block, matrices [K *k o i])` to matrices of the same shape.
            by_diagonal: `(diagonal, columns)` of uncovered parameters, `[*parameter 1]` and `[*parameter K]`.

        Raises:
            ValueError: If the columns have another dtype than the operator.
        """
        odd = {m.dtype for m in M} - {self.dtype}
        if odd:
            raise ValueError(f"{type(self).__name__} is of {self.dtype}, but is applied to {odd.pop()}: convert one")
        result, pieces = list(M), dict[Layer, dict[str, Tensor]]()
        for layer in self._layers:
            given = {p: M[self._position[id(p)]] for p in layer.parameters.values()}
            shares = layer.share(given)
            columns = [layer.pack({r: m[..., k] for r, m in shares.items()}) for k in range(M[0].shape[-1])]
            matrices = columns[0].unsqueeze(0) if len(columns) == 1 else torch.stack(columns)
            wide = torch.promote_types(matrices.dtype, torch.float32)
            product = by_block(self.blocks[layer.name], matrices.to(wide)).to(matrices.dtype)
            unpacked = [layer.unpack(one) for one in product]
            pieces[layer] = {
                role: unpacked[0][role].unsqueeze(-1)
                if len(unpacked) == 1
                else torch.stack([one[role] for one in unpacked], dim=-1)
                for role in layer.roles
            }
        for p, whole in by_parameter(pieces).items():
            result[self._position[id(p)]] = whole
        for i, diagonal in zip(self._loose, self._diagonals, strict=True):
            result[i] = by_diagonal(diagonal.unsqueeze(-1), M[i])
        return result

    def _summed(self, of_block: Callable[[Block], Tensor], of_diagonal: Callable[[Tensor], Tensor]) -> Tensor:
        self.compute()
        parts = [of_block(block) for block in self.blocks.values()]
        parts += [of_diagonal(diagonal) for diagonal in self._diagonals]
        return torch.stack(parts).sum()

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues, `[rows]`, ascending, so that any spectral function is a sum over them.

        The logarithm of the determinant with a damping, say: `(operator.eigenvalues + damping).log().sum()`.
        """
        self.compute()
        parts = [block.eigenvalues().flatten() for block in self.blocks.values()]
        parts += [diagonal.flatten() for diagonal in self._diagonals]
        return self._scale * torch.cat(parts).sort().values

    @property
    def trace(self) -> Tensor:
        """Trace of the operator."""
        total = self._summed(lambda block: block.trace(), lambda diagonal: diagonal.sum())
        return self._scale * total

    @property
    def logdet(self) -> Tensor:
        """Logarithm of the determinant; minus infinity where the operator is singular."""
        logs = self._summed(lambda block: block.logdet(), lambda diagonal: diagonal.log().sum())
        return logs + self.shape[0] * torch.tensor(self._scale, dtype=logs.dtype).log()

    @property
    def det(self) -> Tensor:
        """Determinant."""
        return self.logdet.exp()

    @property
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm of the operator as a matrix."""
        squared = self._summed(lambda block: block.frobenius_norm().square(), lambda d: d.square().sum())
        return self._scale * squared.sqrt()
