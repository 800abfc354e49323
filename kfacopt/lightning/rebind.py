"""Moving learning-rate schedulers from one optimizer to another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, ReduceLROnPlateau

Scheduler = LRScheduler | ReduceLROnPlateau

# What schedulers of torch's hold of learning rates: lists with a rate for each group, single rates, and rates that they
# leave in the groups themselves.
_RATES_OF_GROUPS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SINGLE_RATES = ("eta_min", "default_min_lr")
_RATES_IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")


def rebind_schedulers(schedulers: Sequence[Scheduler], old: Optimizer, new: Optimizer) -> list[Scheduler]:
    """Make learning-rate schedulers drive another optimizer, from where they stand.

    A scheduler keeps its class, its progress and the shape of its curve. The scale is the new optimizer's: the learning
    rate that it was made with takes the place of the old optimizer's base learning rate (for `OneCycleLR` and
    `CyclicLR`: of their `max_lr`), and every rate that the scheduler holds, such as `eta_min` or `min_lr`, is
    multiplied by the same ratio. What a scheduler does to momentum is left out: that too was meant for the old
    optimizer.

    Args:
        schedulers: All that drive `old`; they are not changed, but should not be stepped any more.
        old: The optimizer that they drive.
        new: The one that they are to drive; its groups' rates are set to where the schedules stand.

    Returns:
        The new schedulers, in the same order.

    Raises:
        ValueError: The optimizers have different numbers of param groups, and the old one's groups do not all have the
            same learning rate; or the old learning rate is zero.

    >>> import torch
    >>> from torch.optim.lr_scheduler import StepLR
    >>> weight = torch.zeros(1, requires_grad=True)
    >>> adam, sgd = torch.optim.Adam([weight], lr=1e-3), torch.optim.SGD([weight], lr=0.5)
    >>> (scheduler,) = rebind_schedulers([StepLR(adam, step_size=1, gamma=0.1)], adam, sgd)
    >>> sgd.step()
    >>> scheduler.step()
    >>> sgd.param_groups[0]["lr"]
    0.05
    """
    if not schedulers:
        return []
    sources = _matching_groups(schedulers, old, new)
    scales = []
    for index, group in zip(sources, new.param_groups, strict=True):
        reference = _reference_rate(schedulers, old.param_groups[index], index)
        if reference == 0:
            raise ValueError(
                "the learning rate of the optimizer that is replaced is 0, so the scale of its schedule cannot be "
                "carried over: give it a positive learning rate"
            )
        scales.append(float(group["lr"]) / reference)
    # A constant schedule, for what torch's constructor does to the optimizer: it wraps `step`, by which schedulers know
    # whether the optimizer has stepped before them.
    LambdaLR(new, lambda _: 1.0)
    for index, group, scale in zip(sources, new.param_groups, scales, strict=True):
        for name in _RATES_IN_GROUPS:
            if name in old.param_groups[index]:
                rate = float(old.param_groups[index][name]) * scale
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(rate)
                else:
                    group[name] = rate
    return [_rebound(scheduler, new, sources, scales) for scheduler in schedulers]


def _matching_groups(schedulers: Sequence[Scheduler], old: Optimizer, new: Optimizer) -> list[int]:
    """For each group of the new optimizer, the number of the old one's that it follows."""
    olds, news = len(old.param_groups), len(new.param_groups)
    if olds == news:
        return list(range(olds))
    curves = [tuple(float(group[name]) for name in _RATES_IN_GROUPS if name in group) for group in old.param_groups]
    lambdas = [function for scheduler in schedulers for function in getattr(scheduler, "lr_lambdas", [])]
    if len(set(curves)) > 1 or any(function is not lambdas[0] for function in lambdas):
        raise ValueError(
            f"the optimizer that is replaced has {olds} param groups on learning-rate schedules of their own, but the "
            f"new one has {news}: which follows which? build the new optimizer with as many groups (params=), or build "
            "its schedule in configure_optimizers"
        )
    return [0] * news


def _reference_rate(schedulers: Sequence[Scheduler], group: dict[str, Any], index: int) -> float:
    """The rate of an old group that stands for the new optimizer's own."""
    for scheduler in schedulers:
        for part in _flattened(scheduler):
            if isinstance(part, CyclicLR):
                return float(part.max_lrs[index])
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _flattened(scheduler: Scheduler) -> list[Scheduler]:
    parts: list[Scheduler] = [scheduler]
    for part in getattr(scheduler, "_schedulers", []):
        parts.extend(_flattened(part))
    return parts


def _rebound(scheduler: Scheduler, new: Optimizer, sources: list[int], scales: list[float]) -> Scheduler:
    result = copy.copy(scheduler)
    result.optimizer = new
    fields = vars(result)
    for name in _RATES_OF_GROUPS:
        if isinstance(fields.get(name), list):
            rates = fields[name]
            fields[name] = [float(rates[index]) * scale for index, scale in zip(sources, scales, strict=True)]
    for name in _SINGLE_RATES:
        if isinstance(fields.get(name), (int, float)):
            fields[name] = fields[name] * scales[0]
    if "lr_lambdas" in fields:
        fields["lr_lambdas"] = [fields["lr_lambdas"][index] for index in sources]
    if "cycle_momentum" in fields:
        fields["cycle_momentum"] = False
    if "_schedulers" in fields:
        fields["_schedulers"] = [_rebound(part, new, sources, scales) for part in fields["_schedulers"]]
    return result
