"""Squares of per-datum gradients, summed over the data, without holding those gradients all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacopt.blocks.base import at_once, chunks_of_data
from kfacopt.layers.base import OneHot


def squared_sums(gradients: Tensor, inputs: Tensor, budget: int) -> Tensor:
    """`Σ_n (Σ_s g aᵀ)²` of gradients `[*k n s o]` and inputs `[*k n s i]`; data and outputs in pieces.

    Args:
        gradients: g.
        inputs: a.
        budget: Elements that a temporary may have.

    >>> squared_sums(torch.ones(3, 2, 1), torch.ones(3, 2, 4), budget=2)
    tensor([[12., 12., 12., 12.]])
    """
    if gradients.shape[-2] == 1:  # no places to sum over: a square of a product is a product of squares
        return products_of_squares(gradients.unsqueeze(0), inputs.square(), budget)
    leading = torch.broadcast_shapes(gradients.shape[:-3], inputs.shape[:-3])
    outputs, columns = gradients.shape[-1], inputs.shape[-1]
    total = gradients.new_zeros(*leading, outputs, columns)
    budget = at_once(gradients.device, budget)
    for some in chunks_of_data(outputs, leading.numel() * columns, budget):
        own, places = gradients[..., some], total[..., some, :]
        for part in chunks_of_data(gradients.shape[-3], places.numel(), budget):
            places += (own[..., part, :, :].mT @ inputs[..., part, :, :]).square_().sum(-3)
    return total


def products_of_squares(gradients: Tensor, squares: Tensor, budget: int) -> Tensor:
    """`Σ_vn g² (a²)ᵀ`, `[*k o i]`; outputs in pieces, so that of a vocabulary's nothing else is held.

    Args:
        gradients: g, `[v *k n 1 o]`.
        squares: a², `[*k n 1 i]`.
        budget: Elements that a temporary may have.

    >>> products_of_squares(torch.full((2, 3, 1, 1), 2.0), torch.ones(3, 1, 4), budget=1)
    tensor([[24., 24., 24., 24.]])
    """
    across, own = squares.squeeze(-2).mT, gradients.squeeze(-2)  # [*k i n], [v *k n o]
    leading, outputs = torch.broadcast_shapes(own.shape[1:-2], across.shape[:-2]), own.shape[-1]
    total = own.new_empty(*leading, outputs, across.shape[-2])
    for some in chunks_of_data(outputs, own.shape[:-1].numel(), at_once(own.device, budget)):
        first, *others = own[..., some]
        summed = first.square()
        for other in others:
            summed.addcmul_(other, other)
        total[..., some, :] = (across @ summed).mT
    return total


def squared_one_hot(gradients: Tensor, inputs: OneHot) -> Tensor:
    """`Σ_vn (Σ_s g eᵀ)²` of gradients `[v n s o]` and one-hot e, `[o i]`; laid out as an embedding's weight is.

    A datum's gradient at one word is the sum over the word's places in that datum; most words are absent.
    """
    data, _ = inputs.indices.shape
    keys = inputs.indices + inputs.size * torch.arange(data, device=gradients.device).unsqueeze(-1)
    unique, place = keys.flatten().unique(return_inverse=True)
    word = unique % inputs.size
    total = gradients.new_zeros(inputs.size, gradients.shape[-1])
    for cotangent in gradients:
        flat = cotangent.flatten(-3, -2)
        per_datum = flat.new_zeros(unique.numel(), flat.shape[-1]).index_add_(0, place, flat)
        total.index_add_(0, word, per_datum.square_())
    return total.mT
