"""The factor of the user's loss at a step: what backwards showed of it, less what was divided out of the gradients.

Between backward and step a loop may undo a scale of the loss (`torch.amp.GradScaler`, a division by the number of
micro-batches) or change the gradients for good (clipping). Only the first is a factor of the curvature too. Which it
was is told from what has become of the gradients. A GradScaler that calls `step` is asked (it is found on the stack).
Beside it, gradients were divided if they lack the very factor of the loss, or by a power of two or a whole number up to
100; anything else is clipping. A plain loss is never in doubt; a weighted one, scaled and unscaled by hand by another
number, is taken for a clipped one.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from types import FrameType

import torch
from torch import Tensor, nn

from kfacopt.capture.records import Tally
from kfacopt.capture.scaling import LossScale, Seen, norms_of
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import FisherType
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.likelihoods.weights import times
from kfacopt.sharding import Processes

_PLAIN = 1e-6
"""Relative distance from one up to which a number is one: rounding in float32."""


class LossScaling:
    """Says at each step by which factor the loss differs from the plain one.

    Attributes:
        factor: Of the whole loss, over the plain one that the optimizer was given: of the last step that showed it.
        undone: What the gradients were multiplied with between backward and step to undo a scale of the loss.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self.undone = 1.0
        self._said = False

    def settle(
        self,
        tally: Tally,
        estimator: FisherEstimator,
        parameters: Iterable[nn.Parameter],
        exact: bool,
        processes: Processes,
        passes: int,
    ) -> None:
        """Take in what the backwards of a step showed, in all processes; the loss is the mean of theirs.

        Args:
            tally: What arrived since the last step.
            estimator: Of the loss.
            parameters: Of the model, in its order, with the gradients of the step.
            exact: Whether the step follows a quadratic model, which a wrong factor would make wrong.
            processes: Those that train together.
            passes: How many curvature passes they had, all together.

        Raises:
            RuntimeError: If the step is to be exact, and the loss is evidently not the plain one by a factor or weights
                that its gradient does not tell.
        """
        here = partial(self._settle_here, tally, estimator, parameters, exact)
        if exact:
            processes.together(here)  # what one refuses all do
        else:
            here()
        self._agree(tally, estimator, processes, passes)

    def _settle_here(
        self, tally: Tally, estimator: FisherEstimator, parameters: Iterable[nn.Parameter], exact: bool
    ) -> None:
        self.undone, scale = 1.0, tally.scale
        if not tally.passes:
            return
        factor = scale.factor(estimator.likelihoods, estimator.weights)
        candidates = _undone(scale, factor, [p.grad for p in parameters]) if scale.wants_norms else [1.0]
        self.undone = candidates[0]
        if scale.is_open:
            fits = [one for one in candidates if _is_plain(scale, estimator, one) or _is_mean(tally, one)]
            self.undone = fits[0] if fits else 1.0
            if not fits:
                self._doubt(scale.seen, exact)
        self.factor = factor * self.undone if scale.told else 1.0

    def _agree(self, tally: Tally, estimator: FisherEstimator, processes: Processes, passes: int) -> None:
        """Take in what the other processes found."""
        if processes.size == 1 or not passes:
            return
        told = tally.scale.told
        own = [self.undone, self.factor / self.undone if told else 1.0, float(tally.terms), float(bool(told))]
        rows = processes.table([float(tally.scale.wants_norms), *own])
        # What was done to the gradients was done to all of them alike: who looked knows.
        self.undone = next((undone for looked, undone, *_ in rows if looked), 1.0)
        weights = [1.0 if terms else 0.0 for *_, terms, _ in rows]
        whole = float(len(rows))
        if estimator.likelihood.reduction == "sum":
            weights = [terms for *_, terms, _ in rows]
            whole = sum(weights) or 1.0
        found = sum(weight * row[2] for weight, row in zip(weights, rows, strict=True)) / whole
        self.factor = found * self.undone if any(row[-1] for row in rows) else 1.0

    def rescaling(self, tally: Tally, estimator: FisherEstimator, layers: Mapping[Layer, int]) -> dict[Layer, float]:
        """What the rows that were delivered lack of the loss' factor, by layer; those that lack nothing are left out.

        Args:
            tally: What arrived since the last step.
            estimator: Of the loss.
            layers: In how many backwards each was delivered.
        """
        empirical = estimator.fisher_type is FisherType.EMPIRICAL
        found = {n: tally.scale.rescaling(n, self.undone, empirical) for n in set(layers.values())}
        return {layer: found[n] for layer, n in layers.items() if abs(found[n] - 1.0) > _PLAIN}

    def _doubt(self, seen: Sequence[Seen], exact: bool) -> None:
        """Say that the loss is not the plain one, or cannot be told to be.

        Raises:
            RuntimeError: If it is not, and the step is to be exact.
        """
        names = ", ".join(sorted({repr(one.likelihood) for one in seen if one.terms.weights is None}))
        evident = all(one.loss is not None and one.loss.alone for one in seen)
        text = (_OTHER if evident else _HIDDEN).format(names) + _ADVICE
        if evident and exact:
            raise RuntimeError(text)
        if not self._said:
            self._said = True
            warnings.warn(text, stacklevel=7)


_OTHER = (
    "the loss that was differentiated is not that of {}: its value is another than its gradient at the prediction "
    "says. It is multiplied by a constant factor, weights its data or outputs, or is not CrossEntropyLoss (MSELoss, "
    "BCEWithLogitsLoss) of the model's output; which of these the gradient does not tell, and the curvature would be "
    "that of the plain loss. "
)
_HIDDEN = (
    "whether {} has weights or a constant factor in the loss that was differentiated cannot be told, as the loss has "
    "other parts or cannot be seen: its curvature is taken to be that of the plain loss. "
)
_ADVICE = (
    "Let the loop call the very loss module that the optimizer was given (with reduction='none' for weights), so that "
    "its target is seen; or drop the weights and the constant factor"
)


def _undone(scale: LossScale, factor: float, gradients: Sequence[Tensor | None]) -> list[float]:
    """What the gradients may have been multiplied with to undo a scale of the loss; the likeliest first."""
    scaler = _scale_of_grad_scaler()
    known = [1.0] if scaler == 1.0 else [1.0 / scaler, 1.0]
    if scale.left is None or len(scale.left) != len(gradients):
        return known
    left, now = scale.left.tolist(), norms_of(gradients).tolist()
    ratios = [scaler * after / before for before, after in zip(left, now, strict=True) if before > 0.0]
    if not ratios or not all(map(math.isfinite, ratios)) or min(ratios) <= 0.0:
        return known
    ratio = ratios[0]
    if max(ratios) - min(ratios) > 1e-2 * ratio or abs(ratio - 1.0) <= _PLAIN:
        return known  # not one factor for all (clipped by layer, noise added, ...), or nothing else happened
    # Powers of two and numbers of micro-batches are divided by; that a clipped norm is such a fraction is rare.
    power, whole = math.log2(ratio), round(1.0 / ratio)
    divided = ratio < 1.0 and (
        abs(power - round(power)) <= _PLAIN or (whole <= 100 and abs(1.0 / ratio - whole) <= 1e-4)
    )
    # Of a loss that is not told, its value decides.
    likely = divided or scale.has_value or abs(ratio * factor / scaler - 1.0) <= 1e-3
    return [ratio / scaler, *known] if likely else known


def _scale_of_grad_scaler() -> float:
    """The scale of the GradScaler that calls the optimizer's `step`, which has divided the gradients by it; or 1."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            return float(frame.f_locals["self"].get_scale())  # 1 of one that is not enabled
        frame = frame.f_back
    return 1.0


def _is_mean(tally: Tally, undone: float) -> bool:
    """Whether a loss is the mean of the plain losses of several backwards; their terms are weighted so then."""
    roots = {one.loss for one in tally.scale.seen}
    if len(roots) < 2 or None in roots or any(one.terms.weights is not None for one in tally.scale.seen):
        return False
    weight = 1.0 / len(roots)
    for one in tally.scale.seen:
        share = weight * one.likelihood.term_share(float(one.terms.count))
        value = one.value(share, undone)
        assert one.loss is not None
        if value is None or one.name or one.precision.differ(float(value), undone * one.loss.value):
            return False
    for one, replay in product(tally.scale.seen, tally.replays):
        if replay.terms is one.terms:
            replay.terms = times(one.terms, weight / undone)
    return True


def _is_plain(scale: LossScale, estimator: FisherEstimator, undone: float) -> bool:
    """Whether a loss is the plain one times `1 / undone`, by its value; False where that cannot be said.

    Of several losses, those that do not tell their factor are taken to have the others'.
    """
    seen, first = scale.seen, scale.first
    counts = Counter[str]()
    for one in seen:
        counts[one.name] += int(one.terms.count)
    found = 0.0
    for one in seen:
        share = estimator.weights[one.name] * one.likelihood.term_share(float(counts[one.name]))
        if one.name and first is not None and first.told:
            share = estimator.weights[one.name] * one.likelihood.term_share(float(one.terms.count))
            share *= undone * first.weight
        if (value := one.value(share, undone)) is None:
            return True  # a likelihood that does not know its loss is taken at its word
        found += float(value)
    losses = {one.loss for one in seen}
    want = sum(math.nan if loss is None else undone * loss.value for loss in losses)
    return None not in losses and not any(one.precision.differ(found, want) for one in seen)
