"""Binary cross-entropy on probabilities: a Bernoulli likelihood whose prediction is no logit."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.pointwise import Pointwise
from kfacopt.likelihoods.precision import widest


class BernoulliProbability(Pointwise):
    """Binary cross-entropy on probabilities p, torch's `BCELoss`, behind a sigmoid within the model.

    A probability is no natural parameter, and the loss' own Hessian depends on the target: the Fisher information
    `1 / (p (1 - p))` stands for it. Brought back through the sigmoid it is the Hessian of `BCEWithLogitsLoss`. As in
    torch's backward, `p (1 - p)` is at least 1e-12. Targets may lie between 0 and 1.

    Args:
        reduction: See `Pointwise`.

    >>> terms = BernoulliProbability().terms(torch.full((1, 2), 0.5), target=torch.tensor([[1.0, 0.0]]))
    >>> terms.gradient.tolist(), BernoulliProbability().hessian_product(terms, torch.ones(1, 2)).tolist()
    ([[-1.0, 1.0]], [[2.0, 2.0]])
    """

    loss_name: ClassVar[str] = "BCELoss"
    is_separable: ClassVar[bool] = True
    is_hessian = False

    def __repr__(self) -> str:
        return f"BernoulliProbability(reduction={self.reduction!r})"

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """`(p - y) / (p (1 - p))`."""
        return (numbers - target) * self.curvature(numbers)

    def curvature(self, numbers: Tensor) -> Tensor:
        """Variance of the slope at labels of the model."""
        return (numbers * (1.0 - numbers)).clamp_min(_LEAST).reciprocal()

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """The loss at the targets that the gradient stands for."""
        p, multiplier = widest(terms.parameters), share * widest(self._multiplier(terms))
        return (multiplier * _cross_entropy(p, self._targets(p, gradient / multiplier))).sum()

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · KL between the Bernoulli distributions before and after."""
        before, after = widest(old.parameters), widest(new.parameters)
        each = _cross_entropy(after, before) - _cross_entropy(before, before)
        return (each * widest(self._multiplier(old))).sum().to(old.parameters.dtype)

    def remainder(self, old: LossTerms, new: LossTerms) -> Tensor:
        """What the loss at its targets changes by, less its linear part."""
        if old.gradient is None:
            return self.divergence(old, new)
        before, after, multiplier = widest(old.parameters), widest(new.parameters), widest(self._multiplier(old))
        slopes = widest(old.gradient) / multiplier
        targets = self._targets(before, slopes)
        each = _cross_entropy(after, targets) - _cross_entropy(before, targets) - slopes * (after - before)
        return (each * multiplier).sum().to(old.parameters.dtype)

    def _targets(self, p: Tensor, slopes: Tensor) -> Tensor:
        return p - slopes / self.curvature(p)


_LEAST = 1e-12
"""Of p (1 - p), as torch has it."""


def _cross_entropy(p: Tensor, y: Tensor) -> Tensor:
    """Logarithms no lower than -100, as torch has them."""
    found: Tensor = -(y * p.log().clamp_min(-100.0) + (1.0 - y) * torch.log1p(-p).clamp_min(-100.0))
    return found
