"""Linear layers that hold their weight as `[i o]`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kfacopt.layers.linear import LinearHandler


class TransposedLinearHandler(LinearHandler):
    """Rows of `y = x W + b`: those of a linear layer with `Wᵀ`.

    `Conv1D` of `transformers`, of which GPT-2 is made, is known by its name: nothing has to be registered for it.

    >>> import torch
    >>> handler, weight, bias = TransposedLinearHandler(), torch.zeros(3, 2), torch.ones(2)
    >>> handler.pack(nn.Identity(), {"weight": weight, "bias": bias}).shape
    torch.Size([2, 4])
    """

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        turned = {"weight": parts["weight"].mT} if "weight" in parts else {}
        return super().pack(module, {**parts, **turned})

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        parts = super().unpack(module, matrix, roles)
        return parts | ({"weight": parts["weight"].mT} if "weight" in parts else {})
