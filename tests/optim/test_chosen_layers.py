"""Whether the choice of layers still holds: asked twice a step, so by another way than the choice itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import prune

from kfacopt.layers.coverage import find_layers
from kfacopt.optim.chosen_layers import ChosenLayers


class Net(nn.Module):
    """A layer that is a module, and layers that are parts of one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2)


def other(module: Any, name: str) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))


CHANGES: dict[str, tuple[bool, Callable[[Net, dict[str, Any], dict[Any, str]], object]]] = {
    "nothing": (True, lambda net, group, unseen: None),
    "values": (True, lambda net, group, unseen: net.head.weight.data.mul_(2.0)),
    "a frozen parameter": (False, lambda net, group, unseen: net.head.bias.requires_grad_(False)),
    "a frozen part": (False, lambda net, group, unseen: net.attention.in_proj_bias.requires_grad_(False)),
    "another parameter": (False, lambda net, group, unseen: other(net.head, "weight")),
    "another parameter of a part": (False, lambda net, group, unseen: other(net.attention, "in_proj_weight")),
    "a bias that is gone": (False, lambda net, group, unseen: net.head.register_parameter("bias", None)),
    "a mask": (False, lambda net, group, unseen: prune.random_unstructured(net.head, "weight", 0.5)),
    "another module of the same name": (True, lambda net, group, unseen: setattr(net, "head", nn.Linear(4, 2))),
    "fewer parameters in the group": (False, lambda net, group, unseen: group["params"].pop()),
    "a use out of sight": (False, lambda net, group, unseen: unseen.update({net.head.weight: "used elsewhere"})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_choice_was_made_by(change: str) -> None:
    holds, make = CHANGES[change]
    net, unseen = Net(), dict[nn.Parameter, str]()
    group: dict[str, Any] = {"params": list(net.parameters())}
    chosen = ChosenLayers([group], unseen)
    layers, _ = find_layers(net, list(net.parameters()), {}, separate=False)
    assert {layer.part is None for layer in layers} == {True, False}
    chosen.are(layers)
    make(net, group, unseen)
    assert chosen.hold([group], unseen) is holds
