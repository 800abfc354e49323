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
    [arrived] = sent([parts], list(held.values()), Processes(), None)
    assert arrived is not None
    for tensor, (key, whole) in zip(arrived, held.items(), strict=True):
        assert torch.equal(tensor, whole), key
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    [kept] = sent([parts], list(held.values()), Processes(), lambda source: [source])
    assert kept is not None
    assert all(map(torch.equal, kept, arrived))
    assert [tensor.stride() for tensor in kept] == [tensor.stride() for tensor in arrived]


def test_what_stays_is_as_though_it_was_sent() -> None:
    """An inverse whose halves are alike is not copied, be it stored by columns; one with rounding is mirrored."""
    square = torch.randn(3, 200, 200)
    exact = (square + square.mT).mT
    part = Part.of("head", "inverse", kind_of(exact), {"inverse"})
    assert not exact.is_contiguous()
    rounded = exact.clone(memory_format=torch.contiguous_format)
    rounded[1, 150, 20] += 1e-3
    for tensor, is_copied in ((exact, False), (exact.mT, False), (rounded, True)):
        kept, arrived = part.as_sent(tensor), part.unpacked(part.packed(tensor))
        assert torch.equal(kept, arrived)
        assert kept.stride() == arrived.stride()
        assert (kept.data_ptr() != tensor.data_ptr()) == is_copied
