"""`torch.nn.MultiheadAttention`: its four projections, which no module hook sees, and where they are in the graph.

Its forward hands all parameters to `torch.nn.functional.multi_head_attention_forward` and calls no submodule, so a
module hook sees neither the input of the output projection nor the gradients of the input projections.
`projection_edges` finds the products in the autograd graph instead, and `MultiheadAttentionHandler` makes of them four
linear layers: queries, keys, values (each with a third of the packed weight and bias, or a weight of its own) and the
output. Their rows are those of the same attention written with four `torch.nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfacopt.fsdp import copy_in
from kfacopt.layers.base import LayerHandler
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part, PartCall, saves_elsewhere
from kfacopt.layers.registry import RefusedHandler

_WHATS = ("queries", "keys", "values")
_BIASES = {"out_proj.weight": "out_proj.bias", "in_proj_weight": "in_proj_bias"}


class MultiheadAttentionHandler(CompoundHandler):
    """The projections of a `torch.nn.MultiheadAttention` as linear layers.

    Handled exactly: packed and separate weights (`kdim`, `vdim`), any masks, dropout, `need_weights`, `batch_first` or
    not, unbatched inputs, self-attention and cross-attention, several calls in a forward; `add_zero_attn` acts on no
    parameter. `bias_k` and `bias_v` are joined to the keys and values and are in no product: they train by AdamW. Where
    the forward makes no such graph (compiled as a whole, within `torch.utils.checkpoint` or other hooks on saved
    tensors), no products are found, and the optimizer says so.

    Args:
        linear: The handler of linear layers.

    >>> from kfacopt.layers import handler_for
    >>> attention = nn.MultiheadAttention(4, 2, kdim=3)
    >>> [(part.name, part.label("weight")) for part in handler_for(attention).parts(attention)]
    [('q_proj', 'q_proj_weight'), ('k_proj', 'k_proj_weight'), ('v_proj', 'v_proj_weight'), ('out_proj', 'weight')]
    """

    def __init__(self, linear: LayerHandler) -> None:
        names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        super().__init__("treated as its four projections", names)
        self._linear = linear

    def roles(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(n for n in self.parameter_names if module._parameters.get(n) is not None)

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        assert isinstance(module, nn.MultiheadAttention)
        packed, size = module._qkv_same_embed_dim, module.embed_dim
        parts = []
        for number, (letter, what) in enumerate(zip("qkv", _WHATS, strict=True)):
            rows = slice(number * size, (number + 1) * size)
            paths = {"weight": "in_proj_weight" if packed else f"{letter}_proj_weight", "bias": "in_proj_bias"}
            own = {"weight": rows, "bias": rows} if packed else {"bias": rows}
            parts.append(self._part(module, f"{letter}_proj", f"projection of the {what}", paths, own))
        paths = {"weight": "out_proj.weight", "bias": "out_proj.bias"}
        return (*parts, self._part(module, "out_proj", "projection of the output", paths, {}))

    def _part(self, module: nn.Module, name: str, what: str, paths: dict[str, str], rows: dict[str, slice]) -> Part:
        whole = Part(name, what, self, self._linear, paths, rows)
        held = {role: path for role, path in paths.items() if whole.parameter(module, role) is not None}
        return Part(name, what, self, self._linear, held, {role: rows[role] for role in held if role in rows})

    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        assert isinstance(module, nn.MultiheadAttention)
        if saves_elsewhere():
            return {}
        found: dict[str, list[Projection]] = {}
        for product in projection_edges(module, call.output[0], call.above):
            found.setdefault(product.names[0], []).append(product)
        calls = {}
        for part in self.parts(module):
            rows = part.rows.get("weight")
            for product in found.get(part.paths.get("weight", ""), ()):
                start, stop = (0, product.outputs) if rows is None else (rows.start, rows.stop)
                if product.first <= start and stop <= product.first + product.rows:
                    columns = slice(start - product.first, stop - product.first)
                    shape = torch.Size((*product.inputs.shape[:-1], stop - start))
                    arrange = partial(_arranged, product.inputs.shape, columns)
                    calls[part.name] = PartCall((product.inputs,), shape, (product.edge,), arrange)
        return calls


def _arranged(inputs: torch.Size, columns: slice, arrived: Sequence[Tensor | None]) -> Tensor:
    """Some columns of what arrived at a product with `[n s i]`, `[v (s n) ...]`, as `[v n s o]`."""
    (gradient,) = arrived
    assert gradient is not None
    apart: Tensor = gradient[..., columns].unflatten(-2, (inputs[1], inputs[0]))
    return apart.transpose(-2, -3)


def output_projection_handler() -> RefusedHandler:
    """Refuses `out_proj` of an attention module whose own handler is refused: a Linear that may never be called.

    >>> output_projection_handler().roles(nn.MultiheadAttention(4, 2).out_proj)
    ('weight', 'bias')
    """
    return RefusedHandler("its forward is never called: the attention module uses its parameters directly")


@dataclass(frozen=True, eq=False)
class Projection:
    """One matrix product inside an attention module, as if it had been a layer of its own.

    Args:
        names: The parameters by their path in the module: a weight, and its bias if that trains.
        inputs: What was multiplied, `[n s i]`: a datum's tokens are its places.
        edge: Where the product's gradient arrives, as `[(s n) rows]`: tokens before data.
        first: The first row of the weight that took part (cross-attention splits the packed one).
        rows: How many rows took part.
        outputs: How many rows the weight has.
    """

    names: tuple[str, ...]
    inputs: Tensor
    edge: GradientEdge
    first: int
    rows: int
    outputs: int

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """Cotangents that arrived at `edge`, `[v (s n) rows]`, as `[v n s outputs]`.

        Zero where the weight's rows took no part, so that the products of one weight are places of one layer: their sum
        of `g aᵀ` is the weight's gradient.
        """
        data, tokens = self.inputs.shape[:2]
        places = gradient.unflatten(1, (tokens, data)).transpose(1, 2)
        return nn.functional.pad(places, (self.first, self.outputs - self.first - self.rows))


def projection_edges(module: nn.MultiheadAttention, output: Tensor, above: Collection[Node] = ()) -> list[Projection]:
    """Find the products with `module`'s weights in the graph of its attention `output`.

    A weight has one product (self-attention: all of `in_proj_weight`) or several, each with a part of its rows. Frozen
    and parametrized weights have none. A bias is named with its weight; `in_proj_bias` beside three separate weights,
    `bias_k` and `bias_v` are in no product.

    Args:
        module: The attention module.
        output: The first output of its forward (not the attention weights), with its graph.
        above: The nodes that made its inputs, where the search ends.

    Returns:
        The products; an empty list if the graph has not the form that torch's own forward gives it (compiled,
        checkpointed, another backend): all of them or none.

    >>> import torch
    >>> attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.zeros(5, 3, 4)
    >>> products = projection_edges(attention, attention(x, x, x)[0])
    >>> [(product.names[0], tuple(product.inputs.shape)) for product in products]
    [('out_proj.weight', (5, 3, 4)), ('in_proj_weight', (5, 3, 4))]
    """
    data = 1 if output.ndim == 2 else output.shape[0 if module.batch_first else 1]
    weights = _trained_weights(module)
    found: dict[str, list[Projection]] = {name: [] for name in weights}
    owners = {copy_in(module, weight): name for name, weight in weights.items()}
    for node, weight, first, rows, mat1 in _products(output.grad_fn, owners, above):
        name = owners[weight]
        if mat1.shape[0] % max(data, 1):
            return []
        places = mat1.shape[0] // max(data, 1)  # of an empty batch nobody can tell them
        inputs = mat1.detach().unflatten(0, (places, data)).transpose(0, 1)
        names = (name, *_trained_bias(module, name))
        edge = GradientEdge(node, 0)
        found[name].append(Projection(names, inputs, edge, first, rows, weight.shape[0]))
    if not all(_is_partition(products) for products in found.values()):
        return []
    return [product for products in found.values() for product in products]


def _trained_weights(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    names = ("out_proj.weight", "in_proj_weight", *separate)
    parameters = dict(module.named_parameters())
    return {n: parameters[n] for n in names if n in parameters and parameters[n].requires_grad}


def _trained_bias(module: nn.MultiheadAttention, weight: str) -> tuple[str, ...]:
    bias = _BIASES.get(weight)
    parameter = dict(module.named_parameters()).get(bias or "")
    return (bias,) if bias is not None and parameter is not None and parameter.requires_grad else ()


def _is_partition(products: list[Projection]) -> bool:
    """Whether each row of the weight took part in exactly one product."""
    end = 0
    for product in sorted(products, key=lambda p: p.first):
        if product.first != end:
            return False
        end += product.rows
    return bool(products) and end == products[0].outputs


def _products(
    root: Node | None, weights: dict[Tensor, str], above: Collection[Node]
) -> Iterator[tuple[Node, Tensor, int, int, Tensor]]:
    """Products `mat1 @ weight[first : first + rows]ᵀ` above the module's inputs."""
    queue, seen = [root], {root, *above}
    while queue:
        node = queue.pop()
        if node is None:
            continue
        following = [n for n, _ in node.next_functions]
        kind = node.name()
        if kind in ("AddmmBackward0", "MmBackward0"):
            weight, first, rows = _weight_rows(*node.next_functions[-1])
            if weight is not None and weight in weights:
                mat1 = node._saved_mat1 if kind == "AddmmBackward0" else node._saved_self  # type: ignore[attr-defined]
                yield node, weight, first, rows, mat1
                # Below an input projection lie other layers, maybe an earlier call of this one.
                is_output = weights[weight] == "out_proj.weight"
                following = [following[-2]] if is_output else []
        for n in following:
            if n not in seen:
                seen.add(n)
                queue.append(n)


def _weight_rows(node: Node | None, number: int) -> tuple[Tensor | None, int, int]:
    """The parameter behind a product's second factor, and which of its rows it is."""
    first, rows = 0, None
    while node is not None:
        kind = node.name()
        if kind == "torch::autograd::AccumulateGrad":
            weight: Tensor = node.variable  # type: ignore[attr-defined]
            return weight, first, weight.shape[0] if rows is None else rows
        if kind == "SplitWithSizesBackward0":
            sizes = node._saved_split_sizes  # type: ignore[attr-defined]
            first, rows = sum(sizes[:number]), sizes[number]
        elif kind == "SplitBackward0":
            rows = node._saved_split_size  # type: ignore[attr-defined]
            first = number * rows
        elif kind not in ("TBackward0", "ToCopyBackward0"):  # the latter: autocast
            break
        node, number = node.next_functions[0]
    return None, 0, 0
