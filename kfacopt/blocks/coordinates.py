"""Squared coordinates of per-datum gradients in an eigenbasis, in the cheapest way that the sizes allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.blocks.base import ELEMENTS_AT_ONCE
from kfacopt.blocks.squares import (
    per_datum,
    products_of_squares,
    squared_matrices,
    squared_one_hot,
    squared_sums,
    times_basis,
)
from kfacopt.blocks.tied import squared_tied_coordinates
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.unformed import UnformedRows


def squared_coordinates(
    rows: Rows, left: Tensor | None, right: Tensor | None, budget: int = ELEMENTS_AT_ONCE
) -> Tensor:
    """Sum over cotangents and data of the squared coordinates of per-datum gradients in an eigenbasis, `[*k o i]`.

    Without weight sharing no per-datum gradient is formed: `((g Q_G)²)ᵀ (a Q_A)²` (George et al. 2018, section 3.1).
    With it, all pairs of places (of few), or per-datum gradients in chunks that bound the memory.

    Args:
        rows: Inputs `[*k n s i]` or one-hot, gradients `[v *k n s o]`.
        left: Q_G, `[*k o q]`, or None for the identity, or if the gradients are coordinates already.
        right: Q_A, `[*k i r]`, or None for the identity.
        budget: Elements that a temporary may have.
    """
    return squared_coordinates_of_chunks([rows], left, right, budget)


def squared_coordinates_of_chunks(
    chunks: Sequence[Rows], left: Tensor | None, right: Tensor | None, budget: int = ELEMENTS_AT_ONCE
) -> Tensor:
    """As `squared_coordinates`, of all chunks of a batch's cotangents: the inputs, which they share, rotated once."""
    inputs = chunks[0].held_inputs
    if isinstance(inputs, OneHot) or chunks[0].transposed is not None:
        parts = [_squared_by_words(rows, left, right, budget) for rows in chunks]
        return sum(parts[1:], start=parts[0])
    gradients = cotangents_of(chunks)
    places = gradients[0].shape[-2]
    if isinstance(inputs, UnformedRows):
        if places > 3:
            return squared_sums(gradients, inputs, budget, left, right)
        inputs = inputs.formed()
    if places == 1 and left is None:
        return products_of_squares(gradients, times_basis(inputs, right).square(), budget)
    if places == 1:
        return of_squares(squared_gradients(gradients, left), inputs, right)
    if inputs.shape[-1] == 1:
        parts = [squared_matrices(per_datum(g, inputs), left, right, budget) for g in gradients]
        return sum(parts[1:], start=parts[0])
    # Pairs of places cost s(s+1)/2 products against s and two passes over the per-datum gradients.
    if places <= 3:
        rotated = times_basis(inputs, right)
        parts = [_squared_by_pairs(times_basis(g, left), rotated) for g in gradients]
        return sum(parts[1:], start=parts[0])
    return squared_sums(gradients, inputs, budget, left, right)


def cotangents_of(chunks: Sequence[Rows]) -> list[Tensor]:
    """The gradients of all chunks, `[*k n s o]` a cotangent."""
    return [gradients for rows in chunks for gradients in rows.gradients]


def squared_gradients(gradients: Sequence[Tensor], left: Tensor | None) -> Tensor:
    """`Σ_v (g Q_G)²`, `[*k n s o]`, of gradients `[*k n s o]` a cotangent; one at a time, which the cache can hold."""
    total = times_basis(gradients[0], left).square()
    for one in gradients[1:]:
        rotated = times_basis(one, left)
        total.addcmul_(rotated, rotated)
    return total


def of_squares(squares: Tensor, inputs: Tensor | OneHot, right: Tensor | None) -> Tensor:
    """`squaresᵀ (a Q_A)²`, `[*k o i]`, of squares `[*k n 1 o]` and inputs `[*k n 1 i]`."""
    assert isinstance(inputs, Tensor)
    return squares.squeeze(-2).mT @ times_basis(inputs, right).square().squeeze(-2)


def _squared_by_words(rows: Rows, left: Tensor | None, right: Tensor | None, budget: int) -> Tensor:
    if rows.transposed is not None:
        return squared_tied_coordinates(rows, left, right, budget)
    assert isinstance(rows.inputs, OneHot)
    return squared_one_hot(times_basis(rows.gradients, left), rows.inputs)


def _squared_by_pairs(gradients: Tensor, inputs: Tensor) -> Tensor:
    first, second = torch.triu_indices(gradients.shape[-2], gradients.shape[-2], device=gradients.device)
    weight = torch.where(first == second, 1.0, 2.0).to(gradients.dtype).unsqueeze(-1)
    left = gradients[..., first, :] * gradients[..., second, :] * weight
    right = inputs[..., first, :] * inputs[..., second, :]
    return left.flatten(-3, -2).mT @ right.flatten(-3, -2)
