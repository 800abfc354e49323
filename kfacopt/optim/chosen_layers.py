"""What the choice of covered layers was made by, so that a step can ask whether it still holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from kfacopt.layers.layer import Layer


class ChosenLayers:
    """The parameters and modules as they were when the layers were chosen.

    Asked twice in every step, of every parameter: what is read most often is looked up at construction.

    Args:
        groups: The optimizer's `param_groups`.
        unseen_uses: Parameters that are used out of the hooks' sight, and are left to AdamW therefore.

    >>> model = nn.Linear(2, 1)
    >>> chosen = ChosenLayers([{"params": list(model.parameters())}], {})
    >>> chosen.hold([{"params": list(model.parameters())}], {})
    True
    >>> _ = model.bias.requires_grad_(False)
    >>> chosen.hold([{"params": list(model.parameters())}], {})
    False
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], unseen_uses: Collection[nn.Parameter]) -> None:
        self._trained, self._unseen_uses = _trained(groups), list(map(id, unseen_uses))
        self._held: list[tuple[nn.Module, str, nn.Parameter, Layer]] = []
        self._parts: list[tuple[nn.Module, Layer]] = []

    def are(self, layers: Sequence[Layer]) -> None:
        """Say which were chosen."""
        places = [(module, layer) for layer in layers for module in layer.modules]
        self._parts = [(module, layer) for module, layer in places if layer.part is not None]
        whole = [(module, layer) for module, layer in places if layer.part is None]
        self._held = [(module, role, p, layer) for module, layer in whole for role, p in layer.parameters.items()]

    def hold(self, groups: Sequence[Mapping[str, Any]], unseen_uses: Collection[nn.Parameter]) -> bool:
        """Whether the same parameters train, are used out of sight, and are held by their modules as they were.

        A mask or a parametrization that comes or goes (`torch.nn.utils.prune`) leaves the parameter and changes what it
        is to its module.
        """
        for module, role, parameter, layer in self._held:
            if module._parameters.get(role) is not parameter and not layer.held_by(module):
                return False
        if not all(layer.held_by(module) for module, layer in self._parts):
            return False
        return _trained(groups) == self._trained and list(map(id, unseen_uses)) == self._unseen_uses


def _trained(groups: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [p.requires_grad for group in groups for p in group["params"]]
