"""The product with a matrix that `torch.einsum` makes, read off the graph.

It rearranges both factors, multiplies them as batches of matrices, and rearranges the result: `"...i,io->...o"` is one
batch of inputs `[1 (n s) i]` times `[1 i o]`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

_VIEWS = ("ViewBackward0", "ReshapeAliasBackward0")
_TURNS = ("PermuteBackward0", "TransposeBackward0", "TBackward0", "UnsqueezeBackward0")


def product_of_einsum(node: Node) -> tuple[Tensor, bool] | None:
    """The matrix that a node multiplies by from the right, and whether that is as it is held (`[i o]`) or turned.

    None where the node is no such product with the whole of a leaf, or its rows are not in the order of the data.

    >>> import torch
    >>> x, weight = torch.ones(5, 3), torch.ones(2, 3, requires_grad=True)
    >>> product = torch.einsum("ni,oi->no", x, weight).grad_fn
    >>> while product.name() != "BmmBackward0":
    ...     product = product.next_functions[0][0]
    >>> matrix, held = product_of_einsum(product)
    >>> matrix is weight, held
    (True, False)
    """
    if node.name() != "BmmBackward0" or len(node.next_functions) != 2:
        return None
    (left, _), (right, _) = node.next_functions
    path, leaf = _path(right)
    if leaf is None or leaf.ndim != 2 or not _data_lead(left):
        return None
    inputs, outputs = _sizes(node)
    turned = _rearranged(leaf.detach(), path, (1, inputs, outputs))
    if turned is None or turned.shape[0] != 1:
        return None
    for held, found in ((True, leaf.detach()), (False, leaf.detach().mT)):
        if turned[0].shape == found.shape and turned[0].stride() == found.stride():
            return leaf, held
    return None


def _sizes(node: Any) -> tuple[int, int]:
    """Inputs and outputs of the product, from its result's shape and its first factor's."""
    return int(node._saved_self.shape[-1]), int(node._input_metadata[0].shape[-1])


def _path(node: Node | None) -> tuple[list[Node], Tensor | None]:
    """The rearrangements from a leaf up to a factor, in their order, and the leaf; None: there is something between."""
    path: list[Node] = []
    while node is not None:
        if node.name() == "torch::autograd::AccumulateGrad":
            return path[::-1], node.variable  # type: ignore[attr-defined]
        if node.name() in (*_VIEWS, *_TURNS):
            path.append(node)
        elif node.name() != "ToCopyBackward0":  # autocast
            break
        node = node.next_functions[0][0]
    return [], None


def _rearranged(matrix: Tensor, path: list[Node], last: tuple[int, ...]) -> Tensor | None:
    """A matrix as a factor of the product has it: a view, whose strides say where each number lies."""
    for place, node in enumerate(path):
        kind = node.name()
        if kind in _VIEWS:
            if place < len(path) - 1:
                return None  # its shape is known of the last alone
            try:
                matrix = matrix.view(last)
            except RuntimeError:  # not a view of the matrix
                return None
        else:
            matrix = _turned(matrix, kind, node)
    return matrix


def _turned(tensor: Tensor, kind: str, node: Any) -> Tensor:
    """One rearrangement that is no view of other sizes."""
    if kind == "UnsqueezeBackward0":
        return tensor.unsqueeze(_signed(node._saved_dim))
    if kind == "PermuteBackward0":
        return tensor.permute([_signed(dim) for dim in node._saved_dims])
    return tensor.mT if kind == "TBackward0" else tensor.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1))


def _data_lead(node: Node | None) -> bool:
    """Whether the leading axis of what einsum was given still leads in the rows of the first factor."""
    turns: list[Any] = []
    while node is not None and node.name() in (*_VIEWS, *_TURNS, "UnsafeViewBackward0", "CloneBackward0"):
        if node.name() in _TURNS:
            turns.append(node)
        elif turns:
            break  # a view of before
        node = node.next_functions[0][0]
    axes: list[int | None] = []
    for turn in reversed(turns):
        if turn.name() != "UnsqueezeBackward0" and turn.name() != "PermuteBackward0":
            return False
        if not axes:
            count = len(turn._saved_dims) if turn.name() == "PermuteBackward0" else _signed(turn._saved_dim)
            axes = list(range(max(count, 1)))
        if turn.name() == "PermuteBackward0":
            if len(turn._saved_dims) != len(axes):
                return False
            axes = [axes[_signed(dim)] for dim in turn._saved_dims]
        else:
            axes.insert(_signed(turn._saved_dim), None)
    return next((axis for axis in axes if axis is not None), 0) == 0


def _signed(number: int) -> int:
    """A dimension, which the graph keeps without its sign."""
    return number - 2**64 if number >= 2**63 else number
