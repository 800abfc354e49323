"""`torch.nn.Conv1d`, `Conv2d` and `Conv3d`: linear layers on patches, one for every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from einconv.conv_index_pattern import index_pattern_logical
from einops import rearrange
from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, input_tensor, with_ones
from kfacopt.likelihoods import KFACType
from kfacopt.linalg.tensors import as_statistic, pieces

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Up to this many kernel entries, one copy per entry out of channels-last storage fills the patches faster on a CPU than
# one strided copy (3x3: by 1.5 to 5 times, 5x5: slower by 2; torch's unfold, followed by the transposition to rows, is
# in between).
_ENTRYWISE_KERNEL = 9

# Entries up to which einconv's pattern is formed, kernel * output * input of them: no matter for images, a gigabyte for
# a second of sound. 2^24 booleans are 16 MiB, double what an axis of 1,000 places and a kernel of 9 takes; above, the
# same average is summed entry by entry of the kernel. Another bound trades memory for time, the result is the same.
_LONGEST_PATTERN = 2**24


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
        conv = _convolution(module)
        x = input_tensor(inputs, kwargs)
        if x.ndim == len(conv.kernel_size) + 1:
            x = x.unsqueeze(0)
        reduce = approx == KFACType.REDUCE
        rows = with_ones(averaged_patches(conv, x), roles) if reduce else patches(conv, x, roles)
        return rows if conv.groups > 1 else rows.squeeze(0)

    @torch.no_grad()
    def input_squares(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], roles: tuple[str, ...]
    ) -> Tensor | None:
        """See `LayerHandler.input_squares`: the average of patches of squares; no patches are formed.

        >>> layer, x = nn.Conv1d(2, 3, 2), torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 4.0]]])
        >>> ConvolutionHandler().input_squares(layer, (x,), {}, ("weight", "bias"))
        tensor([ 1.,  1.,  4., 10.,  1.])
        """
        x = as_statistic(input_tensor(inputs, kwargs))
        if x.ndim == len(_convolution(module).kernel_size) + 1:
            x = x.unsqueeze(0)
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


def averaged_pattern(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """What a kernel entry sees of each input place on average, `[kernel size]`, float64.

    The mean over the output axis of `einconv`'s index pattern (Dangel 2023, arXiv:2307.02275), of which only this
    average enters KFAC-reduce. On the CPU.

    >>> averaged_pattern(size=4, kernel=2, stride=2, padding=0, dilation=1)
    tensor([[0.5000, 0.0000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.0000, 0.5000]], dtype=torch.float64)
    """
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if kernel * outputs * size <= _LONGEST_PATTERN:
        # Not index_pattern: that one convolves place numbers, which autocast or reduced-precision convolutions would
        # round.
        pattern: Tensor = index_pattern_logical(size, kernel, stride, padding, dilation)
        return pattern.sum(dim=1).double() / outputs
    averaged = torch.zeros(kernel, size, dtype=torch.float64)
    for k in range(kernel):
        seen = torch.arange(outputs) * stride + k * dilation - padding
        averaged[k, seen[(seen >= 0) & (seen < size)]] = 1 / outputs
    return averaged


def _convolution(module: nn.Module) -> Convolution:
    assert isinstance(module, Convolution)
    return module


def _paddings(conv: Convolution) -> list[tuple[int, int]]:
    """What the layer adds before and after each spatial axis."""
    if conv.padding == "valid":
        return [(0, 0) for _ in conv.kernel_size]
    if conv.padding == "same":
        totals = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in conv.padding]


def _padded(conv: Convolution, x: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
    flat = [p for pair in reversed(paddings) for p in pair]  # torch pads from the last axis on
    if not any(flat):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, flat, mode=mode)


def averaged_patches(conv: Convolution, x: Tensor) -> Tensor:
    """`[n (k c) ...] -> [k n 1 i]`, a patch averaged over all output places."""
    paddings = _paddings(conv)
    if conv.padding_mode == "zeros" and all(before == after for before, after in paddings):
        pattern_paddings = [before for before, _ in paddings]  # zeros need not be there to be averaged
    else:
        x = _padded(conv, x, paddings)
        pattern_paddings = [0 for _ in paddings]
    with torch.autocast(x.device.type, enabled=False):
        for axis, padding in enumerate(pattern_paddings):
            # Each contraction takes the first spatial axis left, and appends the kernel's.
            pattern = averaged_pattern(
                x.shape[2], conv.kernel_size[axis], conv.stride[axis], padding, conv.dilation[axis]
            )
            x = torch.tensordot(x, pattern.to(x), dims=([2], [1]))
    return rearrange(x.flatten(2), "n (k c) e -> k n 1 (c e)", k=conv.groups)


def patches(conv: Convolution, x: Tensor, roles: tuple[str, ...]) -> Tensor:
    """`[n (k c) ...] -> [k n s i]`, the patches of all output places, and ones for a bias."""
    x = _padded(conv, x, _paddings(conv))
    spatial, data, channels = len(conv.kernel_size), len(x), conv.in_channels // conv.groups
    outputs = _windows(conv, x).shape[2 : 2 + spatial]
    if "weight" not in roles:
        return with_ones(x.new_empty(()).expand(conv.groups, data, outputs.numel(), 0), roles)
    length = channels * torch.Size(conv.kernel_size).numel()
    rows = x.new_empty(conv.groups, data, *outputs, length + ("bias" in roles))
    target = rows[..., :length].unflatten(-1, (channels, *conv.kernel_size))
    if x.device.type == "cpu" and torch.Size(conv.kernel_size).numel() <= _ENTRYWISE_KERNEL:
        # Each entry's copy meets all of the target: it had better be in the cache.
        for some in pieces(data, rows[:, :1].numel(), x.device):
            source = _windows(conv, x[some].movedim(1, -1).contiguous().movedim(-1, 1))
            here = target[:, some]
            for entry in product(*(range(kernel) for kernel in conv.kernel_size)):
                place: tuple[Any, ...] = (..., *entry)
                here[place] = source[place]
    else:
        target.copy_(_windows(conv, x))
    rows[..., length:] = 1
    return rows.reshape(conv.groups, data, outputs.numel(), rows.shape[-1])


def _windows(conv: Convolution, x: Tensor) -> Tensor:
    """Of padded inputs `[n (k c) ...]`, `[k n outputs c kernel]`: a view."""
    for axis, (kernel, stride, dilation) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    grouped: Tensor = x.unflatten(1, (conv.groups, conv.in_channels // conv.groups))
    grouped = grouped.movedim(1, 0).movedim(2, 2 + len(conv.kernel_size))
    return grouped
