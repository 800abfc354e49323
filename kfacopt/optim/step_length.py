"""How long a step may be: bounds on each layer's step and the measure of the whole step's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kfacopt.layers.layer import Layer
from kfacopt.optim import rule
from kfacopt.optim.groups import Groups


def bound_layers(
    groups: Groups,
    layers: Sequence[Layer],
    averaged: Mapping[nn.Parameter, Tensor],
    updates: dict[nn.Parameter, Tensor],
) -> float:
    """Bound each layer's step by `relative_clip` in place; return the squared length `Σ lr² uᵀ m` of the whole step.

    Both with each group's learning rate before any schedule that lowers it: a schedule then shortens bounded steps
    too, and raising `lr` by hand does not lift the bounds.
    """
    total = 0.0
    for group in groups:
        rate = max(float(group["base_lr"]), float(group["lr"]))
        present = [p for p in group["params"] if p in updates]
        if not present:
            continue
        if math.isfinite(group["relative_clip"]):
            here = {id(p) for p in present}
            parts = [[p for p in layer.parameters.values() if id(p) in here] for layer in layers]
            _bound(list(filter(None, parts)), updates, rate, float(group["relative_clip"]))
        inner = rule.inner_product([updates[p] for p in present], [averaged[p] for p in present])
        total += rate**2 * float(inner)
    return total


def _bound(
    parts: Sequence[Sequence[nn.Parameter]], updates: dict[nn.Parameter, Tensor], rate: float, relative_clip: float
) -> None:
    lists = [[updates[p] for p in part] for part in parts]
    scales = rule.relative_scales(parts, lists, lr=rate, relative_clip=relative_clip)
    for part, scale in zip(parts, scales, strict=True):
        for p in part:
            updates[p] = updates[p] * scale
