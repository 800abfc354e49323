"""What every block made of Kronecker factors has: their running averages."""

from __future__ import annotations

from torch import Tensor

from kfacopt.blocks.base import Block, gradient_covariance, input_covariance, squared_columns
from kfacopt.blocks.sides import Diagonals
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.blocks.tied import TransposedFactors
from kfacopt.layers.base import Rows
from kfacopt.linalg import kronecker


class FactoredBlock(Block):
    """A block whose statistics are the Kronecker factors A and G.

    Args:
        diagonals: Which of them are their diagonals, of sides too wide to be squared; that of one-hot inputs always is.
        input_factor: Running average of A, `[*k i i]` or the diagonal `[i]`.
        gradient_factor: Running average of G, `[*k o o]` or the diagonal `[o]`.
    """

    symmetric = frozenset(f"{use}{side}_factor" for use in ("", "transposed_") for side in ("input", "gradient"))
    of_inputs = frozenset({"input_factor", "transposed_input_factor"})

    def __init__(self, diagonals: Diagonals = Diagonals()) -> None:  # noqa: B008 - it is immutable
        super().__init__(diagonals)
        self.input_factor = RunningAverage()
        self.gradient_factor = RunningAverage()
        self.owner: FactoredBlock | None = None
        """The block of the same module whose gradient factor this one uses."""
        self.transposed: TransposedFactors | None = None
        """For a matrix that is used transposed, too: the factors of that use."""

    def averages(self) -> dict[str, RunningAverage]:
        own = {} if self.owner is not None else {"gradient_factor": self.gradient_factor}
        transposed = {} if self.transposed is None else self.transposed.averages()
        return {"input_factor": self.input_factor} | own | transposed

    def share_gradient_factor(self, owner: FactoredBlock) -> None:
        """Use the gradient factor of another block of the same module (its weight's, for a bias), which updates it."""
        self.gradient_factor, self.owner = owner.gradient_factor, owner

    @property
    def estimated(self) -> bool:
        own = self.gradient_factor.known and self.input_factor.known
        return own or (self.transposed is not None and self.transposed.estimated)

    def factors(self) -> tuple[Tensor, Tensor]:
        """G `[*k o o]` or `[o]`, and A `[*k i i]` or `[i]`."""
        left, right = self.gradient_factor.value, self.input_factor.value
        own = None if left is None or right is None else (left, right)
        found = own if self.transposed is None else self.transposed.joined_with(own)
        if found is None:
            raise RuntimeError("this block has no statistics yet: update() and fold() come first")
        return found

    def update(self, rows: Rows) -> None:
        if rows.first:
            inputs = rows.for_factors().held_inputs
            self.input_factor.add(*input_covariance(inputs, rows.gradients.dtype, self.diagonals.input))
        self.update_gradient_factor(rows)
        if self.transposed is not None and rows.transposed is not None:
            self.transposed.update(rows.transposed)

    def update_gradient_factor(self, rows: Rows) -> None:
        """`update` of G alone."""
        if self.owner is None:
            total = squared_columns if self.diagonals.gradient else gradient_covariance
            self.gradient_factor.add(total(rows.for_factors().gradients), rows.new_terms)

    def snapshot(self) -> dict[str, Tensor]:
        left, right = self.factors()
        return {"gradient_factor": left, "input_factor": right}

    def mean_eigenvalue(self) -> Tensor:
        return kronecker.mean_eigenvalue(*self.factors())
