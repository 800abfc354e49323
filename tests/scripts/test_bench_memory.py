"""What optimizers hold, against what their definitions say they need."""

from __future__ import annotations

import bench_memory
import pytest
import torch

from kfacopt.blocks.sides import WIDEST

# Copies of square layers: AdamW's moments; SpectralDescent's momentum, G, its inverse and that one's root. Biases,
# rows' averages and step counts are a tenth of one at this width.
COPIES = {"AdamW": 2.0, "SpectralDescent": 4.0}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_square_layers(name: str) -> None:
    torch.manual_seed(0)
    found = bench_memory.held(bench_memory.OPTIMIZERS[name], *bench_memory.perceptron(128))
    assert found == pytest.approx(COPIES[name], abs=0.1)


@pytest.mark.parametrize(("name", "copies"), [("SpectralDescent", 2.5), ("KFAC", 2.5), ("EKFAC", 3.0)])
def test_many_words_are_no_square(name: str, copies: float) -> None:
    """Momentum, EKFAC's second moments and the roots of the head's, and little that is not along the words."""
    torch.manual_seed(0)
    assert bench_memory.held(bench_memory.OPTIMIZERS[name], *bench_memory.words(WIDEST + 1)) < copies
