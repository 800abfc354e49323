"""A convolution's patches: the places of its input that each place of the output sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from einconv.conv_index_pattern import index_pattern_logical
from einops import rearrange
from torch import Tensor, nn

from kfacopt.layers.base import with_ones
from kfacopt.linalg.tensors import pieces

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Up to this many kernel entries, one copy per entry out of channels-last storage fills the patches faster on a CPU than
# one strided copy (3x3: by 1.5 to 5 times, 5x5: slower by 2; torch's unfold, followed by the transposition to rows, is
# in between).
_ENTRYWISE_KERNEL = 9

# Entries up to which einconv's pattern is formed, kernel * output * input of them: no matter for images, a gigabyte for
# a second of sound. 2^24 booleans are 16 MiB, double what an axis of 1,000 places and a kernel of 9 takes; above, the
# same average is summed entry by entry of the kernel. Another bound trades memory for time, the result is the same.
_LONGEST_PATTERN = 2**24


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


def paddings_of(conv: Convolution) -> list[tuple[int, int]]:
    """What the layer adds before and after each spatial axis."""
    if conv.padding == "valid":
        return [(0, 0) for _ in conv.kernel_size]
    if conv.padding == "same":
        totals = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in conv.padding]


def padded(conv: Convolution, x: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
    flat = [p for pair in reversed(paddings) for p in pair]  # torch pads from the last axis on
    if not any(flat):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, flat, mode=mode)


def averaged_patches(conv: Convolution, x: Tensor) -> Tensor:
    """`[n (k c) ...] -> [k n 1 i]`, a patch averaged over all output places."""
    paddings = paddings_of(conv)
    if conv.padding_mode == "zeros" and all(before == after for before, after in paddings):
        pattern_paddings = [before for before, _ in paddings]  # zeros need not be there to be averaged
    else:
        x = padded(conv, x, paddings)
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
    x = padded(conv, x, paddings_of(conv))
    spatial, data, channels = len(conv.kernel_size), len(x), conv.in_channels // conv.groups
    outputs = windows_of(conv, x).shape[2 : 2 + spatial]
    if "weight" not in roles:
        return with_ones(x.new_empty(()).expand(conv.groups, data, outputs.numel(), 0), roles)
    length = channels * torch.Size(conv.kernel_size).numel()
    rows = x.new_empty(conv.groups, data, *outputs, length + ("bias" in roles))
    target = rows[..., :length].unflatten(-1, (channels, *conv.kernel_size))
    if x.device.type == "cpu" and torch.Size(conv.kernel_size).numel() <= _ENTRYWISE_KERNEL:
        # Each entry's copy meets all of the target: it had better be in the cache.
        for some in pieces(data, rows[:, :1].numel(), x.device):
            source = windows_of(conv, x[some].movedim(1, -1).contiguous().movedim(-1, 1))
            here = target[:, some]
            for entry in product(*(range(kernel) for kernel in conv.kernel_size)):
                place: tuple[Any, ...] = (..., *entry)
                here[place] = source[place]
    else:
        target.copy_(windows_of(conv, x))
    rows[..., length:] = 1
    return rows.reshape(conv.groups, data, outputs.numel(), rows.shape[-1])


def windows_of(conv: Convolution, x: Tensor) -> Tensor:
    """Of padded inputs `[n (k c) ...]`, `[k n outputs c kernel]`: a view."""
    for axis, (kernel, stride, dilation) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    grouped: Tensor = x.unflatten(1, (conv.groups, conv.in_channels // conv.groups))
    grouped = grouped.movedim(1, 0).movedim(2, 2 + len(conv.kernel_size))
    return grouped
