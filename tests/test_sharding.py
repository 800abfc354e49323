"""One process is the processes of one; work is divided evenly; what an engine wraps is found."""

from __future__ import annotations

import copy
import itertools
import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kfacopt.replicas import owners
from kfacopt.sharding import Processes, unwrapped


def test_one_process_asks_nobody() -> None:
    alone, tensor = Processes(), torch.ones(2)
    assert (alone.size, alone.rank, alone.is_open, alone.joins) == (1, 0, False, False)
    assert alone.sum([tensor])[0] is tensor
    assert alone.gathered("x") == ["x"]
    assert alone.table([1.0, 2.0]) == [[1.0, 2.0]]
    assert alone.largest([1.0, 2.0]) == alone.mean([1.0, 2.0]) == alone.sum_vector([1.0, tensor[0] + 1]) == [1.0, 2.0]
    assert torch.equal(alone.sent([[tensor]])[0][0], tensor)


def test_copies_have_no_group() -> None:
    processes = Processes()
    assert pickle.loads(pickle.dumps(processes)).size == 1
    assert copy.deepcopy(processes) is processes


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=7), st.integers(1, 3))
def test_the_busiest_has_at_most_four_thirds_of_the_best(costs: list[float], size: int) -> None:
    """Graham 1969: LPT is within 4/3 - 1/(3 size) of the optimum."""
    named = {str(number): cost for number, cost in enumerate(costs)}
    found = owners(named, size)
    assert set(found) == set(named)

    def busiest(choice: tuple[int, ...]) -> float:
        return max(sum(c for c, r in zip(costs, choice, strict=True) if r == rank) for rank in range(size))

    best = min(map(busiest, itertools.product(range(size), repeat=len(costs))))
    assert busiest(tuple(found[name] for name in named)) <= (4 / 3 - 1 / (3 * size)) * best * (1 + 1e-12)


def test_other_models_stay() -> None:
    model = nn.Linear(2, 2)
    assert unwrapped(model)[0] is model
    assert unwrapped(model)[1].size == 1
