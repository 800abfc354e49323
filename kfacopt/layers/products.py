"""Matrices that a module of one's own multiplies by with `@`, `F.linear` or `einsum`, without a layer for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfacopt.fsdp import copies_within, copy_in
from kfacopt.layers.base import LayerHandler
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part, PartCall, saves_elsewhere
from kfacopt.layers.einsum import product_of_einsum
from kfacopt.layers.experts import ExpertHandler, calls_of_stacks, parts_of_stack
from kfacopt.layers.linear import LinearHandler
from kfacopt.layers.transposed_linear import TransposedLinearHandler
from kfacopt.likelihoods.estimator import tensors_of


class ProductsHandler(CompoundHandler):
    """Named matrices of a module as linear layers, found by their products in the graph of each call.

    Register it for a class of your own that holds raw matrices (a `ParameterList` of them, say). What multiplies a
    matrix may have any leading shape, the data first, as `torch.nn.Linear` has it; a matrix may be used several times
    in a call, of which each is more places. Other uses (a product from the left, of a part of the matrix, an `einsum`
    whose result has the data elsewhere) are noticed: the matrix trains by AdamW then, which a warning and `coverage()`
    say. All else that the module holds trains by AdamW, too.

    A parameter with three axes is a stack of matrices, of which each is a layer of its own: the experts of a mixture,
    in `bmm`, `baddbmm` and `einsum`, picked one by one (`x[mine] @ W[e]`) or for each token (`W[chosen]`). Their rows
    are data of their own, whichever datum of the batch a token was of: KFAC-expand's factors are exact, second moments
    of EKFAC are those of tokens.

    Args:
        linear: Paths of the matrices `[o i]` that `F.linear(x, W)`, `x @ W.T` or `einsum("...i,oi->...o", x, W)` uses,
            or of stacks `[e o i]`; of a `ParameterList`, all in it.
        matmul: Paths of the matrices `[i o]` that `x @ W` or `einsum("...i,io->...o", x, W)` uses, or of stacks
            `[e i o]`.

    Raises:
        ValueError: If no path is given, or one twice.

    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.pair = nn.ParameterList(torch.eye(3) for _ in range(2))
    ...
    ...     def forward(self, x):
    ...         return (x @ self.pair[0]).sigmoid() * (x @ self.pair[1])
    >>> from kfacopt.layers import handler_for, register_handler
    >>> with register_handler(Gated, ProductsHandler(matmul=["pair"])):
    ...     [part.name for part in handler_for(Gated()).parts(Gated())]
    ['pair.0', 'pair.1']
    """

    def __init__(self, linear: Sequence[str] = (), matmul: Sequence[str] = ()) -> None:
        paths = [*linear, *matmul]
        if isinstance(linear, str) or isinstance(matmul, str) or not paths or len(set(paths)) < len(paths):
            raise ValueError(
                f"linear and matmul must be sequences of paths of matrices, each path once, got {linear!r} and "
                f"{matmul!r}"
            )
        super().__init__("treated as its products", tuple(paths))
        self._ways: dict[str, LayerHandler] = dict.fromkeys(linear, LinearHandler())
        self._ways |= dict.fromkeys(matmul, TransposedLinearHandler())

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        found = []
        for path, handler in self._ways.items():
            for name, parameter in module.named_parameters():
                if not (name == path or name.startswith(f"{path}.")):
                    continue
                if parameter.ndim == 2:
                    found.append(Part(name, "products found in the graph", self, handler, {"weight": name}))
                elif parameter.ndim == 3:
                    of_stack = ExpertHandler(isinstance(handler, TransposedLinearHandler))
                    found += parts_of_stack(self, name, len(parameter), of_stack)
        return tuple(found)

    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        if saves_elsewhere():
            return {}
        parts: dict[Tensor, Part] = {}
        stacks: dict[Tensor, list[Part]] = {}
        for part in self.parts(module):
            weight = copy_in(module, module.get_parameter(part.paths["weight"]))
            if part.rows:
                stacks.setdefault(weight, []).append(part)
            else:
                parts[weight] = part
        data = call.data
        found: dict[Tensor, list[_Product]] = {}
        reads: Counter[Tensor] = Counter()
        for weight, product in _reads([x.grad_fn for x in tensors_of(call.output)], parts, call.above):
            reads[weight] += 1
            found.setdefault(weight, []).extend([] if product is None else [product])
        with copies_within(module) if stacks else nullcontext():
            calls = calls_of_stacks(call, stacks)
        for weight, products in found.items():
            part = parts[weight]
            as_declared = all(p.transposed == isinstance(part.handler, TransposedLinearHandler) for p in products)
            if (
                len(products) < reads[weight]
                or not as_declared
                or any(p.inputs.shape[0] % max(data, 1) for p in products)
            ):
                continue
            inputs = torch.cat([_with_data(p.inputs, data) for p in products], dim=1)
            outputs = weight.shape[1 if products[0].transposed else 0]
            shape = torch.Size((*inputs.shape[:2], outputs))
            edges = tuple(GradientEdge(p.node, 0) for p in products)
            rows = [p.inputs.shape[0] for p in products]
            calls[part.name] = PartCall((inputs,), shape, edges, partial(_joined, data, rows, outputs))
        return calls


@dataclass(frozen=True, eq=False)
class _Product:
    """`inputs @ W`, or `Wᵀ` if it is not `transposed`: a node of the graph, inputs `[(n s) i]`."""

    node: Node
    inputs: Tensor
    transposed: bool


def _reads(
    roots: Sequence[Node | None], weights: Collection[Tensor], above: Collection[Node]
) -> Iterator[tuple[Tensor, _Product | None]]:
    """Every operation that reads one of some weights; None: it is no product with the whole of it from the right."""
    wanted = {id(weight) for weight in weights}
    queue = [root for root in roots if root is not None]
    seen = {*queue, *above}
    while queue:
        node = queue.pop()
        kind = node.name()
        if (found := product_of_einsum(node)) is not None and id(found[0]) in wanted:
            yield found[0], _Product(node, node._saved_self.detach()[0], transposed=found[1])  # type: ignore[attr-defined]
            if (left := node.next_functions[0][0]) is not None and left not in seen:
                seen.add(left)
                queue.append(left)
            continue
        for place, (following, _) in enumerate(node.next_functions):
            weight, turns = _leaf(following)
            if weight is not None and id(weight) in wanted:
                product = None
                if kind in ("AddmmBackward0", "MmBackward0") and place == len(node.next_functions) - 1:
                    saved = node._saved_mat1 if kind == "AddmmBackward0" else node._saved_self  # type: ignore[attr-defined]
                    product = _Product(node, saved.detach(), transposed=turns % 2 == 0)
                yield weight, product
            elif following is not None and following not in seen:
                seen.add(following)
                queue.append(following)


def _leaf(node: Node | None) -> tuple[Tensor | None, int]:
    """The parameter behind a factor, and how often it was transposed on the way."""
    turns = 0
    while node is not None:
        kind = node.name()
        if kind == "torch::autograd::AccumulateGrad":
            return node.variable, turns  # type: ignore[attr-defined]
        if kind in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
            turns += 1
        elif kind != "ToCopyBackward0":  # autocast
            break
        node = node.next_functions[0][0]
    return None, 0


def _with_data(rows: Tensor, data: int) -> Tensor:
    """`[(n s) i]` as `[n s i]`."""
    return rows.reshape(data, rows.shape[0] // max(data, 1), rows.shape[1])


def _joined(data: int, rows: Sequence[int], outputs: int, arrived: Sequence[Tensor | None]) -> Tensor:
    """What arrived at each product, `[v (n s) o]` or `[v 1 (n s) o]` (None: nothing), as `[v n s o]`."""
    some = next(gradient for gradient in arrived if gradient is not None)
    every = [
        some.new_zeros(len(some), count, outputs) if gradient is None else gradient
        for gradient, count in zip(arrived, rows, strict=True)
    ]
    apart = [g.reshape(len(g), data, n // max(data, 1), outputs) for g, n in zip(every, rows, strict=True)]
    return torch.cat(apart, dim=2)
