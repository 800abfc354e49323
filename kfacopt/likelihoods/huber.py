"""Huber's loss and the smooth absolute error: squares with straight tails."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.pointwise import Pointwise
from kfacopt.likelihoods.precision import Precision, check_prediction, widest


class Huber(Pointwise):
    """torch's `HuberLoss` and `SmoothL1Loss`: `½ bend r²` up to `|r| = threshold`, r = f - y, and straight beyond.

    Huber (1964).

    The Hessian is the loss' own: `bend` within the threshold, zero beyond, where the loss is straight (and at the
    kink of its slope itself, a set of measure zero). A batch whose errors are all beyond has no curvature.

    Which numbers are beyond is told by the user's gradient, which is at its bound there; how large that bound is in a
    loss that was rescaled, by the largest gradient or by the value of the loss (`factor_of_value`). Weights of the data
    hide it: let the loop call the loss module then, so that the target is seen.

    Args:
        threshold: torch's `delta` or `beta`.
        bend: 1 for `HuberLoss`, 1/beta for `SmoothL1Loss`.
        reduction: See `Pointwise`.

    Raises:
        ValueError: If one of the numbers is not positive.

    >>> terms = Huber(reduction="sum").terms(torch.tensor([[0.5, 3.0]]), target=torch.zeros(1, 2))
    >>> terms.gradient.tolist(), Huber().hessian_product(terms, torch.ones(1, 2)).tolist()
    ([[0.5, 1.0]], [[1.0, 0.0]])
    """

    is_level: ClassVar[bool] = True
    loss_name: ClassVar[str] = "HuberLoss (SmoothL1Loss)"

    def __init__(self, threshold: float = 1.0, bend: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction)
        for name, given in (("threshold", threshold), ("bend", bend)):
            if not given > 0.0:
                raise ValueError(f"{name} must be positive, got {given}")
        self.threshold, self.bend = float(threshold), float(bend)
        self.loss_nodes = (*(("HuberLoss",) if bend == 1.0 else ()), *(("SmoothL1Loss",) if self._bound == 1.0 else ()))

    def __repr__(self) -> str:
        return f"Huber(threshold={self.threshold}, bend={self.bend}, reduction={self.reduction!r})"

    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target has the prediction's shape.

        Raises:
            ValueError: Also if neither gradient nor target is given.
        """
        if gradient is None and target is None:
            check_prediction(prediction, None, self.loss_name)
            raise ValueError(
                f"which errors of {self!r} lie beyond the threshold, and have no curvature, is not known: pass the "
                f"target or the gradient"
            )
        return super().terms(prediction, gradient=gradient, target=target)

    @property
    def _bound(self) -> float:
        """Largest slope."""
        return self.threshold * self.bend

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """`bend r`, bounded."""
        return self.bend * (numbers - target).clamp(-self.threshold, self.threshold)

    def curvature(self, numbers: Tensor) -> Tensor:
        """`bend`; `output_scale` has the numbers beyond the threshold."""
        return torch.full_like(numbers, self.bend)

    def output_scale(self, slopes: Tensor, precision: Precision) -> Tensor:
        """Zero where the slope is at its bound."""
        return (slopes.abs() < self._bound * (1.0 - precision.rounding)).to(slopes)

    def plausible(self, slopes: Tensor, precision: Precision) -> Tensor:
        """The slopes, divided by what brings the largest of them to the bound if it is beyond."""
        excess = slopes.abs().amax() / self._bound
        return torch.where(excess > 1.0 + precision.factor, slopes / excess, slopes)

    def at_share(self, terms: LossTerms, gradient: Tensor, share: Tensor | float) -> LossTerms:
        """Which numbers are beyond, once it is known what a term of the user's loss counts."""
        slopes = gradient / (terms.scale * share)[:, None]
        return terms.with_output_scale(self.output_scale(slopes, Precision.of(gradient)))

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor | None:
        """`Σ u² / (2 share scale bend)`; None where an error is beyond the threshold: its size is in no gradient."""
        largest = self._largest_slope(terms, gradient, share) / self._bound
        return None if abs(largest - 1.0) <= Precision.of(gradient).factor else self._squares(terms, gradient, share)

    def factor_of_value(
        self, terms: LossTerms, gradient: Tensor, share: float, value: float, precision: Precision
    ) -> float | None:
        """As of squared errors if that leaves all slopes within the bound; else the largest is at it."""
        if not value > 0.0:
            return None
        squares = float(self._squares(terms, gradient, share)) / value
        largest = self._largest_slope(terms, gradient, share) / self._bound
        return squares if largest <= squares * (1.0 + precision.factor) else largest

    def _squares(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """The loss as though no error were beyond the threshold; less than it where some are."""
        return (widest(gradient).square().sum(-1) / (2.0 * share * self.bend * terms.scale)).sum()

    def _largest_slope(self, terms: LossTerms, gradient: Tensor, share: float) -> float:
        return float((gradient / (share * terms.scale[:, None])).abs().amax())

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Half the step's square in the Hessian."""
        moved = widest(new.parameters) - widest(old.parameters)
        return (0.5 * self._deviation(old).square() * moved.square()).sum().to(old.parameters.dtype)

    def remainder(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Exact within the threshold; an error beyond it is taken to stay beyond."""
        if old.gradient is None:
            return self.divergence(old, new)
        moved = widest(new.parameters) - widest(old.parameters)
        slopes = widest(old.gradient) / widest(old.scale.clamp_min(torch.finfo(old.scale.dtype).tiny))[:, None]
        error = slopes / self.bend
        change = self._loss(error + moved) - self._loss(error) - slopes * moved
        return (change * widest(self._multiplier(old))).sum().to(old.parameters.dtype)

    def _loss(self, error: Tensor) -> Tensor:
        size = error.abs()
        straight = self._bound * (size - 0.5 * self.threshold)
        return torch.where(size < self.threshold, 0.5 * self.bend * error.square(), straight)
