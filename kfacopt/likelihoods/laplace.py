"""The absolute error as a Laplace likelihood."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.pointwise import Pointwise
from kfacopt.likelihoods.precision import widest


class Laplace(Pointwise):
    """Absolute error `|f - y|`, torch's `L1Loss`: a Laplace distribution of scale one around the prediction.

    The loss is straight but for its kink at f = y, so that its own Hessian is zero wherever it exists and no step could
    be made of it: all curvature is in the kinks. What stands for it is the Fisher information, the second moment of
    the slope ±1, which is one. It is the expectation, over labels of the model, of the kinks' curvature `2 δ(f - y)`.

    Args:
        reduction: See `Pointwise`.

    >>> terms = Laplace().terms(torch.zeros(2, 1), target=torch.tensor([[3.0], [-1.0]]))
    >>> terms.gradient.tolist(), Laplace().hessian_product(terms, torch.ones(2, 1)).tolist()
    ([[-1.0], [1.0]], [[1.0], [1.0]])
    """

    is_level: ClassVar[bool] = True
    loss_name: ClassVar[str] = "L1Loss"
    is_hessian = False

    def __repr__(self) -> str:
        return f"Laplace(reduction={self.reduction!r})"

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """The error's sign."""
        return (numbers - target).sign()

    def curvature(self, numbers: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(numbers)

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · (|d| + exp(-|d|) - 1), d the change of the prediction."""
        moved = (widest(new.parameters) - widest(old.parameters)).abs()
        each = moved + torch.expm1(-moved)
        return (each.sum(-1) * old.scale).sum().to(old.parameters.dtype)
