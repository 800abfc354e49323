"""Binary cross-entropy on logits as a product of Bernoulli likelihoods."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kfacopt.likelihoods.base import Likelihood, LossTerms, independent_columns
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.precision import (
    Precision,
    check_prediction,
    check_reduction,
    largest_magnitude,
    wide_enough,
    widest,
)


class Bernoulli(Likelihood):
    """Binary cross-entropy on logits, torch's `BCEWithLogitsLoss`.

    The Hessian is σ(1-σ), times `pos_weight` where y = 1: without that, targets between 0 and 1 have the same.

    A prediction `[n ... c]` has its outputs along the last axis; `[n]` has one output per datum. The targets are read
    from the sign of the user's gradient, and numbers whose gradient is exactly zero although their logit is not
    saturated were left out of the loss: they have no curvature, and rows of them do not count.

    Args:
        pos_weight: Weight of the positive examples; a tensor that broadcasts to one datum's shape.
        soft_targets: Targets may lie between 0 and 1, and are not looked for in the gradient. Without, such targets
            are refused only where the Hessian depends on them (`pos_weight`).
        reduction: `"datum"` sums over everything that belongs to one datum (all axes but the first) and averages over
            data. `"mean"` averages over all numbers and `"sum"` adds them up, as torch does. `"none"` is read as
            `"mean"`, since what happens to the numbers outside the loss function cannot be seen.
        weight: Weight of every output; a tensor that broadcasts to one datum's shape.

    Note:
        Each term's gradient is known with hard targets. With soft ones it is the user's times `count`, which holds
        while the loss is not rescaled, and is `None` where no target between 0 and 1 has such a gradient; a constant
        factor of the loss is told by its value (`factor_of_value`), and that a loss is another one by what torch calls
        it in the graph. With soft targets, a number left out of the loss cannot be told from one fitted perfectly.

    >>> likelihood = Bernoulli(pos_weight=torch.tensor(3.0))
    >>> terms = likelihood.terms(torch.zeros(2, 1), gradient=torch.tensor([[0.25], [-0.75]]))
    >>> terms.output_scale.flatten().tolist(), terms.gradient.flatten().tolist()
    ([1.0, 3.0], [0.5, -1.5])
    """

    is_separable: ClassVar[bool] = True
    loss_nodes: tuple[str, ...] = ("BinaryCrossEntropyWithLogits",)

    def __init__(
        self,
        pos_weight: Tensor | None = None,
        soft_targets: bool = False,
        reduction: str = "datum",
        weight: Tensor | None = None,
    ) -> None:
        for name, given in (("pos_weight", pos_weight), ("weight", weight)):
            if given is not None and bool((given < 0).any()):
                raise ValueError(f"{name} has negative entries, with which the loss is not convex")
        self.pos_weight = pos_weight
        self.soft_targets = soft_targets
        self.reduction = check_reduction(reduction, ("datum", "mean", "sum", "none"), "Bernoulli")
        self.weight = weight
        if weight is not None:
            self.loss_nodes = ()  # the graph does not show whether its weights are these

    def __repr__(self) -> str:
        return (
            f"Bernoulli(pos_weight={self.pos_weight}, soft_targets={self.soft_targets}, "
            f"reduction={self.reduction!r}, weight={self.weight})"
        )

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target has the prediction's shape."""
        check_prediction(prediction, gradient, "BCEWithLogitsLoss")
        layout = RowLayout.of(prediction, prediction.ndim - 1 if prediction.ndim > 1 else None)
        logits = layout.rows(prediction.detach())
        probabilities = logits.sigmoid()
        weight = self._per_output("weight", self.weight, prediction, layout)
        positive = self._per_output("pos_weight", self.pos_weight, prediction, layout)
        if positive is not None and bool((positive == 1.0).all()):
            positive = None
        alive = labels = gradients = None
        if target is not None:
            labels = self._checked_target(target, prediction, layout)
        elif gradient is None or self.soft_targets:
            if positive is not None:
                raise ValueError(
                    "pos_weight scales the curvature by the target, which cannot be read here "
                    "(soft targets, or no gradient given): pass the target, or drop pos_weight"
                )
        else:
            precision = Precision.of(prediction, gradient)
            rows = layout.rows(gradient).to(logits.dtype)
            labels, alive, wrong = _read_labels(rows, probabilities, weight, positive, precision)
            if wrong and positive is not None:
                raise ValueError(_not_binary(wrong, gradient.numel()))
            if wrong:  # the Hessian is the same for all targets
                labels = alive = None
        output_scale, gradients = _weigh(probabilities, labels, weight, positive, alive)
        scale, count = self._scale_and_count(layout, logits, alive)
        if gradients is not None:
            gradients *= scale[:, None]
        elif gradient is not None:
            gradients = layout.rows(gradient) * (1.0 if self.reduction == "sum" else count)
            gradients = _if_possible(gradients, probabilities, scale, output_scale)
        return LossTerms.of(
            layout,
            logits,
            scale=scale,
            count=count,
            gradient=gradients,
            reads_target=labels is not None,
            output_scale=output_scale,
        )

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """Sum of `softplus(f) - y f`, with the targets that the gradient u = share · scale · (σ - y) stands for."""
        logits, multiplier = widest(terms.parameters), share * _deviation(terms, 1.0).square()
        return (multiplier * (F.softplus(logits) - logits.sigmoid() * logits) + gradient * logits).sum()

    def factor_of_value(
        self, terms: LossTerms, gradient: Tensor, share: float, value: float, precision: Precision
    ) -> float | None:
        """`(L - Σ u f) / Σ share scale (softplus(f) - σ f)`, as the value grows with both."""
        along = float((gradient * widest(terms.parameters)).sum())
        rest = float(self.loss_value(terms, gradient, share)) - along
        # The difference may have lost its digits where the loss is small against its gradient's part in it.
        told = precision.saturation * (abs(value) + abs(along)) <= precision.factor * rest
        return (value - along) / rest if told and rest > 0.0 and value > along else None

    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> Tensor:
        """Gradients σ(f) - y at labels y drawn with probability σ(f)."""
        probabilities = terms.parameters.sigmoid()
        device = probabilities.device if generator is None else generator.device
        uniform = torch.rand(
            mc_samples,
            *probabilities.shape,
            generator=generator,
            device=device,
            dtype=probabilities.dtype,
        ).to(probabilities.device)
        labels = uniform.lt_(probabilities)
        return torch.sub(probabilities, labels).mul_(_deviation(terms, 1.0 / mc_samples))

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        """Columns of the diagonal matrices of sqrt(scale σ(1-σ))."""
        # σ(f)σ(-f) and not σ(1-σ): the second is zero too early in f.
        variance = terms.parameters.sigmoid() * (-terms.parameters).sigmoid()
        return independent_columns(variance.sqrt() * _deviation(terms, 1.0), columns)

    def hessian_product(self, terms: LossTerms, vectors: Tensor) -> Tensor:
        """`scale σ(1-σ) v`."""
        variance = terms.parameters.sigmoid() * (-terms.parameters).sigmoid()
        return variance * _deviation(terms, 1.0).square() * vectors

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · KL between the Bernoulli distributions before and after."""
        before, after = widest(old.parameters), widest(new.parameters)
        bregman = F.softplus(after) - F.softplus(before) - before.sigmoid() * (after - before)
        if old.output_scale is not None:
            bregman = bregman * old.output_scale
        return (bregman.sum(-1) * old.scale).sum().to(old.parameters.dtype)

    def _per_output(self, name: str, given: Tensor | None, prediction: Tensor, layout: RowLayout) -> Tensor | None:
        """`weight` or `pos_weight` as rows `[m c]`, if it is the same for every datum."""
        if given is None:
            return None
        shape, one_datum = list(given.shape), list(prediction.shape[1:])
        same = given.ndim < max(prediction.ndim, 1) or given.shape[0] == 1
        trailing = zip(reversed(shape), reversed(prediction.shape), strict=False)
        fits = given.ndim <= max(prediction.ndim, 1) and all(a in (1, b) for a, b in trailing)
        if not (same and fits):
            raise ValueError(
                f"{name} of shape {shape} does not broadcast to one datum's outputs {one_datum} "
                f"(prediction {list(prediction.shape)}): weights that differ between data have no "
                "place in a likelihood; pass one weight per output, or weigh the data by sampling "
                "them"
            )
        spread = given.to(prediction.device).broadcast_to(prediction.shape or (1,))
        return layout.rows(spread).to(wide_enough(prediction.dtype))

    def _checked_target(self, target: Tensor, prediction: Tensor, layout: RowLayout) -> Tensor:
        if target.shape != prediction.shape:
            raise ValueError(
                f"target has shape {list(target.shape)}, prediction {list(prediction.shape)}: "
                "BCEWithLogitsLoss needs them equal"
            )
        rows = layout.rows(target).to(layout.rows(prediction.detach()).dtype)
        outside = int(((rows < 0) | (rows > 1)).sum())
        if outside:
            raise ValueError(
                f"{outside} of {rows.numel()} BCE targets lie outside [0, 1], where they are no probabilities"
            )
        return rows

    def _scale_and_count(self, layout: RowLayout, logits: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, outputs = logits.shape
        averaged = self.reduction in ("mean", "none")
        factor = 1.0 / outputs if averaged else 1.0
        if alive is None:
            count = rows if averaged else layout.data
            return logits.new_full((rows,), factor), logits.new_tensor(float(count))
        live = alive.any(-1)
        counted = live if averaged else live.view(layout.data, -1).any(-1)
        return live * logits.new_tensor(factor), counted.sum().to(logits.dtype)


def _deviation(terms: LossTerms, factor: float) -> Tensor:
    """Square root of the Hessian multipliers, `[m 1]` or `[m c]`."""
    scale = terms.scale[:, None] * factor
    return (scale if terms.output_scale is None else scale * terms.output_scale).sqrt()


def _weigh(
    probabilities: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    positive: Tensor | None,
    alive: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Hessian multipliers of the outputs and, if the labels are known, the terms' gradients."""
    output_scale = weight
    if labels is None:
        return output_scale, None
    if positive is None:
        gradients = probabilities - labels
    else:
        multiplier = 1.0 + (positive - 1.0) * labels
        gradients = multiplier * probabilities - positive * labels
        output_scale = multiplier if weight is None else multiplier * weight
    if weight is not None:
        gradients = gradients * weight
    if alive is not None:
        gradients = gradients * alive
        output_scale = alive.to(gradients.dtype) if output_scale is None else output_scale * alive
    return output_scale, gradients


def _read_labels(
    gradient: Tensor,
    probabilities: Tensor,
    weight: Tensor | None,
    positive: Tensor | None,
    precision: Precision,
) -> tuple[Tensor, Tensor | None, int]:
    """Labels 0/1 `[m c]` by the gradient's sign; which numbers the loss has (`None`: all); how many do not fit.

    With the right labels the gradient is one positive multiple k of w (s σ - pos_weight y). A number whose target is t
    instead of y is off by about |t - y| k: this tells non-binary targets and other losses.
    """
    lowest, highest = gradient.aminmax()
    largest = largest_magnitude(lowest, highest)
    labels = (gradient < 0).to(probabilities.dtype)
    alive: Tensor | None = None
    if int(gradient.count_nonzero()) < gradient.numel():
        zero = gradient == 0
        labels = torch.where(zero, (probabilities >= 0.5).to(labels.dtype), labels)
        # A gradient this close to zero is rounded to it. Of its factor k only this is known: no number's gradient is
        # larger than k times the largest weight.
        heaviest = 1.0 if weight is None else weight.amax()
        heaviest = heaviest if positive is None else heaviest * positive.amax().clamp_min(1.0)
        smallest = 2.0 * heaviest * precision.quantum / largest
        margin = torch.minimum(probabilities, 1.0 - probabilities)
        alive = ~(zero & (margin > precision.saturation) & (margin > smallest))
    multipliers, expected = _weigh(probabilities, labels, weight, positive, alive)
    assert expected is not None
    # Numbers whose sign is that of a rounding error have no part in this mean of the factor.
    flat = gradient.flatten()
    factor = flat.dot(flat) / flat.dot(expected.flatten())
    wrong = _count_deviations(gradient, factor, expected, multipliers, precision)
    if wrong and not _explained_by_row(gradient, expected, multipliers, precision):
        middle = probabilities - (1.0 if positive is None else positive) * (1.0 - probabilities)
        middle = 0.5 * factor * (middle if weight is None else middle * weight)
        labels = (gradient < middle).to(probabilities.dtype)
        multipliers, expected = _weigh(probabilities, labels, weight, positive, alive)
        assert expected is not None
        wrong = _count_deviations(gradient, factor, expected, multipliers, precision)
        return labels, alive, wrong if bool(torch.isfinite(factor) & (factor > 0)) else 0
    return labels, alive, 0


def _explained_by_row(gradient: Tensor, expected: Tensor, multipliers: Tensor | None, precision: Precision) -> bool:
    """Whether the gradients are the expected but for a factor of each row: the loss weights its data.

    One number a row says nothing: any gradient is the expected one, but for a factor.
    """
    if gradient.shape[1] == 1:
        return False
    factor = gradient.square().sum(-1, keepdim=True) / (gradient * expected).sum(-1, keepdim=True)
    factor = torch.where(factor > 0, factor, 1.0)  # a row that is not part of the loss
    return _count_deviations(gradient, factor, expected, multipliers, precision) == 0


def _count_deviations(
    gradient: Tensor,
    factor: Tensor,
    expected: Tensor,
    multipliers: Tensor | None,
    precision: Precision,
) -> int:
    """How many numbers' gradients are not `factor` times the expected."""
    tolerance = precision.target + 2.0 * precision.quantum / factor
    deviation = torch.addcdiv(expected, gradient, factor, value=-1.0)
    if multipliers is None:
        if bool((torch.maximum(-deviation.amin(-1), deviation.amax(-1)) <= tolerance.flatten()).all()):
            return 0
    else:
        tolerance = tolerance * multipliers
    return int((deviation.abs_() > tolerance).count_nonzero())


def _if_possible(gradients: Tensor, probabilities: Tensor, scale: Tensor, output_scale: Tensor | None) -> Tensor | None:
    """The gradients if targets between 0 and 1 have them; else the loss was rescaled: unknown."""
    multiplier = scale[:, None] if output_scale is None else scale[:, None] * output_scale
    # A gradient is allowed to lie this share of a whole label outside: half precision rounds it by less than 1%, while
    # one scaled up by 2 leaves the range by far more wherever the prediction is wrong. (Scaled down it stays inside.)
    slack = 1e-2 * multiplier
    below = gradients <= multiplier * probabilities + slack
    above = gradients >= multiplier * (probabilities - 1.0) - slack
    return gradients if bool((below & above).all()) else None


def _not_binary(wrong: int, total: int) -> str:
    return (
        f"non-binary BCE target: {wrong} of {total} targets are neither 0 nor 1 (or the gradient "
        "that reached the prediction is not that of BCEWithLogitsLoss with these arguments). With "
        "pos_weight the curvature depends on targets between 0 and 1, which the gradient does not "
        "tell: call the loss_func itself in the loop, so that its target is seen, or drop "
        "pos_weight. Weights of the outputs and positive weights are arguments of the "
        "loss_func; weights of the data are read where there are several outputs a datum, for a "
        "single one call the loss_func itself in the loop. For another loss pass its own Likelihood"
    )
