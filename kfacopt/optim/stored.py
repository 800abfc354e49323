"""State dicts that are damaged, or of another model, are refused by name before anything is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_TOGETHER = (("momentum_buffer", "momentum_weight"), ("exp_avg", "exp_avg_sq", "step"))
"""What is remembered of a parameter is there as a whole, or not at all."""


def check_stored(state_dict: Mapping[str, Any], parameters: Sequence[nn.Parameter], names: Collection[str]) -> None:
    """Refuse a state dict with numbers that are none, hyper-parameters that are missing, or moments of another shape.

    Args:
        state_dict: What is to be loaded.
        parameters: Of all param groups, in order.
        names: The hyper-parameters of a group.

    Raises:
        ValueError: If so, with the place within the state dict.

    >>> check_stored({"state": {0: {"exp_avg": torch.tensor([math.nan])}}, "param_groups": []}, [], [])
    Traceback (most recent call last):
    ValueError: state/0/exp_avg holds numbers that are not finite
    """
    for section in ("state", "param_groups"):
        if section not in state_dict:
            raise ValueError(f"there is no {section!r}: it is not an optimizer's state dict, or a part of one")
    _check_numbers(state_dict, "")
    for number, group in enumerate(state_dict["param_groups"]):
        if missing := [name for name in names if name not in group]:
            raise ValueError(f"param_groups/{number} lacks {', '.join(map(repr, missing))}")
    places = [place for group in state_dict["param_groups"] for place in group["params"]]
    if len(places) == len(parameters):  # else torch says so
        for place, parameter in zip(places, parameters, strict=True):
            _check_memory(f"state/{place}", state_dict["state"].get(place, {}), parameter)


def _check_numbers(value: Any, place: str) -> None:
    """A tensor has finite numbers only; a plain number may be infinite (no bound), but not NaN."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            _check_numbers(held, f"{place}/{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for number, held in enumerate(value):
            _check_numbers(held, f"{place}/{number}")
    elif isinstance(value, Tensor):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{place} holds numbers that are not finite")
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{place} is not a number")


def _check_memory(place: str, own: Mapping[str, Any], parameter: nn.Parameter) -> None:
    for names in _TOGETHER:
        there = [name for name in names if name in own]
        if there and len(there) < len(names):
            lacking = next(name for name in names if name not in own)
            raise ValueError(f"{place} has {there[0]!r}, but lacks {lacking!r}")
    for name, value in own.items():
        shape = _shape(name, parameter)
        if shape is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{place}/{name} must be a tensor of floating-point numbers, got {_described(value)}")
        found = torch.Size([value.numel()]) if name.startswith("row_squares") else value.shape  # there in groups
        if found != shape:
            raise ValueError(f"{place}/{name} has the shape {list(value.shape)}, but here it must have {list(shape)}")


def _shape(name: str, parameter: nn.Parameter) -> torch.Size | None:
    """Of what is remembered under a name; of squares of rows the number of rows. None: of any shape."""
    if name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        return parameter.shape
    if name.startswith("row_squares") and parameter.ndim > 0:
        rows = re.fullmatch(r"row_squares\[(\d+):(\d+)\]", name)
        return torch.Size([int(rows[2]) - int(rows[1]) if rows else parameter.shape[0]])
    return None


def _described(value: Any) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else repr(value)
