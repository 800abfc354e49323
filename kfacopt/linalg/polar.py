"""The polar factor of matrices, `U Vᵀ` of `U S Vᵀ`: exactly, and by Newton-Schulz iteration with the best polynomials.

An odd polynomial of a matrix acts on its singular values alone, and takes products only. A few quintic ones after each
other bring all singular values that are not too small near one, at a fraction of a decomposition's cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Quintic = tuple[float, float, float]
"""`a, b, c` of `a x + b x³ + c x⁵`."""

PolarFactor = Callable[[Tensor], Tensor]
"""`[*b m n]` to its polar factor, of the same shape and dtype; zero stays zero."""

# From this ratio of the sides on, powers of the Gram matrix take fewer flops than products with the matrix itself: an
# iteration takes 8 m³ against 4 m² n + 2 m³, less at the ends. It changes the speed, and the result by rounding.
_GRAM_RATIO = 2.0
# In bfloat16 rounding takes a singular value above the end of the interval, where the next polynomial is steep: of 120
# made matrices 6 x 9 the worst ended at 2,000 without a margin, and at 1.02 with one of 1, 2 or 5%.
_MARGIN = 1.02


@dataclass(frozen=True)
class NewtonSchulz:
    """The polar factor by iterations `X ← (a I + b X Xᵀ + c (X Xᵀ)²) X`, with the best coefficients for each.

    The matrix is first divided by `‖X Xᵀ‖_F^½`, which no singular value exceeds, and is nearer to the largest than the
    Frobenius norm is. The polynomials are those whose composition is nearest to one on `[smallest, 1]`
    (`minimax_quintics`; Amsel et al. 2025, arXiv:2505.16932). Singular values below `smallest` grow by the same factor
    each, and stay below one.

    Matrices at least twice as long on one side are treated in Gram form: with `B = X Xᵀ` of the short side each
    iteration is `P = a I + b B + c B²`, `Q ← P Q`, `B ← P B P`, and the long side is met twice, however many
    iterations. As B squares the condition that is for float32 and float64 only.

    Args:
        iterations: How many.
        smallest: Down to which part of the largest possible one singular values are brought to one. The defaults end
            within 1.3% of one. Singular values far below are lifted a third as much as by 5 iterations of Jordan et al.
            (2024), on purpose: on the deep autoencoder, whose momentum has a steep spectrum, lifting them more trained
            worse (77 against 100 at `iterations=5, smallest=1e-3`, and 520 at `6, 3e-4`).

    Raises:
        ValueError: If a number is out of range.

    >>> singular = torch.linalg.svdvals(NewtonSchulz()(torch.diag(torch.tensor([3.0, 1.0, 0.5]))))
    >>> bool(((singular - 1.0).abs() < 0.02).all())
    True
    """

    iterations: int = 4
    smallest: float = 1e-2

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if not 0.0 < self.smallest < 1.0:
            raise ValueError(f"smallest must lie between 0 and 1, got {self.smallest}: it is a part of the largest")

    def __call__(self, matrix: Tensor) -> Tensor:
        """The polar factor of `[*b m n]`, computed in the matrix's dtype; float16, whose range is short, in float32."""
        tall = matrix.shape[-2] > matrix.shape[-1]
        wide = matrix.mT if tall else matrix
        # Brought to size one first: the Gram matrix of a tiny or huge one would leave the range of its dtype.
        largest = wide.abs().amax((-2, -1), keepdim=True)  # vector_norm takes ten times as long for it
        wide = wide / largest.clamp_min_(torch.finfo(largest.dtype).tiny)
        if wide.shape[-2] == 1:
            row: Tensor = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(0.5)
            return row.mT if tall else row
        wide = wide.float() if wide.dtype == torch.float16 else wide
        polynomials = minimax_quintics(self.smallest, self.iterations)
        if wide.dtype == torch.bfloat16:
            *first, last = polynomials
            polynomials = (*((a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in first), last)
        result = _by_gram(wide, polynomials) if _is_long(wide) else _directly(wide, polynomials)
        return (result.mT if tall else result).to(matrix.dtype)

    def squares(self, matrix: Tensor) -> bool:
        """Whether matrices may be treated by their Gram matrices, which square their condition."""
        return matrix.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(matrix.device.type)

    def is_long(self, matrix: Tensor) -> bool:
        """Whether matrices have so many more rows than columns that they are treated by their Gram matrices anyway."""
        return self.squares(matrix) and matrix.shape[-1] > 1 and _is_long(matrix.mT)

    def inverse_root(self, gram: Tensor) -> Tensor:
        """`B^(-1/2)` of Gram matrices `B = X Xᵀ`, `[*b m m]`: what takes X to its polar factor.

        >>> NewtonSchulz().inverse_root(4.0 * torch.eye(2)).round(decimals=1)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
        """
        # Brought to size one first: its norm's squares would leave the range of its dtype.
        largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(torch.finfo(gram.dtype).tiny)
        scaled, divisor = _normalised(gram / largest)
        return _inverse_root(scaled, minimax_quintics(self.smallest, self.iterations)) / (divisor * largest.sqrt())


def exact_polar(matrix: Tensor) -> Tensor:
    """The polar factor of `[*b m n]` by singular value decomposition; directions without singular value stay out.

    >>> exact_polar(torch.tensor([[2.0, 0.0], [0.0, -3.0]])).round(decimals=4)
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    precise = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, values, right = torch.linalg.svd(precise, full_matrices=False)
    floor = torch.finfo(values.dtype).eps * max(matrix.shape[-2:]) * values[..., :1]
    factor: Tensor = (left * (values > floor).to(values.dtype).unsqueeze(-2)) @ right
    return factor.to(matrix.dtype)


@cache
def minimax_quintics(smallest: float, iterations: int) -> tuple[Quintic, ...]:
    """Odd quintics whose composition is as near to one on `[smallest, 1]` as any composition of so many can be.

    One after the other: the first is nearest to one on `[smallest, 1]`, and takes it to `[1 - e, 1 + e]`; the next is
    nearest to one on that interval, and so on. That this is best for the composition, too, is theorem 3.1 of Amsel et
    al. 2025 (arXiv:2505.16932).

    >>> first, *_ = minimax_quintics(1e-2, 4)
    >>> [round(c, 2) for c in first]
    [8.09, -23.62, 17.45]
    """
    found: list[Quintic] = []
    lower, upper = smallest, 1.0
    for _ in range(iterations):
        polynomial, error = _nearest_to_one(lower, upper)
        found.append(polynomial)
        lower, upper = 1.0 - error, 1.0 + error
    return tuple(found)


def _nearest_to_one(lower: float, upper: float) -> tuple[Quintic, float]:
    """The odd quintic nearest to one on an interval, and its error there, by Remez' exchange.

    Of the best one the error takes its largest size four times with alternating sign: at both ends, and at the two
    places in between where the polynomial is stationary.
    """
    if upper - lower < 1e-5:
        # Near one the best is Taylor's, which all of them tend to, and the exchange would only see rounding.
        return (15 / 8, -10 / 8, 3 / 8), 0.0
    first, second = lower + (upper - lower) / 3, lower + 2 * (upper - lower) / 3
    polynomial, error = (0.0, 0.0, 0.0), math.inf
    for _ in range(100):
        x = torch.tensor([lower, first, second, upper], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        polynomial = (a, b, c)
        # Where a + 3 b x² + 5 c x⁴ = 0.
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        new = sorted(math.sqrt(max((-3 * b + sign * root) / (10 * c), 0.0)) for sign in (-1, 1))
        moved, (first, second) = abs(new[0] - first) + abs(new[1] - second), new
        if moved < 1e-12:
            break
    return polynomial, abs(error)


def _is_long(wide: Tensor) -> bool:
    return wide.shape[-1] >= _GRAM_RATIO * wide.shape[-2] and wide.dtype in (torch.float32, torch.float64)


def _normalised(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A Gram matrix over its Frobenius norm, and the root of that: what X is to be divided by.

    The matrix was brought to size one: its norm is below that only if it is zero, of which the inverse root is to be
    finite.
    """
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp_min_(0.5)
    return gram / norm, norm.sqrt()


def _directly(wide: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    gram, divisor = _normalised(product(wide, wide.mT))
    wide = wide / divisor
    for step, (a, b, c) in enumerate(polynomials):
        gram = product(wide, wide.mT) if step else gram
        wide = _combined(wide, _combined(gram, gram, gram, b, c), wide, a, 1.0)
    return wide


def _by_gram(wide: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    gram, divisor = _normalised(product(wide, wide.mT))
    return product(_inverse_root(gram, polynomials) / divisor, wide)


def _inverse_root(gram: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    """`B^(-1/2)` of a Gram matrix with eigenvalues up to one, by the polynomials that take X to its polar factor."""
    if gram.shape[-1] == 1:
        return torch.ones_like(gram)  # of a row, whose Gram matrix is its own norm: no iteration is needed
    root: Tensor | None = None
    for step, (a, b, c) in enumerate(polynomials):
        polynomial = _combined(gram, gram, gram, b, c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        root = polynomial if root is None else product(polynomial, root)
        if step + 1 < len(polynomials):
            gram = product(product(polynomial, gram), polynomial)
    assert root is not None
    return root


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, in one call where both are a batch of matrices."""
    return torch.bmm(left, right) if left.ndim == 3 and right.ndim == 3 else left @ right


def _combined(added: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """`beta added + alpha left right` in one call."""
    if added.ndim == 2:
        return torch.addmm(added, left, right, beta=beta, alpha=alpha)
    if added.ndim == 3:
        return torch.baddbmm(added, left, right, beta=beta, alpha=alpha)
    return beta * added + alpha * (left @ right)
