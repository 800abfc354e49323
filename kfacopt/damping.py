"""Rules of damping: in units of the curvature, or after the trust in the quadratic model (Levenberg-Marquardt)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Raise the damping where the quadratic model promised too much, lower it where it kept its promise.

    Every `every` steps the loss change of the step just taken is measured on the step's own batches (all
    micro-batches, each run again with its own random state) and divided by what the quadratic model
    `gᵀδ + ½ δᵀ(C + damping I)δ` predicted: the reduction ratio ρ. `ρ > 3/4`: damping is multiplied by
    `decay ** every`; `ρ < 1/4`: divided by it (Martens & Grosse 2015, section 6.5). Where the loss cannot be measured
    again the damping stays: several roots on the way to one prediction (an encoder and a decoder called separately),
    or float16 with a loss whose gradient does not tell its target (`MSELoss` in the functional form, soft targets).

    Args:
        every: Steps between two adjustments; each costs a forward.
        decay: Factor a step, below one; 19/20 in the paper.
        smallest: Bound of the damping.
        largest: Bound of the damping.

    >>> rule = LevenbergMarquardt(every=5, decay=0.95)
    >>> rule.adjusted(1.0, rho=0.9) < 1.0 < rule.adjusted(1.0, rho=0.1), rule.adjusted(1.0, rho=0.5)
    (True, 1.0)
    """

    every: int = 5
    decay: float = 0.95
    smallest: float = 1e-8
    largest: float = 1e8

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay must lie between 0 and 1, got {self.decay}")

    def due(self, step: int) -> bool:
        """Whether the damping is adjusted after step `step` (counted from 0)."""
        return (step + 1) % self.every == 0

    def adjusted(self, damping: float, rho: float) -> float:
        """The damping that follows `damping` after a reduction ratio; a ratio that is not finite raises it."""
        factor = self.decay**self.every
        if rho > 0.75:
            damping *= factor
        elif not rho >= 0.25:
            damping /= factor
        return min(self.largest, max(self.smallest, damping))


@dataclass(frozen=True)
class RelativeDamping:
    """Damping of each layer in units of its own mean eigenvalue (trace over dimension).

    Losses, models and layers differ by orders of magnitude in the scale of their curvature; a number in these units
    does not. With KFAC's π-split, `factor` 1 adds to each Kronecker factor its own mean eigenvalue.

    Args:
        factor: Damping over mean eigenvalue.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0.0:
            raise ValueError(f"the factor of a relative damping must be positive, got {self.factor}")


RELATIVE_DAMPING = RelativeDamping()
"""The default of every optimizer."""
