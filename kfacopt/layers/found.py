"""Products that were found in the graph of a call, as rows of the parameters that their factors are computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfacopt.layers.base import LayerHandler
from kfacopt.layers.compound import ModuleCall, PartCall
from kfacopt.layers.convolution import ConvolutionHandler, group_rows
from kfacopt.layers.pullback import Map, is_leaf, leaves_below, map_to, nodes_of, scales_to, shape_of
from kfacopt.likelihoods import KFACType
from kfacopt.likelihoods.estimator import tensors_of
from kfacopt.linalg.tensors import as_statistic

DATA, PLACES = -3, -2
"""Axes of rows `[*k n s i]`."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a parameter did in one product.

    Args:
        node: The product.
        inputs: Makes its rows, `[*k n s i]`.
        gradients: Makes of what arrives at the node, `[v ...]`, rows `[v *k n s o]`.
        shape: Of those, without v.
    """

    node: Node
    inputs: Callable[[], Tensor]
    gradients: Callable[[Tensor], Tensor]
    shape: torch.Size


@dataclass(frozen=True, eq=False)
class Use:
    """A product, or a sum with a bias, and the place in the graph of the factor that is computed from a parameter.

    Args:
        node: The operation: a product of matrices, a convolution, a sum.
        factor: The weight, or the bias.
        is_bias: Whether it is one.
    """

    node: Any
    factor: GradientEdge
    is_bias: bool

    @property
    def inputs(self) -> Tensor:
        """The other factor of a product of matrices, `[... i]`."""
        names = {"AddmmBackward0": "_saved_mat1", "BaddbmmBackward0": "_saved_batch1"}
        saved: Tensor = getattr(self.node, names.get(self.node.name(), "_saved_self"))
        return saved.detach()

    @property
    def output(self) -> torch.Size:
        """The shape of what the operation returned."""
        return shape_of(GradientEdge(self.node, 0))

    def found(self, parameter: Tensor, data: int, transposed: bool = False) -> Found | None:
        """Which rows the parameter has here; None: that cannot be told.

        Args:
            parameter: What the factor is computed from.
            data: How many the call was of.
            transposed: Whether it is a matrix `[i o]`.
        """
        if self.node.name() in ("BmmBackward0", "BaddbmmBackward0"):
            return None
        convolves = self.node.name() == "ConvolutionBackward0"
        rows_to = self._map(parameter, not convolves, transposed)
        if rows_to is None:
            return None
        return self._of_convolution(rows_to) if convolves else self._of_product(rows_to, data)

    def _map(self, parameter: Tensor, turned: bool, transposed: bool) -> Map | None:
        if not self.is_bias:
            return map_to(self.factor, parameter, turned, transposed)
        scales = scales_to(self.factor, parameter)
        return None if scales is None else Map(gradients=scales)

    def _of_product(self, rows_to: Map, data: int) -> Found | None:
        output = self.output
        rows = output[:-1].numel()
        if rows % max(data, 1):
            return None
        apart = data, rows // max(data, 1)

        def inputs() -> Tensor:
            if self.is_bias:
                described = self.node._input_metadata[0]
                one = torch.ones((), dtype=described.dtype, device=described.device)
                return as_statistic(one).expand(*apart, 1)
            rows: Tensor = rows_to.of_inputs(as_statistic(self.inputs)).unflatten(0, apart)
            return rows

        def gradients(gradient: Tensor) -> Tensor:
            return rows_to.of_gradients(gradient.reshape(len(gradient), *apart, output[-1]))

        return Found(self.node, inputs, gradients, torch.Size((*apart, rows_to.width(output[-1]))))

    def _of_convolution(self, rows_to: Map) -> Found | None:
        images, conv = self.node._saved_input.detach(), _as_module(self.node)
        data, outputs, *spatial = self.output
        groups = conv.groups
        if groups > 1 and not rows_to.keeps_outputs:
            return None

        def inputs() -> Tensor:
            roles = ("bias",) if self.is_bias else ("weight",)
            rows = ConvolutionHandler().input_rows(conv, (as_statistic(images),), {}, roles, KFACType.EXPAND)
            assert isinstance(rows, Tensor)
            return rows if self.is_bias else rows_to.of_inputs(rows)

        def gradients(gradient: Tensor) -> Tensor:
            if groups == 1:
                return rows_to.of_gradients(group_rows(gradient, len(spatial), 1, KFACType.EXPAND))
            scaled = rows_to.of_gradients(gradient.movedim(2, -1)).movedim(-1, 2)
            return group_rows(scaled, len(spatial), groups, KFACType.EXPAND)

        own = (groups,) if groups > 1 else ()
        places = torch.Size(spatial).numel()
        return Found(self.node, inputs, gradients, torch.Size((*own, data, places, rows_to.width(outputs) // groups)))


def _as_module(node: Any) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution as a node of the graph has it: its sizes alone."""
    weight = node._saved_weight
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(node._saved_stride) - 1]
    return kind(
        weight.shape[1] * node._saved_groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(node._saved_stride),
        tuple(node._saved_padding),
        tuple(node._saved_dilation),
        node._saved_groups,
        bias=False,
        device="meta",
    )


def uses_of(call: ModuleCall, wanted: Collection[int]) -> dict[int, list[Use]]:
    """By the `id` of a parameter, all that it does in a call; without those that do anything else, too.

    Args:
        call: Of the module that holds them.
        wanted: The `id`s of the parameters to look for.
    """
    found: dict[int, list[Use]] = {}
    elsewhere: set[int] = set()
    within: set[Node] = set()
    queue = [x.grad_fn for x in tensors_of(call.output) if x.grad_fn is not None]
    seen: set[Node] = {*queue, *call.above}
    while queue:
        node = queue.pop()
        sides = _sides(node, call.above)
        for place, (following, number) in enumerate(node.next_functions):
            if following is None:
                continue
            edge = GradientEdge(following, number)
            if place in sides and (below := leaves_below(edge, call.above)) is not None:
                within.update(nodes_of(edge))
                for key in below.keys() & wanted:
                    found.setdefault(key, []).append(Use(node, edge, sides[place]))
            elif is_leaf(following):
                elsewhere.add(id(following.variable))  # type: ignore[attr-defined]
            elif following not in seen:
                seen.add(following)
                queue.append(following)
    for node in seen & within:  # reached as a part of a weight, and otherwise
        elsewhere.update(leaves_below(GradientEdge(node, 0), ()) or ())
    return {key: uses for key, uses in found.items() if key not in elsewhere}


def _sides(node: Any, above: Collection[Node]) -> dict[int, bool]:
    """Where a node takes the factors that parameters are behind, by place: whether it is a bias."""
    kind, following = node.name(), node.next_functions
    if kind == "AddmmBackward0":
        return {0: True, 2: False} if node._saved_alpha == node._saved_beta == 1 and _is_data(node, 1, above) else {}
    if kind == "BaddbmmBackward0":
        return {2: False} if node._saved_alpha == 1 and _is_data(node, 1, above) else {}
    if kind in ("MmBackward0", "BmmBackward0"):
        return {1: False} if _is_data(node, 0, above) else {}
    if kind == "ConvolutionBackward0" and not node._saved_transposed:
        return {1: False, 2: True} if _is_data(node, 0, above) else {}
    if kind == "AddBackward0" and node._saved_alpha == 1:
        output = shape_of(GradientEdge(node, 0))
        edges = [None if n is None else GradientEdge(n, number) for n, number in following]
        sizes = [None if edge is None else shape_of(edge) for edge in edges]
        return {place: True for place, size in enumerate(sizes) if size == output[-1:] != output}
    return {}


def _is_data(node: Node, place: int, above: Collection[Node]) -> bool:
    """Whether a node's other factor may be data: it is no parameter."""
    following, number = node.next_functions[place]
    return following is None or not is_leaf(following) or leaves_below(GradientEdge(following, number), above) is None


def required_shape(found: Sequence[Found], axis: int = PLACES) -> torch.Size | None:
    """Of the rows that several products have together; None: they do not go together."""
    first = found[0].shape
    place = len(first) + axis
    if len({(*one.shape[:place], *one.shape[place + 1 :]) for one in found}) > 1:
        return None
    return torch.Size((*first[:place], sum(one.shape[place] for one in found), *first[place + 1 :]))


def part_call(found: Sequence[Found], axis: int = PLACES) -> PartCall:
    """What a parameter did in several products as one call, in which each is more places, or more data."""
    shape = required_shape(found, axis)
    assert shape is not None
    edges = tuple(GradientEdge(one.node, 0) for one in found)
    return PartCall((tuple(found),), shape, edges, partial(_joined, found, axis))


def _joined(found: Sequence[Found], axis: int, arrived: Sequence[Tensor | None]) -> Tensor:
    """What arrived at each product (None: nothing), as rows `[v *k n s o]`."""
    some = next(gradient for gradient in arrived if gradient is not None)
    every = [
        some.new_zeros(len(some), *one.shape) if gradient is None else one.gradients(gradient)
        for one, gradient in zip(found, arrived, strict=True)
    ]
    return every[0] if len(every) == 1 else torch.cat(every, dim=axis)


class FoundHandler(LayerHandler):
    """The inputs of a call are what was found; what arrives are rows.

    Attributes:
        axis: That of rows along which several products follow each other.
    """

    parameter_names = ("weight",)
    axis: ClassVar[int] = PLACES

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        (found,) = inputs
        rows = torch.cat([one.inputs() for one in found], dim=self.axis)
        return rows.mean(-2, keepdim=True) if approx == KFACType.REDUCE else rows

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return gradient.sum(-2, keepdim=True) if approx == KFACType.REDUCE else gradient


class FoundMatrixHandler(FoundHandler):
    """A parameter with any axes behind the first, or a bias.

    Args:
        path: Where the module holds it.
        groups: Of the convolution.
        transposed: Whether it is a matrix `[i o]`.
    """

    def __init__(self, path: str, groups: int, transposed: bool = False) -> None:
        self._path, self._groups, self.transposed = path, groups, transposed

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        weight, groups = parts["weight"], self._groups
        if self.transposed:
            return weight.mT
        matrix = weight.reshape(groups, len(weight) // groups, weight[0].numel())
        return matrix if groups > 1 else matrix.squeeze(0)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        shape = module.get_parameter(self._path).shape
        return {"weight": matrix.mT if self.transposed else matrix.reshape(shape)}


class FoundScaleHandler(FoundHandler):
    """A parameter each of whose numbers scales an output, or an input.

    Args:
        path: Where the module holds it.
    """

    structure = "elementwise"

    def __init__(self, path: str) -> None:
        self._path = path

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        rows = super().input_rows(module, inputs, kwargs, roles, KFACType.EXPAND)
        return rows.expand(*rows.shape[:-1], module.get_parameter(self._path).numel()).unsqueeze(-1)  # of ones: a bias

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return gradient

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"].reshape(-1, 1)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {"weight": matrix.reshape(module.get_parameter(self._path).shape)}
