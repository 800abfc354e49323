"""The path of a step, and the loss along it on the step's own batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfacopt.linalg.tensors import all_finite, inner_product
from kfacopt.replay.linearization import BatchLinearization, moved


def at(step: Sequence[Tensor], bend: Sequence[Tensor] | None, size: float) -> list[Tensor]:
    """`size · step + ½ size² · bend`.

    >>> at([torch.ones(1)], [torch.ones(1)], 2.0)
    [tensor([4.])]
    """
    result = list(torch._foreach_mul(list(step), size))
    if bend is not None:
        torch._foreach_add_(result, list(bend), alpha=0.5 * size * size)
    return result


def loss_change(linearization: BatchLinearization, step: Sequence[Tensor]) -> float:
    """The loss after a step minus the loss before it; infinite where it is not finite."""
    with moved(linearization.parameters, step, 1.0):
        return linearization.loss_change()


def backtracked(linearization: BatchLinearization, steps: Sequence[list[Tensor]], stats: dict[str, float]) -> int:
    """Place of the last of `steps`, or of an earlier one as long as the loss is lower (Martens 2010, section 4.6)."""
    place = len(steps) - 1
    if len(steps) > 1:
        lowest = loss_change(linearization, steps[place])
        while place > 0 and (found := loss_change(linearization, steps[place - 1])) < lowest:
            place, lowest = place - 1, found
        stats["backtracked"] = float(len(steps) - 1 - place)
    return place


def bend(
    linearization: BatchLinearization,
    step: list[Tensor],
    solve: Callable[[list[Tensor]], list[Tensor]],
    probe: float,
    limit: float,
) -> list[Tensor] | None:
    """Geodesic acceleration `-(C + damping I)⁻¹ Jᵀ S Sᵀ f_vv`; None where it is too large or not finite.

    Args:
        linearization: At the start.
        step: v.
        solve: From rows `w` of each piece to `(C + damping I)⁻¹ Jᵀ S Sᵀ w`.
        probe: The second derivative is measured at `± probe · v`.
        limit: Largest `2 |a| / |v|`.
    """
    along = linearization.second_difference(step, probe)
    if linearization.processes.largest([float(not all_finite(along))])[0] > 0.0:
        return None
    result = [-x for x in solve(along)]
    large = not 4.0 * inner_product(result, result) <= limit**2 * inner_product(step, step)
    return None if large or not all_finite(result) else result
