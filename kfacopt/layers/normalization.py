"""Layers that normalise, then scale and shift: Layer-, RMS-, Batch-, Group- and InstanceNorm.

Their scale γ and shift β act on each channel alone, `y_c = γ_c x̂_c + β_c`, so the gradient's rows are elementwise
products with `a = (x̂, 1)`, and the curvature is a small matrix per channel.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, Structure, input_tensor
from kfacopt.likelihoods import KFACType

_HALF = (torch.float16, torch.bfloat16)


class NormalizationHandler(LayerHandler):
    """What the normalisation layers share. The matrix `[c i]` has the columns scale and shift.

    Subclasses say how an input is normalised (`normalized`) and where its channels are (`channel_rows`).
    """

    structure: ClassVar[Structure] = "elementwise"

    @abstractmethod
    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        """x̂, in the shape of `x`: the layer's output before scale and shift."""

    @abstractmethod
    def channel_rows(self, module: nn.Module, x: Tensor, leading: int = 0) -> Tensor:
        """An input or output as `[n s c]`, behind `leading` other axes."""

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        x = input_tensor(inputs, kwargs)
        if x.dtype in _HALF:
            x = x.float()  # as torch's own kernels do; statistics of half inputs would be too coarse
        if "weight" in roles:
            # Ambient autocast would bring parts of it back to half.
            with torch.autocast(x.device.type, enabled=False):
                scale = self.channel_rows(module, self.normalized(module, x))
        else:
            scale = self.channel_rows(module, x)
        if approx == KFACType.REDUCE and scale.shape[1] != 1:
            scale = scale.mean(dim=1, keepdim=True)
        columns = [scale] if "weight" in roles else []
        columns += [torch.ones_like(scale)] if "bias" in roles else []
        return torch.stack(columns, dim=-1)

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        rows = self.channel_rows(module, gradient, leading=1)
        if approx == KFACType.REDUCE and rows.shape[2] != 1:
            rows = rows.sum(dim=2, keepdim=True)
        return rows

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        names = [name for name in self.parameter_names if name in parts]
        return torch.stack([parts[name].flatten() for name in names], dim=-1)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        names = [name for name in self.parameter_names if name in roles]
        shape = _parameter_shape(module)
        return {name: matrix[..., i].reshape(shape) for i, name in enumerate(names)}


class LayerNormHandler(NormalizationHandler):
    """`torch.nn.LayerNorm`; a channel is one place of `normalized_shape`.

    >>> layer, handler = nn.LayerNorm(3), LayerNormHandler()
    >>> x = torch.zeros(5, 4, 3)
    >>> handler.input_rows(layer, (x,), {}, ("weight", "bias"), KFACType.EXPAND).shape
    torch.Size([5, 4, 3, 2])
    """

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return nn.functional.layer_norm(x, list(module.normalized_shape), eps=module.eps)

    def channel_rows(self, module: nn.Module, x: Tensor, leading: int = 0) -> Tensor:
        axes = x.ndim - len(_normalized_shape(module))
        channels = x.shape[axes:].numel()
        data = x.shape[leading] if axes > leading else 1
        places = x.shape[leading + 1 : axes].numel()
        return x.reshape(*x.shape[:leading], data, places, channels)


class RMSNormHandler(LayerNormHandler):
    """`torch.nn.RMSNorm`, a LayerNorm without centring and shift."""

    parameter_names: tuple[str, ...] = ("weight",)

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return nn.functional.rms_norm(x, list(module.normalized_shape), eps=module.eps)


class GroupNormHandler(NormalizationHandler):
    """`torch.nn.GroupNorm` on `[n c ...]`."""

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return nn.functional.group_norm(x, module.num_groups, eps=module.eps)

    def channel_rows(self, module: nn.Module, x: Tensor, leading: int = 0) -> Tensor:
        return _channels_last(x, leading)


class BatchNormHandler(NormalizationHandler):
    """`torch.nn.BatchNorm1d`, `2d` and `3d`.

    In training mode, and without running statistics, x̂ is normalised by the batch as the forward pass did, otherwise
    by the running statistics. As the batch's moments belong to every datum, rows are not per-example gradients of a
    function of one datum; the gradient of γ and β is their sum all the same.
    """

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        running = not module.training and module.running_mean is not None and module.running_var is not None
        # No running statistics are handed over in training mode, so none are updated a second time.
        mean, variance = (module.running_mean, module.running_var) if running else (None, None)
        return nn.functional.batch_norm(x, mean, variance, training=not running, eps=module.eps)

    def channel_rows(self, module: nn.Module, x: Tensor, leading: int = 0) -> Tensor:
        return _channels_last(x, leading)


class InstanceNormHandler(NormalizationHandler):
    """`torch.nn.InstanceNorm1d`, `2d` and `3d` with `affine=True`; also unbatched."""

    def normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        running = not module.training and module.track_running_stats
        mean, variance = (module.running_mean, module.running_var) if running else (None, None)
        batch = x if x.ndim == _spatial_axes(module) + 2 else x.unsqueeze(0)
        normalized = nn.functional.instance_norm(batch, mean, variance, use_input_stats=not running, eps=module.eps)
        return normalized.reshape(x.shape)

    def channel_rows(self, module: nn.Module, x: Tensor, leading: int = 0) -> Tensor:
        unbatched = x.ndim == leading + _spatial_axes(module) + 1
        return _channels_last(x.unsqueeze(leading) if unbatched else x, leading)


def _normalized_shape(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return tuple(module.normalized_shape)


def _spatial_axes(module: nn.Module) -> int:
    if isinstance(module, nn.InstanceNorm1d):
        return 1
    return 2 if isinstance(module, nn.InstanceNorm2d) else 3


def _parameter_shape(module: nn.Module) -> torch.Size:
    for parameter in (module._parameters.get("weight"), module._parameters.get("bias")):
        if parameter is not None:
            return parameter.shape
    raise ValueError(f"{type(module).__name__} has neither weight nor bias, so there is nothing to unpack")


def _channels_last(x: Tensor, leading: int) -> Tensor:
    """`[v n c ...]` -> `[v n s c]` behind `leading` axes v; no places are one place."""
    if leading:
        return rearrange(x.reshape(*x.shape[:3], x.shape[3:].numel()), "v n c s -> v n s c")
    return rearrange(x.reshape(*x.shape[:2], x.shape[2:].numel()), "n c s -> n s c")
