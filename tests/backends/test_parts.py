"""Tensors of blocks on their way."""

from __future__ import annotations

import torch

from kfacopt.backends.parts import Part, kind_of, sent
from kfacopt.sharding import Processes


def test_what_arrives_is_what_was_sent() -> None:
    """Of symmetric matrices a half is on its way, of their diagonals and of others all; nothing shares memory."""
    square = torch.randn(5, 5, dtype=torch.float64)
    held = {"factor": square + square.mT, "diagonal": torch.randn(5), "corrections": torch.randn(3, 4).mT}
    parts = [Part.of("head", key, kind_of(tensor), {"factor", "diagonal"}) for key, tensor in held.items()]
    assert [part.is_half for part in parts] == [True, False, False]
    assert [part.nbytes for part in parts] == [8 * 3 * 6, 4 * 5, 4 * 12]  # of rows, two halves make one
    for readers in (None, lambda source: []):
        [arrived] = sent([parts], list(held.values()), Processes(), readers)
        assert arrived is not None
        for tensor, (key, whole) in zip(arrived, held.items(), strict=True):
            assert torch.equal(tensor, whole), key
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
