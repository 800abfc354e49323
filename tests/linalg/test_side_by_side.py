"""Work on several threads at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kfacopt.linalg.side_by_side import pool, side_by_side


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("items", "each"), [(2, 2), (3, 1), (9, 1)])
def test_threads_are_divided(four_threads: None, items: int, each: int) -> None:
    found = side_by_side(lambda item: (item, torch.get_num_threads(), torch.is_grad_enabled()), range(items))
    assert found == [(item, each, False) for item in range(items)]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("items", [0, 1])
def test_a_single_item_has_all_threads(four_threads: None, items: int) -> None:
    assert side_by_side(lambda _: torch.get_num_threads(), range(items)) == [4] * items


def test_errors_arrive(four_threads: None) -> None:
    def fail(item: int) -> float:
        return 1 / item

    with pytest.raises(ZeroDivisionError):
        side_by_side(fail, [1, 0, 1])
    assert torch.get_num_threads() == 4


def test_a_pool_leaves_the_callers_threads(four_threads: None) -> None:
    with pool(2, 3) as threads:
        assert list(threads.map(lambda _: torch.get_num_threads(), range(2))) == [3, 3]
        assert torch.get_num_threads() == 4
