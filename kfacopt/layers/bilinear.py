"""`torch.nn.Bilinear`: a linear layer on products of two inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.layers.base import input_tensor
from kfacopt.layers.linear import LinearHandler
from kfacopt.likelihoods import KFACType


class BilinearHandler(LinearHandler):
    """Rows of `y_o = x1ᵀ W_o x2 + b_o`: all products of the two inputs' numbers, `i = i1 · i2`, on any leading shape.

    The factor of the inputs is that of the products, `[i1·i2, i1·i2]`.

    >>> layer, handler = nn.Bilinear(3, 4, 2), BilinearHandler()
    >>> x1, x2 = torch.zeros(5, 3), torch.zeros(5, 4)
    >>> handler.input_rows(layer, (x1, x2), {}, ("weight", "bias"), KFACType.EXPAND).shape
    torch.Size([5, 1, 13])
    """

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        first, second = input_tensor(inputs, kwargs, "input1"), input_tensor(inputs[1:], kwargs, "input2")
        products = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        return super().input_rows(module, (products,), {}, roles, approx)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        flat = {"weight": parts["weight"].flatten(1)} if "weight" in parts else {}
        return super().pack(module, {**parts, **flat})

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        assert isinstance(module, nn.Bilinear)
        parts = super().unpack(module, matrix, roles)
        if "weight" in parts:
            parts["weight"] = parts["weight"].unflatten(-1, (module.in1_features, module.in2_features))
        return parts
