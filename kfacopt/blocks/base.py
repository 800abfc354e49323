"""What approximates one layer's curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from kfacopt.blocks.sides import Diagonals
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.blocks.storage import Storage
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.unformed import UnformedRows
from kfacopt.linalg.gram import gram
from kfacopt.linalg.polar import PolarFactor
from kfacopt.linalg.tensors import ELEMENTS_IN_CACHE, rows_of

ELEMENTS_AT_ONCE = 2**24
"""How many elements a temporary may have where memory would grow with data times parameters.

64 MiB in float32: little beside a model's own memory, and enough for products to be long. Fewer: more and shorter
products; more: more memory. Results change by rounding only.
"""


class Renewal(NamedTuple):
    """What a decomposition of a block's statistics found; the block has not taken it over yet.

    Args:
        cache: What `Block.load_cache` takes; None: the cache stays, as the decomposition failed or was spared.
        retries: Attempts that failed.
        overlaps: Of blocks with statistics along an eigenbasis: what brings them into the new one, from the left and
            from the right.
    """

    cache: Mapping[str, Tensor | None] | None
    retries: int
    overlaps: tuple[Tensor | None, Tensor | None] = (None, None)


class Block(ABC):
    """One layer's curvature: a symmetric positive semi-definite operator on matrices `[*k o i]`.

    The way of a block: `update` with the rows of every micro-batch, `fold` once a step (running average) or once a data
    set (plain average), `refresh` when the cache is to follow the statistics, then `solve`. All quantities are of the
    mean loss per loss term; `damping` is added to the operator in the same units.
    """

    title: str
    """What `coverage()` calls it."""
    symmetric: frozenset[str] = frozenset()
    """Which of the averages are symmetric matrices, of which half is enough to send; diagonal ones have one axis."""
    symmetric_cache: frozenset[str] = frozenset()
    """Which tensors of `renewed` are symmetric, likewise: what is received is then their upper triangle, mirrored."""
    rows_need_cache: ClassVar[bool] = False
    """Whether `update` reads the cache: every process needs it then, for its own rows."""
    of_inputs: ClassVar[frozenset[str]] = frozenset()
    """Which of the averages are of inputs alone, so that the loss has no part in them."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Who whitens otherwise than the class above steps otherwise than it.
        if not {"whiten", "unwhiten"}.isdisjoint(vars(cls)) and "steepest" not in vars(cls):
            cls.steepest = staticmethod(Block.steepest)  # type: ignore[method-assign]

    def __init__(self, diagonals: Diagonals = Diagonals()) -> None:  # noqa: B008 - it is immutable
        self.diagonals = diagonals
        """Which Kronecker factors, of a block that has them, are their diagonals."""
        self.retries = 0
        """Decompositions that failed and were tried again, or left the cache as it was, since the beginning."""

    @abstractmethod
    def averages(self) -> dict[str, RunningAverage]:
        """The statistics by name, in the order in which they are stored."""

    def kept_as(self, storage: Storage | None) -> Self:
        """Keep the averages that are symmetric so, from now on; to be said of a block without statistics. Itself."""
        for name, average in self.averages().items():
            if name in self.symmetric:
                average.storage = storage
        return self

    @abstractmethod
    def update(self, rows: Rows) -> None:
        """Add one micro-batch's rows to what the next `fold` averages."""

    def refresh(self, damping: float) -> None:
        """Bring the cache up to date with the statistics. Statistics that were never folded are an error."""
        self.renew(self.decomposed(self.snapshot(), damping))

    def snapshot(self) -> dict[str, Tensor]:
        """The statistics that `decomposed` reads, not copied. Empty: such a block is refreshed in the step itself."""
        return {}

    def decomposed(self, snapshot: Mapping[str, Tensor], damping: float) -> Renewal:
        """All of a refresh that takes time; nothing is written, so that it may run on another thread.

        Args:
            snapshot: What `snapshot` returned, or copies of it.
            damping: As of `refresh`.
        """
        raise NotImplementedError(f"{type(self).__name__} decomposes nothing outside refresh()")

    def unmoved(self, snapshot: Mapping[str, Tensor], damping: float, tolerance: float) -> Renewal | None:
        """What a refresh without a decomposition finds, if what is cached is still true to `tolerance`; else None.

        Of a block that cannot tell, as here, it never is.

        Args:
            snapshot: What `snapshot` returned; there is a cache.
            damping: As of `refresh`.
            tolerance: The share by which a cached factor may be off: of its Frobenius norm along an eigenbasis, in the
                direction that is most in error of an inverse.
        """
        return None

    def refresh_if_moved(self, damping: float, tolerance: float) -> bool:
        """`refresh`, unless statistics have hardly moved (see `unmoved`). Returns whether it decomposed."""
        snapshot = self.snapshot()
        kept = self.unmoved(snapshot, damping, tolerance) if snapshot and self.ready else None
        if kept is None:
            self.refresh(damping)
            return True
        self.renew(kept)
        return False

    def renew(self, renewal: Renewal) -> None:
        """The rest of a refresh. The cache must be that of when `decomposed` ran; statistics may have gone on."""
        self.retries += renewal.retries
        if renewal.cache is not None:
            self.load_cache(dict(renewal.cache))

    @abstractmethod
    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """`(C + damping I)^-1 matrix` from the cache, `[*k o i]`."""

    @staticmethod
    def solve_together(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float]) -> Tensor:
        """`solve` of blocks of one class, with their matrices `[b *k o i]`."""
        held = zip(blocks, matrices, dampings, strict=True)
        return rows_of([block.solve(matrix, damping) for block, matrix, damping in held])

    @abstractmethod
    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        """`Sᵀ matrix` with any S such that `S Sᵀ` is what `solve` multiplies with, `[*k o i]`.

        A direction can then work where the curvature is the identity: `unwhiten(f(whiten(M)))`.
        """

    @abstractmethod
    def unwhiten(self, matrix: Tensor, damping: float) -> Tensor:
        """`S matrix` with the S of `whiten`, `[*k o i]`: `unwhiten(whiten(M)) = solve(M)`."""

    @staticmethod
    def steepest(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float], polar: PolarFactor) -> Tensor:
        """`S polar(Sᵀ M)` with the S of `whiten`, of blocks of one class and their matrices `[b *k o i]`."""
        damped = list(zip(blocks, dampings, strict=True))
        factors = polar(rows_of([b.whiten(m, d) for (b, d), m in zip(damped, matrices, strict=True)]))
        return rows_of([b.unwhiten(f, d) for (b, d), f in zip(damped, factors, strict=True)])

    @abstractmethod
    def matvec(self, matrix: Tensor) -> Tensor:
        """`C matrix`, undamped, `[*k o i]`."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """All eigenvalues of the operator, `[*k o i]`, unordered, at least zero."""

    @abstractmethod
    def cache(self) -> dict[str, Tensor | None]:
        """The tensors that `solve` reads and `refresh` writes."""

    @abstractmethod
    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        """Take over what `cache` returned."""

    def renewed(self) -> dict[str, Tensor | None]:
        """All tensors that `refresh` writes: the cache, and statistics that it brings to new coordinates."""
        return self.cache()

    def take_renewed(self, renewed: dict[str, Tensor | None]) -> None:
        """Take over what `renewed` returned in another process, which refreshed the same statistics."""
        self.load_cache(renewed)

    @property
    def ready(self) -> bool:
        """Whether there is a cache to solve with."""
        return any(value is not None for value in self.cache().values())

    @property
    def estimated(self) -> bool:
        """Whether any statistics have been folded, so that `refresh` has something to work on."""
        return all(average.known for average in self.averages().values())

    def pending_checksum(self) -> Tensor | None:
        """A number that is finite exactly if everything that waits to be folded is; None if nothing waits."""
        sums = [average.pending for average in self.averages().values() if average.pending is not None]
        return torch.stack([total.abs().sum().float() for total in sums]).sum() if sums else None

    def rescale(self, factor: float) -> None:
        """Multiply what waits to be folded and comes from cotangents: the loss turns out to have a factor."""
        for name, average in self.averages().items():
            if name not in self.of_inputs:
                average.rescale(factor)

    def fold(self, decay: float) -> None:
        """Average what `update` added into the running averages (`decay` 0: replace them)."""
        for average in self.averages().values():
            average.fold(decay)

    def accumulate(self) -> None:
        """Average what `update` added into the plain averages over all data."""
        for average in self.averages().values():
            average.accumulate()

    def merge(self, other: Block) -> None:
        """Average another block's statistics in: those of the same layer over other data.

        Both must have been accumulated, not folded.
        """
        for mine, others in zip(self.averages().values(), other.averages().values(), strict=True):
            mine.merge(others)

    def discard(self) -> None:
        """Forget what `update` added since the last fold."""
        for average in self.averages().values():
            average.discard()

    def trace(self) -> Tensor:
        """Trace of the operator, summed over groups."""
        return self.eigenvalues().sum()

    def mean_eigenvalue(self) -> Tensor:
        """Trace over dimension, of the statistics as they are (the cache may be older, or not be there yet)."""
        trace: Tensor = self.trace()
        return trace / self.eigenvalues().numel()

    def frobenius_norm(self) -> Tensor:
        """Frobenius norm of the operator as a matrix on the vectorised parameters."""
        return self.eigenvalues().square().sum().sqrt()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the determinant of `C + damping I`; minus infinity where it is singular."""
        return (self.eigenvalues() + damping).log().sum()

    def det(self, damping: float = 0.0) -> Tensor:
        """Determinant of `C + damping I`."""
        return self.logdet(damping).exp()

    def condition(self, damping: float) -> Tensor:
        """Largest over smallest eigenvalue of `C + damping I`."""
        values = self.eigenvalues() + damping
        return values.max() / values.min().clamp_min(torch.finfo(values.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """Statistics and cache, tensors and plain Python only."""
        averages = {name: average.state_dict() for name, average in self.averages().items()}
        return {"averages": averages, "cache": self.cache(), "retries": self.retries}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Take over a state; tensors keep their dtype and move to `device`."""
        for name, average in self.averages().items():
            average.load_state_dict(state["averages"][name], device)
        self.load_cache({name: None if v is None else v.to(device, copy=True) for name, v in state["cache"].items()})
        self.retries = int(state["retries"])


def flat_rows(rows: Tensor) -> Tensor:
    """All rows of each group as one matrix: `[*k n s d]` to `[*k (n s) d]`."""
    return rows.flatten(-3, -2)


def input_covariance(
    inputs: Tensor | OneHot | UnformedRows, dtype: torch.dtype, diagonal: bool = False
) -> tuple[Tensor, float]:
    """Sum of `a aᵀ` over the rows, `[*k i i]` or the diagonal `[i]`, and the number of rows.

    Kronecker factor A of Eschenhagen et al. 2023, equation 16 (expand) or 22 (reduce: there is one row per datum).
    Of one-hot rows it is diagonal by itself.
    """
    if isinstance(inputs, OneHot):
        return inputs.counts(dtype), float(inputs.indices.numel())
    if isinstance(inputs, UnformedRows):
        if not diagonal:
            return inputs.covariance(), float(inputs.shape[:2].numel())
        inputs = inputs.formed()
    flat = flat_rows(inputs)
    if diagonal:
        return squared_columns(flat), float(flat.shape[-2])
    return gram(flat), float(flat.shape[-2])


def squared_columns(rows: Tensor) -> Tensor:
    """Sum of the squares of each column over all rows, `[d]`, from `[.. d]`: the diagonal of `Σ r rᵀ`."""
    flat = rows.flatten(0, -2)
    total = flat.new_zeros(flat.shape[-1])
    for part in chunks_of_data(len(flat), len(total), at_once(flat.device)):
        total += flat[part].square().sum(0)
    return total


def gradient_covariance(gradients: Tensor) -> Tensor:
    """Sum of `g gᵀ` over cotangents and rows, `[*k o o]`, from `[v *k n s o]`; to be divided by the loss terms.

    Kronecker factor G; the same references as `input_covariance`.
    """
    if gradients.stride(-1) != 1 and gradients.shape[-2] >= gradients.shape[-1] > 1:
        # A convolution's rows, [n o s] in memory: a small product for each datum needs no copy of them.
        return (gradients.mT @ gradients).sum((0, -3))
    flat = gradients.movedim(0, -4).flatten(-4, -2) if gradients.shape[0] > 1 else flat_rows(gradients[0])
    return gram(flat)


def at_once(device: torch.device, budget: int = ELEMENTS_AT_ONCE) -> int:
    """How many elements of a temporary are fast on a device, and within the budget."""
    return min(budget, ELEMENTS_IN_CACHE) if device.type == "cpu" else budget


def chunks_of_data(data: int, elements_per_datum: int, budget: int = ELEMENTS_AT_ONCE) -> Iterator[slice]:
    """Slices of the data axis that keep a temporary of `elements_per_datum` per datum within `budget` elements."""
    size = max(1, budget // max(1, elements_per_datum))
    for start in range(0, data, size):
        yield slice(start, start + size)
