"""EKFAC of a data set: first the basis, of all data, then the corrected eigenvalues along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kfacopt.blocks.base import ELEMENTS_AT_ONCE, input_covariance
from kfacopt.blocks.coordinates import of_squares, squared_coordinates_of_chunks
from kfacopt.blocks.eigen import EigenBlock
from kfacopt.blocks.squares import squared_matrices
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import Rows
from kfacopt.linalg import kronecker
from kfacopt.linalg.alignment import missing
from kfacopt.linalg.gram import gram
from kfacopt.linalg.kronecker import Spectrum
from kfacopt.linalg.symmetric import Eigendecomposition
from kfacopt.linalg.thin_basis import orthonormal, thin_basis

_SMALLEST_CUT = 128


class DataSetEigenBlock(EigenBlock):
    """The Kronecker eigenbasis of a data set with the curvature's own second moments along it (George et al. 2018).

    The way: `update` with all rows, `accumulate`, `refresh`; then `correct` with all rows again, `accumulate`. Where
    all rows are at hand, `feed` does for the first two, and need not form an A of larger size than rank. Damping is
    added to the corrected eigenvalues, exactly.

    Args:
        budget: Elements that a temporary may have.
        corrected: Average of E, `[*k o r]`; r is the size of A, or its rank but for rounding, if that is less.
    """

    title = "EKFAC"

    def __init__(self, budget: int = ELEMENTS_AT_ONCE) -> None:
        super().__init__()
        self.corrected = RunningAverage()
        self._budget = budget
        self._few_inputs: Tensor | None = None
        self._few_coordinates: Tensor | None = None
        self._polished = False

    def averages(self) -> dict[str, RunningAverage]:
        return super().averages() | {"corrected": self.corrected}

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.input_factor.value is None and self._few_inputs is not None:
            self.input_factor.add(*input_covariance(self._few_inputs, self._few_inputs.dtype))
            self.input_factor.accumulate()
            self._few_inputs = None
        return super().factors()

    @property
    def estimated(self) -> bool:
        inputs = self.input_factor.value is not None or self._few_inputs is not None
        return inputs and self.gradient_factor.value is not None

    def same_basis(self, other: DataSetEigenBlock) -> bool:
        """Whether corrected eigenvalues of the two are along the same directions."""
        mine, others = self.cache(), other.cache()
        return all(_equal(mine[name], others[name]) for name in ("gradient_basis", "input_basis"))

    def merge_factors(self, other: DataSetEigenBlock) -> None:
        """Average the other's factors in, not its corrected eigenvalues."""
        for name, average in super().averages().items():
            average.merge(other.averages()[name])

    def feed(self, kept: Sequence[Rows]) -> None:
        """Take in all rows that `update` has not: into the factors, or, where they are few, keep them in place of A."""
        inputs = _few(kept) if self.input_factor.pending is None else None
        for rows in kept:
            if inputs is None:
                self.update(rows)
            else:
                self.update_gradient_factor(rows)
        self.accumulate()
        self._few_inputs = inputs

    def undecomposed(self) -> dict[str, Tensor]:
        """What a refresh decomposes: G, unless another block does, and A, or the few inputs' own product."""
        found: dict[str, Tensor] = {}
        if not isinstance(self.owner, EigenBlock):
            assert self.gradient_factor.value is not None
            found["gradient"] = self.gradient_factor.value
        few = self._few_inputs
        if few is None:
            found["input"] = self.factors()[1]
        else:
            found["input"] = gram(few.flatten(0, 1).mT).div_(float(len(few)))
        return found

    def take_spectra(self, spectra: Mapping[str, Spectrum]) -> None:
        """Take over the decompositions of what `undecomposed` returned; the owner of a shared factor comes first."""
        self.retries += sum(spectrum.retries for spectrum in spectra.values())
        if isinstance(self.owner, EigenBlock):
            left, values_left = self.owner.basis()[0], self.owner.factor_eigenvalues()[0]
        else:
            values_left, left, _ = spectra["gradient"]
        few = self._few_inputs
        if few is None:
            values_right, right, _ = spectra["input"]
            values_right, right = _without_rounding(values_right, right)
            self._change_basis(left, right, values_left, values_right)
            self._polished = True  # LAPACK's columns are orthonormal as they are
            return
        whole = spectra["input"]
        assert whole.vectors is not None
        basis = thin_basis(few.flatten(0, 1), float(len(few)), Eigendecomposition(whole.values, whole.vectors, 0))
        self._change_basis(left, basis.vectors, values_left, basis.values)
        self._few_coordinates, self._polished = basis.coordinates.unsqueeze(1), False

    def in_coordinates(self, kept: Sequence[Rows]) -> list[Rows] | None:
        """The rows of `feed`, their inputs replaced by coordinates, where the last refresh has found these by the way.

        They are given away: a second call finds none.
        """
        coordinates, self._few_coordinates = self._few_coordinates, None
        if coordinates is None:
            return None
        parts = iter(coordinates.split([_count(rows) for rows in kept if rows.first]))
        result, current = [], coordinates
        for rows in kept:
            current = next(parts) if rows.first else current
            result.append(rows.but(inputs=current))
        return result

    def refresh(self, damping: float) -> None:
        refresh_together([self])

    def correct(self, chunks: Sequence[Rows], left: Tensor | None, right: Tensor | None) -> None:
        """Add the rows' squared coordinates to the corrected eigenvalues.

        Args:
            chunks: Rows as in `update`, or coordinates, of one batch.
            left: Q_G; None if the gradients are coordinates.
            right: Q_A; None if the inputs are coordinates.
        """
        self.corrected.add(squared_coordinates_of_chunks(chunks, left, right, self._budget), _terms(chunks))

    def correct_by_squares(self, squares: Tensor, chunks: Sequence[Rows], right: Tensor | None) -> None:
        """As `correct`, for rows without weight sharing whose `squared_gradients` are there already, `[*k n 1 o]`."""
        self.corrected.add(of_squares(squares, chunks[0].inputs, right), _terms(chunks))

    def correct_by_datum(self, gradients: Tensor, terms: Tensor | float) -> None:
        """As `correct`, by per-datum gradients themselves, `[*k n o i]`, and the loss terms they count for."""
        self.corrected.add(squared_matrices(gradients, *self.basis(), self._budget), terms)

    def drop_corrections(self) -> None:
        """Forget basis and corrected eigenvalues: the factors have changed."""
        self.factors()
        self.corrected.reset()
        self.load_cache(dict.fromkeys(self.cache()))

    def _values(self) -> Tensor:
        if self.corrected.value is None:
            raise RuntimeError("this block has no corrected eigenvalues yet: correct() and accumulate() come first")
        return self.corrected.value

    def eigenvalues(self) -> Tensor:
        values, (_, right) = self._values(), self.basis()
        return values if right is None else functional.pad(values, (0, right.shape[-2] - right.shape[-1]))

    def matvec(self, matrix: Tensor) -> Tensor:
        left, right = self.basis()
        return kronecker.rotate_back(left, kronecker.rotate(left, matrix, right) * self._values(), right)

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        return self._power(matrix, damping, -1.0)

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        return self._power(matrix, damping, -0.5)

    unwhiten = whiten  # S is the symmetric root

    def _power(self, matrix: Tensor, damping: float, exponent: float) -> Tensor:
        """A power of `C + damping I` times `matrix`."""
        left, right = self.basis()
        coordinates, powers = kronecker.rotate(left, matrix, right), (self._values() + damping).pow(exponent)
        if right is None or right.shape[-1] == right.shape[-2]:
            return kronecker.rotate_back(left, coordinates * powers, right)
        # Outside the range of A there is only the damping, which takes orthonormal vectors inside.
        if not self._polished:
            self._right, self._polished = orthonormal(right), True
            return self._power(matrix, damping, exponent)
        outside = float(damping**exponent)
        return matrix * outside + kronecker.rotate_back(left, coordinates * (powers - outside), right)


def refresh_together(blocks: Sequence[DataSetEigenBlock]) -> None:
    """Refresh blocks, their decompositions side by side; the owner of a shared factor comes before those who share it.

    Raises:
        LinAlgError: If statistics are not finite.
    """
    wanted = [block.undecomposed() for block in blocks]
    found = iter(kronecker.spectra([matrix for matrices in wanted for matrix in matrices.values()]))
    for block, matrices in zip(blocks, wanted, strict=True):
        block.take_spectra({name: next(found) for name in matrices})


def _few(kept: Sequence[Rows]) -> Tensor | None:
    """All inputs, `[n 1 i]`, if there are fewer than their dimensions; None for other layouts."""
    inputs = [rows.inputs for rows in kept if rows.first]
    plain = [a for a in inputs if isinstance(a, Tensor) and a.ndim == 3 and a.shape[1] == 1]
    if not plain or len(plain) < len(inputs) or sum(a.shape[0] for a in plain) >= plain[0].shape[-1]:
        return None
    return torch.cat(plain)


def _without_rounding(values: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors but those that are rounding of the largest, as of pixels that are always black.

    Products along an eigenbasis are the shorter for it. Small matrices are left whole, where it would spare nothing.
    What is left out is below one rounding, not below as many as there are dimensions, as is usual for a rank: between
    the two is curvature, in all 3e-4 of the trace (inputs after a ReLU, float32), and the
    inverse at a damping of 1e-3 is off by 2e-2 without it, by 6e-4 with it.
    """
    if basis is None or basis.ndim > 2 or values.shape[-1] < _SMALLEST_CUT:
        return values, basis
    count = int((values > torch.finfo(values.dtype).eps * values[-1]).sum())
    count = max(1, count + missing(count))
    return (values, basis) if count >= len(values) else (values[-count:].clone(), basis[:, -count:].clone())


def _terms(chunks: Sequence[Rows]) -> Tensor | float:
    return next((rows.terms for rows in chunks if rows.first), 0.0)


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second)


def _count(rows: Rows) -> int:
    assert isinstance(rows.inputs, Tensor)
    return rows.inputs.shape[0]
