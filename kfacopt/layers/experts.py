"""Stacks of matrices in one parameter, as the experts of a mixture have them: a layer for each matrix.

`torch.bmm`, `baddbmm`, `einsum`, a matrix that is picked by its number, or one for each token: whatever takes the stack
apart, of every number that is multiplied by the graph tells which of the parameter it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.layers.compound import ModuleCall, Part, PartCall
from kfacopt.layers.found import DATA, Found, FoundHandler, Use, part_call, uses_of
from kfacopt.layers.pullback import origins
from kfacopt.linalg.tensors import as_statistic


class ExpertHandler(FoundHandler):
    """One matrix of a stack `[e o i]`, or `[e i o]`; each product with a vector is a datum of its own.

    Args:
        transposed: Whether it is held `[i o]`.
    """

    batched = True
    axis = DATA

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        matrix = parts["weight"].squeeze(-3)
        return matrix.mT if self.transposed else matrix

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {"weight": (matrix.mT if self.transposed else matrix).unsqueeze(-3)}


def parts_of_stack(compound: Any, path: str, count: int, handler: ExpertHandler) -> tuple[Part, ...]:
    """A part for each matrix of a parameter."""
    what = "of a stack, by the products found in the graph"
    return tuple(
        Part(f"{path}.{number}", what, compound, handler, {"weight": path}, {"weight": slice(number, number + 1)})
        for number in range(count)
    )


def calls_of_stacks(call: ModuleCall, stacks: Mapping[Tensor, Sequence[Part]]) -> dict[str, PartCall]:
    """What each matrix did in a call; a stack that is used otherwise than in products is left out.

    Args:
        call: Of their module.
        stacks: The parts of each parameter, in their order.
    """
    calls: dict[str, PartCall] = {}
    parameters = {id(parameter): parameter for parameter in stacks}
    for key, uses in uses_of(call, parameters.keys()).items():
        parameter = parameters[key]
        parts = stacks[parameter]
        handler = parts[0].handler
        assert isinstance(handler, ExpertHandler)
        found = [_shares(use, parameter, handler.transposed) for use in uses]
        known = [shares for shares in found if shares is not None]
        if len(known) < len(found):
            continue
        for number, part in enumerate(parts):
            own = [shares[number] for shares in known if number in shares]
            if own:
                calls[part.name] = part_call(own, DATA)
    return calls


def _share(use: Use, batches: Tensor, rows: Tensor, columns: Tensor) -> Found:
    """One matrix's share of a product of batches `[b m i]` with matrices `[b i o]`.

    Args:
        use: The product.
        batches: Which batches are its own.
        rows: Where its inputs are, in their order.
        columns: Where its outputs are.
    """

    def inputs() -> Tensor:
        given = as_statistic(use.inputs)
        return (given if given.ndim == 3 else given.unsqueeze(0))[batches][..., rows].flatten(0, 1).unsqueeze(1)

    def gradients(arrived: Tensor) -> Tensor:
        apart = arrived if arrived.ndim == 4 else arrived.unsqueeze(1)
        return apart[:, batches][..., columns].flatten(1, 2).unsqueeze(2)

    return Found(use.node, inputs, gradients, torch.Size((len(batches) * use.output[-2], 1, len(columns))))


def _shares(use: Use, parameter: Tensor, transposed: bool) -> dict[int, Found] | None:
    """By its number, the share of each matrix in a product; None: it is not one with whole matrices."""
    if use.is_bias or use.node.name() == "ConvolutionBackward0":
        return None
    found = origins(use.factor, parameter)
    if found is None:
        return None
    number, first, second = (axis if axis.ndim == 3 else axis.unsqueeze(0) for axis in found)
    inputs, outputs = (first, second) if transposed else (second, first)
    if _varies(inputs, 2) or _varies(outputs, 1) or (_varies(number, 1) and _varies(number, 2)):
        return None
    sizes = tuple(parameter.shape[1:] if transposed else reversed(parameter.shape[1:]))
    row, column, places = inputs[:, :, 0], outputs[:, 0], number[:, :, 0] if _varies(number, 1) else number[:, 0]
    if not (_varies(number, 1) or _varies(number, 2)):
        return _by_batch(use, number[:, 0, 0], row, column, sizes)
    if _varies(row, 0) or _varies(column, 0) or _varies(places, 0):
        return None
    by_row = _varies(number, 1)
    every = torch.arange(len(number), device=number.device)
    shares = {}
    for one in places[0].unique().tolist():
        own = (places[0] == one).nonzero().flatten()
        rows = _ordered(row[0], own if by_row else None, sizes[0])
        columns = _ordered(column[0], None if by_row else own, sizes[1])
        if rows is None or columns is None:
            return None
        shares[int(one)] = _share(use, every, rows, columns)
    return shares


def _by_batch(use: Use, number: Tensor, row: Tensor, column: Tensor, sizes: tuple[int, ...]) -> dict[int, Found] | None:
    """Each batch is of one matrix."""
    if _varies(row, 0) or _varies(column, 0) or not len(number):
        return None
    rows, columns = _ordered(row[0], None, sizes[0]), _ordered(column[0], None, sizes[1])
    if rows is None or columns is None:
        return None
    each = {int(one): (number == one).nonzero().flatten() for one in number.unique().tolist()}
    return {one: _share(use, batches, rows, columns) for one, batches in each.items()}


def _varies(tensor: Tensor, axis: int) -> bool:
    return bool((tensor != tensor.narrow(axis, 0, min(1, tensor.shape[axis]))).any())


def _ordered(origin: Tensor, among: Tensor | None, size: int) -> Tensor | None:
    """Where the numbers up to `size` are, among some places; None: not each of them once."""
    places = torch.arange(len(origin), device=origin.device) if among is None else among
    values, order = origin[places].sort()
    whole = torch.arange(size, device=origin.device)
    return places[order] if values.shape == whole.shape and bool((values == whole).all()) else None
