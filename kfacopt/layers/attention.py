"""`torch.nn.MultiheadAttention`: why no module hook sees its projections, and where they are.

Its forward hands all parameters to `torch.nn.functional.multi_head_attention_forward` and calls no submodule, so a
module hook sees neither the input of the output projection nor the gradients of the input projections: the handlers
here refuse them. (The same layer written with four `torch.nn.Linear` is covered.) `projection_edges` finds the products
in the autograd graph instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfacopt.layers.registry import RefusedHandler


def multihead_attention_handler() -> RefusedHandler:
    """Refuses the projections that a `torch.nn.MultiheadAttention` holds itself.

    >>> multihead_attention_handler().roles(nn.MultiheadAttention(4, 2))
    ('in_proj_weight', 'in_proj_bias')
    """
    return RefusedHandler(
        "computed inside multi_head_attention_forward, where no module hook sees it",
        ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"),
    )


def output_projection_handler() -> RefusedHandler:
    """Refuses `out_proj` of an attention module: a Linear whose forward is never called.

    >>> output_projection_handler().roles(nn.MultiheadAttention(4, 2).out_proj)
    ('weight', 'bias')
    """
    return RefusedHandler("its forward is never called: multi_head_attention_forward uses its parameters directly")


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
        places = rearrange(gradient, "v (s n) o -> v n s o", n=self.inputs.shape[0])
        return nn.functional.pad(places, (self.first, self.outputs - self.first - self.rows))


def projection_edges(module: nn.MultiheadAttention, output: Tensor) -> list[Projection]:
    """Find the products with `module`'s weights in the graph of its attention `output`.

    A weight has one product (self-attention: all of `in_proj_weight`) or several, each with a part of its rows. Frozen
    and parametrized weights have none. A bias is named with its weight; `in_proj_bias` beside three separate weights,
    `bias_k` and `bias_v` are in no product.

    Args:
        module: The attention module.
        output: The first output of its forward (not the attention weights), with its graph.

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
    owners = {weight: name for name, weight in weights.items()}
    for node, weight, first, rows, mat1 in _products(output.grad_fn, owners):
        name = owners[weight]
        if mat1.shape[0] % max(data, 1):
            return []
        inputs = rearrange(mat1.detach(), "(s n) i -> n s i", n=data)
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
    bias = {"out_proj.weight": "out_proj.bias", "in_proj_weight": "in_proj_bias"}.get(weight)
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


def _products(root: Node | None, weights: dict[Tensor, str]) -> Iterator[tuple[Node, Tensor, int, int, Tensor]]:
    """Products `mat1 @ weight[first : first + rows]ᵀ` above the module's inputs."""
    queue, seen = [root], {root}
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
