"""Learning-rate schedules over the whole length of a run, for a task's `schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_decay(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, floor: float = 0.0) -> LambdaLR:
    """Decay the learning rate on a straight line, after an optional linear warm-up.

    Args:
        optimizer: Each of its groups' rates is multiplied by the same factor.
        total_steps: Optimizer steps in the run.
        warmup: The part of them in which the rate rises from 0, in [0, 1).
        floor: The factor at the end, in [0, 1].

    Raises:
        ValueError: A number is outside its range.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> schedule = linear_decay(sgd, total_steps=4)
    >>> rates = []
    >>> for _ in range(4):
    ...     rates.append(sgd.param_groups[0]["lr"])
    ...     sgd.step()
    ...     schedule.step()
    >>> rates
    [1.0, 0.75, 0.5, 0.25]
    """
    return _decay(optimizer, total_steps, warmup, floor, lambda progress: 1.0 - progress)


def cosine_decay(optimizer: Optimizer, total_steps: int, warmup: float = 0.0, floor: float = 0.0) -> LambdaLR:
    """Decay the learning rate on half a cosine (Loshchilov & Hutter 2017), else as `linear_decay`.

    Args:
        optimizer: Each of its groups' rates is multiplied by the same factor.
        total_steps: Optimizer steps in the run.
        warmup: The part of them in which the rate rises from 0, in [0, 1).
        floor: The factor at the end, in [0, 1].

    Raises:
        ValueError: A number is outside its range.
    """
    return _decay(optimizer, total_steps, warmup, floor, lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)))


def _decay(
    optimizer: Optimizer, total_steps: int, warmup: float, floor: float, shape: Callable[[float], float]
) -> LambdaLR:
    if total_steps < 1 or not 0.0 <= warmup < 1.0 or not 0.0 <= floor <= 1.0:
        raise ValueError(
            f"a decay needs total_steps >= 1, 0 <= warmup < 1 and 0 <= floor <= 1, got total_steps={total_steps}, "
            f"warmup={warmup}, floor={floor}"
        )
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        progress = min(1.0, (step - rising) / max(1, total_steps - rising))
        return floor + (1.0 - floor) * shape(progress)

    return LambdaLR(optimizer, factor)
