"""Rows made one by one: the same for the same seed, those of validation others, and what each kind is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfacopt.experiments.data import Photograph
from kfacopt.experiments.in_memory import InMemoryData
from kfacopt.experiments.made_rows import (
    HeavyTails,
    MadeRatings,
    NearGraphs,
    RareEvents,
    RawColumns,
    Regions,
    SampledShapes,
    Taught,
)

Make = Callable[[int], InMemoryData]
MADE: dict[str, tuple[Make, tuple[int, ...], tuple[int, ...]]] = {
    "rare": (lambda seed: RareEvents(50, 500, seed), (16,), (1,)),
    "raw": (lambda seed: RawColumns(50, 500, seed), (12,), (1,)),
    "tails": (lambda seed: HeavyTails(50, 500, seed), (10,), (1,)),
    "regions": (lambda seed: Regions(50, 500, columns=9, seed=seed), (9,), ()),
    "taught": (lambda seed: Taught(50, 500, seed), (16,), (10,)),
    "ratings": (lambda seed: MadeRatings(50, 500, 80, 50, seed), (2,), (1,)),
    "shapes": (lambda seed: SampledShapes(50, 500, seed), (24, 3), ()),
    "graphs": (lambda seed: NearGraphs(50, 500, seed), (16, 24), (16, 1)),
    "photograph": (lambda seed: Photograph(50, seed=seed), (2,), (3,)),
}


def rows_of(data: InMemoryData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    data.setup()
    parts = [rows[torch.arange(len(rows))] for rows in (data.training_rows, data.validation_rows)]
    return parts[0], parts[1]


@pytest.mark.parametrize("name", MADE)
def test_rows_are_what_the_seed_says(name: str) -> None:
    make, inputs, targets = MADE[name]
    first, same, other = (next(iter(make(seed).train_dataloader())) for seed in (0, 0, 1))
    assert (first[0].shape, first[1].shape) == ((50, *inputs), (50, *targets))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(part.isfinite().all() for part in first)


@pytest.mark.parametrize("name", MADE)
def test_validation_rows_are_others(name: str) -> None:
    (train, _), (validation, _) = rows_of(MADE[name][0](0))
    both = torch.cat([train, validation]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_one_event_in_fifty() -> None:
    parts = rows_of(RareEvents(50, 8000))
    targets = torch.cat([targets for _, targets in parts])
    assert targets.unique().tolist() == [0.0, 1.0]
    assert targets.mean().item() == pytest.approx(0.02)
    assert all(0.01 < part.mean() < 0.03 for _, part in parts)


def test_raw_columns_have_units_of_their_own() -> None:
    (inputs, targets), _ = rows_of(RawColumns(50, 4000))
    deviations = inputs.std(0)
    assert deviations.max() > 1e3 * deviations.min()
    assert (inputs.mean(0) > 4 * deviations).sum() == 4
    assert (inputs.min(0).values > 0).sum() >= 4
    assert targets.std().item() == pytest.approx(1.0, rel=0.05)


def test_heavy_tails_are_those_of_training_only() -> None:
    (_, targets), (_, kept) = rows_of(HeavyTails(50, 4000))
    assert targets.abs().max() > 20 * kept.abs().max()
    assert targets.median().abs() < 0.2


def test_a_teacher_is_rather_sure() -> None:
    (_, targets), _ = rows_of(Taught(50, 2000))
    torch.testing.assert_close(targets.sum(1), torch.ones(2000))
    entropy, spread = (nn.functional.cross_entropy(part.log(), part) for part in (targets, targets.mean(0)))
    assert entropy < 0.3 * spread


def test_regions_and_shapes_have_all_their_classes() -> None:
    for data, classes in ((Regions(50, 2000), 8), (SampledShapes(50, 2000), 5)):
        (_, labels), _ = rows_of(data)
        assert labels.unique().tolist() == list(range(classes))


def test_no_pair_is_rated_twice() -> None:
    parts = rows_of(MadeRatings(50, 2000, users=80, items=50))
    pairs = torch.cat([pairs for pairs, _ in parts])
    assert len(pairs.unique(dim=0)) == len(pairs) == 4000
    assert pairs.max(0).values.tolist() == [79, 49]


def test_graphs_are_normalised_and_the_same_both_ways() -> None:
    (graphs, targets), _ = rows_of(NearGraphs(50, 200))
    adjacency = graphs[..., :16]
    assert torch.equal(adjacency, adjacency.mT)
    largest = torch.linalg.eigvalsh(adjacency)[:, -1]
    torch.testing.assert_close(largest, torch.ones(200), rtol=0, atol=1e-5)
    assert targets.std().item() == pytest.approx(1.0, rel=0.1)


def test_a_photograph_by_places() -> None:
    (places, colours), (others, _) = rows_of(Photograph(50))
    assert len(places) + len(others) == 106 * 160
    assert places.abs().amax(0).tolist() == pytest.approx([105 / 160, 159 / 160])
    torch.testing.assert_close(colours.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
