"""Rows that are formed when they are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.lanes import UnformedPatches


def unformed() -> UnformedPatches:
    torch.manual_seed(0)
    return UnformedPatches(nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 6), ("weight", "bias"))


def made(held: object, reduce: bool = False) -> Rows:
    gradients = torch.randn(2, 4, 12, 3)
    return Rows(held, gradients, torch.tensor(4.0), reduce=reduce)  # type: ignore[arg-type]


def test_whoever_reads_them_sees_a_tensor() -> None:
    held = unformed()
    rows = made(held)
    assert rows.held_inputs is held
    assert isinstance(rows.inputs, Tensor)
    assert rows.inputs.shape == held.shape
    assert rows.inputs is held.formed()  # once for all


def test_changed_rows_stay_unformed() -> None:
    held = unformed()
    changed = made(held).but(first=False, squares=torch.ones(19))
    assert changed.held_inputs is held
    assert not changed.first
    assert held._formed is None


def test_reducing_forms_nothing() -> None:
    held = unformed()
    reduced = made(held, reduce=True).for_factors()
    assert held._formed is None
    torch.testing.assert_close(reduced.inputs, held.formed().mean(-2, keepdim=True))
    assert reduced.gradients.shape == (2, 4, 1, 3)


def test_tensors_and_words_are_as_they_were() -> None:
    inputs, words = torch.randn(4, 12, 3), OneHot(torch.zeros(4, 12, dtype=torch.long), 3)
    assert made(inputs).inputs is inputs
    assert made(words).inputs is words
    assert made(words).but(first=False).inputs is words
