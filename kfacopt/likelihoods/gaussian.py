"""Mean-squared error as a Gaussian likelihood."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.pointwise import Pointwise
from kfacopt.likelihoods.precision import Precision, widest


class Gaussian(Pointwise):
    """Squared error `(f - y)²`, torch's `MSELoss`.

    It is a Gaussian of variance 1/2 around the prediction; its Hessian is 2.

    Args:
        reduction: See `Pointwise`.

    Note:
        Without a target, each term's gradient is `count` times the user's gradient. That holds while the loss is
        not rescaled (`GradScaler`, a division for gradient accumulation); optimizers find out by the value of the loss
        (`kfacopt.capture.scaling`), and weights of the data where the loop calls their `MSELoss`. A position left out
        of the loss cannot be told from one fitted perfectly: both count.

    >>> terms = Gaussian(reduction="mean").terms(torch.zeros(4, 3), target=torch.ones(4, 3))
    >>> terms.count.item(), terms.scale[0].item(), terms.gradient[0, 0].item()
    (4.0, 0.3333333432674408, -0.6666666865348816)
    """

    loss_name: ClassVar[str] = "MSELoss"
    loss_nodes: tuple[str, ...] = ("MseLoss",)

    def __init__(self, reduction: str = "datum") -> None:
        super().__init__(reduction)

    def __repr__(self) -> str:
        return f"Gaussian(reduction={self.reduction!r})"

    def slope(self, numbers: Tensor, target: Tensor) -> Tensor:
        """`2 (f - y)`."""
        return 2.0 * (numbers - target)

    def curvature(self, numbers: Tensor) -> Tensor:
        """2."""
        return torch.full_like(numbers, 2.0)

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor:
        """Sum of share · scale · (f - y)², from the gradient u = 2 share · scale · (f - y)."""
        squares = gradient.square().sum(-1) / (4.0 * share * terms.scale)
        return squares.sum()

    def factor_of_value(
        self, terms: LossTerms, gradient: Tensor, share: float, value: float, precision: Precision
    ) -> float | None:
        """`Σ u² / (4 share scale L)`: it grows with the factor as `Σ u²` does."""
        if not value > 0.0:
            return None
        return float(self.loss_value(terms, gradient, share)) / value

    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> Tensor:
        """Gradients at labels from N(f, 1/2): twice the deviation, of variance 2."""
        device = terms.parameters.device if generator is None else generator.device
        noise = torch.randn(
            mc_samples,
            *terms.parameters.shape,
            generator=generator,
            device=device,
            dtype=terms.parameters.dtype,
        )
        return noise.to(terms.parameters.device) * (terms.scale * (2.0 / mc_samples)).sqrt()[:, None]

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · ‖f_new - f_old‖²."""
        moved = (widest(new.parameters) - widest(old.parameters)).square().sum(-1)
        return (moved * old.scale).sum().to(old.parameters.dtype)
