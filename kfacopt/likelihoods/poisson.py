"""Counts: the Poisson likelihood."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.pointwise import Pointwise
from kfacopt.likelihoods.precision import widest


class Poisson(Pointwise):
    """Negative log-likelihood of counts, torch's `PoissonNLLLoss`.

    With `log_input` the prediction is the logarithm f of the rate, the loss `exp(f) - y f` and its Hessian `exp(f)`,
    whatever the target. Without, it is the rate f itself, which is no natural parameter: the Fisher information
    `f / (f + eps)²` stands for the Hessian. That is the generalised Gauss-Newton of the logarithm of the rate.

    Args:
        log_input: Whether the prediction is the rate's logarithm.
        full: Whether the loss has Stirling's approximation of log y!; no curvature depends on it.
        eps: Added to a rate before its logarithm is taken.
        reduction: See `Pointwise`.

    >>> terms = Poisson().terms(torch.zeros(1, 2), target=torch.tensor([[1.0, 4.0]]))
    >>> terms.gradient.tolist(), Poisson().hessian_product(terms, torch.ones(1, 2)).tolist()
    ([[0.0, -1.5]], [[0.5, 0.5]])
    """

    loss_name: ClassVar[str] = "PoissonNLLLoss"

    def __init__(self, log_input: bool = True, full: bool = False, eps: float = 1e-8, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.log_input, self.full, self.eps = bool(log_input), bool(full), float(eps)
        self.is_hessian = self.log_input

    def __repr__(self) -> str:
        return f"Poisson(log_input={self.log_input}, full={self.full}, eps={self.eps}, reduction={self.reduction!r})"

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """`exp(f) - y`, or `1 - y / (f + eps)`."""
        return numbers.exp() - target if self.log_input else 1.0 - target / (numbers + self.eps)

    def curvature(self, numbers: Tensor) -> Tensor:
        """Variance of the slope at counts of the model."""
        return numbers.exp() if self.log_input else numbers.clamp_min(0.0) / (numbers + self.eps).square()

    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> Tensor:
        """Slopes at counts drawn from the model."""
        device = terms.parameters.device if generator is None else generator.device
        rates = self._rates(terms.parameters).expand(mc_samples, -1, -1)
        # A batch that has diverged is not to end the training: its statistics are dropped as they are not finite.
        finite = rates.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
        counts = torch.poisson(finite.to(device), generator=generator).to(rates.device)
        return self.slope(terms.parameters, counts) * (self._multiplier(terms) / mc_samples).sqrt()

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """The loss at the counts that the gradient stands for."""
        numbers, multiplier = widest(terms.parameters), share * widest(self._multiplier(terms))
        slopes = gradient / multiplier
        if self.log_input:
            counts = numbers.exp() - slopes
            each = numbers.exp() - counts * numbers
        else:
            counts = (1.0 - slopes) * (numbers + self.eps)
            each = numbers - counts * (numbers + self.eps).log()
        if self.full:
            large = counts.clamp_min(1.0)
            stirling = large * large.log() - large + 0.5 * (2.0 * math.pi * large).log()
            each = each + torch.where(counts > 1.0, stirling, 0.0)
        return (multiplier * each).sum()

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · KL between the Poisson distributions before and after."""
        before, after = self._rates(widest(old.parameters)), self._rates(widest(new.parameters))
        if self.log_input:
            logarithm = widest(old.parameters) - widest(new.parameters)
            each = before * (logarithm + torch.expm1(-logarithm))
        else:
            each = before * ((before + self.eps).log() - (after + self.eps).log()) - before + after
        return (each * widest(self._multiplier(old))).sum().to(old.parameters.dtype)

    def remainder(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Of a rate: `-y (log f' - log f - (f' - f) / f)` at the counts y."""
        if self.log_input or old.gradient is None:
            return self.divergence(old, new)
        before, after = widest(old.parameters) + self.eps, widest(new.parameters) + self.eps
        multiplier = widest(self._multiplier(old))
        counts = (1.0 - widest(old.gradient) / multiplier) * before
        each = counts * ((after - before) / before - (after / before).log())
        return (each * multiplier).sum().to(old.parameters.dtype)

    def _rates(self, numbers: Tensor) -> Tensor:
        return numbers.exp() if self.log_input else numbers
