"""Whole models as torch users write them: how much of each gets curvature, and that it trains with defaults."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.zoo import MODELS, OURS, Model, adamw, covered_share, ours, train, with_curvature

every = pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
LEAST = 0.95


@every
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_almost_all_parameters_get_curvature(model: Model, name: str) -> None:
    """And the page promises no more than that."""
    made = with_curvature(model, name)(model.make())
    share = covered_share(made)
    assert share >= LEAST or (model.uncovered and model.uncovered in str(made.coverage()))
    assert zoo.shares_on_the_page()[model.name] <= share + 5e-4


def test_the_page_has_a_line_for_each() -> None:
    assert set(zoo.shares_on_the_page()) == {model.name for model in MODELS}


@every
@pytest.mark.parametrize("name", OURS)
def test_every_covered_layer_is_seen(model: Model, name: str) -> None:
    """What `coverage()` plans is what happens: no layer waits for rows, no update of it is dropped."""
    torch.manual_seed(0)
    net = model.make()
    made = ours(model, name)(net)
    planned = str(made.coverage())
    for _ in range(3):
        made.zero_grad()
        model.loss_of(net, *model.batch()).backward()
        made.step()
    health = made.health()
    assert str(made.coverage()) == planned
    assert health["unseen_layers"] == health["skipped_steps"] == health["dropped_updates"] == 0.0
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.slow
@every
def test_defaults_train_below_adamw_or_as_the_page_says(model: Model) -> None:
    """At equal steps, AdamW at the rate that was best for the page."""
    rival = train(model, adamw(zoo.rate_on_the_page(model.name)))[1]
    for name, ratio in zoo.ratios_on_the_page(model.name).items():
        before, after = train(model, ours(model, name))
        assert after < before
        assert after < rival * max(1.0, 1.5 * ratio), f"{name}: {after:.3g}, AdamW {rival:.3g}"
