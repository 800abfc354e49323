"""Matrices of one shape as one tensor, so that a step takes as many products as there are shapes, not layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kfacopt.layers.base import Structure
from kfacopt.layers.layer import Layer, by_parameter
from kfacopt.linalg.tensors import as_statistic, rows_of
from kfacopt.optim.memory import Key
from kfacopt.optim.step.base import ByParameter, Step
from kfacopt.optim.step.lengths import matrix_length

Holder = Layer | nn.Parameter
"""What a matrix is of: a layer, or a plain matrix that is a parameter by itself."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices `[b *k o i]` of one shape.

    Attributes:
        holders: Of what each is.
        matrices: In their order; in float32 at least.
        curved: Whether they are of layers that have curvature.
        differentiated: Whether they have none as derivatives are taken of the model (`PlainMatrix`).
        stride: How many times as far as otherwise they move (`Turns`).
        structure: Of the layers, all of one (`LayerHandler.structure`); plain matrices have a linear layer's.
    """

    holders: tuple[Holder, ...]
    matrices: Tensor
    curved: bool
    structure: Structure = "outer"
    differentiated: bool = False
    stride: int = 1

    @property
    def inputs(self) -> int:
        """Which axis is that of the inputs (`inputs_axis`)."""
        return inputs_axis(self.structure)

    @property
    def length(self) -> float:
        """The Frobenius norm of each holder's step: `layer_length`, and of a plain matrix likewise."""
        return self.stride * matrix_length(self.structure, self.matrices.shape[1:])

    @property
    def layers(self) -> list[Layer]:
        """The holders that are layers."""
        return [holder for holder in self.holders if isinstance(holder, Layer)]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The holders' parameters but for biases."""
        return [p for holder in self.holders for p in _parameters_of(holder) if p.ndim > 1]

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
        first = stack.holders[0]
        if isinstance(first, Layer) and first.alike is not None:
            shares = first.unpack(matrices)
            columns = [shares[role].to(self._like[p].dtype).unbind() for role, p in first.parameters.items()]
            for layer, own in zip(stack.layers, zip(*columns, strict=True), strict=True):
                self._shares[layer] = dict(zip(first.parameters, own, strict=True))
            return
        for holder, matrix in zip(stack.holders, matrices.unbind(), strict=True):
            if isinstance(holder, Layer):
                shares = holder.unpack(matrix)
                self._shares[holder] = {r: shares[r].to(self._like[p].dtype) for r, p in holder.parameters.items()}
            else:
                self._plain[holder] = matrix.reshape(holder.shape).to(self._like[holder].dtype)

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """All of them, but for parameters of which a layer's share is missing."""
        return by_parameter(self._shares) | self._plain


def stacks(step: Step, tensors: ByParameter, strides: Mapping[Layer, int]) -> list[Stack]:
    """All layers that move, and plain matrices, of which there are tensors; those with and without curvature apart."""
    found: dict[tuple[Any, ...], list[tuple[Holder, Sequence[Tensor]]]] = {}
    for layer, parts in step.by_layer(tensors).items():
        if not strides[layer]:
            continue
        pieces = (layer.pack(parts),) if layer.alike is None else tuple(parts.values())
        kind = layer.alike, structure_of(layer), step.ready(layer), False, strides[layer], _dtypes(layer, pieces)
        found.setdefault(kind, []).append((layer, pieces))
    for parameter, plain in step.plain.items():
        if parameter in tensors:
            pieces = (tensors[parameter].reshape(plain.shape),)
            kind = None, structure_of(parameter), False, plain.differentiated, 1, _dtypes(parameter, pieces)
            found.setdefault(kind, []).append((parameter, pieces))
    return [
        Stack(
            tuple(holder for holder, _ in members),
            as_statistic(_matrices(members, alike is not None)),
            curved,
            structure,
            differentiated,
            stride,
        )
        for (alike, structure, curved, differentiated, stride, _), members in found.items()
    ]


def _dtypes(holder: Holder, pieces: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tensors must have in common to be stacked, of some holder's."""
    # What is remembered of a holder is in its first parameter's dtype, which need not be the gradient's.
    return key_of(holder)[0].dtype, pieces[0].device, *((piece.shape, piece.dtype) for piece in pieces)


def _matrices(members: Sequence[tuple[Holder, Sequence[Tensor]]], alike: bool) -> Tensor:
    """The matrices `[b *k o i]` of holders, from each one's matrix, or from the parts of layers that are alike."""
    stacked = [rows_of(column) for column in zip(*(pieces for _, pieces in members), strict=True)]
    first = members[0][0]
    return (
        first.pack(dict(zip(first.parameters, stacked, strict=True)))
        if isinstance(first, Layer) and alike
        else stacked[0]
    )


def structure_of(holder: Holder) -> Structure:
    """A layer's, or that of a plain matrix: a linear layer's."""
    return holder.handler.structure if isinstance(holder, Layer) else "outer"


def _parameters_of(holder: Holder) -> Iterable[nn.Parameter]:
    return holder.parameters.values() if isinstance(holder, Layer) else (holder,)


def inputs_axis(structure: Structure) -> int:
    """Which axis of a matrix is that of the inputs: the last, but for tied embeddings, whose outputs are the words, as
    those of the head are."""
    return -2 if structure == "tied" else -1


def key_of(holder: Holder) -> Key:
    """A parameter of its own, and which of its rows are: what is remembered of it belongs there."""
    if not isinstance(holder, Layer):
        return holder, None
    role, parameter = next(iter(holder.parameters.items()))
    return parameter, holder.rows(role)
