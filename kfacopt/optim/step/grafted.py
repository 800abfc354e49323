"""One direction with the lengths of another, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kfacopt.layers.layer import Layer
from kfacopt.layers.plain import PlainMatrix
from kfacopt.optim.step.base import Direction, Remembered, Step, Updates
from kfacopt.optim.step.lengths import FULL_STEPS, check_full_steps, layer_length, norms, shrunk, times


class Grafted(Direction):
    """Where `direction` goes, as far in each layer as `length_of` says (Agarwal et al. 2020, arXiv:2002.11803).

    `u ← length · u / ‖u‖_F` for each layer, over its parameters together. A direction that is steepest descent in some
    norm of each layer stays so; what changes is how the layers share the step. With the natural gradient they share it
    by their own curvature's unit, and one layer with small curvature may take all that a trust region allows; grafted,
    no layer can.

    **How the learning rate reads.** With the default, `layer_length`, white inputs of size one move each output of a
    layer by `lr` (root of the mean square), at every width, as in `Spectral`. With another direction's lengths it reads
    as that one's.

    Args:
        direction: Where to go.
        length_of: Another direction, whose step's Frobenius norm counts, or `layer -> norm`. Layers that it leaves out
            train by AdamW.
        full_steps: For so many steps a layer's own length is whole, after them it falls as `sqrt(full_steps / number of
            steps)` (see `kfacopt.optim.step.lengths.shrunk`); None: it stays. Another direction's lengths are its own.

    >>> from kfacopt.optim.step.preconditioned import Preconditioned
    >>> Grafted(Preconditioned(momentum=0.95)).defaults()
    {'momentum': 0.95}
    """

    def __init__(
        self,
        direction: Direction,
        length_of: Direction | Callable[[Layer], float] = layer_length,
        full_steps: int | None = FULL_STEPS,
    ) -> None:
        for name, part in {"direction": direction, "length_of": length_of}.items():
            if not isinstance(part, Direction) and (name == "direction" or not callable(part)):
                wanted = "a kfacopt.Direction" + ("" if name == "direction" else " or a function of the layer")
                raise TypeError(f"{name} must be {wanted}, got {part!r}")
        check_full_steps(full_steps)
        self.direction, self.length_of, self._full_steps = direction, length_of, full_steps

    def __repr__(self) -> str:
        return f"Grafted({self.direction}, length_of={getattr(self.length_of, '__name__', self.length_of)})"

    def _parts(self) -> dict[str, Direction]:
        """The directions in it by name, those of the length first, as the other's word counts where both speak."""
        own = {"direction": self.direction}
        return {"length_of": self.length_of} | own if isinstance(self.length_of, Direction) else own

    def defaults(self) -> dict[str, float]:
        return {name: value for part in self._parts().values() for name, value in part.defaults().items()}

    def wants_replays(self, step: int) -> bool:
        return any(part.wants_replays(step) for part in self._parts().values())

    def refusal(self, layer: Layer) -> str | None:
        return next((why for part in self._parts().values() if (why := part.refusal(layer))), None)

    def remembered(self, layers: Sequence[Layer], plain: Mapping[nn.Parameter, PlainMatrix]) -> Remembered:
        result: Remembered = {}
        for part in self._parts().values():
            for parameter, values in part.remembered(layers, plain).items():
                result[parameter] = result.get(parameter, {}) | values
        return result

    def by_layers(self, step: Step) -> bool:
        return all(part.by_layers(step) for part in self._parts().values())

    def updates(self, step: Step) -> Updates:
        found = self.direction.updates(step)
        steps = step.by_layer(found.tensors)
        lengths, resting = self._lengths(step, list(steps))
        found = replace(found, resting=found.resting | resting, prospect=None)  # lengths are others'
        steps = {layer: parts for layer, parts in steps.items() if layer in lengths}
        factors = {layer: lengths[layer] / norm for layer, norm in norms(steps).items()}
        tensors = times(factors, steps)
        image = None if found.image is None else times(factors, step.by_layer({p: found.image[p] for p in tensors}))
        if found.bend is None:
            return replace(found, tensors=tensors, image=image, check=None)
        # A path that is run f times as fast bends f² times as much.
        bends = times({layer: f * f for layer, f in factors.items()}, step.by_layer(_named(found)))
        return replace(found, tensors=tensors, image=image, check=None, bend=[bends[p] for p in tensors])

    def _lengths(
        self, step: Step, layers: list[Layer]
    ) -> tuple[Mapping[Layer, float | Tensor], frozenset[nn.Parameter]]:
        if not isinstance(self.length_of, Direction):
            kept = shrunk(step.number, self._full_steps)
            return {layer: kept * self.length_of(layer) for layer in layers}, frozenset()
        other = self.length_of.updates(step)
        found = norms(step.by_layer(other.tensors))
        return {layer: other.scale * norm for layer, norm in found.items()}, other.resting

    def health(self) -> dict[str, float]:
        return {name: value for part in self._parts().values() for name, value in part.health().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state.get(name, {}))


def _named(updates: Updates) -> dict[Any, Tensor]:
    assert updates.bend is not None
    return dict(zip(updates.tensors, updates.bend, strict=True))
