"""Modules that hold several layers without calling them as modules, such as the projections of an attention module.

A hook on such a module sees one call; what its layers multiplied is in the autograd graph of the output. A
`CompoundHandler` names the parts, and finds their products there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from kfacopt.layers.base import LayerHandler
from kfacopt.layers.registry import RefusedHandler
from kfacopt.likelihoods.estimator import tensors_of


@dataclass(frozen=True, eq=False)
class Part:
    """A layer within a module, which is no module itself or is never called.

    Args:
        name: Where the layer would be, had it been a module of its own (`"q_proj"`).
        what: What it is, as a phrase for `coverage()`.
        compound: The handler of the module.
        handler: Brings what `CompoundHandler.calls` found to rows, and the parameters to a matrix and back.
        paths: Where the module holds its parameters, by the name that `handler` gives them
            (`{"weight": "out_proj.weight"}`).
        rows: By the same names, which rows of a parameter are its own; left out: all.
        needs_weight: Whether a bias is seen only with a weight that trains.
        held: What its rows take for constant although the parameters move it, so that they do not sum to the gradient;
            "": nothing.
        sought: Whether only a forward shows if it is a layer; where none does, that is no mistake of the user's.
    """

    name: str
    what: str
    compound: CompoundHandler
    handler: LayerHandler
    paths: Mapping[str, str]
    rows: Mapping[str, slice] = field(default_factory=dict)
    needs_weight: bool = True
    held: str = ""
    sought: bool = False

    def parameter(self, module: nn.Module, role: str) -> Tensor | None:
        """What `module` holds for `role` at present; None if that is no parameter (computed from others, removed)."""
        *owners, name = self.paths[role].split(".")
        holder: nn.Module | None = module
        for owner in owners:
            holder = None if holder is None else holder._modules.get(owner)
        return None if holder is None else holder._parameters.get(name)

    def label(self, role: str) -> str:
        """The parameter's name, with the rows that are the part's.

        >>> from kfacopt.layers import handler_for
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> [part.label("weight") for part in handler_for(attention).parts(attention)]
        ['in_proj_weight[0:4]', 'in_proj_weight[4:8]', 'in_proj_weight[8:12]', 'weight']
        """
        name, rows = self.paths[role].removeprefix(f"{self.name}."), self.rows.get(role)
        return name if rows is None else f"{name}[{rows.start}:{rows.stop}]"


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module, right after it.

    Args:
        inputs: Positional inputs.
        kwargs: Keyword inputs.
        output: What the forward returned, with its graph.
        above: The nodes that made the inputs: the graph ends there.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    above: Collection[Node] = ()

    @property
    def data(self) -> int:
        """How many the call was of: the length of the first tensor."""
        return next((len(x) for x in tensors_of((self.inputs, self.kwargs)) if x.ndim), 1)


def saves_elsewhere() -> bool:
    """Whether what the graph saves is kept by somebody's hooks: to read it now would run a checkpoint's forward again,
    in the middle of it.

    >>> saves_elsewhere()
    False
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@dataclass(frozen=True, eq=False)
class PartCall:
    """What a part did in one call of its module, as though it had been called itself.

    Args:
        inputs: What its handler is to be told were the inputs of the call.
        shape: Of its output, `[n s o]`.
        edges: Where the gradients that its own is made of arrive in the graph.
        arrange: Makes of what arrived at the edges, each `[v ...]` (None where nothing did), the gradient of the part's
            output, `[v n s o]`.
    """

    inputs: tuple[Any, ...]
    shape: torch.Size
    edges: tuple[GradientEdge, ...]
    arrange: Callable[[Sequence[Tensor | None]], Tensor]


class CompoundHandler(RefusedHandler):
    """What a module has to say that is made of several layers which no module hook sees.

    It has no rows itself. A parameter of one of its modules is in parts that together hold each row of it once, or in
    none.
    """

    reads_parameters: ClassVar[bool] = False
    """Whether rows are computed from the module's parameters, which the handler asks `kfacopt.fsdp.whole_copy` for."""

    def refusal(self, module: nn.Module) -> str | None:
        return None

    @abstractmethod
    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """The layers that `module` is made of; parameters that do not exist are left out."""

    @abstractmethod
    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        """What the parts did in a call of `module`, by name.

        A part that cannot be found there is left out: it has no rows then, which the optimizer says.
        """
