"""A covered place of a model: the modules that hold one set of parameters, and their handler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kfacopt.fsdp import is_sharded
from kfacopt.layers.base import LayerHandler
from kfacopt.layers.compound import Part


@dataclass(frozen=True, eq=False)
class Layer:
    """One place that gets a block: a module, or several that share their parameters, or a part of a module.

    Of parameters that several parts share (the packed projections of attention) it has some rows: its *share*.

    Args:
        name: The module's path in the model; with the parameter's name where a module has several blocks.
        modules: The module, or all modules that hold the very same parameters.
        handler: Brings inputs and cotangents to rows.
        parameters: The covered parameters by the name the handler gives them (`"weight"`, `"bias"`).
        part: Which part of the module it is; None: the module.
    """

    name: str
    modules: tuple[nn.Module, ...]
    handler: LayerHandler
    parameters: Mapping[str, nn.Parameter]
    part: Part | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The names under which the handler knows the covered parameters."""
        return tuple(self.parameters)

    @property
    def outputs(self) -> tuple[tuple[nn.Module, ...], str]:
        """What tells its outputs from another layer's: a weight and its bias in layers of their own have the same."""
        return self.modules, "" if self.part is None else self.part.name

    @cached_property
    def shape(self) -> torch.Size:
        """Of the block's matrix, `[*k o i]`."""
        if not any(map(is_sharded, self.parameters.values())):
            return self.pack(self.values()).shape
        empty = {role: torch.empty(p.shape, dtype=p.dtype, device="meta") for role, p in self.parameters.items()}
        return self.pack({role: self.own_rows(role, t) for role, t in empty.items()}).shape

    @cached_property
    def alike(self) -> tuple[object, ...] | None:
        """What layers whose parts, of the same shapes, may be packed together have in common; None: it is not to be."""
        if not vars(type(self.handler)).get("batched", False):
            return None
        return type(self.handler), self.roles, self.shape

    def held_by(self, module: nn.Module) -> bool:
        """Whether `module` holds the very parameters at present (`functional_call` puts others in their place)."""
        for role, p in self.parameters.items():
            held = module._parameters.get(role) if self.part is None else self.part.parameter(module, role)
            if held is p:
                continue
            # Of a sharded parameter the engine puts a whole copy there in a forward, and lets nothing else stay.
            if held is None or not is_sharded(p) or is_sharded(held) or held.shape != p.shape:
                return False
        return True

    def rows(self, role: str) -> slice | None:
        """Which rows of a parameter are the layer's; None: all."""
        return None if self.part is None else self.part.rows.get(role)

    def share(self, tensors: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """By role, the layer's share of tensors shaped as the parameters: views.

        Raises:
            KeyError: If a parameter is missing.
        """
        if self.part is None:
            return {role: tensors[p] for role, p in self.parameters.items()}
        return {role: self.own_rows(role, tensors[p]) for role, p in self.parameters.items()}

    def values(self) -> dict[str, Tensor]:
        """By role, the layer's share of the parameters themselves, without a graph."""
        return {role: self.own_rows(role, p.detach()) for role, p in self.parameters.items()}

    def own_rows(self, role: str, tensor: Tensor) -> Tensor:
        """The layer's share of one tensor, shaped as the parameter of that role: a view."""
        rows = self.rows(role)
        return tensor if rows is None else tensor[rows]

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by role, shaped as the layer's share of the parameters, as the block's matrix `[*k o i]`."""
        return self.handler.pack(self.modules[0], tensors)

    def unpack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The block's matrix as tensors by role, shaped as the layer's share of the parameters."""
        return self.handler.unpack(self.modules[0], matrix, self.roles)


def by_layer(layers: Iterable[Layer], tensors: Mapping[nn.Parameter, Tensor]) -> dict[Layer, dict[str, Tensor]]:
    """Each layer's share of tensors by parameter; layers of which a parameter is missing are left out."""
    return {layer: layer.share(tensors) for layer in layers if all(p in tensors for p in layer.parameters.values())}


def by_parameter(tensors: Mapping[Layer, Mapping[str, Tensor]]) -> dict[nn.Parameter, Tensor]:
    """Shares of layers as tensors by parameter: the inverse of `by_layer`.

    A parameter of which some rows are missing, as the layer that has them was left out, is left out as a whole.

    >>> from kfacopt.layers.coverage import find_layers
    >>> attention = nn.MultiheadAttention(4, 2, bias=False)
    >>> layers, _ = find_layers(attention, list(attention.parameters()), {}, separate=False)
    >>> shares = by_layer(layers, {p: p.detach() for p in attention.parameters()})
    >>> torch.equal(by_parameter(shares)[attention.in_proj_weight], attention.in_proj_weight)
    True
    >>> by_parameter({layers[0]: shares[layers[0]]})
    {}
    """
    result: dict[nn.Parameter, Tensor] = {}
    pieces: dict[nn.Parameter, list[tuple[int, Tensor]]] = {}
    for layer, parts in tensors.items():
        for role, tensor in parts.items():
            rows = layer.rows(role)
            if rows is None:
                result[layer.parameters[role]] = tensor
            else:
                pieces.setdefault(layer.parameters[role], []).append((rows.start, tensor))
    for parameter, held in pieces.items():
        ordered = [tensor for _, tensor in sorted(held, key=lambda piece: piece[0])]
        if sum(len(tensor) for tensor in ordered) == len(parameter):
            result[parameter] = torch.cat(ordered)
    return result


def connected(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that share parameters, among themselves or by way of others, together; in their order.

    >>> from kfacopt.layers.coverage import find_layers
    >>> model = nn.ModuleList([nn.Linear(4, 4), nn.MultiheadAttention(4, 2)])
    >>> layers, _ = find_layers(model, list(model.parameters()), {}, separate=False)
    >>> [[layer.name for layer in piece] for piece in connected(layers)]
    [['0'], ['1.q_proj', '1.k_proj', '1.v_proj'], ['1.out_proj']]
    """
    pieces: dict[int, list[Layer]] = {}
    holding: dict[nn.Parameter, int] = {}
    for number, layer in enumerate(layers):
        met = sorted({holding[p] for p in layer.parameters.values() if p in holding})
        place = met[0] if met else number
        joined = [other for old in met for other in pieces.pop(old)] + [layer]
        pieces[place] = joined
        holding |= {p: place for other in joined for p in other.parameters.values()}
    return [pieces[place] for place in sorted(pieces)]


def packed_together(
    tensors: Mapping[Layer, Mapping[str, Tensor]], kind: Callable[[Layer], object]
) -> list[tuple[list[Layer], Tensor]]:
    """Tensors by layer and role as matrices `[b *k o i]`: one for all layers that are alike, and of one kind.

    Args:
        tensors: Shaped as the layers' shares of their parameters.
        kind: What else layers have to have in common.
    """
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer, parts in tensors.items():
        alike = layer if layer.alike is None else layer.alike
        key = alike, kind(layer), *((t.shape, t.dtype, t.device) for t in parts.values())
        found.setdefault(key, []).append(layer)
    result = []
    for layers in found.values():
        first = layers[0]
        if len(layers) == 1:
            result.append((layers, first.pack(tensors[first]).unsqueeze(0)))
        else:
            columns = {role: torch.stack([tensors[layer][role] for layer in layers]) for role in first.roles}
            result.append((layers, first.pack(columns)))
    return result


def unpacked_together(layers: Sequence[Layer], matrices: Tensor) -> dict[Layer, dict[str, Tensor]]:
    """Matrices `[b *k o i]` of layers that are alike, or of one, as tensors by layer and role.

    >>> from kfacopt.layers.coverage import find_layers
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
    >>> layers, _ = find_layers(model, list(model.parameters()), {}, separate=False)
    >>> [(held, matrices)] = packed_together({layer: layer.values() for layer in layers}, kind=lambda layer: None)
    >>> matrices.shape, torch.equal(unpacked_together(held, matrices)[layers[1]]["bias"], model[1].bias)
    (torch.Size([2, 3, 3]), True)
    """
    if len(layers) == 1:
        return {layers[0]: layers[0].unpack(matrices[0])}
    columns = {role: column.unbind() for role, column in layers[0].unpack(matrices).items()}
    return {layer: {role: column[place] for role, column in columns.items()} for place, layer in enumerate(layers)}
