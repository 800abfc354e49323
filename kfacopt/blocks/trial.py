"""Whether a stored state is one that a block can go on from: tried on a copy, before anything is taken over."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfacopt.blocks.base import Block
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.layer import Layer


@torch.no_grad()
def misfit(block: Block, state: Mapping[str, Any], layer: Layer) -> str | None:
    """Why a block of a layer cannot go on from a stored state; None if it can.

    A copy takes the state over, solves, and is fed a datum of zeros: what is missing, or has another shape or dtype
    than the rows of the layer, shows there instead of some steps later.

    >>> from kfacopt.blocks import KroneckerBlock
    >>> from kfacopt.layers import handler_for
    >>> module = torch.nn.Linear(3, 2)
    >>> layer = Layer("head", (module,), handler_for(module), dict(module.named_parameters()))
    >>> misfit(KroneckerBlock(), KroneckerBlock().state_dict(), layer)
    >>> misfit(KroneckerBlock(), {"averages": {}}, layer)
    "it lacks 'input_factor'"
    """
    trial = copy.deepcopy(block)
    nothing = _zeros(layer)
    try:
        trial.load_state_dict(dict(state), nothing.device)
        if trial.ready and trial.solve(nothing, 1.0).shape != nothing.shape:
            return "its cache solves for matrices of another shape"
        groups = nothing.shape[:-2]  # an axis of one would pass for any number of them
        for name, held in trial.cache().items():
            if held is not None and not (held.is_floating_point() and held.shape[: len(groups)] == groups):
                return f"{name} is {held.dtype} {list(held.shape)}"
        stored = [(name, a.value, a.pending) for name, a in trial.averages().items()]
        trial.discard()
        trial.update(_nothing_seen(layer, nothing))
        fresh = {name: average.pending for name, average in trial.averages().items()}
        for name, *tensors in stored:
            for there, here in ((tensor, fresh[name]) for tensor in tensors if tensor is not None):
                if here is not None and (there.shape, there.dtype) != (here.shape, here.dtype):
                    found, wanted = (f"{t.dtype} {list(t.shape)}" for t in (there, here))
                    return f"{name} is {found}, where the layer's rows make {wanted}"
    except KeyError as error:
        return f"it lacks {error}"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return str(error).splitlines()[0]
    return None


def _zeros(layer: Layer) -> Tensor:
    """Of the layer's matrix, in the statistics' dtype; shards of its parameters are not gathered."""
    held = list(layer.parameters.values())
    dtype = functools.reduce(torch.promote_types, [p.dtype for p in held], torch.float32)
    return torch.zeros(layer.shape, dtype=dtype, device=held[0].device)


def _nothing_seen(layer: Layer, matrix: Tensor) -> Rows:
    """Rows of one datum at one place, all zero."""
    terms, structure = matrix.new_ones(()), layer.handler.structure
    if structure == "elementwise":
        return Rows(matrix[None, None], matrix.new_zeros(1, 1, 1, matrix.shape[0]), terms)
    groups, outputs, inputs = matrix.shape[:-2], matrix.shape[-2], matrix.shape[-1]
    gradients = matrix.new_zeros(1, *groups, 1, 1, outputs)
    if structure == "outer":
        return Rows(matrix.new_zeros(*groups, 1, 1, inputs), gradients, terms)
    first = OneHot(torch.zeros(1, 1, dtype=torch.long, device=matrix.device), inputs)
    if structure == "one-hot":
        return Rows(first, gradients, terms)
    head = Rows(matrix.new_zeros(1, 1, outputs), matrix.new_zeros(1, 1, 1, inputs), terms)
    return Rows(first, gradients, terms, transposed=head)
