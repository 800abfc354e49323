"""KFAC: one Kronecker product a layer, inverted factor by factor."""

from __future__ import annotations

from torch import Tensor

from kfacopt.blocks.base import Block, gradient_covariance, input_covariance
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import Rows
from kfacopt.linalg import kronecker
from kfacopt.linalg.symmetric import LinAlgError


class KroneckerBlock(Block):
    """`G ⊗ A` with the damped inverse `(G + √damping/π I)^-1 ⊗ (A + π √damping I)^-1`.

    Kronecker factors of Martens & Grosse 2015 (for weight sharing: Eschenhagen et al. 2023), inverted by Cholesky with
    the π-split of the damping (`kfacopt.linalg.kronecker.pi_split`). The damping of the last `refresh` counts.

    Args:
        input_factor: Running average of A, `[*k i i]` or the diagonal `[i]`.
        gradient_factor: Running average of G, `[*k o o]`.
    """

    title = "KFAC"

    def __init__(self) -> None:
        super().__init__()
        self.input_factor = RunningAverage()
        self.gradient_factor = RunningAverage()
        self._inverses: tuple[Tensor, Tensor] | None = None

    def averages(self) -> dict[str, RunningAverage]:
        return {"input_factor": self.input_factor, "gradient_factor": self.gradient_factor}

    def factors(self) -> tuple[Tensor, Tensor]:
        """G `[*k o o]` and A `[*k i i]` or `[i]`."""
        if self.gradient_factor.value is None or self.input_factor.value is None:
            raise RuntimeError("this block has no statistics yet: update() and fold() come first")
        return self.gradient_factor.value, self.input_factor.value

    def update(self, rows: Rows) -> None:
        if rows.first:
            self.input_factor.add(*input_covariance(rows.inputs, rows.gradients.dtype))
        self.gradient_factor.add(gradient_covariance(rows.gradients), rows.new_terms)

    def refresh(self, damping: float) -> None:
        left, right = self.factors()
        damping_left, damping_right = kronecker.pi_split(left, right, damping)
        try:
            inverse_left = kronecker.inverse(left, damping_left)
            inverse_right = kronecker.inverse(right, damping_right)
        except LinAlgError:
            self.retries += 1  # the cache, or its absence, stays; the next step tries again
            return
        self.retries += inverse_left.retries + inverse_right.retries
        self._inverses = inverse_left.value, inverse_right.value

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        if self._inverses is None:
            raise RuntimeError("this block has no inverse yet: refresh() comes before solve()")
        return kronecker.multiply(self._inverses[0], matrix, self._inverses[1])

    def mean_eigenvalue(self) -> Tensor:
        return kronecker.mean_eigenvalue(*self.factors())

    def matvec(self, matrix: Tensor) -> Tensor:
        left, right = self.factors()
        return kronecker.multiply(left, matrix, right)

    def eigenvalues(self) -> Tensor:
        left, right = self.factors()
        return kronecker.outer(kronecker.spectrum(left)[0], kronecker.spectrum(right)[0])

    def trace(self) -> Tensor:
        left, right = self.factors()
        return (kronecker.trace(left) * kronecker.trace(right)).sum()

    def frobenius_norm(self) -> Tensor:
        left, right = self.factors()
        return (kronecker.squared_norm(left) * kronecker.squared_norm(right)).sum().sqrt()

    def condition(self, damping: float) -> Tensor:
        # An estimate that costs no decomposition: the norms of the damped factors and of their cached inverses.
        if self._inverses is None:
            return super().condition(damping)
        (left, right), (inverse_left, inverse_right) = self.factors(), self._inverses
        dampings = kronecker.pi_split(left, right, damping)
        largest = [_row_norm(f) + d.max() for f, d in zip((left, right), dampings, strict=True)]
        return largest[0] * _row_norm(inverse_left) * largest[1] * _row_norm(inverse_right)

    def cache(self) -> dict[str, Tensor | None]:
        left, right = self._inverses if self._inverses is not None else (None, None)
        return {"inverse_gradient_factor": left, "inverse_input_factor": right}

    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        left, right = cache["inverse_gradient_factor"], cache["inverse_input_factor"]
        self._inverses = None if left is None or right is None else (left, right)


def _row_norm(factor: Tensor) -> Tensor:
    """Largest absolute row sum: a bound on the spectral norm."""
    return factor.abs().max() if factor.ndim == 1 else factor.abs().sum(-1).max()
