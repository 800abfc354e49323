"""The matrices of torch's layers, for steps that need a matrix but no curvature of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from kfacopt.layers.coverage import CoverageRow, places_of, retreated

USED_ELSEWHERE = "used outside its module too (F.linear of its weight, or a derivative of the model)"
DIFFERENTIATED = "a derivative of the model is taken in its forward, which the calls do not show"
RECOMPUTED = (
    "torch.utils.checkpoint with use_reentrant=True lies between it and the loss, through which torch lets no "
    "curvature pass; use_reentrant=False saves as much memory"
)
"""Why a layer has no curvature, in the table of coverage."""


class PlainMatrix(NamedTuple):
    """A parameter that multiplies inputs by a matrix.

    Attributes:
        shape: `[*k o i]`, k groups of matrices.
        differentiated: Whether derivatives of the model are taken in its forward.
    """

    shape: tuple[int, ...]
    differentiated: bool


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


def plain_matrices(model: nn.Module, parameters: Collection[nn.Parameter]) -> dict[nn.Parameter, tuple[int, ...]]:
    """Of some parameters those that multiply inputs by a matrix, with its shape `[*k o i]`, k groups of them.

    Linear layers, convolutions, attention's projections and the gates of recurrent layers; no biases, embeddings or
    normalisations, and nothing of modules that are not torch's own, whose parameters may be anything.

    Args:
        model: Holds them.
        parameters: Which to look at.

    >>> held = nn.MultiheadAttention(4, 2)
    >>> [shape for shape in plain_matrices(held, list(held.parameters())).values()]
    [(3, 4, 4), (4, 4)]
    """
    wanted = {id(p) for p in parameters}
    found: dict[nn.Parameter, tuple[int, ...]] = {}
    unclear: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in wanted:
                continue
            shape = _matrix(module, name, parameter)
            if shape is None or found.setdefault(parameter, shape) != shape:
                unclear.add(parameter)  # of several modules, too, all have to mean the same
    return {parameter: shape for parameter, shape in found.items() if parameter not in unclear}


def _matrix(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[int, ...] | None:
    """The shape of a module's parameter as a matrix; None: it is none, or not known to be."""
    shape = tuple(parameter.shape)
    if parameter.is_complex():
        return None
    if isinstance(module, nn.Linear) and name == "weight":
        return shape
    if isinstance(module, _CONVOLUTIONS) and name == "weight":
        outputs, inputs = shape[0] // module.groups, parameter[0].numel()
        return (outputs, inputs) if module.groups == 1 else (module.groups, outputs, inputs)
    if isinstance(module, nn.MultiheadAttention) and name.endswith("_proj_weight"):
        return (3, shape[0] // 3, shape[1]) if name == "in_proj_weight" else shape
    if isinstance(module, _RECURRENT) and name.startswith("weight_"):
        size = module.hidden_size if not name.startswith("weight_hr") else shape[0]
        return shape if shape[0] == size else (shape[0] // size, size, shape[1])
    return None


def plain_matrices_in(
    rows: Sequence[CoverageRow], model: nn.Module, parameters: Collection[nn.Parameter], treatment: str
) -> tuple[dict[nn.Parameter, PlainMatrix], list[CoverageRow]]:
    """Of some parameters the plain matrices that stand in the table of coverage by themselves; the table with them.

    What stands there by a layer that is refused, or lost its partner, is not among them: it trains as is said there.

    Args:
        rows: Of the parameters without curvature.
        model: Holds them.
        parameters: Which to look at.
        treatment: Of the plain matrices, from now on.
    """
    listed = {(row.module, name): row.why for row in rows for name in row.parameters}
    places = {key: {(path, name) for path, _, name in held} for key, held in places_of(model).items()}
    found: dict[nn.Parameter, PlainMatrix] = {}
    for parameter, shape in plain_matrices(model, parameters).items():
        whys = [listed[place] for place in places[id(parameter)] if place in listed]
        if whys:
            found[parameter] = PlainMatrix(shape, DIFFERENTIATED in whys)
    return found, retreated(rows, set().union(*(places[id(p)] for p in found)), treatment)
