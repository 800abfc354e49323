"""Whether a handler's rows have the axes that its matrix asks for: a misfit is named where it is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.layers.base import OneHot
from kfacopt.layers.layer import Layer
from kfacopt.layers.unformed import UnformedRows


def require_gradients_fit(layer: Layer, gradients: object, cotangents: int) -> None:
    """Of one call of a layer: `[v *k n s o]`, or `[v n s c]` of an elementwise layer.

    Args:
        layer: The layer, whose matrix is `[*k o i]` or `[c i]`.
        gradients: What `gradient_rows` returned.
        cotangents: v.

    Raises:
        TypeError: If that is no tensor.
        ValueError: If its axes are others.
    """
    *groups, outputs, _ = _matrix(layer)
    axes = "v n s c" if _elementwise(layer) else f"v {'k ' * len(groups)}n s o"
    wanted = [cotangents, *groups, None, None, outputs]
    _require(layer, "gradient_rows", gradients, axes, wanted)


def require_inputs_fit(layer: Layer, inputs: object) -> None:
    """Of one call of a layer: `[*k n s i]` or `OneHot`, or `[n s c i]` of an elementwise layer.

    Args:
        layer: The layer, whose matrix is `[*k o i]` or `[c i]`.
        inputs: What `input_rows` returned.

    Raises:
        TypeError: If that is neither a tensor nor `OneHot`.
        ValueError: If its axes are others.
    """
    *groups, outputs, columns = _matrix(layer)
    if isinstance(inputs, OneHot):
        if inputs.indices.ndim != 2 or inputs.size != columns:
            got = f"OneHot rows of indices {list(inputs.indices.shape)} and size {inputs.size}"
            raise ValueError(_misfit(layer, "input_rows", got, f"indices [n s] and size {columns}"))
    elif _elementwise(layer):
        _require(layer, "input_rows", inputs, "n s c i", [None, None, outputs, columns])
    else:
        _require(layer, "input_rows", inputs, f"{'k ' * len(groups)}n s i", [*groups, None, None, columns])


def require_rows_pair(layer: Layer, inputs: Tensor | OneHot | UnformedRows, gradients: Tensor) -> None:
    """Each row of the inputs has its own of the gradients: as many data n, as many places s.

    Raises:
        ValueError: If not.
    """
    if isinstance(inputs, OneHot):
        found = inputs.indices.shape
    else:
        found = inputs.shape[:2] if _elementwise(layer) else inputs.shape[-3:-1]
    if found != gradients.shape[-3:-1]:
        got = f"rows of n, s = {list(found)}, gradient_rows of {list(gradients.shape[-3:-1])}"
        raise ValueError(_misfit(layer, "input_rows", got, "the same n and s of both"))


def _matrix(layer: Layer) -> torch.Size:
    shape: torch.Size = layer.shape
    if len(shape) < 2 or (_elementwise(layer) and len(shape) > 2):
        wanted = "[c i]" if _elementwise(layer) else "[*k o i]"
        raise ValueError(
            f"{type(layer.handler).__name__}.pack gave a tensor of shape {list(shape)} for the module {layer.name!r} "
            f"({type(layer.modules[0]).__name__}), wanted {wanted}"
        )
    return shape


def _elementwise(layer: Layer) -> bool:
    return layer.handler.structure == "elementwise"


def _require(layer: Layer, method: str, rows: object, axes: str, wanted: Sequence[int | None]) -> None:
    """A None in `wanted` is any size. The words are made where they are needed: this runs with each capture."""
    shape = rows.shape if isinstance(rows, Tensor | UnformedRows) else None
    if (
        shape is not None
        and len(shape) == len(wanted)
        and all(w in (None, g) for w, g in zip(wanted, shape, strict=True))
    ):
        return
    sizes = ", ".join(f"{name} = {size}" for name, size in zip(axes.split(), wanted, strict=True) if size is not None)
    words = f"[{axes}] with {sizes}"
    if shape is None:
        raise TypeError(_misfit(layer, method, f"{type(rows).__name__}, no tensor", words))
    raise ValueError(_misfit(layer, method, f"rows of shape {list(shape)}", words))


def _misfit(layer: Layer, method: str, got: str, wanted: str) -> str:
    module = layer.modules[0]
    matrix: torch.Size = layer.shape
    return (
        f"{type(layer.handler).__name__}.{method} gave {got} for the module {layer.name!r} "
        f"({type(module).__name__}), wanted {wanted}: pack gives a matrix {list(matrix)}, whose gradient the rows sum "
        "to. Rows have the axis s even where there are no places (of size 1). Mend the handler with "
        "kfacopt.layers.check_handler(handler, module, input), or leave the module to AdamW by a param group with "
        "'curvature': False"
    )
