"""The experiments train with Lightning: its tests' fixtures are theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lightning.conftest import interruptible as interruptible
from tests.lightning.conftest import let_chatter
from tests.lightning.conftest import one_thread as one_thread


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    let_chatter(items, Path(__file__).parent)
