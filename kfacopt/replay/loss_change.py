"""The loss after a step minus the loss before it, on the step's own batches, and its ratio to what was promised.

A loss that is a likelihood with natural parameters f changes by `u·(f' - f) + KL(p_f ‖ p_f')`, u its gradient at the
prediction f: no target is needed, and the divergence of the step comes with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacopt.capture.recording import unnoticed
from kfacopt.capture.records import Call, Replay
from kfacopt.likelihoods import Likelihood, LossTerms
from kfacopt.likelihoods.estimator import FisherEstimator


@dataclass(eq=False)
class Part:
    """What one prediction of one of a step's forwards contributes to the whole loss.

    Attributes:
        replay: The forward, and its loss terms as rows `[m c]`.
        likelihood: Of the terms.
        weight: Of this likelihood's mean in the whole loss.
        count: Over how many terms that mean goes, in all the step's forwards.
        gradient: Of the whole loss with respect to the rows, as the user's backward had it, `[m c]`.
    """

    replay: Replay
    likelihood: Likelihood
    weight: float
    count: float
    gradient: Tensor

    @property
    def terms(self) -> LossTerms:
        """The loss terms."""
        return self.replay.terms

    @property
    def share(self) -> float:
        """What a term's loss counts in the whole loss."""
        return self.weight / self.count

    @property
    def loss_gradient(self) -> Tensor:
        """The gradient, free of loss scaling, clipping and accumulation's 1/k where the target could be read.

        Micro-batches whose means were added up, not averaged, are the exception: that sum is what the user minimises,
        and each gradient is that of its own mean.
        """
        known = self.terms.gradient
        if known is None or not self.terms.reads_target:
            return self.gradient
        own = known * (self.weight / float(self.terms.count))
        # Above rounding, in bfloat16 too (a few 1e-4 over a batch); every 1/k and loss scale is farther from 1.
        of_own_mean = abs(float((self.gradient - own).mul(own).sum())) < 1e-3 * float(own.square().sum())
        return self.gradient if of_own_mean else known * self.share


@dataclass(frozen=True)
class LossChange:
    """The whole loss after a step minus the one before it.

    Attributes:
        linear: `u·(f' - f)`.
        divergence: `KL(p_f ‖ p_f')`, weighted as the losses are.

    >>> LossChange(-2.0, 0.5).total
    -1.5
    """

    linear: float
    divergence: float

    @property
    def total(self) -> float:
        """The change; infinite where it is not finite."""
        change = self.linear + self.divergence
        return change if math.isfinite(change) else math.inf


def parts_of(replays: Sequence[Replay], estimator: FisherEstimator, gradient_scale: float) -> list[Part]:
    """The parts of a step's loss; those of one forward come one after the other.

    Args:
        replays: The forwards, with the user's gradient at each prediction.
        estimator: Of the likelihoods and their weights.
        gradient_scale: Brings the user's gradient to that of the mean loss.
    """
    counts = dict.fromkeys(estimator.likelihoods, 0.0)
    for replay in replays:
        counts[replay.name] += float(replay.terms.count)
    first = {id(replay.call): place for place, replay in reversed(list(enumerate(replays)))}
    return [
        Part(
            replay,
            estimator.likelihoods[replay.name],
            estimator.weights[replay.name],
            counts[replay.name],
            gradient_scale * as_rows(replay.terms, replay.gradient).to(replay.terms.parameters.dtype),
        )
        for replay in sorted(replays, key=lambda replay: first[id(replay.call)])
    ]


def loss_change(parts: Sequence[Part], estimator: FisherEstimator) -> LossChange:
    """The change from the parts' predictions to those at the parameters as they are now.

    Each forward is run again with its own random state; buffers (running statistics of normalisation layers) and the
    generators are left as they are.
    """
    linear = divergence = 0.0
    for part, new in zip(parts, terms_now(parts, estimator), strict=True):
        difference = new.parameters - part.terms.parameters
        linear += float((part.loss_gradient * difference).sum(dtype=torch.float64))
        divergence += part.share * float(part.likelihood.divergence(part.terms, new))
    return LossChange(linear, divergence)


def reduction_ratio(change: float, promised: float) -> float:
    """ρ, the loss change over what the quadratic model promised; not a number where it promised no reduction.

    >>> reduction_ratio(-1.0, -2.0), reduction_ratio(1.0, 0.0)
    (0.5, nan)
    """
    return change / promised if promised < 0.0 else math.nan


def terms_now(parts: Sequence[Part], estimator: FisherEstimator) -> list[LossTerms]:
    """Each part's terms at the parameters as they are now; every forward is run once."""
    result: list[LossTerms] = []
    last: Call | None = None
    for part in parts:
        if part.replay.call is not last:
            last = part.replay.call
            predictions = {name: p.detach() for name, p in estimator.predictions(run_again(last)).items()}
        result.append(part.terms.at(predictions[part.replay.name]))
    return result


def run_again(call: Call) -> Any:
    """A forward's output, with gradients enabled (a model may differentiate itself) and unnoticed by any optimizer."""
    with torch.enable_grad(), unnoticed():
        return call.run()


def as_rows(terms: LossTerms, tensor: Tensor) -> Tensor:
    """A tensor of the prediction's shape as rows `[m c]`."""
    assert terms.rows is not None
    return terms.rows(tensor)
