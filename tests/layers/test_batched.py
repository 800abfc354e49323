"""Layers of equal shapes packed together, against each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfacopt.layers.coverage import find_layers

TWINS = {
    "linear": lambda: nn.Linear(3, 4),
    "linear without bias": lambda: nn.Linear(3, 4, bias=False),
    "convolution": lambda: nn.Conv2d(4, 6, (3, 2)),
    "groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "groups without bias": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
}


@pytest.mark.parametrize("made", TWINS.values(), ids=TWINS)
def test_packed_together_as_alone(made: type[nn.Module]) -> None:
    model = nn.ModuleList([made(), made(), made()])
    layers, _ = find_layers(model, list(model.parameters()), {}, separate=False)
    assert len({layer.alike for layer in layers}) == 1
    assert layers[0].alike is not None
    parts = [layer.values() for layer in layers]
    together = layers[0].pack({role: torch.stack([own[role] for own in parts]) for role in layers[0].roles})
    assert torch.equal(together, torch.stack([layer.pack(own) for layer, own in zip(layers, parts, strict=True)]))
    for role, column in layers[0].unpack(together).items():
        assert torch.equal(column, torch.stack([own[role] for own in parts]))


def test_a_handler_that_inherits_has_to_say_so_itself() -> None:
    layers, _ = find_layers(model := nn.Linear(2, 2), list(model.parameters()), {}, separate=False)
    own = type("Own", (type(layers[0].handler),), {})
    assert own.batched
    layer = type(layers[0])("", layers[0].modules, own(), layers[0].parameters)
    assert layer.alike is None
