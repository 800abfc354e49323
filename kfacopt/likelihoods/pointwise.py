"""What losses of every number of a prediction by itself share."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.base import Likelihood, LossTerms, independent_columns
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.precision import Precision, check_prediction, check_reduction, check_target


class Pointwise(Likelihood):
    """A loss that is a sum over the numbers of a prediction, each with a target of its own: its Hessian is diagonal.

    A prediction `[n ... c]` has its outputs along the last axis; `[n]` has one output per datum. A subclass says what
    the slope and the curvature of one number's loss are.

    Args:
        reduction: `"datum"` sums over everything that belongs to one datum (all axes but the first) and averages over
            data. `"mean"` averages over all numbers and `"sum"` adds them up, as torch does. `"none"` is read as
            `"mean"`, since what happens to the numbers outside the loss function cannot be seen.
    """

    loss_name: ClassVar[str]
    """As torch has it, for messages."""

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = check_reduction(reduction, ("datum", "mean", "sum", "none"), type(self).__name__)

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target has the prediction's shape."""
        check_prediction(prediction, gradient, self.loss_name)
        layout = RowLayout.of(prediction, prediction.ndim - 1 if prediction.ndim > 1 else None)
        numbers = layout.rows(prediction.detach())
        averaged = self.reduction in ("mean", "none")
        factor = 1.0 / numbers.shape[1] if averaged else 1.0
        count = numbers.shape[0] if averaged else layout.data
        slopes = rows = None
        if target is not None:
            check_target(prediction, target, self.loss_name)
            slopes = self.slope(numbers, layout.rows(target).to(numbers))
            rows = factor * slopes
        elif gradient is not None:
            rows = layout.rows(gradient) * (1.0 if self.reduction == "sum" else float(count))
            slopes = self.plausible(rows / factor, Precision.of(prediction, gradient))
        return LossTerms.of(
            layout,
            numbers,
            scale=numbers.new_full((numbers.shape[0],), factor),
            count=numbers.new_tensor(float(count)),
            gradient=rows,
            reads_target=target is not None,
            output_scale=None if slopes is None else self.output_scale(slopes, Precision.of(prediction)),
        )

    @abstractmethod
    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Derivative of each number's loss, of the numbers' shape."""

    @abstractmethod
    def curvature(self, numbers: Tensor) -> Tensor:
        """What stands for the second derivative of each number's loss; it does not depend on the target."""

    def output_scale(self, slopes: Tensor, precision: Precision) -> Tensor | None:
        """What the curvature is multiplied with, if that depends on the slope; None for one."""
        return None

    def plausible(self, slopes: Tensor, precision: Precision) -> Tensor:
        """Slopes read from the gradient of a loss that may have been rescaled."""
        return slopes

    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> Tensor:
        """Random signs times the root of the Hessian: for all such losses unbiased."""
        like = terms.parameters
        device = like.device if generator is None else generator.device
        signs = torch.randint(2, (mc_samples, *like.shape), generator=generator, device=device)
        vectors: Tensor = (2.0 * signs - 1.0).to(like) * self._deviation(terms) / mc_samples**0.5
        return vectors

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        """Columns of diagonal matrices."""
        return independent_columns(self._deviation(terms), columns)

    def hessian_product(self, terms: LossTerms, vectors: Tensor) -> Tensor:
        """`scale curvature v`."""
        return self._multiplier(terms) * self.curvature(terms.parameters) * vectors

    def _multiplier(self, terms: LossTerms) -> Tensor:
        """`[m 1]` or `[m c]`."""
        scale = terms.scale[:, None]
        return scale if terms.output_scale is None else scale * terms.output_scale

    def _deviation(self, terms: LossTerms) -> Tensor:
        """Square root of each number's Hessian, `[m c]`."""
        return (self._multiplier(terms) * self.curvature(terms.parameters)).sqrt()
