"""Which of a layer's Kronecker factors are kept as their diagonals: those of sides too wide to be squared."""

from __future__ import annotations

from typing import NamedTuple

from kfacopt.layers.layer import Layer

WIDEST = 5120
"""Inputs or outputs up to which a factor is a whole matrix, in 100 MiB of float32; of more it is its diagonal.

A factor takes memory that is quadratic in the side, and its decomposition time that is cubic: seconds at this size, and
at a vocabulary's no step would end. The widest convolutions that are in use (512 channels, 3 x 3) stay below."""

DENSE_WORDS = 1024
"""Up to so many words a tied layer's factor over them is a whole matrix, beyond it is diagonal, as an embedding's own.

Its decomposition takes `words³` products: at 1024 of them about as long as a step of a small language model."""


class Diagonals(NamedTuple):
    """Which factors of `G ⊗ A` are diagonal.

    Args:
        gradient: Whether G is, `[o]`.
        input: Whether A is, `[i]`.
    """

    gradient: bool = False
    input: bool = False

    @classmethod
    def of(cls, layer: Layer, widest: int) -> Diagonals:
        """Those of sides wider than `widest`, and A of one-hot inputs, which is diagonal by itself.

        A bias's column does not count. Layers of several groups, whose factors are of one group each, keep them whole.

        >>> from torch import nn
        >>> from kfacopt.layers.coverage import find_layers
        >>> model = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 9), nn.Linear(9, 2))
        >>> layers, _ = find_layers(model, list(model.parameters()), {}, separate=False)
        >>> for layer in layers:
        ...     print(Diagonals.of(layer, widest=8), Diagonals.of(layer, widest=9))
        Diagonals(gradient=False, input=True) Diagonals(gradient=False, input=True)
        Diagonals(gradient=True, input=False) Diagonals(gradient=False, input=False)
        Diagonals(gradient=False, input=True) Diagonals(gradient=False, input=False)
        """
        structure = layer.handler.structure
        if structure == "elementwise" or len(layer.shape) > 2:
            return cls()
        outputs, inputs = layer.shape
        if structure == "one-hot":
            return cls(outputs > widest, True)
        if structure == "tied":
            return cls(outputs > widest, inputs > min(widest, DENSE_WORDS))
        return cls(outputs > widest, inputs - (set(layer.roles) > {"bias"}) > widest)

    def named(self) -> str:
        """As a phrase; empty if none is.

        >>> Diagonals(True, True).named(), Diagonals(False, True).named(), Diagonals().named()
        ('G and A diagonal', 'A diagonal', '')
        """
        names = [name for name, diagonal in zip("GA", self, strict=True) if diagonal]
        return f"{' and '.join(names)} diagonal" if names else ""
