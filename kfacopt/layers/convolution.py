"""`torch.nn.Conv1d`, `Conv2d` and `Conv3d`: linear layers on patches, one for every group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, input_tensor, with_ones
from kfacopt.layers.lanes import UnformedPatches
from kfacopt.layers.patches import Convolution, averaged_patches, patches
from kfacopt.likelihoods import KFACType
from kfacopt.linalg.tensors import as_statistic


class ConvolutionHandler(LayerHandler):
    """Rows of a convolution: its kernel's patches, `i = (c_in / groups) · kernel`, at places s.

    With groups all rows and the matrix lead with an axis k of them: each group has its own pair of Kronecker factors,
    which is its exact block structure. `reduce` takes the patches' average from `einconv`'s index patterns and never
    forms the patches themselves. Stride, dilation, padding (`'same'` with even kernels too) and every padding mode are
    followed.

    >>> layer, handler = nn.Conv2d(4, 6, 3, groups=2, padding=1), ConvolutionHandler()
    >>> x, roles = torch.zeros(5, 4, 8, 8), ("weight", "bias")
    >>> handler.input_rows(layer, (x,), {}, roles, KFACType.EXPAND).shape
    torch.Size([2, 5, 64, 19])
    >>> handler.input_rows(layer, (x,), {}, roles, KFACType.REDUCE).shape
    torch.Size([2, 5, 1, 19])
    >>> handler.gradient_rows(layer, torch.zeros(1, 5, 6, 8, 8), KFACType.EXPAND).shape
    torch.Size([1, 2, 5, 64, 3])
    """

    batched = True

    def refusal(self, module: nn.Module) -> str | None:
        kind = next(t for t in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, t))
        if getattr(type(module), "_conv_forward", None) is not kind._conv_forward:
            return f"subclass of {kind.__name__} with a _conv_forward of its own: register a handler"
        return super().refusal(module)

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        conv, x = _convolution(module), _images(module, inputs, kwargs)
        reduce = approx == KFACType.REDUCE
        rows = with_ones(averaged_patches(conv, x), roles) if reduce else patches(conv, x, roles)
        return rows if conv.groups > 1 else rows.squeeze(0)

    @torch.no_grad()
    def unformed_rows(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], roles: tuple[str, ...]
    ) -> UnformedPatches | None:
        conv, x = _convolution(module), as_statistic(_images(module, inputs, kwargs))
        own = type(self).input_rows is ConvolutionHandler.input_rows  # whose rows a subclass makes otherwise has them
        return UnformedPatches(conv, x, roles) if own and UnformedPatches.suits(conv, x, roles) else None

    @torch.no_grad()
    def input_squares(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], roles: tuple[str, ...]
    ) -> Tensor | None:
        """See `LayerHandler.input_squares`: the average of patches of squares; no patches are formed.

        >>> layer, x = nn.Conv1d(2, 3, 2), torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 4.0]]])
        >>> ConvolutionHandler().input_squares(layer, (x,), {}, ("weight", "bias"))
        tensor([ 1.,  1.,  4., 10.,  1.])
        """
        x = as_statistic(_images(module, inputs, kwargs))
        if not len(x):
            return None
        return self.input_rows(module, (x.square().mean(0, keepdim=True),), {}, roles, KFACType.REDUCE).mean((-3, -2))

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        conv = _convolution(module)
        return group_rows(gradient, len(conv.kernel_size), conv.groups, approx)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        conv = _convolution(module)
        groups, axes = conv.groups, {"weight": 2 + len(conv.kernel_size), "bias": 1}
        columns = []
        for role in (role for role in axes if role in parts):
            shape, leading = parts[role].shape, parts[role].ndim - axes[role]
            inputs = shape[leading + 1 :].numel()  # not of conv.weight: to read that may compute it anew
            columns.append(parts[role].reshape(*shape[:leading], groups, conv.out_channels // groups, inputs))
        matrix = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        return matrix if groups > 1 else matrix.squeeze(-3)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        conv = _convolution(module)
        if conv.groups == 1:
            matrix = matrix.unsqueeze(-3)
        leading, parts = matrix.shape[:-3], dict[str, Tensor]()
        if "weight" in roles:
            columns = matrix[..., :-1] if "bias" in roles else matrix
            shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
            parts["weight"] = columns.reshape(*leading, *shape)
        if "bias" in roles:
            parts["bias"] = matrix[..., -1].reshape(*leading, conv.out_channels)
        return parts


def group_rows(gradient: Tensor, axes: int, groups: int, approx: KFACType) -> Tensor:
    """Gradients of images `[v n (k o) ...]` with so many spatial axes (n may be missing) as `[v k n s o]`.

    With one group there is no axis k; `reduce` sums over the places s.

    >>> group_rows(torch.zeros(2, 5, 6, 4, 3), axes=2, groups=3, approx=KFACType.EXPAND).shape
    torch.Size([2, 3, 5, 12, 2])
    """
    if gradient.ndim == axes + 2:
        gradient = gradient.unsqueeze(1)
    places = gradient.shape[3:].numel()
    gradient = gradient.reshape(*gradient.shape[:3], places)
    if approx == KFACType.REDUCE:
        gradient = gradient.sum(dim=-1, keepdim=True)
    rows = rearrange(gradient, "v n (k o) s -> v k n s o", k=groups)
    return rows if groups > 1 else rows.squeeze(1)


def _convolution(module: nn.Module) -> Convolution:
    assert isinstance(module, Convolution)
    return module


def _images(module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The layer's input, `[n c ...]`."""
    x = input_tensor(inputs, kwargs)
    return x.unsqueeze(0) if x.ndim == len(_convolution(module).kernel_size) + 1 else x
