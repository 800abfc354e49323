"""A bound on the step's Kullback-Leibler divergence, and on each layer's relative length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from kfacopt.exchange import norms_of_shards
from kfacopt.fsdp import is_sharded
from kfacopt.linalg.tensors import inner_product, lengths
from kfacopt.optim.groups import peak_rate
from kfacopt.optim.step.base import ByParameter, Step, StepLength, Updates
from kfacopt.sharding import wholes


class TrustRegion(StepLength):
    """Shortens a step to `lr² uᵀ (C + damping I) u ≤ kl_clip`: one factor for all layers.

    The left side is twice the step's Kullback-Leibler divergence under the damped quadratic model (Ba et al. 2017,
    section 5; Osawa et al. 2019). It is that of the plain loss: a constant factor of the user's, where it can be told,
    is divided out, so that it does not change the step. Where the direction is Newton's, `(C + damping I) u` is its
    momentum and the bound costs nothing; otherwise the backend multiplies. Both bounds hold at the highest learning
    rate that a group has had or that its scheduler announces, so that a schedule shortens bounded steps too and raising
    `lr` does not lift the bounds.

    Args:
        kl_clip: The bound; None: no bound. A param group's `kl_clip` from then on; the first group's counts.
        relative_clip: Bound on the length of each layer's step over that of its parameters; None: no bound. A param
            group's `relative_clip` from then on.

    >>> TrustRegion(kl_clip=0.03).defaults()
    {'kl_clip': 0.03, 'relative_clip': inf}
    """

    reads_shards = True

    def __init__(self, kl_clip: float | None = 0.03, relative_clip: float | None = None) -> None:
        self._defaults = {
            "kl_clip": math.inf if kl_clip is None else kl_clip,
            "relative_clip": math.inf if relative_clip is None else relative_clip,
        }
        self._report: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"TrustRegion(kl_clip={self._defaults['kl_clip']}, relative_clip={self._defaults['relative_clip']})"

    def defaults(self) -> dict[str, float]:
        return dict(self._defaults)

    def health(self) -> dict[str, float]:
        """`kl_scale`, what the last step was shortened by, and `kl`, its divergence, where it had to be known."""
        return dict(self._report)

    def scaled(self, step: Step, updates: Updates) -> Updates | None:
        for group in step.groups:
            if math.isfinite(group["relative_clip"]):
                updates = updates.scaled_apart(_relative_factors(step, group, updates))
        clip, length = float(step.groups[0]["kl_clip"]), None
        if math.isfinite(clip) or updates.image is not None or updates.products is not None:
            length = squared_length(step, updates) / step.loss_factor
            updates = updates.scaled(scale := kl_scale(length, clip))
            if not math.isfinite(scale):
                return None
        # Without a bound, or a divergence that costs nothing, what is left to see to is that the step is a number.
        found = updates.as_promised() if length is None or updates.prospect is not None else updates
        if found is not None:
            self._report = {"kl_scale": found.scale}
            if length is not None:
                self._report["kl"] = 0.5 * found.scale**2 * length
        return found


def squared_length(step: Step, updates: Updates) -> float:
    """`Σ lr² uᵀ (C + damping I) u` over all updates, at each group's highest learning rate."""
    products = updates.products
    if products is None:
        # Of a step that was divided, whose direction is not Newton's, all are gathered: the backend multiplies wholes.
        tensors = wholes(updates.tensors)
        image = step.multiply(tensors) if updates.image is None else updates.image
        total = 0.0
        for group in step.groups:
            present = [p for p in group["params"] if p in tensors and p in image]
            total += peak_rate(group) ** 2 * inner_product([tensors[p] for p in present], [image[p] for p in present])
        return total
    rates = {p: peak_rate(group) for group in step.groups for p in group["params"] if p in products}
    return sum((rate * rate * products[p] for p, rate in rates.items()), 0.0)


def kl_scale(squared_length: float, kl_clip: float) -> float:
    """Factor `min(1, sqrt(kl_clip / squared_length))` that keeps a step within `kl_clip`; not a number for such a step.

    >>> kl_scale(4.0, kl_clip=1.0), kl_scale(0.5, kl_clip=1.0)
    (0.5, 1.0)
    """
    if not math.isfinite(squared_length):
        return math.nan
    if squared_length <= kl_clip or squared_length <= 0.0:
        return 1.0
    return float((kl_clip / squared_length) ** 0.5)


def _relative_factors(step: Step, group: dict[str, Any], updates: Updates) -> dict[nn.Parameter, float]:
    here = {id(p) for p in group["params"] if p in updates.tensors}
    parts = [[p for p in layer.parameters.values() if id(p) in here] for layer in step.layers]
    parts = [part for part in parts if part]
    lists = [[updates.tensors[p] for p in part] for part in parts]
    own: ByParameter = {p: p.detach() for part in parts for p in part}
    divided = any(is_sharded(update) for of_layer in lists for update in of_layer)
    if not divided:
        own = wholes(own)
    held = [[own[p] for p in part] for part in parts]
    scales = relative_scales(
        held,
        lists,
        lr=peak_rate(group),
        relative_clip=float(group["relative_clip"]),
        measured=partial(norms_of_shards, step.processes) if divided else lengths,
    )
    factors: dict[nn.Parameter, float] = {}
    for part, scale in zip(parts, scales, strict=True):
        # What several layers have rows of is bounded by the strictest of them.
        factors |= {p: min(scale, factors.get(p, scale)) for p in part}
    return factors


def relative_scales(
    parameters: Sequence[Sequence[Tensor]],
    updates: Sequence[Sequence[Tensor]],
    *,
    lr: float,
    relative_clip: float,
    measured: Callable[[Sequence[Tensor]], Sequence[float]] = lengths,
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
        measured: The norms of tensors.

    >>> import torch
    >>> relative_scales([[torch.ones(4)]], [[torch.full((4,), 2.0)]], lr=0.5, relative_clip=0.1)
    [0.1]
    """
    flat_parameters = [p for layer in parameters for p in layer]
    flat_updates = [u for layer in updates for u in layer]
    if not flat_parameters:
        return []
    squares = [norm * norm for norm in measured([*flat_parameters, *flat_updates])]
    scales, start = [], 0
    for layer in parameters:
        held = slice(start, start + len(layer))
        moved = slice(len(flat_parameters) + start, len(flat_parameters) + start + len(layer))
        floor = 1e-4 * sum(p.numel() for p in layer)  # of a mean square of 0.01², see above
        allowed = relative_clip * max(sum(squares[held]), floor) ** 0.5
        length = lr * sum(squares[moved]) ** 0.5
        scales.append(min(1.0, allowed / length) if length > 0.0 else 1.0)
        start += len(layer)
    return scales
