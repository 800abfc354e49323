"""What a loss function's mean divides by."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

OVER_NUMBERS = (
    nn.MSELoss,
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
)
"""torch's losses of each number of a prediction, whose mean is over all of them."""


def mean_divisor(loss_func: Any, target: Tensor) -> float | None:
    """What torch's loss with `reduction="mean"` divides the sum over its terms by, up to a constant factor.

    With it, means over mini-batches can be combined to the mean over all of them, as though they were one batch: class
    weights and ignored targets count as they do there.

    Returns:
        Class weights of the targets that are not ignored, summed (cross-entropy with class indices); otherwise the
        number of targets. None for a loss function that is not torch's, or not a mean over targets.

    >>> import torch
    >>> mean_divisor(nn.CrossEntropyLoss(), torch.tensor([0, -100, 1]))
    2.0
    >>> mean_divisor(nn.MSELoss(), torch.zeros(4, 3))
    12.0
    """
    if isinstance(loss_func, (nn.CrossEntropyLoss, nn.NLLLoss)) and not target.is_floating_point():
        kept = target[target != loss_func.ignore_index]
        return float(kept.numel() if loss_func.weight is None else loss_func.weight[kept].sum())
    if isinstance(loss_func, nn.KLDivLoss):
        return float(len(target) if loss_func.reduction == "batchmean" else target.numel())
    if isinstance(loss_func, (nn.CrossEntropyLoss, *OVER_NUMBERS, nn.SoftMarginLoss)):
        return float(target.numel())
    return None
