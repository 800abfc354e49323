"""Directions that see gradients of another length than they have."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.fsdp import is_sharded
from kfacopt.layers.layer import Layer
from kfacopt.layers.plain import PlainMatrix
from kfacopt.linalg.tensors import lengths
from kfacopt.optim.step.base import Direction, Remembered, Step, Updates


class RescaledGradients(Direction):
    """Another direction, of gradients that are multiplied by a number each before they are averaged.

    Args:
        direction: What the gradients go to.

    Attributes:
        reads_norms: Whether of gradients that are sharded it reads no more than `Step.norms`.
        keeps_units: Whether most gradients stay as they are, so that the slope along a step is still the loss'
            (`Updates.prospect`).

    Raises:
        TypeError: If it is no direction.
    """

    reads_norms: bool = False
    keeps_units: bool = False

    def __init__(self, direction: Direction) -> None:
        if not isinstance(direction, Direction):
            raise TypeError(f"direction must be a kfacopt.Direction, got {direction!r}")
        self.direction = direction
        self.plain_treatment, self.reads_inputs = direction.plain_treatment, direction.reads_inputs

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "rescaled" in vars(cls):  # who rescales otherwise than the class below says anew what is read
            for said in ("reads_norms", "keeps_units"):
                setattr(cls, said, bool(vars(cls).get(said, False)))

    def by_layers(self, step: Step) -> bool:
        return self.reads_norms and step.norms is not None and self.direction.by_layers(step)

    @abstractmethod
    def rescaled(self, step: Step, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of some parameters, rescaled, or `gradients` itself; they are not to be written to.

        Packed parameters have one number together: a key's bias, on which no output depends, has rounding for gradient,
        and would be as long as the others.
        """

    def defaults(self) -> dict[str, float]:
        return self.direction.defaults()

    def wants_replays(self, step: int) -> bool:
        return self.direction.wants_replays(step)

    def refusal(self, layer: Layer) -> str | None:
        return self.direction.refusal(layer)

    def remembered(self, layers: Sequence[Layer], plain: Mapping[nn.Parameter, PlainMatrix]) -> Remembered:
        return self.direction.remembered(layers, plain)

    def updates(self, step: Step) -> Updates:
        stepped = [p for p in step.stepped if p in step.gradients]
        if not stepped:
            return self.direction.updates(step)
        gradients = [step.gradients[p] for p in stepped]
        changed, seen = self.rescaled(step, stepped, gradients), step
        if changed is not gradients:
            seen = replace(step, gradients={**step.gradients, **dict(zip(stepped, changed, strict=True))}, norms=None)
        # The image of a direction, where it has one, is what it was told, not the gradient: nobody is to trust it.
        found = self.direction.updates(seen)
        return replace(found, image=None, prospect=found.prospect if self.keeps_units else None)

    def health(self) -> dict[str, float]:
        return self.direction.health()

    def state_dict(self) -> dict[str, Any]:
        return self.direction.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.direction.load_state_dict(state)


class UnitGradients(RescaledGradients):
    """Another direction, of gradients that are divided by their norm, parameter by parameter, before they are averaged.

    A batch then counts in the momentum for where it points, however steep the loss is there: one outlier among the
    targets turns it no further than any other batch does (normalised momentum, Cutkosky & Mehta 2020). For directions
    whose length is their own (`Spectral`, `Grafted`); of others it changes the length, too.

    Args:
        direction: What the gradients go to.

    >>> from kfacopt.optim.step.spectral import Spectral
    >>> UnitGradients(Spectral()).defaults()
    {'momentum': 0.95, 'cautious_decay': 0.2, 'embedding_factor': 4.0}
    """

    reads_norms = True

    def __repr__(self) -> str:
        return f"UnitGradients({self.direction})"

    def rescaled(self, step: Step, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        if any(map(is_sharded, gradients)):
            tiny = torch.finfo(gradients[0].dtype).tiny
            return torch._foreach_div(
                list(gradients), [max(norm, tiny) for norm in _norms(step, parameters, gradients)]
            )
        norms = torch._foreach_norm(list(gradients))
        torch._foreach_clamp_min_(norms, torch.finfo(norms[0].dtype).tiny)
        return torch._foreach_div(list(gradients), norms)


class ClippedGradients(RescaledGradients):
    """Another direction, of gradients that are at most `limit` times as long as usual, before they are averaged.

    What is usual is a running average of each parameter's own gradient norms, as they were clipped: there is no bound
    to choose, and none that the end of training outgrows. One batch with an outlier among its targets then turns the
    momentum no further than a few others do; batches that say little, as those of data that are fitted already, go on
    to count little (`UnitGradients` gives them the weight of all others).

    Args:
        direction: What the gradients go to.
        limit: In lengths of the running average; above one.
        decay: Of the running average.

    Raises:
        TypeError: If the direction is none.
        ValueError: If a number is out of range.

    >>> from kfacopt.optim.step.spectral import Spectral
    >>> ClippedGradients(Spectral(), limit=2.0).defaults()
    {'momentum': 0.95, 'cautious_decay': 0.2, 'embedding_factor': 4.0}
    """

    reads_norms = True
    keeps_units = True

    def __init__(self, direction: Direction, limit: float = 1.5, decay: float = 0.95) -> None:
        super().__init__(direction)
        if not 1.0 < limit < math.inf:
            raise ValueError(f"limit must be a number above 1, got {limit}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self._limit, self._decay = limit, decay
        self._usual: list[float] = []  # by place among the parameters of all groups, 0 where none is known

    def __repr__(self) -> str:
        return f"ClippedGradients({self.direction}, limit={self._limit}, decay={self._decay})"

    def rescaled(self, step: Step, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        # On the host, from norms that are there anyway: most steps clip nothing, and touch no gradient.
        norms = _norms(step, parameters, gradients)
        places = {id(p): place for place, p in enumerate(p for group in step.groups for p in group["params"])}
        usual, factors = self._usual, dict[int, float]()
        usual += [0.0] * (len(places) - len(usual))
        for number, (parameter, norm) in enumerate(zip(parameters, norms, strict=True)):
            place = places[id(parameter)]
            bound = self._limit * usual[place]
            # A parameter that never had a gradient has no usual length yet.
            clipped = min(norm, bound) if bound > 0.0 else norm
            usual[place] = usual[place] + (1.0 - self._decay) * (clipped - usual[place]) if bound > 0.0 else norm
            if clipped < norm:
                factors[number] = clipped / norm
        if not factors:
            return gradients
        shortened = torch._foreach_mul([gradients[number] for number in factors], list(factors.values()))
        found = dict(zip(factors, shortened, strict=True))
        return [found.get(number, gradient) for number, gradient in enumerate(gradients)]

    def state_dict(self) -> dict[str, Any]:
        return {"direction": self.direction.state_dict(), "usual_norms": torch.tensor(self._usual, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.direction.load_state_dict(state["direction"])
            self._usual = state["usual_norms"].tolist()


def _norms(step: Step, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Sequence[float]:
    """Of some parameters' gradients, whole ones: each process alone does not know them of its shards."""
    if step.norms is None:
        return lengths(gradients)
    known = dict(zip(map(id, step.gradients), step.norms, strict=True))
    return [known[id(p)] for p in parameters]
