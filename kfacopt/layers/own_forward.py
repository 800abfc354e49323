"""Linear layers and convolutions with a forward or a weight of one's own: their products are found in the graph.

Adapters (LoRA), quantization-aware training, standardized or rescaled weights: the forward ends in `F.linear` or
`F.conv2d` with a weight that is computed from what trains, or is a sum of such.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kfacopt.fsdp import copies_within, copy_in
from kfacopt.layers.base import LayerHandler
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part, PartCall, saves_elsewhere
from kfacopt.layers.convolution import ConvolutionHandler
from kfacopt.layers.found import FoundMatrixHandler, FoundScaleHandler, part_call, required_shape, uses_of
from kfacopt.layers.linear import LinearHandler
from kfacopt.layers.pullback import is_vector
from kfacopt.layers.registry import OwnForwardRefused

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def forward_is_searched(module: nn.Module, handler: LayerHandler) -> bool:
    """Whether a module's products are to be looked for: its handler, if it is none of the user's, does not apply.

    >>> layer = nn.Linear(3, 2)
    >>> forward_is_searched(layer, LinearHandler())
    False
    >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    >>> forward_is_searched(layer, LinearHandler())
    True
    """
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or isinstance(module, torch.jit.ScriptModule):
        return False
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return False
    if isinstance(handler, OwnForwardRefused):
        return True
    return type(handler) in (LinearHandler, ConvolutionHandler) and handler.refusal(module) is not None


class OwnForwardHandler(CompoundHandler):
    """A linear layer or convolution whose output is a sum of products with matrices computed from its parameters.

    Every parameter is a layer of its own, of which each product that it takes part in gives places. Rows of matrices
    are those of `kfacopt.layers.pullback`: exact, but that what projects a gradient (a mask, a norm) is left out.
    Vectors, but the bias, scale outputs or inputs: their curvature is the GGN's diagonal. What the
    forward is made of is read off the graph of each call, so that weights may be computed by anything.

    A parameter that is used in any other way, too, trains by AdamW, which `coverage()` says. Convolutions with groups
    have matrices of the weight's own outputs alone.

    Args:
        known: The handler of a module, by which modules within are treated; None: they belong to this one.

    >>> from kfacopt.layers import handler_for
    >>> class Lora(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.zeros(2, 1))
    ...
    ...     def forward(self, weight):
    ...         return weight + self.b @ self.a
    >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(3, 2), "weight", Lora())
    >>> [part.name.rpartition(".")[-1] for part in handler_for(layer).parts(layer)]
    ['bias', 'original', 'a', 'b']
    """

    def __init__(self, known: Callable[[nn.Module], LayerHandler | None]) -> None:
        super().__init__("treated by the products that its forward makes")
        self._known = known

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        groups = module.groups if isinstance(module, _CONVOLUTIONS) else 1
        found = []
        for path, parameter in self._parameters(module):
            held = ""
            if path == "bias":
                handler: LayerHandler = FoundMatrixHandler(path, groups)
                what = "bias"
            elif not is_vector(parameter) and (groups == 1 or len(parameter) == module.out_channels):
                handler = FoundMatrixHandler(path, groups, _is_transposed(module, parameter))
                what = "by the products that its forward makes with it"
                held = "what is subtracted, divided by or masked"
            elif parameter.ndim and groups == 1:
                handler, what = FoundScaleHandler(path), "by the products that its forward makes scaled by it"
            else:
                continue
            found.append(Part(path, what, self, handler, {"weight": path}, needs_weight=False, held=held, sought=True))
        return tuple(found)

    def _parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Those that train of the module itself, and of modules within that nobody else treats, by their path."""
        return [
            (".".join(filter(None, [place, name])), parameter)
            for place, holder in module.named_modules()
            if holder is module or self._known(holder) is None
            for name, parameter in holder._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]

    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        if saves_elsewhere():
            return {}
        with copies_within(module):
            held = {part: copy_in(module, module.get_parameter(part.name)) for part in self.parts(module)}
            wanted = {id(parameter): part for part, parameter in held.items()}
            calls = {}
            for key, uses in uses_of(call, wanted.keys()).items():
                part = wanted[key]
                parameter, handler = held[part], part.handler
                transposed = isinstance(handler, FoundMatrixHandler) and handler.transposed
                with torch.autocast(parameter.device.type, enabled=False):
                    found = [use.found(parameter, call.data, transposed) for use in uses]
                known = [one for one in found if one is not None]
                if len(known) == len(found) and required_shape(known) is not None:
                    calls[part.name] = part_call(known)
            return calls


def _is_transposed(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a matrix is `[i o]`, by the module's sizes; where they do not tell, it is not."""
    if not isinstance(module, nn.Linear) or parameter.ndim != 2:
        return False
    rows, columns = parameter.shape
    plain = columns == module.in_features or rows == module.out_features
    return not plain and (rows == module.in_features or columns == module.out_features)
