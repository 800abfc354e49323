"""Checkpoints of released versions load, and training goes on as it did there (docs: contributing, "Checkpoints").

`checkpoints/version_0_1_0.pt` was written by version 0.1.0 (commit c66ef9c, torch 2.13.0, one thread), for KFAC and for
EKFAC, with

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    optimizer = kfacopt.KFAC(
        model, nn.CrossEntropyLoss(), lr=0.1, fisher_type="type-2", factor_every=2, refresh_every=3
    )

after five steps on x and y: `model` and `optimizer` are the state dicts then, `losses` what the next six steps had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfacopt

CHECKPOINTS = sorted((Path(__file__).parent / "checkpoints").glob("*.pt"))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("path", CHECKPOINTS, ids=[path.stem for path in CHECKPOINTS])
def test_training_goes_on_from_an_older_version(path: Path, optimizer: Any) -> None:
    stored = torch.load(path, weights_only=True)[optimizer.__name__]
    model, criterion = network(), nn.CrossEntropyLoss()
    made = optimizer(model, criterion, lr=0.1, curvature="ggn", factor_every=2, refresh_every=3, kl_clip=0.03)
    model.load_state_dict(stored["model"])
    made.load_state_dict(stored["optimizer"])
    losses = []
    for _ in stored["losses"]:
        loss = criterion(model(stored["x"]), stored["y"])
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(loss.item())
    # In float64, what an eigendecomposition and other sums in another order leave.
    assert losses == pytest.approx(stored["losses"], rel=1e-8)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_the_spectral_step_has_no_older_version(optimizer: Any) -> None:
    """What the first release stored is no state of it: refused, and nothing is changed."""
    stored = torch.load(CHECKPOINTS[0], weights_only=True)[optimizer.__name__]
    made = optimizer(network(), nn.CrossEntropyLoss())
    before = [dict(group, params=[]) for group in made.param_groups]
    with pytest.raises(ValueError, match=r"version 0\.1.*make it with kl_clip="):
        made.load_state_dict(stored["optimizer"])
    assert [dict(group, params=[]) for group in made.param_groups] == before


def test_there_is_a_checkpoint_of_every_release() -> None:
    assert [path.stem for path in CHECKPOINTS] == ["version_0_1_0"]
