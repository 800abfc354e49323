"""Mean-squared error as a Gaussian likelihood."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.base import Likelihood, LossTerms, independent_columns
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.precision import Precision, check_prediction, check_reduction, widest


class Gaussian(Likelihood):
    """Squared error `(f - y)²`, torch's `MSELoss`.

    It is a Gaussian of variance 1/2 around the prediction; its Hessian is 2.

    A prediction `[n ... c]` has its outputs along the last axis; `[n]` has one output per datum.

    Args:
        reduction: `"datum"` sums over everything that belongs to one datum (all axes but the first) and averages over
            data. `"mean"` averages over all numbers and `"sum"` adds them up, as torch does. `"none"` is read as
            `"mean"`, since what happens to the numbers outside the loss function cannot be seen.

    Note:
        Without a target, each term's gradient is `count` times the user's gradient. That holds while the loss is
        not rescaled (`GradScaler`, a division for gradient accumulation); optimizers find out by the value of the loss
        (`kfacopt.capture.scaling`), and weights of the data where the loop calls their `MSELoss`. A position left out
        of the loss cannot be told from one fitted perfectly: both count.

    >>> terms = Gaussian(reduction="mean").terms(torch.zeros(4, 3), target=torch.ones(4, 3))
    >>> terms.count.item(), terms.scale[0].item(), terms.gradient[0, 0].item()
    (4.0, 0.3333333432674408, -0.6666666865348816)
    """

    loss_nodes: tuple[str, ...] = ("MseLoss",)

    def __init__(self, reduction: str = "datum") -> None:
        self.reduction = check_reduction(reduction, ("datum", "mean", "sum", "none"), "Gaussian")

    def __repr__(self) -> str:
        return f"Gaussian(reduction={self.reduction!r})"

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target has the prediction's shape."""
        check_prediction(prediction, gradient, "MSELoss")
        layout = RowLayout.of(prediction, prediction.ndim - 1 if prediction.ndim > 1 else None)
        means = layout.rows(prediction.detach())
        averaged = self.reduction in ("mean", "none")
        factor = 1.0 / means.shape[1] if averaged else 1.0
        count = means.shape[0] if averaged else layout.data
        rows = None
        if target is not None:
            if target.shape != prediction.shape:
                raise ValueError(
                    f"target has shape {list(target.shape)}, prediction {list(prediction.shape)}: "
                    "MSELoss would broadcast them against each other; reshape one to the other"
                )
            rows = 2.0 * factor * (means - layout.rows(target).to(means))
        elif gradient is not None:
            rows = layout.rows(gradient) * (1.0 if self.reduction == "sum" else float(count))
        return LossTerms.of(
            layout,
            means,
            scale=means.new_full((means.shape[0],), factor),
            count=means.new_tensor(float(count)),
            gradient=rows,
            reads_target=target is not None,
        )

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

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        """Columns of sqrt(2 scale) times the identity."""
        deviation = (2.0 * terms.scale).sqrt()[:, None].expand_as(terms.parameters)
        return independent_columns(deviation, columns)

    def hessian_product(self, terms: LossTerms, vectors: Tensor) -> Tensor:
        """`2 scale v`."""
        return 2.0 * terms.scale[:, None] * vectors

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · ‖f_new - f_old‖²."""
        moved = (widest(new.parameters) - widest(old.parameters)).square().sum(-1)
        return (moved * old.scale).sum().to(old.parameters.dtype)
