"""The loss after a step minus the loss before it, on the step's own batches, and its ratio to what was promised.

A loss that is a likelihood with natural parameters f changes by `u·(f' - f) + KL(p_f ‖ p_f')`, u its gradient at the
prediction f: no target is needed, and the divergence of the step comes with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacopt.capture.recording import unnoticed
from kfacopt.capture.records import Call, Replay
from kfacopt.likelihoods import Likelihood, LossTerms
from kfacopt.likelihoods.estimator import FisherEstimator, tensors_of
from kfacopt.sharding import Processes


@dataclass(eq=False)
class Part:
    """What one prediction of one of a step's forwards contributes to the whole loss.

    Attributes:
        replay: The forward, and its loss terms as rows `[m c]`.
        likelihood: Of the terms.
        weight: Of this likelihood's mean in the whole loss.
        count: Over how many terms that mean goes, in all the step's forwards.
        share: What a term's loss counts in the whole loss, beside the weights that its terms have.
        gradient: Of the whole loss with respect to the rows, as the user's backward had it, `[m c]`.
        loss_gradient: The same, whatever becomes of `gradient` (`BatchLinearization.match`).
    """

    replay: Replay
    likelihood: Likelihood
    share: float
    gradient: Tensor
    loss_gradient: Tensor

    @property
    def terms(self) -> LossTerms:
        """The loss terms."""
        return self.replay.terms

    @property
    def told(self) -> bool:
        """Whether the terms have their weights in the user's loss; else it is taken for the plain one."""
        return self.terms.weights is not None


@dataclass(frozen=True)
class LossChange:
    """The whole loss after a step minus the one before it.

    Attributes:
        linear: `u·(f' - f)`.
        divergence: `KL(p_f ‖ p_f')`, weighted as the losses are.
        remainder: What the change has beyond these two, where predictions are no natural parameters.

    >>> LossChange(-2.0, 0.5).total
    -1.5
    """

    linear: float
    divergence: float
    remainder: float = 0.0

    @property
    def total(self) -> float:
        """The change; infinite where it is not finite."""
        change = self.linear + self.divergence + self.remainder
        return change if math.isfinite(change) else math.inf


def parts_of(
    replays: Sequence[Replay],
    estimator: FisherEstimator,
    gradient_scale: float,
    processes: Processes = Processes(),  # noqa: B008 - it asks for the group whenever it needs it
) -> list[Part]:
    """The parts of a step's loss; those of one forward come one after the other.

    Args:
        replays: The forwards, with the user's gradient at each prediction.
        estimator: Of the likelihoods and their weights.
        gradient_scale: Brings the user's gradient to that of the mean loss.
        processes: Those that train together, each on its own forwards; all must ask.
    """
    counts = dict.fromkeys(estimator.likelihoods, 0.0)
    for replay in replays:
        counts[replay.name] += float(replay.terms.count)
    if estimator.likelihood.reduction == "sum":
        # Gradients are those of the mean of the processes' sums.
        counts = dict(zip(counts, processes.mean(list(counts.values())), strict=True))
    first = {id(replay.call): place for place, replay in reversed(list(enumerate(replays)))}
    parts = []
    for replay in sorted(replays, key=lambda replay: first[id(replay.call)]):
        likelihood, terms = estimator.likelihoods[replay.name], replay.terms
        # Weights say what the user's loss counts a term; untold, it is a mean over all terms of the step's forwards.
        share = estimator.weights[replay.name] / counts[replay.name]
        if terms.weights is not None:
            share = gradient_scale * likelihood.term_share(float(terms.count))
        gradient = gradient_scale * as_rows(terms, replay.gradient).to(terms.parameters.dtype)
        parts.append(Part(replay, likelihood, share, gradient, gradient))
    return parts


def loss_change(parts: Sequence[Part], estimator: FisherEstimator) -> LossChange:
    """The change from the parts' predictions to those at the parameters as they are now.

    Each forward is run again with its own random state; buffers (running statistics of normalisation layers) and the
    generators are left as they are.
    """
    linear = divergence = remainder = 0.0
    for part, new in zip(parts, terms_now(parts, estimator), strict=True):
        difference = new.parameters - part.terms.parameters
        linear += float((part.loss_gradient * difference).sum(dtype=torch.float64))
        apart = part.share * float(part.likelihood.divergence(part.terms, new))
        divergence += apart
        remainder += part.share * float(part.likelihood.remainder(part.terms, new)) - apart
    return LossChange(linear, divergence, remainder)


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
            predictions = {name: p.detach() for name, p in predictions_again(last, estimator).items()}
        result.append(part.terms.at(predictions[part.replay.name]))
    return result


def run_again(call: Call) -> Any:
    """A forward's output, with gradients enabled (a model may differentiate itself) and unnoticed by any optimizer."""
    with torch.enable_grad(), unnoticed():
        return call.run()


def predictions_again(call: Call, estimator: FisherEstimator) -> Mapping[str, Tensor]:
    """The predictions of a forward that is run again, by the loss term's name."""
    output = run_again(call)
    return estimator.predictions(output if call.place is None else tensors_of(output)[call.place])


def as_rows(terms: LossTerms, tensor: Tensor) -> Tensor:
    """A tensor of the prediction's shape as rows `[m c]`."""
    assert terms.rows is not None
    return terms.rows(tensor)
