"""`torch.nn.Linear` on inputs of any leading shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, input_tensor, with_ones
from kfacopt.likelihoods import KFACType
from kfacopt.linalg.tensors import as_statistic


class LinearHandler(LayerHandler):
    """Rows of `y = W x + b`: the inputs themselves. The bias is the matrix's last column.

    The first axis of the input is read as the data `n`, all between it and the features as places `s` that share the
    weights; a single vector is one datum. (A transformer whose layout is `[t n i]` has the two swapped: `expand`
    factors are the same, `reduce` and corrections from per-datum gradients are not.)

    >>> layer, handler = nn.Linear(3, 2), LinearHandler()
    >>> x = torch.zeros(5, 4, 3)
    >>> handler.input_rows(layer, (x,), {}, ("weight", "bias"), KFACType.EXPAND).shape
    torch.Size([5, 4, 4])
    """

    batched = True

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        rows = _as_rows(input_tensor(inputs, kwargs))
        if approx == KFACType.REDUCE and rows.shape[1] != 1:
            rows = rows.mean(dim=1, keepdim=True)
        return with_ones(rows, roles)

    @torch.no_grad()
    def input_squares(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], roles: tuple[str, ...]
    ) -> Tensor | None:
        """See `LayerHandler.input_squares`.

        >>> layer, x = nn.Linear(2, 3), torch.tensor([[1.0, 30.0], [-1.0, 40.0]])
        >>> LinearHandler().input_squares(layer, (x,), {}, ("weight", "bias"))
        tensor([1.0000e+00, 1.2500e+03, 1.0000e+00])
        """
        # torch's norm along the rows takes eight times as long as this does.
        rows = as_statistic(self.input_rows(module, inputs, kwargs, ("weight",), KFACType.EXPAND)).flatten(0, -2)
        return with_ones(rows.square().sum(0) / max(1, len(rows)), roles)

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        rows = _as_rows(gradient, leading=1)
        if approx == KFACType.REDUCE and rows.shape[2] != 1:
            rows = rows.sum(dim=2, keepdim=True)
        return rows

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        columns = [parts["weight"]] if "weight" in parts else []
        columns += [parts["bias"].unsqueeze(-1)] if "bias" in parts else []
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        if roles == ("bias",):
            return {"bias": matrix.squeeze(-1)}
        if "bias" not in roles:
            return {"weight": matrix}
        return {"weight": matrix[..., :-1], "bias": matrix[..., -1]}


def _as_rows(tensor: Tensor, leading: int = 0) -> Tensor:
    """`[v n ... f]` -> `[v n s f]` behind `leading` axes v; n and s may be missing."""
    features = tensor.shape[-1]
    if tensor.ndim == leading + 1:
        return tensor.reshape(*tensor.shape[:leading], 1, 1, features)
    places = tensor.shape[leading + 1 : -1].numel()  # explicit, as -1 is ambiguous for an empty batch
    return tensor.reshape(*tensor.shape[: leading + 1], places, features)
