"""Several optimizers on one model, and copies of a watched model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import kfacopt
from tests.capture.harness import assert_same_factors, attached, batch, factors, fresh, hooks_on, pending
from tests.cases import backward, still, train_step


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_two_optimizers_on_one_model(curvature: str) -> None:
    x, y = batch()
    both, alone = fresh(), fresh()
    first = attached(both, curvature=curvature)
    second = kfacopt.EKFAC(both, nn.CrossEntropyLoss(), **still(curvature=curvature))
    one = attached(alone, curvature=curvature)
    two = kfacopt.EKFAC(alone, nn.CrossEntropyLoss(), **still(curvature=curvature))
    assert two is not None
    backward(both, nn.CrossEntropyLoss(), x, y)
    backward(alone, nn.CrossEntropyLoss(), x, y)
    first.step()
    second.step()
    one.step()
    assert_same_factors(first, one, {"0": "0", "2": "2"})
    for name, block in second.backend.blocks.items():
        for a, b in zip(factors(first)[name], factors(second)[name], strict=False):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert block.ready


def test_one_optimizer_for_each_half_of_the_parameters() -> None:
    x, y = batch()
    model = fresh()
    optimizers = [
        kfacopt.KFAC(model, nn.CrossEntropyLoss(), model[i].parameters(), factor_every=1, lr=0.1) for i in (0, 2)
    ]
    losses = []
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(float(backward(model, nn.CrossEntropyLoss(), x, y)))
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]
    assert [list(o.backend.blocks) for o in optimizers] == [["0"], ["2"]]


def test_copies_of_a_watched_model_are_free() -> None:
    """An EMA copy, a pickle and torch.save of the model: no hook of ours acts there."""
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model = fresh()
    optimizer = attached(model, lr=0.1)
    train_step(optimizer, model, loss, x, y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        average.module,
    ]
    before = factors(optimizer)
    for copied in copies:
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
        backward(copied, loss, x, y)
        assert pending(optimizer) == []
        pickle.loads(pickle.dumps(copied))
        own = attached(copied, lr=0.1)
        train_step(own, copied, loss, x, y)
        assert pending(optimizer) == []
        own.close()
        assert hooks_on(copied) == 0
    for name, values in factors(optimizer).items():
        assert all(torch.equal(a, b) for a, b in zip(values, before[name], strict=True))
    average.update_parameters(model)
    train_step(optimizer, model, loss, x, y)
