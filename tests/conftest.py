"""What every test starts from: one thread, fixed seeds, nothing left behind by the test before."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A busy machine is no failure, and the examples are the same in every run.
settings.register_profile("kfacopt", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("kfacopt")


def pytest_configure(config: pytest.Config) -> None:
    # torch says that an even kernel with padding="same" costs a copy: that is what the cases are for.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")
    # So does torch.func, which only the dense truth uses, of layers that it differentiates one number at a time.
    config.addinivalue_line("filterwarnings", "ignore:There is a performance drop because we have not yet:UserWarning")


def pytest_collection_finish() -> None:
    # Thirteen thousand tests are more objects than one test makes, and each full collection would look at them all.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    # torch.manual_seed also remembers, for accelerators that are not there, who called: half a millisecond each time.
    torch.default_generator.manual_seed(0)
