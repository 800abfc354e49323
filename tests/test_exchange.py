"""Parts of tensors come to their owners as wholes, and go back as parts, whatever lies where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kfacopt.exchange import Parcel, Spread, chunks, everywhere, from_owners, norms_of_shards, to_owners
from kfacopt.sharding import Processes

T = TypeVar("T")


class Simulated(Processes):
    """One of several processes that are threads of this one.

    Args:
        rank: Its number.
        boxes: By sender, what it sends to each.
        barrier: Of all.
    """

    def __init__(self, rank: int, boxes: list[list[Tensor]], barrier: Barrier) -> None:
        super().__init__()
        self._number, self._boxes, self._barrier = rank, boxes, barrier
        self.received: list[int] = []

    @property
    def size(self) -> int:
        return len(self._boxes)

    @property
    def rank(self) -> int:
        return self._number

    def exchanged(self, outgoing: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        self._boxes[self._number] = list(outgoing)
        self._barrier.wait(10.0)
        arrived = [box[self._number].clone() for box in self._boxes]
        self._barrier.wait(10.0)
        assert [len(vector) for vector in arrived] == list(counts)
        self.received.append(sum(counts))
        return arrived

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        vector = torch.cat([tensor.flatten() for tensor in tensors])
        sent = self.exchanged([vector] * self.size, [len(vector)] * self.size)
        summed = torch.stack(sent).sum(0).split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(summed, tensors, strict=True)]


def together(size: int, work: Callable[[Simulated], T]) -> list[T]:
    """What some work returns in each of so many processes."""
    boxes, barrier = [list[Tensor]() for _ in range(size)], Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Simulated(rank, boxes, barrier)), range(size)))


@pytest.mark.parametrize(("rows", "size"), [(8, 4), (7, 4), (5, 4), (3, 4), (1, 2), (6, 1)])
def test_rows_are_cut_as_torch_cuts_them(rows: int, size: int) -> None:
    whole = torch.arange(3 * rows).view(rows, 3)
    pieces = [whole.flatten()[start:end] for start, end in chunks(rows, size, 3)]
    expected = [piece.flatten() for piece in whole.chunk(size)]
    assert len(pieces) == size
    assert all(map(torch.equal, pieces, expected))
    assert not any(len(piece) for piece in pieces[len(expected) :])


# Of four processes: rows of all four; fewer rows than processes; two copies of halves (HSDP); all of it in each.
SPREADS: dict[str, tuple[int, Spread]] = {
    "even": (8, Spread(((0, 2), (2, 4), (4, 6), (6, 8)), (0, 0, 0, 0))),
    "fewer": (2, Spread(((0, 1), (1, 2), (2, 2), (2, 2)), (0, 0, 0, 0))),
    "copies": (5, Spread(((0, 3), (3, 5), (0, 3), (3, 5)), (0, 0, 1, 1))),
    "other copies": (5, Spread(((0, 3), (0, 3), (3, 5), (3, 5)), (0, 1, 0, 1))),
    "everywhere": (3, everywhere(3, 4)),
}


def held_by(rank: int, whole: Tensor, spread: Spread) -> Tensor:
    start, end = spread.parts[rank]
    return whole[start:end]


@pytest.mark.parametrize(("bucket", "expected"), [(2**23, 4), (0, 80)])
def test_wholes_come_and_parts_go(monkeypatch: pytest.MonkeyPatch, bucket: int, expected: int) -> None:
    """Of two dtypes, with every owner, all at once or one by one; whose message it is changes nothing."""
    monkeypatch.setattr("kfacopt.exchange.BUCKET", bucket)
    parcels, wholes = list[Parcel](), list[Tensor]()
    for dtype in (torch.float32, torch.float64):
        for owner in range(4):
            for number, spread in SPREADS.values():
                parcels.append(Parcel(owner, spread, dtype))
                wholes.append(torch.randn(number, dtype=dtype))

    def there_and_back(processes: Simulated) -> tuple[list[Tensor | None], list[Tensor], int]:
        held = [held_by(processes.rank, w, p.spread) for w, p in zip(wholes, parcels, strict=True)]
        arrived = to_owners(processes, parcels, held)
        made = [None if whole is None else 2.0 * whole for whole in arrived]
        return arrived, from_owners(processes, parcels, made), len(processes.received)

    for rank, (arrived, parts, messages) in enumerate(together(4, there_and_back)):
        for parcel, whole, own, part in zip(parcels, wholes, arrived, parts, strict=True):
            assert (own is None) == (parcel.owner != rank)
            assert own is None or torch.equal(own, whole)
            assert torch.equal(part, held_by(rank, 2.0 * whole, parcel.spread))
        assert messages == expected


def test_what_is_received_is_a_part_of_all() -> None:
    """Four tensors of one owner each: of N numbers three quarters of a quarter, each way."""
    parcels = [Parcel(owner, SPREADS["even"][1], torch.float32) for owner in range(4)]
    wholes = [torch.randn(8) for _ in range(4)]

    def received(processes: Simulated) -> list[int]:
        held = [held_by(processes.rank, w, p.spread) for w, p in zip(wholes, parcels, strict=True)]
        from_owners(processes, parcels, to_owners(processes, parcels, held))
        return processes.received

    assert together(4, received) == [[6, 6]] * 4


def test_one_process_has_everything() -> None:
    parcels, whole = [Parcel(0, everywhere(3, 1), torch.float32)], torch.randn(3)
    [found] = to_owners(Processes(), parcels, [whole])
    assert found is not None
    assert torch.equal(found, whole)
    assert torch.equal(from_owners(Processes(), parcels, [whole])[0], whole)


def test_norms_of_what_all_hold_are_not_added_up() -> None:
    tensors = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2), torch.ones(4)]
    assert together(3, lambda processes: norms_of_shards(processes, tensors)) == [[5.0, 0.0, 2.0]] * 3
