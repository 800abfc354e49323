"""The trust-region subproblem `min gᵀd + ½ dᵀHd, |d| ≤ radius` of an indefinite H, by its secular equation.

A step d is a global minimiser exactly if some λ ≥ 0 fulfils (Moré & Sorensen 1983, lemmas 2.1 and 2.3)

    (H + λI) d = -g,        H + λI positive semi-definite,        λ (radius - |d|) = 0.

The first and the last are the Lagrange conditions; the one in the middle, which decides between the many solutions of
these two, is what an indefinite H needs. In the eigenbasis of H, with eigenvalues `h_i` and `g_i` the parts of g,

    |d(λ)|² = Σ_i g_i² / (h_i + λ)²

falls from infinity (unless g has no part along the lowest eigenvector: the hard case) to zero as λ goes from `-min h`
to infinity, so that one λ has `|d(λ)| = radius`, or the step with λ = 0 is permitted and inside the region already.
Newton's method on |d| itself would suffer from the poles. But `φ(λ) = 1/|d(λ)| - 1/radius` is nearly a straight line
(with one eigenvalue it is one), increasing, and concave: a power mean, of order -2, of the affine functions `h_i + λ`.
A concave function lies below its tangents. Hence from any λ with a positive definite `H + λI` the tangent's zero is at
or below the root: from the left (|d| too long) Newton's method goes up to the root and never past it, and from the
right it takes one step to the left, perhaps so far that `H + λI` is no longer positive definite. Only that step needs a
safeguard. As `d/dλ |d|² = -2 dᵀ(H + λI)⁻¹d`, Newton's step is

    λ ← λ + (|d| / radius - 1) · |d|² / dᵀ(H + λI)⁻¹d

which takes one more solve with the factorisation at hand.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kfacopt.linalg.symmetric import LinAlgError


class Shifted(Protocol):
    """A symmetric H that can be factored with a shift: `kfacopt.operators.ChainHessian`, or a dense matrix."""

    def positive_definite(self, damping: float) -> bool:
        """Whether `H + damping I` is, by its inertia."""

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """`(H + damping I)⁻¹ v` for `[p]` or `[p m]`."""


class TrustRegionStep(NamedTuple):
    """A step d; the shift λ with `(H + λI) d ≈ -g`; factorisations made; whether the hard case was met."""

    step: Tensor
    shift: float
    factorizations: int
    hard_case: bool


def trust_region_step(
    system: Shifted,
    gradient: Tensor,
    radius: float,
    *,
    shift: float,
    smallest_shift: float = 1e-7,
    tolerance: float = 0.1,
    max_factorizations: int = 40,
) -> TrustRegionStep:
    """Solve the subproblem to within a share of its optimal value (Moré & Sorensen 1983; Conn, Gould & Toint, ch. 7).

    The minimiser is `d = -(H + λI)⁻¹ g` with λ ≥ 0 such that `H + λI` is positive semi-definite, which the inertia
    tells, and `|d| = radius` unless λ is 0. λ is found by Newton's method on `1/|d| - 1/radius` (see the module), kept
    between the largest shift known to be too small and the smallest known to be large enough. Where g has next to no
    part in the lowest eigenvector (the hard case) every permissible λ leaves |d| below the radius: the step then goes
    on along that eigenvector, found by inverse iteration, to the boundary.

    Args:
        system: H.
        gradient: g, `[p]`, not zero.
        radius: Of the region.
        shift: Where to start; the last step's shift saves factorisations.
        smallest_shift: Taken for 0: the least λ that is tried.
        tolerance: Relative error of |d| that is allowed, and share of the optimal decrease that may be missed.
        max_factorizations: After as many the best step found is returned.

    Raises:
        ValueError: If the radius or the gradient is zero or not finite.
        LinAlgError: If no shift made H positive definite.
    """
    size = float(gradient.norm())
    if not (radius > 0.0 and size > 0.0 and math.isfinite(radius) and math.isfinite(size)):
        raise ValueError(f"radius and gradient norm must be positive and finite, got {radius} and {size}")
    low, high, shift = 0.0, math.inf, max(shift, smallest_shift)
    best: Tensor | None = None
    generator = torch.Generator(device=gradient.device).manual_seed(0)
    lowest = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype, device=gradient.device)
    for count in range(1, max_factorizations + 1):
        if not _is_positive(system, shift):
            low, shift = shift, _between(shift, high)
            continue
        step = -system.solve(gradient, shift)
        length = float(step.norm())
        if abs(length - radius) <= tolerance * radius or (length < radius and shift <= smallest_shift):
            return TrustRegionStep(step, shift, count, hard_case=False)
        both = system.solve(torch.stack([step, lowest / lowest.norm()], dim=1), shift)
        # The quotient is at least 1 / (max h + λ): only rounding could bring it to 1e-30, and that is no division by 0.
        wanted = shift + (length / radius - 1.0) / max(float(step @ both[:, 0]) / length**2, 1e-30)
        if length > radius:
            # 1%: Newton's steps up shrink near the root, and a change that rounding swallows would be tried for ever.
            # If it leads past the root, the upper bound is set by it.
            low, shift = shift, min(max(wanted, 1.01 * shift), _between(shift, high))
            continue
        high, best = shift, step
        lowest = system.solve(both[:, 1] / both[:, 1].norm(), shift)  # a second inverse iteration
        onward = _to_boundary(step, both[:, 1] / both[:, 1].norm(), lowest, radius)
        # Moré & Sorensen, lemma 3.4: what the detour costs is small against what the step gains.
        gain = -float(gradient @ step) + shift * radius**2
        if onward.cost <= tolerance * (2.0 - tolerance) * gain:
            return TrustRegionStep(onward.step, shift, count, hard_case=True)
        # Newton's step down may go too far (even below 0): by at most a thousandfold, and never nearer than a tenth of
        # the interval to a shift that was too small. A smaller part would cost a factorisation that fails and tells
        # little; a larger one would slow the last steps down.
        shift = max(wanted, smallest_shift, 1e-3 * shift, low + 0.1 * (shift - low) if low > 0.0 else 0.0)
    if best is None:
        raise LinAlgError(f"no shift up to {shift:.1e} made the matrix positive definite")
    return TrustRegionStep(best, high, max_factorizations, hard_case=False)


class _Onward(NamedTuple):
    step: Tensor
    cost: float


def _to_boundary(step: Tensor, before: Tensor, after: Tensor, radius: float) -> _Onward:
    """Go on along an inverse iterate `after = (H + λI)⁻¹ before` to the boundary; the cost is `τ² uᵀ(H + λI)u`."""
    length = after.norm()
    direction = after / length
    curvature = float(direction @ before / length)
    along = float(step @ direction)
    room = radius**2 - float(step @ step)
    tau = room / (along + math.copysign(math.sqrt(along**2 + room), along))
    return _Onward(step + tau * direction, tau**2 * curvature)


def _is_positive(system: Shifted, shift: float) -> bool:
    try:
        return system.positive_definite(shift)
    except LinAlgError:  # exactly singular: the shift is that of an eigenvalue, and so too small
        return False


def _between(low: float, high: float) -> float:
    """A shift above one that was too small.

    Without an upper bound four times as large: two factors of two in one factorisation. With one, the geometric mean
    (shifts range over orders of magnitude), but at least 5% into the interval, since low may be next to zero (Moré &
    Sorensen take 0.1%). Such numbers change how many factorisations are made, never the solution.
    """
    if math.isinf(high):
        return 4.0 * low
    return max(math.sqrt(low * high), low + 0.05 * (high - low))
