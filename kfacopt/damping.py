"""Damping that follows the trust in the quadratic model (Levenberg-Marquardt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.forwards import Replay
from kfacopt.likelihoods import Likelihood


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Raise the damping where the quadratic model promised too much, lower it where it kept its promise.

    Every `every` steps the loss change of the step just taken is measured on the step's own batches (all
    micro-batches, each run again with its own random state) and divided by what the quadratic model
    `gᵀδ + ½ δᵀ(C + damping I)δ` predicted: the reduction ratio ρ. `ρ > 3/4`: damping is multiplied by
    `decay ** every`; `ρ < 1/4`: divided by it (Martens & Grosse 2015, section 6.5). Where the loss cannot be measured
    again the damping stays: several roots on the way to one prediction (an encoder and a decoder called separately),
    or a float16 loss scaling that cannot be told from the gradient (`MSELoss`, soft targets).

    Args:
        every: Steps between two adjustments; each costs a forward.
        decay: Factor a step, below one; 19/20 in the paper.
        smallest, largest: Bounds of the damping.

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


@dataclass(frozen=True)
class Comparison:
    """The loss after a step against the loss before it, on the same batches, in units of the mean loss."""

    linear: float
    divergence: float

    @property
    def loss_change(self) -> float:
        """`u·(f' - f) + KL(p_f ‖ p_f')`."""
        return self.linear + self.divergence


def compare_losses(
    likelihood: Likelihood,
    replays: Sequence[Replay],
    prediction_of: Callable[[object], Tensor],
    gradient_scale: float,
) -> Comparison:
    """Run the forwards of a step again, at the parameters after it, and compare.

    A loss that is a likelihood with natural parameters f changes by `u·(f' - f) + KL(p_f ‖ p_f')`, u the gradient at
    the prediction: no target is needed, and the divergence of the step comes with it. Buffers (running statistics of
    normalisation layers) and the random state are put back.

    Args:
        likelihood: Of the loss.
        replays: The forwards; their gradients are the user's own, so they carry accumulation's 1/k.
        prediction_of: Finds the prediction in a model's output.
        gradient_scale: Brings the user's gradient to that of the mean loss.
    """
    linear, divergence, count = 0.0, 0.0, sum(float(replay.terms.count) for replay in replays)
    for replay in replays:
        old = replay.terms
        with torch.no_grad():
            new = old.at(prediction_of(replay.call.run()))
        linear += float((_term_gradient(replay, count, gradient_scale) * (new.parameters - old.parameters)).sum())
        divergence += float(likelihood.divergence(old, new)) / count
    return Comparison(linear, divergence)


def _term_gradient(replay: Replay, count: float, gradient_scale: float) -> Tensor:
    """Gradient of the mean loss over all replays with respect to this one's prediction, as rows `[m c]`.

    The user's, which carries accumulation's 1/k; or the likelihood's own where it knows better: then a factor between
    the two is loss scaling or 1/k, and neither is part of the mean loss.
    """
    terms = replay.terms
    assert terms.rows is not None
    of_user = gradient_scale * terms.rows(replay.gradient).to(terms.parameters.dtype)
    if terms.gradient is None:
        return of_user
    factor = float((of_user * terms.gradient).sum() / terms.gradient.square().sum()) * float(terms.count)
    return of_user if abs(factor - 1.0) < 1e-3 else terms.gradient / count
