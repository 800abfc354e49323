"""Work on several threads at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kfacopt.linalg.gram import gram
from kfacopt.linalg.side_by_side import at_most, pool, side_by_side
from kfacopt.linalg.symmetric import eigh_of_each


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


def test_fewer_threads_within_a_context_and_as_many_after_an_error(four_threads: None) -> None:
    with at_most(8):
        assert torch.get_num_threads() == 4
    with pytest.raises(ZeroDivisionError), at_most(1):
        _ = 1 / (torch.get_num_threads() - 1)
    assert torch.get_num_threads() == 4


@pytest.mark.benchmark
def test_decompositions_side_by_side_waste_no_processor_time() -> None:
    before = torch.get_num_threads()
    rows = torch.rand(600, 512)
    matrices, seconds = [rows.mT @ rows] * 4, {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds[threads] = min(_processor_time(lambda: eigh_of_each(matrices)) for _ in range(5))
    torch.set_num_threads(before)
    assert seconds[2] <= 1.3 * seconds[1]


@pytest.mark.benchmark
@pytest.mark.parametrize("shape", [(5120, 512), (4000, 1152)])
def test_half_a_symmetric_product_is_cheaper(shape: tuple[int, int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = torch.rand(*shape)
    whole, half = (
        min(_processor_time(product) for _ in range(7)) for product in (lambda: rows.mT @ rows, lambda: gram(rows))
    )
    torch.set_num_threads(before)
    assert half <= 0.95 * whole


def _processor_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
