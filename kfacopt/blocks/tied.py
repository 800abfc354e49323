"""One Kronecker product for a matrix that is used both as it is and transposed: an embedding that is the head, too."""

from __future__ import annotations

from torch import Tensor

from kfacopt.blocks.base import chunks_of_data, gradient_covariance, input_covariance, squared_columns
from kfacopt.blocks.sides import Diagonals
from kfacopt.blocks.squares import squared_one_hot, squared_sums
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import OneHot, Rows
from kfacopt.linalg import kronecker


class TransposedFactors:
    """The running Kronecker factors of the transposed use; with those of the other, the factors of both.

    Of uses with the curvature `G₁ ⊗ A₁` and `A₂ ⊗ G₂` (transposed, so that A₂ is on the left) the sum is no Kronecker
    product. The one that stands for it has the sum's partial traces (`kronecker.product_of_sum`): over either side the
    curvature of both uses is added up exactly. It is the sum itself where a side has one dimension, or the uses are
    proportional there. Cross terms between the uses are left out, as KFAC-expand does between places; EKFAC's corrected
    eigenvalues have them.

    Args:
        diagonals: Which factors of the matrix, as the other use has it, are diagonal.
        input_factor: Running average of A₂, `[o o]` or the diagonal `[o]`.
        gradient_factor: Running average of G₂, `[V V]` or the diagonal `[V]`.
    """

    def __init__(self, diagonals: Diagonals) -> None:
        self._diagonals = diagonals
        self.input_factor = RunningAverage()
        self.gradient_factor = RunningAverage()

    def averages(self) -> dict[str, RunningAverage]:
        return {"transposed_input_factor": self.input_factor, "transposed_gradient_factor": self.gradient_factor}

    def update(self, rows: Rows) -> None:
        """Add the rows of the transposed use, inputs `[n s o]` and gradients `[v n s V]`."""
        some = rows.for_factors()
        if rows.first:
            self.input_factor.add(*input_covariance(some.inputs, some.gradients.dtype, self._diagonals.gradient))
        total = squared_columns if self._diagonals.input else gradient_covariance
        self.gradient_factor.add(total(some.gradients), rows.new_terms)

    @property
    def estimated(self) -> bool:
        """Whether this use has been seen."""
        return self.input_factor.known and self.gradient_factor.known

    def joined_with(self, other: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The factors of both uses, `[o o]` or `[o]` and `[V V]` or `[V]`, where the other's are the first and `[V]`.

        None for a use that was never seen.
        """
        pairs = []
        if other is not None:
            pairs.append((other[0], other[1] if self._diagonals.input else other[1].diag()))
        own = self.input_factor.value, self.gradient_factor.value
        if own[0] is not None and own[1] is not None:
            pairs.append((own[0], own[1]))
        return kronecker.product_of_sum(pairs) if len(pairs) > 1 else pairs[0] if pairs else None


def squared_tied_coordinates(rows: Rows, left: Tensor | None, right: Tensor | None, budget: int) -> Tensor:
    """`squared_coordinates` of both uses' per-datum gradients together, `[o V]`: `Σ_vn (Q_Gᵀ (Σ g eᵀ + Σ a gᵀ) Q_A)²`.

    Where the uses count data differently (a head on `[(n t) o]`) which of them belong together is not known: then
    the sum of each use's own.

    Args:
        rows: Inputs one-hot and gradients `[v n s o]`; `transposed` ones with inputs `[n s o]`, gradients `[v n s V]`.
        left: Q_G, `[o k]`, or None for the identity.
        right: Q_A, `[V l]`, or None for the identity.
        budget: Elements that a temporary may have.
    """
    assert isinstance(rows.inputs, OneHot)
    assert rows.transposed is not None
    words, heads = rows.inputs, rows.transposed
    assert isinstance(heads.inputs, Tensor)
    if right is None:
        return _along_words(rows, words, heads, left, budget)
    inputs = _rotated(heads.inputs, left)
    total = inputs.new_zeros(inputs.shape[-1], right.shape[-1])
    together = rows.gradients.shape[1] == heads.gradients.shape[1]
    for looked_up, head in zip(rows.gradients, heads.gradients, strict=True):
        for part in chunks_of_data(max(len(looked_up), len(head)), total.numel() + words.size, budget):
            own = _of_words(_rotated(looked_up[part], left), words.indices[part], right)
            other = inputs[part].mT @ _rotated(head[part], right)
            for gradients in (own + other,) if together else (own, other):
                total += gradients.square().sum(0)
    return total


def _along_words(rows: Rows, words: OneHot, heads: Rows, left: Tensor | None, budget: int) -> Tensor:
    """The same along the words themselves: `other² + own² + 2 own · other`, of which own is zero at most words."""
    assert isinstance(heads.inputs, Tensor)
    looked_up, inputs = _rotated(rows.gradients, left), _rotated(heads.inputs, left)
    total = squared_one_hot(looked_up, words)
    by_word = total.mT
    together = rows.gradients.shape[1] == heads.gradients.shape[1]
    places = words.indices.shape[1] * (heads.gradients.shape[-2] + 2 * inputs.shape[-1])
    for own, head in zip(looked_up, heads.gradients, strict=True):
        by_word += squared_sums([head], inputs, budget)
        for part in chunks_of_data(len(head), places, budget) if together else ():
            index = words.indices[part]
            at_words = head[part].gather(-1, index.unsqueeze(1).expand(-1, head.shape[-2], -1))
            cross = own[part] * (at_words.mT @ inputs[part])
            by_word.index_add_(0, index.flatten(), cross.flatten(0, 1), alpha=2.0)
    return total.clamp_min_(0.0)  # a sum of squares, but for rounding


def _rotated(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis


def _of_words(gradients: Tensor, indices: Tensor, right: Tensor) -> Tensor:
    """`Σ_s g eᵀ Q_A` of each datum, `[n k l]`, from gradients `[n s k]` and the words' indices `[n s]`."""
    return gradients.mT @ right[indices]
