"""How long a layer's step is to be, and steps of such a length."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kfacopt.backends.base import LayerTensors
from kfacopt.layers.layer import Layer, by_parameter
from kfacopt.linalg.tensors import stacked


def layer_length(layer: Layer) -> float:
    """The Frobenius norm of a step that moves each output by one, on average over a layer's inputs.

    `E ‖U x‖² = ‖U‖_F²` for white inputs with entries of size one, which is one for each output where `‖U‖_F² =
    outputs`: the norm of Muon's step, an orthogonal matrix times `sqrt(max(1, o / i))`. Of an embedding's inputs only
    one entry is not zero, so that `‖U‖_F² = outputs · words`; of a tied one the shorter of both, that of a linear
    layer whose outputs are the words. Elementwise layers have an output for each channel.

    >>> from kfacopt.layers import handler_for
    >>> def layer(module): return Layer("", (module,), handler_for(module), dict(module.named_parameters()))
    >>> layer_length(layer(nn.Linear(3, 16))), layer_length(layer(nn.Conv2d(8, 4, 3, groups=2)))
    (4.0, 2.0)
    >>> layer_length(layer(nn.Embedding(9, 4))), layer_length(layer(nn.LayerNorm(9)))
    (6.0, 3.0)
    """
    return matrix_length(layer.handler.structure, layer.shape)


def matrix_length(structure: str, shape: torch.Size) -> float:
    """`layer_length` of a layer with a matrix `[*k o i]` of this shape (`LayerHandler.structure`).

    >>> matrix_length("outer", torch.Size([16, 4]))
    4.0
    """
    if structure == "one-hot":
        return math.sqrt(shape.numel())
    return math.sqrt(shape[-1] if structure == "tied" else shape[:-1].numel())


FULL_STEPS = 100
"""For how many steps the default lengths are whole; see `shrunk`."""


def shrunk(step: int, full_steps: int | None) -> float:
    """Which part of its length a step keeps: all of it for so many steps, then as one over the root of their number.

    Of steps of fixed length in noise the best constant one falls as the root of how many are to come, and who does not
    know how many gets nearly as far with one over the root of how many there were (Zinkevich 2003). So short runs get
    the long steps that they need, and long ones the short ones; a schedule of the user's comes on top.

    Args:
        step: Number of the step, from 0 on.
        full_steps: How many are whole; None: all.

    >>> [round(shrunk(step, 100), 2) for step in (0, 99, 399, 9999)], shrunk(9999, None)
    ([1.0, 1.0, 0.5, 0.1], 1.0)
    """
    return 1.0 if full_steps is None or step < full_steps else math.sqrt(full_steps / (step + 1))


def check_full_steps(full_steps: int | None) -> None:
    """Raises ValueError for what `shrunk` cannot count."""
    if full_steps is not None and full_steps < 1:
        raise ValueError(f"full_steps must be a number of steps, or None for all, got {full_steps}")


def norms(steps: LayerTensors) -> dict[Layer, Tensor]:
    """The Frobenius norm of each layer's step, over its parameters together; of a zero step a tiny number."""
    numbers: dict[int, list[Layer]] = {}
    for layer, parts in steps.items():
        numbers.setdefault(len(parts), []).append(layer)
    result: dict[Layer, Tensor] = {}
    for number, layers in numbers.items():
        held = stacked(torch._foreach_norm([t for layer in layers for t in steps[layer].values()])).view(-1, number)
        lengths = torch.linalg.vector_norm(held, dim=-1).clamp_min(torch.finfo(held.dtype).tiny)
        result |= dict(zip(layers, lengths.unbind(), strict=True))
    return {layer: result[layer] for layer in steps}


def times(factors: Mapping[Layer, Tensor], tensors: LayerTensors) -> dict[nn.Parameter, Tensor]:
    """Each layer's tensors times its factor, by parameter."""
    return by_parameter({layer: {r: t * factors[layer] for r, t in parts.items()} for layer, parts in tensors.items()})
