"""From the gradient of a computed weight to those of the parameters that it is computed from.

The computation may be anything that autograd recorded: its nodes are asked what they make of a few gradients, and what
the answers suggest is confirmed on a random one. Where a weight `W` `[o i]` has rows `g aᵀ`, such a parameter has rows
of its own:

    its gradient from W's, E    rows             found of
    P(d ∘ E)                    (d g) aᵀ         what is fake-quantized, masked, standardized, divided by its norm
    P(E ∘ e)                    g (e ∘ a)ᵀ       the same by inputs
    d ∘ (E Rᵀ)                  (d g) (R a)ᵀ     B of `W0 + B A`, with R = A
    Lᵀ (E ∘ e)                  (Lᵀ g) (e ∘ a)ᵀ  A of `W0 + B A`, with L = B
    Σ_i (E ∘ φ)                 g ∘ (φ a)        a scale of each output
    Σ_o (E ∘ φ)                 (φᵀ g) ∘ a       a scale of each input

d is a number for each output, e for each input. P is a projection, which no Kronecker product has: it is left out of
the rows (a mask's zeros, the direction along which a norm takes a weight's change out). All else is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_EXACT = 256
"""Integers below are exact in every floating type."""

_NEARLY = 0.02
"""How far from a projection may be what is left out of the rows as one."""

Pull = Callable[[Tensor], Tensor]
"""A gradient of the weight, `[o i]`, to that of a parameter as a matrix."""


@dataclass(frozen=True, eq=False)
class Map:
    """How rows of a weight become rows of a parameter: each side times a matrix, or entry by entry, or as it is.

    Args:
        inputs: `[q i]`, or `[i]`; None: as they are.
        gradients: `[o p]`, or `[o]`; None: as they are.
    """

    inputs: Tensor | None = None
    gradients: Tensor | None = None

    def of_inputs(self, rows: Tensor) -> Tensor:
        """`[... i]` as `[... q]`.

        >>> Map(inputs=torch.ones(1, 2)).of_inputs(torch.ones(5, 2)).shape
        torch.Size([5, 1])
        """
        return _times(rows, None if self.inputs is None or self.inputs.ndim == 1 else self.inputs.mT, self.inputs)

    def of_gradients(self, rows: Tensor) -> Tensor:
        """`[... o]` as `[... p]`.

        >>> Map(gradients=torch.tensor([2.0, 3.0])).of_gradients(torch.ones(1, 2))
        tensor([[2., 3.]])
        """
        whole = None if self.gradients is None or self.gradients.ndim == 1 else self.gradients
        return _times(rows, whole, self.gradients)

    @property
    def keeps_outputs(self) -> bool:
        """Whether the inputs' rows stay as they are, and each output's gradients are its own."""
        return self.inputs is None and (self.gradients is None or self.gradients.ndim == 1)

    def width(self, outputs: int) -> int:
        """Of gradients' rows, where a weight's have so many."""
        return outputs if self.gradients is None else self.gradients.shape[-1]


def _times(rows: Tensor, matrix: Tensor | None, entries: Tensor | None) -> Tensor:
    if matrix is not None:
        return rows @ matrix.to(rows)
    return rows if entries is None else rows * entries.to(rows)


def leaves_below(edge: GradientEdge, above: Collection[Node]) -> dict[int, Tensor] | None:
    """By id, the tensors that a place of the graph was computed from; None: one of the nodes `above` took part.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> edge = torch.autograd.graph.get_gradient_edge(2.0 * weight)
    >>> list(leaves_below(edge, [])) == [id(weight)], leaves_below(edge, [edge.node]) is None
    (True, True)
    """
    found: dict[int, Tensor] = {}
    for node in nodes_of(edge):
        if node in above:
            return None
        if is_leaf(node):
            found[id(node.variable)] = node.variable  # type: ignore[attr-defined]
    return found


def shape_of(edge: GradientEdge) -> torch.Size:
    """Of the tensor at a place of the graph.

    >>> shape_of(torch.autograd.graph.get_gradient_edge(torch.ones(2, 3, requires_grad=True)))
    torch.Size([2, 3])
    """
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def _turns(edge: GradientEdge, leaf: Tensor) -> int | None:
    """How often a leaf was transposed to be the tensor at a place of the graph; None: that is something else."""
    node: Any = edge.node
    turns = 0
    while node is not None and node.name() in ("TBackward0", "ToCopyBackward0"):
        turns += node.name() == "TBackward0"
        node = node.next_functions[0][0]
    return turns if node is not None and is_leaf(node) and node.variable is leaf else None


def is_vector(leaf: Tensor) -> bool:
    """Whether all axes but one are of size one.

    >>> [is_vector(torch.ones(shape)) for shape in ((3,), (3, 1, 1), (3, 2))]
    [True, True, False]
    """
    return leaf.numel() == max(leaf.shape, default=1)


@torch.no_grad()
def map_to(edge: GradientEdge, leaf: Tensor, turned: bool, transposed: bool = False) -> Map | None:
    """The map to rows of a parameter from those of a weight that was computed from it; None: it is not one of these.

    Args:
        edge: The weight in the graph, as a matrix or with more axes behind the first.
        leaf: The parameter, with rows `g aᵀ`, or, if it is a vector, entry by entry.
        turned: Whether the graph has the weight as `[i o]`.
        transposed: Whether the parameter is to be taken as its transpose.

    >>> a, b = torch.ones(2, 5, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    >>> weight = torch.ones(3, 5) + b @ a
    >>> found = map_to(torch.autograd.graph.get_gradient_edge(weight), b, turned=False)
    >>> found.of_inputs(torch.ones(1, 5)), found.of_gradients(torch.ones(1, 3)).shape
    (tensor([[5., 5.]]), torch.Size([1, 3]))
    """
    turns = _turns(edge, leaf)
    if turns is not None and leaf.ndim > 1:
        return Map() if (turned + turns + transposed) % 2 == 0 else None
    shape, like = shape_of(edge), leaf.detach()
    dtype = edge.node._input_metadata[edge.output_nr].dtype
    size = torch.Size((shape[0], shape[1:].numel())) if len(shape) > 1 else torch.Size((1, shape.numel()))
    size = torch.Size(reversed(size)) if turned else size

    own = torch.Size((leaf.numel(),)) if is_vector(leaf) else like.flatten(1).shape
    own = own[::-1] if transposed else own

    def pull(gradient: Tensor) -> Tensor:
        given = (gradient.mT if turned else gradient).reshape(shape).to(dtype)
        arrived = _pulled(edge, given, leaf)
        return (arrived.mT if transposed and len(own) > 1 else arrived.reshape(own)).to(gradient.dtype)

    tolerance = _tolerance(dtype)
    precise = like.new_empty(0, dtype=torch.promote_types(dtype, torch.float32))
    of_matrices = (_scaled, _scaled_by_inputs, _from_right, _from_left)
    kinds = (_by_outputs, _by_inputs) if is_vector(leaf) else of_matrices
    for kind in kinds:
        found = kind(pull, size, own, precise, tolerance)
        if found is not None:
            return found
    return None


@torch.no_grad()
def scales_to(edge: GradientEdge, leaf: Tensor) -> Tensor | None:
    """What each number of a vector is multiplied by to be another's, `[o]`; None: the one is not that of the other.

    >>> shift = torch.ones(2, requires_grad=True)
    >>> scales_to(torch.autograd.graph.get_gradient_edge(shift * 0.1), shift)
    tensor([0.1000, 0.1000])
    """
    like = leaf.detach()
    if edge.node is None or is_leaf(edge.node):
        return torch.ones_like(like)
    if shape_of(edge) != leaf.shape or leaf.ndim != 1:
        return None
    dtype = edge.node._input_metadata[edge.output_nr].dtype
    sample = _random(leaf.shape, like.new_empty(0, dtype=dtype))
    scales = _pulled(edge, torch.ones_like(sample), leaf)
    return scales if _alike(_pulled(edge, sample, leaf), scales * sample, _tolerance(dtype)) else None


def _scaled(pull: Pull, size: torch.Size, own: torch.Size, like: Tensor, tolerance: float) -> Map | None:
    """Twice pulled, a projection times a number for each output differs from once pulled by that number.

    That of a norm is one but for the small number that is added to the norm.
    """
    if own != size:
        return None
    once = pull(_random(size, like))
    twice = pull(once)
    squares = once.square().sum(1)
    scales = torch.where(squares > 0, (once * twice).sum(1) / squares.clamp_min(torch.finfo(once.dtype).tiny), 0.0)
    return Map(gradients=scales) if _alike(twice, scales[:, None] * once, max(tolerance, _NEARLY)) else None


def _scaled_by_inputs(pull: Pull, size: torch.Size, own: torch.Size, like: Tensor, tolerance: float) -> Map | None:
    found = _scaled(lambda e: pull(e.mT).mT, size[::-1], own[::-1], like, tolerance)
    return None if found is None else Map(inputs=found.gradients)


def _from_right(pull: Pull, size: torch.Size, own: torch.Size, like: Tensor, tolerance: float) -> Map | None:
    if own[0] != size[0]:
        return None
    inputs = size[1]
    first = pull(_random(size, like)[:1].expand(size))  # d (R v)ᵀ
    greatest = first[first.square().sum(1).argmax()]
    if not greatest.any():
        return None
    scales = first @ greatest / greatest.square().sum()
    usable = (scales.abs() > 0.1).nonzero().flatten()
    matrix = like.new_empty(own[1], inputs)
    for start in range(0, inputs, len(usable)):
        columns = torch.arange(start, min(start + len(usable), inputs), device=like.device)
        rows = usable[: len(columns)]
        asked = like.new_zeros(size)
        asked[rows, columns] = 1.0
        matrix[:, columns] = (pull(asked)[rows] / scales[rows, None]).mT
    sample = _random(size, like)
    found = Map(inputs=matrix, gradients=scales)
    return found if _alike(pull(sample), scales[:, None] * (sample @ matrix.mT), tolerance) else None


def _from_left(pull: Pull, size: torch.Size, own: torch.Size, like: Tensor, tolerance: float) -> Map | None:
    turned = _from_right(lambda e: pull(e.mT).mT, size[::-1], own[::-1], like, tolerance)
    return None if turned is None or turned.inputs is None else Map(turned.gradients, turned.inputs.mT)


def _by_outputs(pull: Pull, size: torch.Size, own: torch.Size, like: Tensor, tolerance: float) -> Map | None:
    if own.numel() != size[0]:
        return None
    with torch.enable_grad():  # Σ over all of the pulled gradient is <E, φ>
        sample = _random(size, like).requires_grad_()
        pulled = pull(sample).flatten()
        if not pulled.requires_grad:
            return None
        (factor,) = torch.autograd.grad(pulled.sum(), sample)
    return Map(inputs=factor) if _alike(pulled.detach(), (sample.detach() * factor).sum(1), tolerance) else None


def _by_inputs(pull: Pull, size: torch.Size, own: torch.Size, like: Tensor, tolerance: float) -> Map | None:
    turned = _by_outputs(lambda e: pull(e.mT), size[::-1], own, like, tolerance)
    return None if turned is None or turned.inputs is None else Map(gradients=turned.inputs.mT)


def _random(size: Sequence[int], like: Tensor) -> Tensor:
    """Normal numbers that leave the user's random numbers alone."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    return torch.randn(*size, generator=generator, dtype=like.dtype, device=like.device)


@torch.no_grad()
def origins(edge: GradientEdge, leaf: Tensor) -> tuple[Tensor, ...] | None:
    """Of each number at a place of the graph, where it is in a leaf: an index tensor for each of the leaf's axes.

    None: the numbers are not the leaf's own, each at one place of it.

    >>> leaf = torch.ones(2, 3, requires_grad=True)
    >>> origins(torch.autograd.graph.get_gradient_edge(leaf[1].expand(2, 3)), leaf)[0]
    tensor([[1, 1, 1],
            [1, 1, 1]])
    >>> origins(torch.autograd.graph.get_gradient_edge(2 * leaf), leaf) is None
    True
    """
    axes = torch.meshgrid(*(torch.arange(size, device=leaf.device) for size in leaf.shape), indexing="ij")
    if edge.node is None or is_leaf(edge.node):
        return axes
    with torch.enable_grad():  # what pulls a gradient back is linear: its own gradient is the way there
        asked = torch.ones(shape_of(edge), device=leaf.device, requires_grad=True)
        pulled = _pulled(edge, asked, leaf)

    if not pulled.requires_grad:
        return None

    def there(numbers: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(pulled, asked, numbers.to(pulled), retain_graph=True)
        return found.long()

    result = []
    for axis, size in zip(axes, leaf.shape, strict=True):
        index = torch.zeros_like(asked, dtype=torch.long)
        for unit in (_EXACT**place for place in range(4) if _EXACT**place < size):
            index += there(axis // unit % _EXACT) * unit
        if bool((index >= size).any()):
            return None
        result.append(index)
    sample = _random(asked.shape, like=leaf.new_empty(0, dtype=torch.float32))
    placed = torch.zeros_like(leaf, dtype=torch.float32).index_put_(tuple(result), sample, accumulate=True)
    dtype = edge.node._input_metadata[edge.output_nr].dtype
    is_its_own = _alike(_pulled(edge, sample, leaf).float(), placed, max(_tolerance(torch.float32), _tolerance(dtype)))
    return tuple(result) if is_its_own else None


def _tolerance(dtype: torch.dtype) -> float:
    """Of a relative difference between what is the same but for rounding."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)


def _alike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


def _pulled(edge: GradientEdge, gradient: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of a leaf. The nodes are called one by one: the engine would call the hooks of the user's, too."""
    assert edge.node is not None
    nodes = nodes_of(edge)
    leading: set[Node] = set()
    for node in nodes:
        below = any(following in leading for following, _ in node.next_functions)
        if below or (is_leaf(node) and node.variable is leaf):  # type: ignore[attr-defined]
            leading.add(node)
    arrived: dict[Node, dict[int, Tensor]] = {edge.node: {edge.output_nr: gradient}}
    for node in reversed(nodes):
        if node not in leading or node not in arrived:
            continue
        if is_leaf(node):
            return arrived[node][0]
        given = [arrived[node].get(number) for number in range(len(node._input_metadata))]
        for (following, number), part in zip(node.next_functions, _called(node, given), strict=True):
            if following in leading and part is not None:
                described = following._input_metadata[number]
                part = part.sum_to_size(described.shape).to(described.dtype)  # as the engine has it
                held = arrived.setdefault(following, {})
                held[number] = part if number not in held else held[number] + part
    return torch.zeros_like(leaf)


def _called(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """What a node makes of the gradients of its outputs; one that is written in Python has another name for it."""
    result = node.apply(*gradients) if hasattr(node, "_forward_cls") else node(*gradients)
    return result if isinstance(result, tuple) else (result,)


def nodes_of(edge: GradientEdge) -> list[Node]:
    """The nodes that a place of the graph was computed by, each behind all that it leads to."""
    root = edge.node
    if root is None:
        return []
    result: list[Node] = []
    seen: set[Node] = {root}
    open_: list[tuple[Node, Iterator[Node]]] = [(root, _following(root))]
    while open_:
        node, rest = open_[-1]
        following = next(rest, None)
        if following is None:
            open_.pop()
            result.append(node)
        elif following not in seen:
            seen.add(following)
            open_.append((following, _following(following)))
    return result


def _following(node: Node) -> Iterator[Node]:
    return (following for following, _ in node.next_functions if following is not None)


def is_leaf(node: Node) -> bool:
    """Whether a node stands for a tensor that nothing computed."""
    return node.name() == "torch::autograd::AccumulateGrad"
