"""Matrices of one shape as one tensor, so that a step takes as many products as there are shapes, not layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfacopt.layers.layer import Layer, by_parameter
from kfacopt.linalg.tensors import as_statistic
from kfacopt.optim.memory import Key
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
        inputs: Which axis is that of the inputs: the last, but for tied embeddings, whose outputs are the words, as
            those of the head are.
    """

    holders: tuple[Holder, ...]
    matrices: Tensor
    curved: bool
    inputs: int = -1

    @property
    def layers(self) -> list[Layer]:
        """The holders that are layers."""
        return [holder for holder in self.holders if isinstance(holder, Layer)]

    @property
    def keys(self) -> list[Key]:
        """`key_of` each holder."""
        return [key_of(holder) for holder in self.holders]


class Unstacked:
    """Matrices of stacks' holders by parameter: shares of packed parameters meet again.

    Args:
        like: Tensors as which the parameters' are shaped and typed.
    """

    def __init__(self, like: ByParameter) -> None:
        self._like = like
        self._shares: dict[Layer, dict[str, Tensor]] = {}
        self._plain: dict[nn.Parameter, Tensor] = {}

    def add(self, stack: Stack, matrices: Tensor) -> None:
        """Take over other matrices of the stack's holders."""
        for holder, matrix in zip(stack.holders, matrices.unbind(), strict=True):
            if isinstance(holder, Layer):
                dtypes = {role: self._like[p].dtype for role, p in holder.parameters.items()}
                self._shares[holder] = {role: t.to(dtypes[role]) for role, t in holder.unpack(matrix).items()}
            else:
                self._plain[holder] = matrix.reshape(holder.shape).to(self._like[holder].dtype)

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """All of them, but for parameters of which a layer's share is missing."""
        return by_parameter(self._shares) | self._plain


def stacks(step: Step, tensors: ByParameter) -> list[Stack]:
    """All layers and plain matrices of which there are tensors, stacked; those with and without curvature apart."""
    found: dict[tuple[torch.Size, torch.dtype, torch.device, bool, int], list[tuple[Holder, Tensor]]] = {}
    held: list[tuple[Holder, Tensor, bool]] = [
        (layer, layer.pack(parts), step.ready(layer)) for layer, parts in step.by_layer(tensors).items()
    ]
    held += [(p, tensors[p].reshape(tuple(shape)), False) for p, shape in step.plain.items() if p in tensors]
    for holder, matrix, curved in held:
        key = matrix.shape, matrix.dtype, matrix.device, curved, inputs_axis(holder)
        found.setdefault(key, []).append((holder, matrix))
    return [
        Stack(tuple(h for h, _ in members), as_statistic(_stacked([m for _, m in members])), curved, inputs)
        for (_, _, _, curved, inputs), members in found.items()
    ]


def inputs_axis(holder: Holder) -> int:
    """Which axis of a holder's matrix is that of the inputs (`Stack.inputs`)."""
    return -2 if isinstance(holder, Layer) and holder.handler.structure == "tied" else -1


def key_of(holder: Holder) -> Key:
    """A parameter of its own, and which of its rows are: what is remembered of it belongs there."""
    if not isinstance(holder, Layer):
        return holder, None
    role, parameter = next(iter(holder.parameters.items()))
    return parameter, holder.rows(role)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0].unsqueeze(0)
