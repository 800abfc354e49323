"""Squares of per-datum gradients, summed over the data, without holding those gradients all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.blocks.base import at_once, chunks_of_data
from kfacopt.layers.base import OneHot
from kfacopt.layers.unformed import UnformedRows


def squared_sums(
    gradients: Sequence[Tensor],
    inputs: Tensor | UnformedRows,
    budget: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """`Σ_vn (Q_Gᵀ (Σ_s g aᵀ) Q_A)²`, `[*k o i]`; data and outputs in pieces.

    Each side is rotated where that takes fewer products: the rows (`s o²` a datum and cotangent, `s i²` a datum, as
    cotangents share the inputs), or the per-datum gradient (`o² i` and `o i²`, both for each cotangent).

    Args:
        gradients: g, `[*k n s o]` a cotangent.
        inputs: a, `[*k n s i]`; where they are not rotated, they need not be formed.
        budget: Elements that a temporary may have.
        left: Q_G, `[*k o q]`, or None for the identity.
        right: Q_A, `[*k i r]`, or None for the identity.

    >>> squared_sums([torch.ones(3, 2, 1)], torch.ones(3, 2, 4), budget=2)
    tensor([[12., 12., 12., 12.]])
    """
    (data, places, outputs), columns = gradients[0].shape[-3:], inputs.shape[-1]
    on_inputs = None if places > outputs * len(gradients) else right
    if isinstance(inputs, UnformedRows) and (places == 1 or on_inputs is not None):
        inputs = inputs.formed()
    if places == 1 and left is None and right is None:  # a square of a product is a product of squares
        assert isinstance(inputs, Tensor)
        return products_of_squares(gradients, inputs.square(), budget)
    leading = torch.broadcast_shapes(gradients[0].shape[:-3], inputs.shape[:-3])
    on_gradients = None if places > columns else left
    then_left, then_right = (None if on_gradients is not None else left), (None if on_inputs is not None else right)
    sizes = [d if q is None else q.shape[-1] for q, d in ((left, outputs), (right, columns))]
    total = gradients[0].new_zeros(*leading, *sizes)
    rotated = places * max(outputs * (on_gradients is not None), columns * (on_inputs is not None))
    budget, each = at_once(total.device, budget), leading.numel() * max(outputs * columns, rotated)
    for part in chunks_of_data(data, each, budget):
        if isinstance(inputs, UnformedRows):
            a: Tensor | UnformedRows = inputs.some(part)
        else:
            a = times_basis(inputs[..., part, :, :], on_inputs)
        for one in gradients:
            g = times_basis(one[..., part, :, :], on_gradients)
            if then_left is not None:  # it needs all outputs
                total += _squares(per_datum(g, a), then_left, then_right)
                continue
            for some in chunks_of_data(g.shape[-1], leading.numel() * g.shape[-3] * columns, budget):
                total[..., some, :] += _squares(per_datum(g[..., some], a), None, then_right)
    return total


def squared_matrices(matrices: Tensor, left: Tensor | None, right: Tensor | None, budget: int) -> Tensor:
    """`Σ_n (Q_Gᵀ M_n Q_A)²`, `[*k o i]`, of per-datum gradients M `[*k n o i]`; data in pieces.

    Args:
        matrices: M.
        left: Q_G, `[*k o q]`, or None for the identity.
        right: Q_A, `[*k i r]`, or None for the identity.
        budget: Elements that a temporary may have.

    >>> squared_matrices(torch.ones(3, 2, 1), None, torch.tensor([[2.0]]), budget=2)
    tensor([[12.],
            [12.]])
    """
    if matrices.shape[-1] == 1:  # rows, which need no product for each datum
        squares = times_basis(matrices.mT, left).square().sum(-3).mT
        return squares if right is None else squares * right.square()
    parts = chunks_of_data(matrices.shape[-3], matrices[..., 0, :, :].numel(), at_once(matrices.device, budget))
    pieces = (matrices[..., part, :, :] for part in parts)
    same = left is None and right is None
    first, *others = (_squares(piece.clone() if same else piece, left, right) for piece in pieces)
    return sum(others, start=first)


def per_datum(gradients: Tensor, inputs: Tensor | UnformedRows) -> Tensor:
    """`Σ_s g aᵀ`, `[*k n o i]`, of gradients `[*k n s o]` and inputs `[*k n s i]`, formed or not.

    >>> per_datum(torch.ones(1, 3, 2), torch.ones(()).expand(1, 3, 1)).tolist()
    [[[3.0], [3.0]]]
    """
    if isinstance(inputs, UnformedRows):
        return inputs.per_datum(gradients)
    if inputs.shape[-1] > 1:
        return gradients.mT @ inputs
    same = inputs.numel() > 0 and not any(inputs.stride())  # one number everywhere, as a bias has
    summed = gradients.sum(-2) * inputs.flatten()[:1] if same else (gradients * inputs).sum(-2)
    return summed.unsqueeze(-1)


def times_basis(rows: Tensor, basis: Tensor | None) -> Tensor:
    """`rows @ basis` of `[*k n s d]` and `[*k d r]`, or None for the identity."""
    if basis is None:
        return rows
    return rows @ (basis if basis.ndim == 2 else basis.unsqueeze(-3))  # [*k n s d] @ [*k 1 d r]


def _squares(matrices: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """`squared_matrices`, all at once; where both are the identity, what is given is written to."""
    turned = times_basis(matrices, right)
    if left is not None:
        turned = (left if left.ndim == 2 else left.unsqueeze(-3)).mT @ turned
    return turned.square_().sum(-3)


def products_of_squares(gradients: Sequence[Tensor], squares: Tensor, budget: int) -> Tensor:
    """`Σ_vn g² (a²)ᵀ`, `[*k o i]`; outputs in pieces, so that of a vocabulary's nothing else is held.

    Args:
        gradients: g, `[*k n 1 o]` a cotangent.
        squares: a², `[*k n 1 i]`.
        budget: Elements that a temporary may have.

    >>> products_of_squares([torch.full((3, 1, 1), 2.0)] * 2, torch.ones(3, 1, 4), budget=1)
    tensor([[24., 24., 24., 24.]])
    """
    across = squares.squeeze(-2).mT  # [*k i n]
    first, *others = (one.squeeze(-2) for one in gradients)  # [*k n o]
    leading, outputs = torch.broadcast_shapes(first.shape[:-2], across.shape[:-2]), first.shape[-1]
    total = first.new_empty(*leading, outputs, across.shape[-2])
    for some in chunks_of_data(outputs, first.shape[:-1].numel() * len(gradients), at_once(first.device, budget)):
        summed = first[..., some].square()
        for other in others:
            summed.addcmul_(other[..., some], other[..., some])
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
