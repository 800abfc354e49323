"""Products of a convolution's patches with each other and with gradients, without the patches.

A patch of a kernel of `K x L` has K *lanes*: the L inputs of one row of the image, of all channels. Patches below each
other have K - 1 lanes in common, so that an image has K times fewer of them than its patches. A product of two lanes e
rows apart is that of all pairs of kernel rows that are e apart; which rows of the image these meet differs only at the
border. So the patches' covariance takes a product for each row of the image and each e, `K (L c)²` multiplications a
place where the patches take `K² (L c)²`. Nothing is approximated: it is the same sum in another order.
"""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kfacopt.layers.patches import Convolution, averaged_patches, padded, paddings_of, patches
from kfacopt.layers.unformed import UnformedRows
from kfacopt.linalg.tensors import ELEMENTS_IN_CACHE

# Kernels of more rows take too many calls, and rows with fewer inputs are products too small to be fast; it changes the
# speed, and the result by rounding.
_TALLEST, _FEWEST = 16, 2048
# From so many inputs a lane on, products with gradients are faster where these lie next to each other (8 gradients of
# 784 places, processor time at one thread: 5 inputs 5.9 ms so, 1.5 apart; 16 gradients of 196: 40 inputs 4.4 and 5.8).
_MANY = 16


class UnformedPatches(UnformedRows):
    """Patches of a convolution with one group and weight, and stride one along its first axis.

    Args:
        conv: The layer.
        images: Its inputs `[n c ...]`, not padded.
        roles: The parameters that the rows are for; `"weight"` among them.

    >>> conv, images = torch.nn.Conv2d(2, 1, 3, padding=1), torch.arange(32.0).view(1, 2, 4, 4)
    >>> unformed = UnformedPatches(conv, images, ("weight", "bias"))
    >>> rows = unformed.formed()[0]
    >>> torch.equal(unformed.covariance(), rows.mT @ rows)
    True
    """

    def __init__(self, conv: Convolution, images: Tensor, roles: tuple[str, ...]) -> None:
        super().__init__()
        self._conv, self._images, self._roles = conv, images, roles
        sizes = [size + sum(pair) for size, pair in zip(images.shape[2:], paddings_of(conv), strict=True)]
        spans = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        self._outputs = [(a - b) // s + 1 for a, b, s in zip(sizes, spans, conv.stride, strict=True)]
        places = torch.Size(self._outputs).numel()
        self._length = images.shape[1] * torch.Size(conv.kernel_size).numel()
        self.shape = torch.Size([len(images), places, self._length + ("bias" in roles)])
        self.dtype = images.dtype

    @staticmethod
    def suits(conv: Convolution, images: Tensor, roles: tuple[str, ...]) -> bool:
        """Whether lanes are shared. On an accelerator, where large products are the fast ones, there are none."""
        shares = conv.stride[0] == 1 and 1 < conv.kernel_size[0] <= _TALLEST and conv.groups == 1
        if not (shares and "weight" in roles and images.numel() > 0 and images.device.type == "cpu"):
            return False
        return images.numel() // images.shape[1] // images.shape[2] * _width(conv, images.shape[1]) >= _FEWEST

    def _form(self) -> Tensor:
        return patches(self._conv, self._images, self._roles).squeeze(0)

    def to(self, dtype: torch.dtype) -> UnformedPatches:
        return UnformedPatches(self._conv, self._images.to(dtype), self._roles)

    def some(self, data: slice) -> UnformedPatches:
        return UnformedPatches(self._conv, self._images[data], self._roles)

    def averaged(self) -> Tensor:
        rows = averaged_patches(self._conv, self._images).squeeze(0)
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1) if "bias" in self._roles else rows

    def covariance(self) -> Tensor:
        # Rows of zeros above and below add nothing.
        paddings = paddings_of(self._conv)
        above = paddings[0][0] if self._conv.padding_mode == "zeros" else 0
        if self._conv.padding_mode == "zeros":
            paddings[0] = (0, 0)
        lanes = self._lanes(padded(self._conv, self._images, paddings).transpose(0, 2)).flatten(2)  # [rows w (n p)]
        kernel, (rows, width, _) = self._conv.kernel_size[0], lanes.shape
        seen = [(entry * self._conv.dilation[0] - above) for entry in range(kernel)]  # the first row each entry sees
        result = lanes.new_zeros(kernel, width, kernel, width)
        at_once = max(1, ELEMENTS_IN_CACHE // width**2)
        for apart in range(kernel):
            shift = apart * self._conv.dilation[0]
            for start in range(0, rows - shift, at_once):
                stop = min(start + at_once, rows - shift)
                products = torch.bmm(lanes[start:stop], lanes[start + shift : stop + shift].mT)
                for entry in range(kernel - apart):
                    first, last = max(seen[entry], start), min(seen[entry] + self._outputs[0], stop)
                    if first < last:
                        result[entry, :, entry + apart] += products[first - start : last - start].sum(0)
            for entry in range(kernel - apart if apart else 0):
                result[entry + apart, :, entry] = result[entry, :, entry + apart].mT
        inputs, channels = self._length, self._images.shape[1]
        columns = result.view(-1, channels, inputs // channels, channels).permute(1, 0, 3, 2).reshape(inputs, inputs)
        if "bias" not in self._roles:
            return columns
        sums = lanes.sum(-1)  # [rows w]
        own = torch.stack([sums[max(first, 0) : max(first + self._outputs[0], 0)].sum(0) for first in seen])
        whole = columns.new_full((inputs + 1, inputs + 1), float(self.shape[:2].numel()))
        whole[:-1, :-1] = columns
        whole[-1, :-1] = whole[:-1, -1] = own.view(-1, channels).mT.reshape(-1)
        return whole

    def per_datum(self, gradients: Tensor) -> Tensor:
        conv, lanes = self._conv, self._lanes_by_datum
        across, outputs = gradients.mT, gradients.shape[-1]
        result = gradients.new_empty(len(gradients), outputs, self.shape[-1])
        target = result[..., : self._length].unflatten(-1, (self._images.shape[1], *conv.kernel_size))
        for entry in range(conv.kernel_size[0]):
            first = entry * conv.dilation[0]
            seen = lanes[:, :, first : first + self._outputs[0]].flatten(2)
            found = torch.bmm(across, seen.mT).unflatten(-1, (*conv.kernel_size[1:], -1))
            target[:, :, :, entry] = found.movedim(-1, 2)
        if "bias" in self._roles:
            result[..., -1] = gradients.sum(-2)
        return result

    @cached_property
    def _lanes_by_datum(self) -> Tensor:
        """`[n w rows p]`, rows of the padding among them; in memory few lanes so, and many of them last."""
        images = padded(self._conv, self._images, paddings_of(self._conv))
        return self._lanes(images, last=_width(self._conv, images.shape[1]) >= _MANY)

    def _lanes(self, images: Tensor, last: bool = False) -> Tensor:
        """Of images `[a c b others]`, data and rows in any order, `[a w b p]`, a lane's entries as `kernel c`.

        Args:
            images: Padded where they are to be.
            last: The lanes are to lie next to each other, as though they were the last axis.
        """
        conv, others = self._conv, self._conv.kernel_size[1:]
        source = images.movedim(1, -1).contiguous().movedim(-1, 1) if last else images
        for axis, (kernel, stride, dilation) in enumerate(
            zip(others, conv.stride[1:], conv.dilation[1:], strict=True), start=3
        ):
            source = source.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        (a, channels, b, *places), width = source.shape[: source.ndim - len(others)], _width(conv, source.shape[1])
        shape = (a, b, *places, width) if last else (a, width, b, *places)
        target = source.new_empty(shape).movedim(-1, 1) if last else source.new_empty(shape)
        parts = target.unflatten(1, (-1, channels))
        for number, entry in enumerate(product(*(range(kernel) for kernel in others))):
            at: tuple[Any, ...] = (..., *entry)
            parts[:, number] = source[at]
        return target.flatten(3) if places else target.unsqueeze(-1)


def _width(conv: Convolution, channels: int) -> int:
    """How many inputs a lane has."""
    return channels * torch.Size(conv.kernel_size[1:]).numel()
