"""A direction that sees every gradient at length one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kfacopt.layers.layer import Layer
from kfacopt.optim.step.base import Direction, Step, Updates


class UnitGradients(Direction):
    """Another direction, of gradients that are divided by their norm, parameter by parameter, before they are averaged.

    A batch then counts in the momentum for where it points, however steep the loss is there: one outlier among the
    targets turns it no further than any other batch does (normalised momentum, Cutkosky & Mehta 2020). For directions
    whose length is their own (`Spectral`, `Grafted`); of others it changes the length, too.

    Args:
        direction: What the gradients go to.

    >>> from kfacopt.optim.step.spectral import Spectral
    >>> UnitGradients(Spectral()).defaults()
    {'momentum': 0.95}
    """

    def __init__(self, direction: Direction) -> None:
        if not isinstance(direction, Direction):
            raise TypeError(f"direction must be a kfacopt.Direction, got {direction!r}")
        self.direction = direction

    def __repr__(self) -> str:
        return f"UnitGradients({self.direction})"

    def defaults(self) -> dict[str, float]:
        return self.direction.defaults()

    def wants_replays(self, step: int) -> bool:
        return self.direction.wants_replays(step)

    def refusal(self, layer: Layer) -> str | None:
        return self.direction.refusal(layer)

    def updates(self, step: Step) -> Updates:
        # Packed parameters have one norm together: a key's bias, on which no output depends, has rounding for gradient,
        # and would be as long as the others.
        held = dict.fromkeys(p for layer in step.layers for p in layer.parameters.values())
        covered = [p for p in held if p in step.gradients]
        gradients = [step.gradients[p] for p in covered]
        if not gradients:
            return self.direction.updates(step)
        norms = torch._foreach_norm(gradients)
        torch._foreach_clamp_min_(norms, torch.finfo(norms[0].dtype).tiny)
        units = torch._foreach_div(gradients, norms)
        changed = {**step.gradients, **dict(zip(covered, units, strict=True))}
        # The image of a direction, where it has one, is what it was told, not the gradient: nobody is to trust it.
        return replace(self.direction.updates(replace(step, gradients=changed)), image=None)

    def health(self) -> dict[str, float]:
        return self.direction.health()

    def state_dict(self) -> dict[str, Any]:
        return self.direction.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.direction.load_state_dict(state)
