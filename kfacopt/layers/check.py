"""The one equation that a layer's handler must satisfy, checked against autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kfacopt.layers.base import LayerHandler, Rows
from kfacopt.layers.compound import CompoundHandler, ModuleCall
from kfacopt.layers.fit import require_gradients_fit, require_inputs_fit, require_rows_pair
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import KFACType
from kfacopt.likelihoods.estimator import tensors_of

COTANGENTS = 2
RELATIVE = 1e-8
"""Of the largest number in a gradient: far above float64's rounding (1e-16), far below any mistake."""


def check_handler(
    handler: LayerHandler, module: nn.Module, *inputs: Any, data_axis: int | None = 0, **kwargs: Any
) -> None:
    """Check that a handler's rows sum to autograd's gradient, for a small module and what goes into it.

    For every subset of the parameters that the handler covers: rows have the axes that `pack`'s matrix asks for, their
    outer (or elementwise) products sum to the gradient, `unpack` undoes `pack`, a datum's cotangent is in the rows of
    that datum alone, `reduce` averages inputs and sums gradients over the places, and a handler that says it is
    `batched` packs stacked parts as it packs each. All in float64, with a copy of the module and random cotangents of
    a seed of their own; module, inputs and the random state are left as they are. Parts of a compound module are
    checked one by one, by the gradient alone; one whose rows hold something that moves (`Part.held`, the norm of a
    spectral norm) only by its shapes, and there and back through the matrix.

    Args:
        handler: The handler; it need not be registered.
        module: A layer of its type, small, with parameters that train.
        *inputs: Of its forward: at least two data, of several places if it has such, n and s not of the same size.
        data_axis: Which axis of the output the data are; None: do not check whose rows are whose.
        **kwargs: Keyword inputs of its forward.

    Raises:
        TypeError: If the handler or what it returns is of the wrong type.
        ValueError: If the handler refuses the module, or what it gives is wrong: which method, for which parameters,
            and by how much.

    >>> from kfacopt.layers import handler_for
    >>> layer = nn.Linear(3, 2)
    >>> check_handler(handler_for(layer), layer, torch.randn(5, 4, 3))
    """
    if not isinstance(handler, LayerHandler):
        raise TypeError(f"handler must be an instance of kfacopt.LayerHandler, got {handler!r}: did you call it?")
    if handler.structure == "tied":
        raise TypeError("the handler of tied weights treats two modules at a time: check the handlers of both")
    reason = handler.refusal(module)
    if reason is not None:
        raise ValueError(f"{type(handler).__name__} refuses this {type(module).__name__}: {reason}")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        copied = copy.deepcopy(module).double()
        given, named = tree_map(_in_double, inputs), tree_map(_in_double, kwargs)
        if isinstance(handler, CompoundHandler):
            _check_parts(handler, copied, given, named)
        else:
            _check_layer(handler, copied, given, named, data_axis)


def _in_double(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().double() if x.is_floating_point() else x


def _check_layer(
    handler: LayerHandler, module: nn.Module, given: Any, named: Mapping[str, Any], data_axis: int | None
) -> None:
    output = module(*given, **named)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{type(module).__name__} returns {type(output).__name__}, no tensor: a handler treats layers of one output"
        )
    cotangents = torch.randn(COTANGENTS, *output.shape, dtype=output.dtype)
    for layer in _subsets(handler, module):
        check = _Check(layer, given, named)
        rows = check.rows(cotangents, KFACType.EXPAND)
        check.gradient(rows, [output], [cotangents])
        if data_axis is not None:
            check.data(rows, cotangents, data_axis)
        if handler.structure == "outer":
            check.reduce(rows, cotangents)
            check.unformed(rows)
        if vars(type(handler)).get("batched", False):
            check.batched()


def _check_parts(handler: CompoundHandler, module: nn.Module, given: Any, named: Mapping[str, Any]) -> None:
    output = module(*given, **named)
    outputs = [x for x in tensors_of(output) if x.is_floating_point() and x.requires_grad]
    cotangents = [torch.randn(COTANGENTS, *x.shape, dtype=x.dtype) for x in outputs]
    calls = handler.calls(module, ModuleCall(given, named, output))
    for part in handler.parts(module):
        held = {role: module.get_parameter(path) for role, path in part.paths.items()}
        layer = Layer(part.name or type(module).__name__, (module,), part.handler, held, part)
        if part.name not in calls:
            raise ValueError(f"{type(handler).__name__}.calls found nothing of its part {part.name!r} in the forward")
        call = calls[part.name]
        arrived = []
        for edge in call.edges:
            each = [
                torch.autograd.grad(outputs, edge, list(some), retain_graph=True, allow_unused=True)[0]
                for some in zip(*cotangents, strict=True)
            ]
            found = [gradient for gradient in each if gradient is not None]
            arrived.append(torch.stack(found) if len(found) == COTANGENTS else None)
        check = _Check(layer, call.inputs, {})
        check.gradient(check.rows(call.arrange(arrived), KFACType.EXPAND), outputs, cotangents, summed=not part.held)


def _subsets(handler: LayerHandler, module: nn.Module) -> Iterator[Layer]:
    roles = handler.roles(module)
    if not roles:
        raise ValueError(
            f"{type(handler).__name__}.roles names no parameter of this {type(module).__name__}: parameter_names are "
            f"{handler.parameter_names}, the module has {tuple(n for n, _ in module.named_parameters())}"
        )
    for count in range(1, len(roles) + 1):
        for some in combinations(roles, count):
            held = {role: module.get_parameter(role) for role in some}
            yield Layer(type(module).__name__, (module,), handler, held)


class _Check:
    """The promises of one handler, for one subset of a layer's parameters and one call."""

    def __init__(self, layer: Layer, inputs: Any, kwargs: Mapping[str, Any]) -> None:
        self._layer, self._inputs, self._kwargs = layer, inputs, kwargs
        self._elementwise = layer.handler.structure == "elementwise"

    def rows(self, cotangents: Tensor, approx: KFACType) -> Rows:
        layer = self._layer
        module = layer.modules[0]
        inputs = layer.handler.input_rows(module, self._inputs, self._kwargs, layer.roles, approx)
        gradients = layer.handler.gradient_rows(module, cotangents, approx)
        require_inputs_fit(layer, inputs)
        require_gradients_fit(layer, gradients, len(cotangents))
        require_rows_pair(layer, inputs, gradients)
        return Rows(inputs, gradients, torch.tensor(1.0))

    def gradient(self, rows: Rows, outputs: list[Tensor], cotangents: list[Tensor], summed: bool = True) -> None:
        """For each cotangent: the rows sum to the gradient (if `summed`), and that goes there and back as a matrix."""
        layer, inputs = self._layer, self._dense(rows)
        products = "vnsc,nsci->vci" if self._elementwise else "v...nso,...nsi->v...oi"
        matrices = torch.einsum(products, rows.gradients, inputs)
        parameters = list(layer.parameters.values())
        for number, matrix in enumerate(matrices):
            each = torch.autograd.grad(
                outputs, parameters, [v[number] for v in cotangents], retain_graph=True, materialize_grads=True
            )
            truth = layer.share(dict(zip(parameters, each, strict=True)))
            packed = layer.pack(truth)
            if matrix.shape != packed.shape:
                raise ValueError(self._words(f"its rows make {list(matrix.shape)}, the matrix is {list(packed.shape)}"))
            if summed:
                self._require(matrix, packed, "the sum of its rows' products is not autograd's gradient", _factor)
            unpacked = layer.unpack(packed)
            if unpacked.keys() != truth.keys():
                raise ValueError(self._words(f"unpack gives {tuple(unpacked)}"))
            for role, part in truth.items():
                if unpacked[role].shape != part.shape:
                    got, wanted = list(unpacked[role].shape), list(part.shape)
                    raise ValueError(self._words(f"unpack gives {role!r} of shape {got}, wanted {wanted}"))
                self._require(unpacked[role], part, f"unpack does not undo pack for {role!r}")

    def data(self, rows: Rows, cotangents: Tensor, axis: int) -> None:
        """The axis n of the rows is the data's: a datum's cotangent is in its own rows."""
        count, found = cotangents.shape[axis + 1], rows.gradients.shape[-3]
        if found != count:
            raise ValueError(
                self._words(f"the rows' axis n has size {found}, the output has {count} data along axis {axis}")
            )
        for datum in range(count):
            others = cotangents.clone()
            others.select(axis + 1, datum).zero_()
            own = self.rows(others, KFACType.EXPAND).gradients.select(-3, datum)
            self._require(own, torch.zeros_like(own), f"rows of datum {datum} hold other data's cotangents")

    def reduce(self, rows: Rows, cotangents: Tensor) -> None:
        """Averaged inputs and summed gradients."""
        reduced = self.rows(cotangents, KFACType.REDUCE)
        inputs = self._dense(rows).mean(-2, keepdim=True)
        for ours, wanted, words in (
            (self._dense(reduced), inputs, "with 'reduce', input_rows is not the mean over places"),
            (reduced.gradients, rows.gradients.sum(-2, keepdim=True), "with 'reduce', gradient_rows is not the sum"),
        ):
            if ours.shape != wanted.shape:
                raise ValueError(self._words(f"{words}: got {list(ours.shape)}, wanted {list(wanted.shape)}"))
            self._require(ours, wanted, words)

    def unformed(self, rows: Rows) -> None:
        """Rows that are not formed are those of `input_rows`, and so is what they say of them."""
        layer, inputs = self._layer, rows.inputs
        found = layer.handler.unformed_rows(layer.modules[0], self._inputs, self._kwargs, layer.roles)
        if found is None:
            return
        require_inputs_fit(layer, found)
        assert isinstance(inputs, Tensor)
        gradients, flat = rows.gradients[0], inputs.flatten(-3, -2)
        for name, ours, wanted in (
            ("formed", found.formed(), inputs),
            ("averaged", found.averaged(), inputs.mean(-2, keepdim=True)),
            ("covariance", found.covariance(), flat.mT @ flat),
            ("per_datum", found.per_datum(gradients), gradients.mT @ inputs),
            ("some", found.some(slice(1, None)).formed(), inputs[1:]),
        ):
            if ours.shape != wanted.shape:
                raise ValueError(
                    self._words(f"unformed_rows: {name} gives {list(ours.shape)}, not {list(wanted.shape)}")
                )
            self._require(ours, wanted, f"unformed_rows: {name} is not that of input_rows")

    def batched(self) -> None:
        """Stacked parts are packed as each alone."""
        layer, parts = self._layer, self._layer.values()
        stacked = layer.pack({role: torch.stack([part, 2 * part]) for role, part in parts.items()})
        one = layer.pack(parts)
        wanted = torch.stack([one, 2 * one])
        if stacked.shape != wanted.shape:
            raise ValueError(self._words("it is batched, but packs stacked parts otherwise than each"))
        self._require(stacked, wanted, "it is batched, but packs stacked parts otherwise than each")

    def _dense(self, rows: Rows) -> Tensor:
        return rows.inputs if isinstance(rows.inputs, Tensor) else rows.inputs.dense(rows.gradients.dtype)

    def _require(
        self, ours: Tensor, truth: Tensor, words: str, guess: Callable[[Tensor, Tensor], str] = lambda ours, truth: ""
    ) -> None:
        largest = truth.abs().max().item() if truth.numel() else 0.0
        worst = (ours - truth).abs().max().item() if truth.numel() else 0.0
        if not worst <= RELATIVE * max(largest, 1.0):
            raise ValueError(self._words(f"{words}: off by {worst:.3g} of {largest:.3g}{guess(ours, truth)}"))

    def _words(self, what: str) -> str:
        layer = self._layer
        return f"{type(layer.handler).__name__} is wrong for {layer.name}, parameters {layer.roles}: {what}"


def _factor(ours: Tensor, truth: Tensor) -> str:
    """If it is a constant that is missing, which."""
    ratio = (ours * truth).sum() / truth.square().sum()
    if (ours - ratio * truth).norm() > RELATIVE * truth.norm():
        return ""
    return f", a constant factor of {ratio.item():.4g}: it belongs into gradient_rows, as the chain rule has it"
