"""`torch.nn.ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`: linear layers on what each output place sees."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, input_tensor, with_ones
from kfacopt.layers.convolution import group_rows
from kfacopt.likelihoods import KFACType

TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class TransposedConvolutionHandler(LayerHandler):
    """Rows of a transposed convolution: what an output place sees of the input, `i = (c_in / groups) · kernel`.

    A transposed convolution sends input place q to the output places `q · stride - padding + e · dilation`, one for
    each kernel entry e. Read from the output, it is a linear layer: place p sees, through entry e, the input place
    that is sent to p by e, or zero if there is none. Hence the bias is the matrix's last column, and groups are an axis
    k, as those of `ConvolutionHandler`. Stride, padding, output padding (`output_size`, too) and dilation are followed.

    >>> layer, handler = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), TransposedConvolutionHandler()
    >>> x, roles = torch.zeros(5, 4, 3, 3), ("weight", "bias")
    >>> layer(x).shape
    torch.Size([5, 6, 7, 7])
    >>> handler.input_rows(layer, (x,), {}, roles, KFACType.EXPAND).shape
    torch.Size([2, 5, 49, 19])
    >>> handler.input_rows(layer, (x,), {}, roles, KFACType.REDUCE).shape
    torch.Size([2, 5, 1, 19])
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
        conv = _transposed(module)
        x = input_tensor(inputs, kwargs)
        if x.ndim == len(conv.kernel_size) + 1:
            x = x.unsqueeze(0)
        outputs = _output_sizes(conv, x, inputs[1] if len(inputs) > 1 else kwargs.get("output_size"))
        reduce = approx == KFACType.REDUCE
        if "weight" not in roles:
            rows = x.new_empty(conv.groups, x.shape[0], 1 if reduce else torch.Size(outputs).numel(), 0)
        else:
            rows = _averaged(conv, x, outputs) if reduce else _seen(conv, x, outputs)
        rows = with_ones(rows, roles)
        return rows if conv.groups > 1 else rows.squeeze(0)

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        conv = _transposed(module)
        return group_rows(gradient, len(conv.kernel_size), conv.groups, approx)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        groups = _transposed(module).groups
        columns = []
        if "weight" in parts:
            columns.append(rearrange(parts["weight"].flatten(2), "(k c) o e -> k o (c e)", k=groups))
        if "bias" in parts:
            columns.append(rearrange(parts["bias"], "(k o) -> k o 1", k=groups))
        matrix = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
        return matrix if groups > 1 else matrix.squeeze(0)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        conv = _transposed(module)
        if conv.groups == 1:
            matrix = matrix.unsqueeze(0)
        parts: dict[str, Tensor] = {}
        if "weight" in roles:
            columns = matrix[..., :-1] if "bias" in roles else matrix
            entries = torch.Size(conv.kernel_size).numel()
            weight = rearrange(columns, "k o (c e) -> (k c) o e", e=entries)
            parts["weight"] = weight.reshape(*weight.shape[:2], *conv.kernel_size)
        if "bias" in roles:
            parts["bias"] = matrix[..., -1].reshape(conv.out_channels)
        return parts


def _transposed(module: nn.Module) -> TransposedConvolution:
    assert isinstance(module, TransposedConvolution)
    return module


def _output_sizes(conv: TransposedConvolution, x: Tensor, asked: Any) -> list[int]:
    """The output's spatial sizes; `asked` is the forward's `output_size`, of which leading axes say nothing."""
    axes = len(conv.kernel_size)
    if asked is not None:
        return [int(size) for size in list(asked)[-axes:]]
    return [
        (size - 1) * conv.stride[d]
        - 2 * int(conv.padding[d])
        + conv.dilation[d] * (conv.kernel_size[d] - 1)
        + conv.output_padding[d]
        + 1
        for d, size in enumerate(x.shape[2:])
    ]


def _reached(size: int, outputs: int, stride: int, shift: int) -> tuple[slice, slice]:
    """Of the places q of an axis those with `q · stride + shift` inside the output; and these output places.

    >>> _reached(size=4, outputs=5, stride=2, shift=-1)
    (slice(1, 3, None), slice(1, 4, 2))
    """
    first = max(0, -(shift // stride))
    end = max(first, min(size, (outputs - 1 - shift) // stride + 1))
    start = first * stride + shift
    return slice(first, end), slice(start, start + max(0, (end - first - 1) * stride + (end > first)), stride)


def _shifts(conv: TransposedConvolution, axis: int) -> list[int]:
    return [e * conv.dilation[axis] - int(conv.padding[axis]) for e in range(conv.kernel_size[axis])]


def _seen(conv: TransposedConvolution, x: Tensor, outputs: list[int]) -> Tensor:
    """`[n (k c) ...] -> [k n s (c e)]`, what every output place sees; one strided copy a kernel entry."""
    axes, channels = len(outputs), conv.in_channels // conv.groups
    source = rearrange(x.flatten(2), "n (k c) q -> k n q c", k=conv.groups).unflatten(2, x.shape[2:])
    entries = torch.Size(conv.kernel_size).numel()
    rows = x.new_zeros(conv.groups, x.shape[0], *outputs, channels, entries)
    for number, entry in enumerate(product(*(range(kernel) for kernel in conv.kernel_size))):
        pairs = [_reached(x.shape[2 + d], outputs[d], conv.stride[d], _shifts(conv, d)[entry[d]]) for d in range(axes)]
        target, every = rows[..., number], [slice(None)] * 2
        target[(*every, *(places for _, places in pairs))] = source[(*every, *(seen for seen, _ in pairs))]
    return rows.flatten(2 + axes).flatten(2, 1 + axes)


def _averaged(conv: TransposedConvolution, x: Tensor, outputs: list[int]) -> Tensor:
    """`[n (k c) ...] -> [k n 1 (c e)]`, the mean of what the output places see, which is never formed."""
    with torch.autocast(x.device.type, enabled=False):
        for axis, count in enumerate(outputs):
            # Each contraction takes the first spatial axis left, and appends the kernel's.
            pattern = torch.zeros(conv.kernel_size[axis], x.shape[2], dtype=torch.float64)
            for entry, shift in enumerate(_shifts(conv, axis)):
                pattern[entry, _reached(x.shape[2], count, conv.stride[axis], shift)[0]] = 1.0 / count
            x = torch.tensordot(x, pattern.to(x), dims=([2], [1]))
    return rearrange(x.flatten(2), "n (k c) e -> k n 1 (c e)", k=conv.groups)
