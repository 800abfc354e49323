"""The order of batches is a function of seed, epoch and batch, and a stream resumes within it."""

from __future__ import annotations

from itertools import chain, islice

import pytest
import torch
from torch.utils.data import TensorDataset

from kfacopt.experiments.batches import BatchStream, epoch_order


def stream(count: int = 10, batch_size: int = 3, **arguments: object) -> BatchStream:
    settings: dict[str, object] = {"shuffle": True, "seed": 4} | arguments
    return BatchStream(TensorDataset(torch.arange(count)), batch_size, **settings)  # type: ignore[arg-type]


def read(batches: BatchStream, count: int | None = None) -> list[list[int]]:
    return [rows.tolist() for (rows,) in islice(batches, count)]


def test_an_epoch_has_every_row_once() -> None:
    batches = read(stream())
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert sorted(chain(*batches)) == list(range(10))


def test_order_depends_on_seed_and_epoch_and_not_on_the_global_generator() -> None:
    orders = [tuple(epoch_order(100, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert tuple(epoch_order(100, 0, 0).tolist()) == orders[0]
    read(stream())
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_advance_by_themselves_or_are_set() -> None:
    own, told = stream(), stream()
    first, second = read(own), read(own)
    assert first != second
    told.set_epoch(1)
    assert read(told) == second


def test_a_pass_that_is_broken_off_does_not_advance_the_epoch() -> None:
    batches = stream()
    beginning = read(batches, 2)
    assert read(batches)[:2] == beginning


def test_without_shuffle_rows_come_in_order_every_epoch() -> None:
    batches = stream(shuffle=False)
    assert read(batches) == read(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_drop_last_leaves_out_what_does_not_fill_a_batch() -> None:
    batches = stream(drop_last=True)
    assert len(batches) == len(read(batches)) == 3


@pytest.mark.parametrize("batch", range(5))
def test_resumes_with_the_very_next_batch(batch: int) -> None:
    whole = stream()
    epochs = [read(whole), read(whole)]
    cut = stream()
    cut.set_epoch(1)
    iterator = iter(cut)
    for _ in range(batch):
        next(iterator, None)
    place = cut.state_dict()
    assert all(type(value) is int for value in place.values())

    resumed = stream()
    resumed.load_state_dict(place)
    assert resumed.state_dict() == place
    # Lightning makes the iterator first and sets the epoch afterwards.
    iterator = iter(resumed)
    resumed.set_epoch(1)
    assert [rows.tolist() for (rows,) in iterator] == epochs[1][batch:]
    resumed.set_epoch(0)
    assert read(resumed) == epochs[0]


def test_the_place_of_an_ended_epoch_does_not_shorten_the_next() -> None:
    ended = stream()
    read(ended, 4)
    resumed = stream()
    resumed.load_state_dict(ended.state_dict() | {"epoch": 0, "batch": 4})
    resumed.set_epoch(1)
    assert len(read(resumed)) == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 2}, "batch_size=2"),
        ({"count": 11}, "rows=11"),
        ({"seed": 5}, "seed=5"),
        ({"shuffle": False}, "shuffle=0"),
    ],
)
def test_resuming_within_an_epoch_of_other_data_is_refused_by_name(changed: dict[str, object], named: str) -> None:
    cut = stream()
    next(iter(cut))
    resumed = stream(**changed)  # type: ignore[arg-type]
    resumed.load_state_dict(cut.state_dict())
    with pytest.raises(ValueError, match=named):
        read(resumed)


def test_processes_share_every_batch() -> None:
    alone = read(stream(count=12, batch_size=4, shuffle=True))
    shares = [read(stream(count=12, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    for batch, first, second in zip(alone, *shares, strict=True):
        assert sorted(first + second) == sorted(batch)


def test_processes_have_as_many_batches_when_rows_do_not_divide() -> None:
    shares = [read(stream(count=9, batch_size=4, shuffle=False, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batch) for batch in shares[0]] == [len(batch) for batch in shares[1]] == [4, 1]
    assert set(chain(*chain(*shares))) == set(range(9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 11, "drop_last": True}, "batch_size 11 .* 10 rows"),
        ({"count": 0}, "0 rows"),
        ({"rank": 2, "world_size": 2}, "rank.*got 2"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(**arguments)  # type: ignore[arg-type]
