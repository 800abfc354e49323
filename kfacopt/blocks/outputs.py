"""The curvature of a layer's outputs, its inputs taken for white: the Kronecker factor G alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kfacopt.blocks.base import Block, Renewal, gradient_covariance
from kfacopt.blocks.sides import WIDEST, Diagonals
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.layers.base import Rows
from kfacopt.linalg import kronecker
from kfacopt.linalg.moved import inverse_error
from kfacopt.linalg.polar import NewtonSchulz, PolarFactor, product
from kfacopt.linalg.symmetric import LinAlgError
from kfacopt.linalg.tensors import held_as_rows


class OutputBlock(Block):
    """`G ⊗ I`: K-FAC's block with the identity for A, one of the two sides of Shampoo's.

    It is the curvature with respect to a layer's outputs (pre-activations) if the inputs are white and of size one.
    Beside K-FAC's it has no decomposition of A, whose side is the longer one in convolutions and after wide layers, and
    what A's small eigenvalues hold, inputs that hardly ever vary, is not amplified.

    The damped power `(G + damping I)^exponent` is that of the last `refresh`.

    Args:
        shape: Of the layer's matrix, `[*k o i]`.
        exponent: Power of the damped factor to divide by.
        widest: Outputs up to which G is `[*k o o]`; of more it is the diagonal `[*k o]`.
        gradient_factor: Running average of G.
    """

    title = "K-FAC's G"

    def __init__(self, shape: Sequence[int], exponent: float = 1.0, widest: int = WIDEST) -> None:
        super().__init__(Diagonals(gradient=shape[-2] > widest))
        self._inputs, self._exponent, self._wide = shape[-1], exponent, self.diagonals.gradient
        self.symmetric = frozenset() if self._wide else frozenset({"gradient_factor"})
        self.symmetric_cache = frozenset() if self._wide else frozenset({"inverse_gradient_factor"})
        self.gradient_factor = RunningAverage()
        self._inverse: Tensor | None = None
        self._root: Tensor | None = None

    def averages(self) -> dict[str, RunningAverage]:
        return {"gradient_factor": self.gradient_factor}

    def factor(self) -> Tensor:
        """G `[*k o o]`, or its diagonal `[*k o]` of a wide layer."""
        factor = self.gradient_factor.value
        if factor is None:
            raise RuntimeError("this block has no statistics yet: update() and fold() come first")
        return factor

    def update(self, rows: Rows) -> None:
        gradients = rows.for_factors().gradients
        total = gradients.square().sum((0, -3, -2)) if self._wide else gradient_covariance(gradients)
        self.gradient_factor.add(total, rows.new_terms)

    def snapshot(self) -> dict[str, Tensor]:
        return {"gradient_factor": self.factor()}

    def decomposed(self, snapshot: Mapping[str, Tensor], damping: float) -> Renewal:
        factor = snapshot["gradient_factor"]
        if self._wide:
            return Renewal({"inverse_gradient_factor": (factor + damping).pow(-self._exponent)}, 0)
        try:
            found = kronecker.inverse(factor, damping, self._exponent)
        except LinAlgError:
            return Renewal(None, 1)
        return Renewal({"inverse_gradient_factor": found.value}, found.retries)

    def unmoved(self, snapshot: Mapping[str, Tensor], damping: float, tolerance: float) -> Renewal | None:
        if self._wide:
            return None  # nothing to spare
        error = inverse_error(snapshot["gradient_factor"], damping, self._cached(), self._exponent)
        return Renewal(None, 0) if error is not None and bool(error <= tolerance) else None

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        return _times(self._cached(), matrix)

    def whiten(self, matrix: Tensor, damping: float) -> Tensor:
        root = self._cached_root()
        return _times(root if self._wide else root.mT, matrix)

    def unwhiten(self, matrix: Tensor, damping: float) -> Tensor:
        return _times(self._cached_root(), matrix)

    @staticmethod
    def steepest(blocks: Sequence[Block], matrices: Tensor, dampings: Sequence[float], polar: PolarFactor) -> Tensor:
        held = [block for block in blocks if isinstance(block, OutputBlock)]
        wide = held[0]._wide  # matrices of one shape: so are all
        if matrices.shape[1:-1].numel() == 1 and not wide:  # the root is a positive number: polar does not see it
            return _together(held, "_inverse").sqrt() * polar(matrices)
        inverse_root = None
        if isinstance(polar, NewtonSchulz) and not wide and polar.squares(matrices):
            inverse_root = polar.inverse_root
        if inverse_root is not None and matrices.shape[-2] > matrices.shape[-1]:
            # S polar(Sᵀ M) = S Sᵀ M (Mᵀ S Sᵀ M)^(-1/2): the root is not met at all.
            solved = product(_together(held, "_inverse"), matrices)
            return product(solved, inverse_root(product(matrices.mT, solved)))
        for block in held:
            block._cached_root()
        roots = _together(held, "_root")
        whitened = _times(roots if wide else roots.mT, matrices)
        if inverse_root is not None:
            root = inverse_root(product(whitened, whitened.mT))
            return product(product(product(roots, root), roots.mT), matrices)
        return _times(roots, polar(whitened))

    def matvec(self, matrix: Tensor) -> Tensor:
        return _times(self.factor(), matrix)

    def eigenvalues(self) -> Tensor:
        factor = self.factor()
        values = factor.clamp_min(0.0) if self._wide else kronecker.spectrum(factor)[0]
        return values.unsqueeze(-1).expand(*values.shape, self._inputs)

    def trace(self) -> Tensor:
        return self._inputs * self._diagonal().sum()

    def mean_eigenvalue(self) -> Tensor:
        return self._diagonal().mean()

    def condition(self, damping: float) -> Tensor:
        if self._inverse is None:
            return super().condition(damping)
        # As `KroneckerBlock` does, from norms of the damped factor and of its cached inverse.
        factor, inverse = self.factor(), self._inverse
        if self._wide:
            return (factor.amax() + damping) * inverse.amax().pow(1.0 / self._exponent)
        rows, reciprocals = (m.abs().sum(-1).amax() for m in (factor, inverse))
        return (rows + damping) * reciprocals.pow(1.0 / self._exponent)

    @property
    def ready(self) -> bool:
        return self._inverse is not None

    def cache(self) -> dict[str, Tensor | None]:
        return {"inverse_gradient_factor": self._inverse}

    def load_cache(self, cache: dict[str, Tensor | None]) -> None:
        self._inverse, self._root = cache["inverse_gradient_factor"], None

    def _diagonal(self) -> Tensor:
        factor = self.factor()
        return factor if self._wide else factor.diagonal(dim1=-2, dim2=-1)

    def _cached(self) -> Tensor:
        if self._inverse is None:
            raise RuntimeError("this block has no inverse yet: refresh() comes before solve()")
        return self._inverse

    def _cached_root(self) -> Tensor:
        """S with `S Sᵀ` the cached inverse; made when first asked for."""
        if self._root is None:
            inverse = self._cached()
            self._root = inverse.sqrt() if self._wide else kronecker.root(inverse)
        return self._root


def _together(blocks: Sequence[OutputBlock], name: str) -> Tensor:
    """A tensor of each block as one `[b ..]`; the blocks hold views of it then, so that it is made once a refresh."""
    whole, views = held_as_rows([getattr(block, name) for block in blocks])
    for block, view in zip(blocks, views, strict=True):
        setattr(block, name, view)
    return whole


def _times(factor: Tensor, matrix: Tensor) -> Tensor:
    """`factor @ matrix`, of a dense factor `[*k o o]` or of a diagonal `[*k o]`."""
    return product(factor, matrix) if factor.ndim == matrix.ndim else factor.unsqueeze(-1) * matrix
