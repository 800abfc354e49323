"""Matrices of one shape as one tensor, so that a step takes as many products as there are shapes, not layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfacopt.layers.layer import Layer
from kfacopt.linalg.tensors import as_statistic
from kfacopt.optim.step.base import ByParameter, Step

Holder = Layer | nn.Parameter
"""What a matrix is of: a layer, or a plain matrix that is a parameter by itself."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices `[b *k o i]` of one shape.

    Attributes:
        holders: Of what each is.
        matrices: In their order; in float32 at least.
        curved: Whether they are of layers that have curvature.
    """

    holders: tuple[Holder, ...]
    matrices: Tensor
    curved: bool

    @property
    def layers(self) -> list[Layer]:
        """The holders that are layers."""
        return [holder for holder in self.holders if isinstance(holder, Layer)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """One of each holder's parameters, by which to remember what belongs to it."""
        return [next(iter(h.parameters.values())) if isinstance(h, Layer) else h for h in self.holders]

    def unstacked(self, matrices: Tensor, like: ByParameter) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Other matrices of the holders by parameter, shaped and typed as the parameters' tensors in `like`."""
        for holder, matrix in zip(self.holders, matrices.unbind(), strict=True):
            if isinstance(holder, Layer):
                for role, tensor in holder.unpack(matrix).items():
                    parameter = holder.parameters[role]
                    yield parameter, tensor.to(like[parameter].dtype)
            else:
                yield holder, matrix.reshape(holder.shape).to(like[holder].dtype)


def stacks(step: Step, tensors: ByParameter) -> list[Stack]:
    """All layers and plain matrices of which there are tensors, stacked; those with and without curvature apart."""
    found: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[tuple[Holder, Tensor]]] = {}
    held: list[tuple[Holder, Tensor, bool]] = [
        (layer, layer.pack(parts), step.ready(layer)) for layer, parts in step.by_layer(tensors).items()
    ]
    held += [(p, tensors[p].reshape(tuple(shape)), False) for p, shape in step.plain.items() if p in tensors]
    for holder, matrix, curved in held:
        found.setdefault((matrix.shape, matrix.dtype, matrix.device, curved), []).append((holder, matrix))
    return [
        Stack(tuple(h for h, _ in members), as_statistic(_stacked([m for _, m in members])), curved)
        for (_, _, _, curved), members in found.items()
    ]


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0].unsqueeze(0)
