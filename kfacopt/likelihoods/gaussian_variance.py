"""A Gaussian whose variance is predicted beside its mean: torch's `GaussianNLLLoss`, a likelihood for each of the two.

The Fisher information of mean and variance has no entry between the two, so that the curvature is the sum of one pass
from either prediction.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.pointwise import Pointwise
from kfacopt.likelihoods.precision import widest

MEAN, VARIANCE = "mean", "variance"


class GaussianMean(Pointwise):
    """`½ (f - y)² / v` as a function of the mean f: its Hessian is 1/v, with the variance v predicted beside it.

    Args:
        eps: Smallest variance, as torch has it.
        reduction: See `Pointwise`.

    >>> likelihood = GaussianMean().beside({"variance": torch.tensor([[4.0]])})
    >>> terms = likelihood.terms(torch.zeros(1, 1), target=torch.ones(1, 1))
    >>> terms.gradient.item(), likelihood.hessian_product(terms, torch.ones(1, 1)).item()
    (-0.25, 0.25)
    """

    loss_name: ClassVar[str] = "GaussianNLLLoss"
    is_hessian = False  # not of mean and variance together

    def __init__(self, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.eps, self._variance = eps, torch.ones(())

    def __repr__(self) -> str:
        return f"GaussianMean(eps={self.eps}, reduction={self.reduction!r})"

    def beside(self, predictions: Mapping[str, Tensor]) -> GaussianMean:
        """See `Likelihood.beside`."""
        result = copy.copy(self)
        result._variance = predictions[VARIANCE]
        return result

    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target has the prediction's shape."""
        found, variance = super().terms(prediction, gradient=gradient, target=target), self._variance
        if variance.ndim == prediction.ndim - 1:
            variance = variance.unsqueeze(-1)  # as torch does
        assert found.rows is not None
        precise = found.rows(variance.detach().broadcast_to(prediction.shape)).clamp_min(self.eps).reciprocal()
        if target is not None and found.gradient is not None:
            found = found.with_gradient(found.gradient * precise)
        return found.with_output_scale(precise)

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """The error; `terms` divides it by the variance."""
        return numbers - target

    def curvature(self, numbers: Tensor) -> Tensor:
        """One; `output_scale` has the variance."""
        return torch.ones_like(numbers)

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """Nothing: the variance's gradient tells the whole loss."""
        return terms.parameters.new_zeros(())

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · ½ (f_new - f_old)² / v, at the old variance."""
        moved = widest(new.parameters) - widest(old.parameters)
        return (0.5 * self._multiplier(old) * moved.square()).sum().to(old.parameters.dtype)


class GaussianVariance(Pointwise):
    """`½ log v + ½ (f - y)² / v` as a function of the variance v, with the Fisher information `1 / (2 v²)`.

    That stands for the Hessian, which itself, `((f - y)² / v - ½) / v²`, is negative where the error is small.

    Args:
        full: Whether the loss has the constant `½ log 2π`.
        eps: Smallest variance, as torch has it.
        reduction: See `Pointwise`.

    >>> likelihood = GaussianVariance()
    >>> terms = likelihood.terms(torch.full((1, 1), 0.5))
    >>> likelihood.hessian_product(terms, torch.ones(1, 1)).item()
    2.0
    """

    loss_name: ClassVar[str] = "GaussianNLLLoss"
    is_hessian = False

    def __init__(self, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.full, self.eps = full, eps

    def __repr__(self) -> str:
        return f"GaussianVariance(full={self.full}, eps={self.eps}, reduction={self.reduction!r})"

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """With the squared error as the target."""
        variance = numbers.clamp_min(self.eps)
        return 0.5 * (1.0 - target / variance) / variance

    def curvature(self, numbers: Tensor) -> Tensor:
        """`1 / (2 v²)`."""
        return 0.5 / numbers.clamp_min(self.eps).square()

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """The loss at the squared error that the gradient stands for."""
        variance, multiplier = widest(terms.parameters).clamp_min(self.eps), share * widest(self._multiplier(terms))
        ratio = 1.0 - 2.0 * variance * gradient / multiplier
        constant = 0.5 * math.log(2.0 * math.pi) if self.full else 0.0
        return (multiplier * (0.5 * variance.log() + 0.5 * ratio + constant)).sum()

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · ½ (v / v' - 1 + log(v' / v))."""
        before, after = (widest(one.parameters).clamp_min(self.eps) for one in (old, new))
        each = 0.5 * (before / after - 1.0 + (after / before).log())
        return (each * self._multiplier(old)).sum().to(old.parameters.dtype)


def gaussian_pair(loss: nn.GaussianNLLLoss) -> dict[str, Pointwise]:
    """The likelihoods of both predictions, by name."""
    return {
        MEAN: GaussianMean(loss.eps, loss.reduction),
        VARIANCE: GaussianVariance(loss.full, loss.eps, loss.reduction),
    }
