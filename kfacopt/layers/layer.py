"""A covered place of a model: the modules that hold one set of parameters, and their handler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler


@dataclass(frozen=True, eq=False)
class Layer:
    """One place that gets a block: a module, or several that share their parameters.

    Args:
        name: The module's path in the model; with the parameter's name where a module has several blocks.
        modules: The module, or all modules that hold the very same parameters.
        handler: Brings inputs and cotangents to rows.
        parameters: The covered parameters by the name the handler gives them (`"weight"`, `"bias"`).
    """

    name: str
    modules: tuple[nn.Module, ...]
    handler: LayerHandler
    parameters: Mapping[str, nn.Parameter]

    @property
    def roles(self) -> tuple[str, ...]:
        """The names under which the handler knows the covered parameters."""
        return tuple(self.parameters)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by role, shaped as the parameters, as the block's matrix `[*k o i]`."""
        return self.handler.pack(self.modules[0], tensors)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The block's matrix as tensors by role, shaped as the parameters."""
        return self.handler.unpack(self.modules[0], matrix, self.roles)
