"""The arithmetic of a step, as functions of lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum of the inner products of pairs of tensors, a tensor without axes.

    >>> inner_product([torch.ones(2)], [torch.tensor([1.0, 2.0])]).item()
    3.0
    """
    products = [torch.dot(a.reshape(-1), b.reshape(-1).to(a.dtype)) for a, b in zip(left, right, strict=True)]
    return torch.stack([p.to(torch.promote_types(p.dtype, torch.float32)) for p in products]).sum()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every entry of every tensor is finite; one synchronisation with the device.

    >>> all_finite([torch.tensor([1.0, float("nan")])])
    False
    """
    if not tensors:
        return True
    # A sum of absolute values is finite exactly if every entry is (barring overflow, which is as bad).
    return bool(torch.stack([n.float() for n in torch._foreach_norm(list(tensors), 1)]).sum().isfinite())


def kl_scale(squared_length: float, kl_clip: float) -> float:
    """Factor that keeps a step of squared length `lr² uᵀ m` within `kl_clip`.

    `min(1, sqrt(kl_clip / squared_length))`: `½ squared_length` is the step's Kullback-Leibler divergence under the
    damped quadratic model (Ba et al. 2017, section 5; Osawa et al. 2019).

    >>> kl_scale(4.0, kl_clip=1.0), kl_scale(0.5, kl_clip=1.0)
    (0.5, 1.0)
    """
    if not math.isfinite(squared_length):
        return math.nan
    if squared_length <= kl_clip or squared_length <= 0.0:
        return 1.0
    return float((kl_clip / squared_length) ** 0.5)


def relative_scales(
    parameters: Sequence[Sequence[Tensor]], updates: Sequence[Sequence[Tensor]], *, lr: float, relative_clip: float
) -> list[float]:
    """For each layer, the factor that keeps its step within `relative_clip` times the length of its parameters.

    A layer-wise trust region in the manner of LARS (You et al. 2017). It bounds steps that stale curvature, for which a
    bound on the quadratic model is no bound, would make too long. Parameters count as at least 0.01 on average, so that
    a layer that starts at zero can leave it.

    Args:
        parameters: Of each layer.
        updates: `u` of each, the step being `lr u`.
        lr: Learning rate.
        relative_clip: Bound on the length of the step over that of the parameters.

    >>> relative_scales([[torch.ones(4)]], [[torch.full((4,), 2.0)]], lr=0.5, relative_clip=0.1)
    [0.1]
    """
    flat_parameters = [p for layer in parameters for p in layer]
    flat_updates = [u for layer in updates for u in layer]
    norms = torch._foreach_norm([*flat_parameters, *flat_updates])
    lengths = torch.stack([norm.double() for norm in norms]).square().tolist()
    scales, start = [], 0
    for layer in parameters:
        held = slice(start, start + len(layer))
        moved = slice(len(flat_parameters) + start, len(flat_parameters) + start + len(layer))
        floor = 1e-4 * sum(p.numel() for p in layer)
        allowed = relative_clip * max(sum(lengths[held]), floor) ** 0.5
        length = lr * sum(lengths[moved]) ** 0.5
        scales.append(min(1.0, allowed / length) if length > 0.0 else 1.0)
        start += len(layer)
    return scales


def averaged_gradients(
    gradients: Sequence[Tensor], buffers: Sequence[Tensor], *, momentum: float, weight: float
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

    >>> averaged_gradients([torch.ones(1)], [torch.zeros(1)], momentum=0.5, weight=0.0)
    [tensor([1.])]
    """
    if not gradients:
        return []
    torch._foreach_lerp_(list(buffers), list(gradients), 1.0 - momentum)
    result = list(torch._foreach_lerp(list(gradients), list(buffers), momentum))
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
    """torch's own AdamW on parameters that get no curvature; `states` hold exp_avg, exp_avg_sq and step."""
    if not parameters:
        return
    adamw(
        list(parameters),
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
