"""Losses that take log-probabilities: their curvature is that of the logits below."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.likelihoods.base import LossTerms
from kfacopt.likelihoods.categorical import Categorical
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.precision import Precision, check_prediction, check_reduction, check_target, wide_enough


class LinearInLogs(Categorical):
    """What losses that are linear in log-probabilities share."""

    is_hessian = False

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor | None:
        """Not needed: the gradient tells the target."""
        return None

    def remainder(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Nothing: the loss is linear in the log-probabilities."""
        return old.parameters.new_zeros(())


class LogCategorical(LinearInLogs):
    """Negative log-likelihood of log-probabilities, torch's `NLLLoss`.

    The loss is linear in its input z, so that its own Hessian there is zero: what bends is the `log_softmax` below.
    What stands for it is `w_y (diag p - p pᵀ)` with p = exp(z), the Hessian with respect to the logits that z was made
    of; brought back through `log_softmax` it is itself again, so that a network with `NLLLoss` of `log_softmax` has the
    curvature that it has with `CrossEntropyLoss`.

    The target is where the user's gradient is not zero; a row without any gradient is ignored.

    Args:
        class_weights: Weight of every class `[c]`, not negative.
        ignore_index: Targets of this value are left out.
        reduction: As `Categorical` has it.

    >>> z = torch.zeros(2, 2).log_softmax(1)
    >>> terms = LogCategorical().terms(z, gradient=torch.tensor([[-0.5, 0.0], [0.0, -0.5]]))
    >>> terms.count.item(), terms.gradient.tolist()
    (2.0, [[-1.0, 0.0], [0.0, -1.0]])
    """

    def __init__(self, class_weights: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(class_weights, ignore_index, 0.0, reduction)

    def __repr__(self) -> str:
        return (
            f"LogCategorical(class_weights={self.class_weights}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r})"
        )

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target is class indices."""
        check_prediction(prediction, gradient, "NLLLoss")
        axis = normalised_axis(prediction.detach(), "NLLLoss")
        if target is not None:
            # Which target belongs to which row is cross-entropy's to say.
            found = super().terms(prediction, target=target)
            layout, labels = RowLayout.of(prediction, axis), target.reshape(-1).long()
            live = labels != self.ignore_index
            return self._from_rows(layout, found.parameters, torch.where(live, labels, 0), live)
        if gradient is None:
            return super().terms(prediction)
        layout = RowLayout.of(prediction, axis)
        rows, logits = layout.rows(gradient), layout.rows(prediction.detach())
        wrong = ((rows != 0).sum(-1) > 1) | (rows > 0).any(-1)
        if bool((wrong & rows.isfinite().all(-1)).any()):
            raise ValueError(
                f"the gradient that reached the prediction {list(prediction.shape)} is not that of NLLLoss, which is "
                f"one negative number for each row of log-probabilities (axis {axis}) and zeros: pass the loss_func "
                f"that the training loop uses, and say which output it is applied to"
            )
        return self._from_rows(layout, logits, rows.argmin(-1), (rows != 0).any(-1))

    def _from_rows(self, layout: RowLayout, logits: Tensor, labels: Tensor, live: Tensor) -> LossTerms:
        weights = self._weights(logits)
        scale = live.to(logits.dtype) if weights is None else weights[labels] * live
        gradient = torch.zeros_like(logits).scatter_(-1, labels[:, None], -scale[:, None])
        return LossTerms.of(layout, logits, scale=scale, count=scale.sum(), gradient=gradient, reads_target=True)


class KullbackLeibler(LinearInLogs):
    """Divergence of target probabilities from log-probabilities, torch's `KLDivLoss`.

    As for `LogCategorical` the loss is linear in its input z, and `Σ_c t_c (diag p - p pᵀ)` with p = exp(z) stands for
    the Hessian: that of the logits below. The classes lie along the axis over which exp(z) sums to one.

    Args:
        log_target: Whether targets are log-probabilities.
        reduction: torch's: `"batchmean"` divides by the number of data, `"mean"` by that of numbers.

    Note:
        Read from the gradient, targets are taken to sum to one; what their sum differs by is a weight of the datum.

    >>> z, t = torch.zeros(1, 2).log_softmax(1), torch.tensor([[0.25, 0.75]])
    >>> terms = KullbackLeibler(reduction="batchmean").terms(z, gradient=-3.0 * t)
    >>> terms.count.item(), terms.gradient.tolist()
    (1.0, [[-0.25, -0.75]])
    """

    loss_nodes: tuple[str, ...] = ()

    def __init__(self, log_target: bool = False, reduction: str = "mean") -> None:
        super().__init__()
        self.log_target = bool(log_target)
        self.reduction = check_reduction(reduction, ("mean", "batchmean", "sum", "none"), "KullbackLeibler")

    def __repr__(self) -> str:
        return f"KullbackLeibler(log_target={self.log_target}, reduction={self.reduction!r})"

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target has the prediction's shape."""
        check_prediction(prediction, gradient, "KLDivLoss")
        layout = RowLayout.of(prediction, normalised_axis(prediction.detach(), "KLDivLoss"))
        logits, share = layout.rows(prediction.detach()), None
        averaged = self.reduction in ("mean", "none")
        factor, count = (1.0 / logits.shape[1], len(logits)) if averaged else (1.0, layout.data)
        if target is not None:
            check_target(prediction, target, "KLDivLoss")
            share = layout.rows(target.exp() if self.log_target else target).to(logits)
        elif gradient is not None:
            rows = layout.rows(gradient).to(logits)
            if bool(((rows > 0) & rows.isfinite()).any()):
                raise ValueError(
                    f"the gradient that reached the prediction {list(prediction.shape)} is not that of KLDivLoss, "
                    f"which has no positive numbers: pass the loss_func that the training loop uses"
                )
            share = rows / rows.sum(-1, keepdim=True).clamp_max(-torch.finfo(rows.dtype).tiny)
        scale = logits.new_full((len(logits),), factor) if share is None else factor * share.sum(-1)
        return LossTerms.of(
            layout,
            logits,
            scale=scale,
            count=logits.new_tensor(float(count)),
            gradient=None if share is None else -factor * share,
            reads_target=share is not None,
        )


def normalised_axis(prediction: Tensor, loss: str) -> int:
    """The axis along which exp(prediction) sums to one: 1, or the last.

    Raises:
        ValueError: If it is neither.

    >>> normalised_axis(torch.zeros(2, 3, 4).log_softmax(-1), "NLLLoss")
    2
    """
    if prediction.ndim == 0:
        raise ValueError(f"prediction is a single number, but {loss} needs an axis of classes")
    axes = [0] if prediction.ndim == 1 else sorted({1, prediction.ndim - 1})
    wide = prediction.to(wide_enough(prediction.dtype))
    # A batch that has diverged is the caller's to drop: rows with a number that is not finite are not judged.
    off = {
        axis: float((wide.logsumexp(axis).abs() * wide.isfinite().all(axis)).nan_to_num(0.0, 0.0).amax())
        for axis in axes
    }
    best = min(axes, key=off.__getitem__)
    # Three times what a probability in this data type may be off by.
    if off[best] > 3.0 * Precision.of(prediction).target:
        raise ValueError(
            f"the prediction {list(prediction.shape)} has no log-probabilities, which {loss} takes: over the classes "
            f"(axis {' or '.join(map(str, axes))}) exp(prediction) does not sum to 1 (its logarithm is off by "
            f"{off[best]:.2g}). Apply log_softmax in the model, or use CrossEntropyLoss of the logits"
        )
    return best
