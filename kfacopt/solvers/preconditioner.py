"""A layer-wise backend's solve as the preconditioner of a solver for all parameters together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend, Settings
from kfacopt.layers.layer import Layer, by_layer, by_parameter
from kfacopt.linalg.tensors import inner_product


class Preconditioner:
    """`r -> M⁻¹ r` on lists of tensors, linear as long as it lives.

    Args:
        backend: With fresh caches.
        settings: Each layer's.
        parameters: What `r` is shaped as. Those of no layer, or of a layer without a cache, are scaled by one number,
            such that they are treated as the others are on average.
    """

    def __init__(
        self, backend: CurvatureBackend, settings: Mapping[Layer, Settings], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._backend = backend
        self._parameters, self._settings = list(parameters), settings
        self._scale: float | None = None

    @torch.no_grad()
    def __call__(self, vectors: list[Tensor]) -> list[Tensor]:
        given = dict(zip(self._parameters, vectors, strict=True))
        solved = by_parameter(self._backend.solve(by_layer(self._settings, given), self._settings))
        found = {i: solved[p].to(vectors[i].dtype) for i, p in enumerate(self._parameters) if p in solved}
        if self._scale is None:
            before = [vectors[i] for i in found]
            length = inner_product(before, before)
            after = inner_product(list(found.values()), list(found.values()))
            self._scale = math.sqrt(after / length) if length > 0.0 and after > 0.0 else 1.0
        return [found[i] if i in found else self._scale * v for i, v in enumerate(vectors)]
