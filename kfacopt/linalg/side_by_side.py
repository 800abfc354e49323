"""torch's threads: divided among independent work that runs at the same time, or held back where they only wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """No more of torch's threads than these within the context, for the thread of Python's that enters it.

    >>> with at_most(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pool(workers: int, threads: int, name: str = "kfacopt") -> ThreadPoolExecutor:
    """Threads of Python's with their own number of torch's threads.

    torch keeps that number for each thread, but gives a thread that first asks for it (or works in parallel) the one
    that was set last, by whichever thread: so it is asked for before it is set.

    Args:
        workers: How many.
        threads: That torch may use within each.
        name: What theirs begin with.
    """
    made = ThreadPoolExecutor(workers, thread_name_prefix=name)
    before = torch.get_num_threads()
    ready = Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(threads)
        ready.wait()

    for _ in range(workers):
        made.submit(begin)
    ready.wait()
    torch.set_num_threads(before)
    return made


def side_by_side(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """`[function(item) for item in items]` on a processor, torch's threads divided among the items.

    A decomposition is a long chain of short products, over which threads wait for each other more than they work: on
    two threads five `eigh` of 512 and 256 took 372 ms of processor time one after the other, and 76 ms side by side
    (each as on one thread; a machine that others used, too). The results are those of so many threads an item,
    whatever the order in which they come. With one thread, or one item, nothing is started.

    Args:
        function: Must not need the caller's state of autograd: it runs without gradients.
        items: The largest first, so that no thread is left alone with it.

    Raises:
        Exception: The first that the function raises, in the order of the items.

    >>> side_by_side(lambda number: number + 1, [1, 2])
    [2, 3]
    """
    available = torch.get_num_threads()
    if len(items) < 2 or available < 2:
        return [function(item) for item in items]
    workers = min(len(items), available)

    def apart(item: _Item) -> _Result:
        with torch.no_grad():
            return function(item)

    with pool(workers, available // workers) as threads:
        return list(threads.map(apart, items))
