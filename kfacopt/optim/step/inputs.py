"""Large inputs: columns of a step's matrices in units in which these have an ordinary size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfacopt.layers.layer import Layer
from kfacopt.optim.step.base import Step
from kfacopt.optim.step.stacks import Stack

LARGE = 8.0
"""Root mean square from which on an input is large. Standardised features, pixels and activations are smaller."""


def input_scales(step: Step, stack: Stack) -> Tensor | None:
    """One over how many times as large as `LARGE` each input is, at most one, `[b *k 1 i]`; None: none is larger.

    A step of fixed length moves each output by `lr` where inputs have the size of one. Raw features in their own units
    (a population, a year, a byte) have another: a step then throws all outputs far off, and what lies behind a ReLU
    never comes back. With the inputs `D x`, D diagonal, and `W D⁻¹` in the place of W the model is the same, its
    gradient is `M D`, and a step U there is `U D` of W. Columns of ordinary inputs, and a bias', stay as they are.
    """
    if not step.large:
        return None
    layers = stack.layers
    if not any(layer.name in step.large for layer in layers):
        return None
    ones = stack.matrices.new_ones((*stack.matrices.shape[1:-2], stack.matrices.shape[-1]))
    scales = torch.stack([step.large[la.name].to(ones) if la.name in step.large else ones for la in layers])
    return scales.unsqueeze(-2)


def large_inputs(layers: Sequence[Layer], squares: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """By layer name `LARGE` over the root mean square of each input, at most one, of the layers that have a large one.

    Args:
        layers: As they are; of a weight whose bias was frozen since, nothing is known.
        squares: By layer name, the mean square of each input, `[*k i]`.

    Returns:
        These, and by name the mean square of all inputs of a layer.
    """
    shapes = {layer.name: (*layer.shape[:-2], layer.shape[-1]) for layer in layers}
    known = {name: mean for name, mean in squares.items() if shapes.get(name) == mean.shape}
    if not known:
        return {}, {}
    told = [torch.stack([mean.amax(), mean.mean()]).double() for mean in known.values()]
    numbers = torch.stack(told).tolist()
    over = [name for name, (most, _) in zip(known, numbers, strict=True) if most > LARGE**2]
    sizes = {name: size for name, (_, size) in zip(known, numbers, strict=True)}
    return {name: (LARGE / known[name].sqrt()).clamp_max(1.0) for name in over}, sizes
