"""The arithmetic of a step, as functions of lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kfacopt.linalg.tensors import real_views


def averaged_gradients(
    gradients: list[Tensor],
    buffers: list[Tensor],
    *,
    momentum: float,
    weight: float,
    asked: Sequence[int] | None = None,
) -> list[Tensor]:
    """Nesterov momentum on the gradient, bias-corrected; the buffers are updated in place.

    `buffer ← momentum · buffer + (1 - momentum) · g`, result `(momentum · buffer + (1 - momentum) · g) / correction`,
    where the correction makes the weights of all gradients seen sum to one. The average is taken before
    preconditioning, so that the trust region measures the step that is taken, not the noise of one batch.

    Args:
        gradients: This step's.
        buffers: Running averages, zero at first.
        momentum: Decay.
        weight: Sum of the weights of the gradients in the buffers, this step's not included (`next_weight`).
        asked: Of which the result is wanted; None: of all. The averages of the others move on, too.

    >>> averaged_gradients([torch.ones(1)], [torch.zeros(1)], momentum=0.5, weight=0.0)
    [tensor([1.])]
    """
    if not gradients:
        return []
    torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
    if asked is not None and len(asked) < len(gradients):
        gradients, buffers = [gradients[n] for n in asked], [buffers[n] for n in asked]
    if not gradients:
        return []
    result = list(torch._foreach_lerp(gradients, buffers, momentum))
    correction = next_weight(momentum, next_weight(momentum, weight))
    if correction < 1.0:
        torch._foreach_div_(result, correction)
    return result


def next_weight(momentum: float, weight: float) -> float:
    """Sum of the weights of the gradients in a running average after one more, whatever the momentum was before.

    >>> next_weight(0.9, 0.0), next_weight(0.0, 0.5)
    (0.09999999999999998, 1.0)
    """
    return momentum * weight + (1.0 - momentum)


def descend(
    parameters: Sequence[Tensor], updates: Sequence[Tensor], *, lr: float | Tensor, weight_decay: float, scale: float
) -> None:
    """`parameter ← (1 - lr · weight_decay) parameter - lr · scale · update`, in place."""
    if not parameters:
        return
    rate = float(lr)
    if weight_decay != 0.0:
        torch._foreach_mul_(list(parameters), 1.0 - rate * weight_decay)
    torch._foreach_add_(list(parameters), list(updates), alpha=-rate * scale)


def decay_cautiously(parameters: Sequence[Tensor], updates: Sequence[Tensor], rates: Sequence[float]) -> None:
    """`parameter ← (1 - rate) parameter`, in place, of the entries that the update makes smaller: those of its sign.

    Rates above one are one: no sign changes.

    Cautious weight decay (Chen et al. 2025, arXiv:2510.12402): entries that the loss wants larger are not held back.

    >>> weight = torch.tensor([2.0, 2.0, -2.0])
    >>> decay_cautiously([weight], [torch.tensor([1.0, -1.0, -1.0])], [0.25])
    >>> weight
    tensor([ 1.5000,  2.0000, -1.5000])
    """
    if not parameters:
        return
    alike = torch._foreach_mul(list(parameters), list(updates))
    torch._foreach_sign_(alike)
    torch._foreach_clamp_min_(alike, 0.0)
    torch._foreach_addcmul_(list(parameters), list(parameters), alike, [-min(rate, 1.0) for rate in rates])


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch's own AdamW on parameters that get no curvature; `states` hold exp_avg, exp_avg_sq and step.

    Of a complex number the real and the imaginary part are two, as torch has it.
    """
    if not parameters:
        return
    adamw(
        real_views(parameters),
        real_views(gradients),
        real_views([state["exp_avg"] for state in states]),
        real_views([state["exp_avg_sq"] for state in states]),
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        # One kernel for all, at a fifth of the time; on an accelerator it would want the step counts there.
        fused=all(p.device.type == "cpu" for p in parameters),
    )
