"""Quiet and repeatable: Lightning's own chatter is let pass by name, nothing else is."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Each is Lightning's (or wandb's) own doing, not ours.
_CHATTER = (
    # torch deprecated what Lightning's pytree helpers call
    "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    # resumes find the run's own folder not empty
    "ignore:Checkpoint directory .* exists and is not empty",
)


def let_chatter(items: list[pytest.Item], folder: Path) -> None:
    """Let Lightning's chatter pass in the tests of a folder."""
    for item in items:
        if folder in item.path.parents:
            for chatter in _CHATTER:
                item.add_marker(pytest.mark.filterwarnings(chatter))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    let_chatter(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once it has shut down after one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
