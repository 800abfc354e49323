"""Whether a stored block is of the layer that is to take it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfacopt.blocks.base import Block
from kfacopt.blocks.sides import Diagonals
from kfacopt.blocks.trial import misfit
from kfacopt.layers.layer import Layer

_WHOLE = "whole"
"""The factors of a block of which none was too wide."""


def described(block: Block, layer: Layer) -> dict[str, Any]:
    """What a stored block must have in common with the one that takes it over."""
    return {
        "factors": narrowed(block, layer).named() or _WHOLE,
        "kind": type(block).__name__,
        "shape": list(layer.shape),
        "roles": list(layer.roles),
    }


def narrowed(block: Block, layer: Layer) -> Diagonals:
    """Which factors are diagonal as the layer is too wide; of one-hot inputs A is so by itself."""
    gradient, input_ = block.diagonals
    return Diagonals(gradient, input_ and layer.handler.structure != "one-hot")


def mismatch(block: Block, layer: Layer, kept: Mapping[str, Any]) -> str | None:
    """How a stored block differs from the one here that would take it over; None if it does not."""
    for what, here in described(block, layer).items():
        # Version 0.1 kept every factor whole, and did not say so.
        if (there := kept.get(what, _WHOLE if what == "factors" else here)) != here:
            remedy = " (make the backend with the widest= of then)" if what == "factors" else ""
            return f"{what} {there}, but the layer here has {here}{remedy}"
    return None


def without_roles(kept: Mapping[str, Any] | None) -> bool:
    """Whether a stored block is of a version that did not note its parameters: its name must do then."""
    return kept is not None and "roles" not in kept


def key_of(layer: Layer) -> str:
    """A layer by name and parameters: frozen and unfrozen it is the same."""
    return f"{layer.name} {'+'.join(layer.roles)}"


def fitting(
    layers: Mapping[str, Layer], blocks: Mapping[str, Block], stored: Mapping[str, Any], dormant: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which stored block each layer goes on from, by layer name; and those that wait for layers that are not here.

    Args:
        layers: By name.
        blocks: Of them.
        stored: By layer name, of the layers that there were.
        dormant: By `key_of`, of those that waited then.

    Raises:
        ValueError: If they are of another model or backend.
    """
    if stored and blocks and not set(stored) & set(blocks):
        raise ValueError(
            f"the curvature state is of another model: it has the blocks {sorted(stored)}, but the layers here are "
            f"{sorted(blocks)}"
        )
    waiting = {**dormant, **{f"{name} {'+'.join(kept.get('roles', ()))}": kept for name, kept in stored.items()}}
    chosen: dict[str, Any] = {}
    for name, layer in layers.items():
        kept = waiting.pop(key_of(layer), None) or (stored[name] if without_roles(stored.get(name)) else None)
        if kept is None:
            continue
        if (why := mismatch(blocks[name], layer, kept)) is not None:
            raise ValueError(f"the curvature state of {name!r} is of {why}")
        if (why := misfit(blocks[name], kept, layer)) is not None:
            raise ValueError(f"the curvature state of {name!r} does not fit its layer {list(layer.shape)}: {why}")
        chosen[name] = kept
    return chosen, waiting
