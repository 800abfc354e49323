"""The metric of a matrix's own gradients, where the curvature of the loss is out of sight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.linalg.polar import PolarFactor
from kfacopt.linalg.symmetric import damped_inverse_power
from kfacopt.linalg.tensors import held_as_rows
from kfacopt.optim.rule import next_weight
from kfacopt.optim.step.base import Step
from kfacopt.optim.step.stacks import Stack

# On a physics-informed network the running averages hardly matter (0.8 to 0.99 of the gradient of each step), nor does
# it whether roots are of each step or of one in ten; damping does: from 0.3 of the mean to 0.03 the loss halved.
_DECAY = 0.8
_GRADIENT_EVERY = 4
_REFRESH_EVERY = 12
_ALL_UNTIL = 5
_DAMPING = 0.03
_WIDEST = 1024
"""A longer side is left as it is: its root would cost more than the step."""


def steepest_by_gradients(step: Step, stack: Stack, polar: PolarFactor) -> Tensor:
    """`L polar(L M R) R` with `L = E[g gᵀ]^-½` and `R = E[gᵀ g]^-½` of the matrices' gradients g, both damped.

    A network whose forward takes its own derivatives acts on the loss through the calls of its layers and through all
    those derivatives: no Kronecker factors of the calls are its curvature. The second moments of the gradient have all
    of it in them. They are Shampoo's (Gupta et al. 2018), to the power at which their Kronecker product stands for the
    gradient's second moment as a whole (Lin et al. 2025, arXiv:2509.03378). In noise they say more of the noise than of
    the loss, and are no good for classifiers (digits 1.1 to 1.6 where S = I has 0.37 and the Fisher information 0.20);
    physics-informed losses have little.

    Args:
        step: Gradients and the optimizer's state, in which the moments and their roots are kept for each parameter.
        stack: Plain matrices `[b *k o i]`, the momentum M.
        polar: The polar factor of a batch of matrices.
    """
    holders = [holder for holder in stack.holders if isinstance(holder, nn.Parameter)]
    owns = [step.state[parameter] for parameter in holders]
    shape = stack.matrices.shape[1:]
    sides = [side for side, size in (("left", shape[-2]), ("right", shape[-1])) if size <= _WIDEST]
    new = any(own.get(f"{side}_moments", 0) < _ALL_UNTIL for own in owns for side in sides)
    if new or step.number % _GRADIENT_EVERY == 0:
        gradients = torch.stack([step.gradients[p].reshape(shape) for p in holders]).to(stack.matrices.dtype)
        for side in sides:
            matrices = gradients if side == "left" else gradients.mT
            _renew(owns, side, matrices @ matrices.mT, holders[0].dtype, step.number)
    dtype = stack.matrices.dtype
    left, right = (_together(owns, f"{side}_root").to(dtype) if side in sides else None for side in ("left", "right"))
    return _between(left, polar(_between(left, stack.matrices, right)), right)


def _between(left: Tensor | None, matrices: Tensor, right: Tensor | None) -> Tensor:
    product = matrices if left is None else left @ matrices
    return product if right is None else product @ right


def _renew(owns: Sequence[dict[str, Any]], side: str, moments: Tensor, dtype: torch.dtype, number: int) -> None:
    """Moves the moments `[b *k d d]` of one side on, and renews the inverse roots that are due."""
    for own in owns:
        for name in (f"{side}_moment", f"{side}_root"):
            if name not in own:
                own[name] = torch.zeros_like(moments[0], dtype=dtype)
    average, roots = _together(owns, f"{side}_moment"), _together(owns, f"{side}_root")
    average.lerp_(moments.to(dtype), 1.0 - _DECAY)
    due: list[int] = []
    for place, own in enumerate(owns):
        seen: int = own.get(f"{side}_moments", 0)
        own[f"{side}_weight"] = next_weight(_DECAY, own.get(f"{side}_weight", 0.0))
        own[f"{side}_moments"] = seen + 1
        if seen < _ALL_UNTIL or number % _REFRESH_EVERY == 0:
            due.append(place)
    if due:
        weights = moments.new_tensor([owns[place][f"{side}_weight"] for place in due])
        mean = average[due].to(moments.dtype) / weights.view(-1, *[1] * (moments.ndim - 1))
        # The tiny number is for gradients of zero, whose root would not be finite.
        damping = _DAMPING * mean.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(mean.dtype).tiny ** 0.5
        roots[due] = damped_inverse_power(mean, damping, 0.5).value.to(dtype)


def _together(owns: Sequence[dict[str, Any]], name: str) -> Tensor:
    """A tensor of each parameter's state as one, of which they hold views."""
    held = [own[name] for own in owns]
    whole, views = held_as_rows(held)
    if views is not held:
        for own, view in zip(owns, views, strict=True):
            own[name] = view
    return whole
