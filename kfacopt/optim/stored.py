"""State dicts that are damaged, or of another model, are refused by name before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.optim.groups import YOUNGER, Groups
from kfacopt.sharding import shard_of

_TOGETHER = (
    ("momentum_buffer", "momentum_weight"),
    ("exp_avg", "exp_avg_sq", "step"),
    *(tuple(f"{side}_{part}" for part in ("moment", "root", "weight", "moments")) for side in ("left", "right")),
)
"""What is remembered of a parameter is there as a whole, or not at all."""


def check_section(own: Mapping[str, Any] | None, key: str, what: str) -> None:
    """Refuse a `curvature` section of another kind of optimizer, or none.

    Args:
        own: The section.
        key: A key that tells the optimizer's section from another's; "": any is taken.
        what: The optimizer's class.

    Raises:
        KeyError: If so.

    >>> check_section({"solver": {}}, "backend", "KFAC")
    Traceback (most recent call last):
    KeyError: "this state dict has no 'curvature' section with 'backend': it is not one of a KFAC"
    """
    if key and (own is None or key not in own):
        raise KeyError(f"this state dict has no 'curvature' section with {key!r}: it is not one of a {what}")


def packed(state: Mapping[Any, Any], groups: Groups) -> dict[str, Any]:
    """An optimizer's state with parameters by number, as torch's `state_dict()` has it: no hook of that is called.

    >>> packed({}, [{"lr": 0.1, "params": [nn.Parameter(torch.ones(1))]}])
    {'state': {}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    """
    numbers = {p: number for number, p in enumerate(p for group in groups for p in group["params"])}
    return {
        "state": {numbers[p]: own for p, own in state.items() if p in numbers},
        "param_groups": [{**group, "params": [numbers[p] for p in group["params"]]} for group in groups],
    }


def check_stored(
    state_dict: Mapping[str, Any], here: Mapping[str, Any], groups: Groups, defaults: Mapping[str, Any]
) -> None:
    """Refuse a state dict with numbers that are none, things of another kind than here, or moments of another shape.

    Args:
        state_dict: What is to be loaded.
        here: The state dict of the optimizer that is to load it.
        groups: The param groups of that.
        defaults: Of its hyper-parameters.

    Raises:
        ValueError: If so, with the place within the state dict.

    >>> check_stored({"state": {0: {"exp_avg": torch.tensor([math.nan])}}, "param_groups": []}, {}, [], {})
    Traceback (most recent call last):
    ValueError: state/0/exp_avg holds numbers that are not finite
    """
    for section in ("state", "param_groups"):
        if section not in state_dict:
            raise ValueError(f"there is no {section!r}: it is not an optimizer's state dict, or a part of one")
    _check_values(state_dict, _called_alike(here, state_dict), "")
    # torch adds to the defaults on loading
    names = [name for name in defaults if groups and name in groups[0] and name not in YOUNGER]
    for number, group in enumerate(state_dict["param_groups"]):
        if missing := [name for name in (*names, "params") if name not in group]:
            raise ValueError(f"param_groups/{number} lacks {', '.join(map(repr, missing))}")
    places = [place for group in state_dict["param_groups"] for place in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    if len(places) == len(parameters):  # else torch says so
        for place, parameter in zip(places, parameters, strict=True):
            _check_memory(f"state/{place}", state_dict["state"].get(place, {}), parameter)


@contextmanager
def taken_over(what: str, undo: Callable[[], None]) -> Iterator[None]:
    """Within this context an optimizer takes a state dict over, or is as it was before.

    Args:
        what: The optimizer's class.
        undo: Makes it what it was.

    Raises:
        ValueError: Instead of what went wrong, with the optimizer's class; but for a lack of memory.
    """
    try:
        yield
    except Exception as error:
        undo()
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"this {what} cannot go on from this state dict: {said}") from error


def read(place: str, part: Any, *state: Any) -> None:
    """Let a part take its state over; whatever goes wrong is said to be at a place of the state dict.

    Args:
        place: Of the part's state.
        part: Has a `load_state_dict`.
        state: Its arguments.

    Raises:
        ValueError: Instead of what went wrong; but for a lack of memory.
    """
    try:
        part.load_state_dict(*state)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{place}: {said}") from error


def _called_alike(here: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """`here` with its parameters called as in the state dict, where that has names (`torch.distributed.checkpoint`)."""
    groups, own = state_dict["param_groups"], here.get("param_groups", [])
    lists = [group.get("params") for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    names = [name for held in lists if isinstance(held, list) for name in held]
    numbers = [number for group in own for number in group["params"]]
    if not names or not all(isinstance(name, str) for name in names) or len(names) != len(numbers):
        return here
    called = dict(zip(numbers, names, strict=True))
    if foreign := [key for key in state_dict["state"] if key not in names]:
        raise ValueError(f"state/{foreign[0]} is of none of the parameters that param_groups has")
    renamed = [{**group, "params": [called[number] for number in group["params"]]} for group in own]
    return {**here, "state": {called[n]: held for n, held in here["state"].items()}, "param_groups": renamed}


def _check_values(value: Any, here: Any, place: str) -> None:
    """Tensors have finite numbers only; plain numbers may be infinite (no bound), and NaN where they are here.

    Where there is something here, it is of the same kind; None is of any.
    """
    if value is not None and here is not None and _kind(value) != _kind(here):
        raise ValueError(f"{place} must be {_kind(here)}, got {_kind(value)} ({value!r:.40})")
    if isinstance(value, Mapping):
        if isinstance(here, Mapping) and any(isinstance(h, str) and value.get(key) != h for key, h in here.items()):
            here = None  # it says itself that it is of another kind: who takes it over says so better
        for key, held in value.items():
            within = here.get(key) if isinstance(here, Mapping) else None
            _check_values(held, within, f"{place}/{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        if isinstance(here, tuple) and len(value) != len(here):
            raise ValueError(f"{place} must have {len(here)} entries, got {len(value)}")
        for number, held in enumerate(value):
            within = here[number] if isinstance(here, (list, tuple)) and number < len(here) else None
            _check_values(held, within, f"{place}/{number}")
    elif isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and not bool(shard_of(value).isfinite().all()):
            raise ValueError(f"{place} holds numbers that are not finite")
        if isinstance(here, Tensor) and value.is_floating_point() != here.is_floating_point():
            raise ValueError(f"{place} must be of a dtype like {here.dtype}, got {value.dtype}")
        if isinstance(here, Tensor) and value.ndim != here.ndim:
            raise ValueError(f"{place} must have {here.ndim} axes, got the shape {list(value.shape)}")
    elif isinstance(value, float) and math.isnan(value) and not (isinstance(here, float) and math.isnan(here)):
        raise ValueError(f"{place} is not a number")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return "a number"
    return "a tensor" if isinstance(value, Tensor) else "text" if isinstance(value, str) else type(value).__name__


def _check_memory(place: str, own: Mapping[str, Any], parameter: nn.Parameter) -> None:
    for names in _TOGETHER:
        there = [name for name in names if name in own]
        if there and len(there) < len(names):
            lacking = next(name for name in names if name not in own)
            raise ValueError(f"{place} has {there[0]!r}, but lacks {lacking!r}")
    for name, value in own.items():
        shape = _moment_shape(name, parameter, value) if name in _OF_SIDES else _shape(name, parameter)
        if shape is None:
            continue
        numbers = "complex" if parameter.is_complex() and name != "step" else "floating-point"
        if not isinstance(value, Tensor) or not (
            value.is_complex() if numbers == "complex" else value.is_floating_point()
        ):
            raise ValueError(f"{place}/{name} must be a tensor of {numbers} numbers, got {_described(value)}")
        if value.shape != shape:
            raise ValueError(f"{place}/{name} has the shape {list(value.shape)}, but here it must have {list(shape)}")


_OF_SIDES = ("left_moment", "left_root", "right_moment", "right_root")


def _moment_shape(name: str, parameter: nn.Parameter, value: Any) -> torch.Size:
    """Of what is kept of one side of a matrix, or of each of its groups (`optim/step/gradient_metric.py`)."""
    groups = value.shape[:-2] if isinstance(value, Tensor) else torch.Size([])
    first, rest = (parameter.shape[0], parameter.shape[1:].numel()) if parameter.ndim else (1, 1)
    size = first // max(1, groups.numel()) if name.startswith("left") else rest
    return torch.Size([*groups, size, size])


def _shape(name: str, parameter: nn.Parameter) -> torch.Size | None:
    """Of what is remembered under a name; None: of any shape, or one that `check_remembered` knows."""
    if name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "last_step"):
        return parameter.shape
    if name == "step":
        return torch.Size([])
    return None


def check_remembered(
    state_dict: Mapping[str, Any], groups: Groups, remembered: Mapping[nn.Parameter, Mapping[str, Any]]
) -> None:
    """Refuse a state dict in which what a direction remembers has another shape than it would have here.

    Args:
        state_dict: What is to be loaded.
        groups: The param groups of the optimizer.
        remembered: By parameter, as it is before the first step.

    Raises:
        ValueError: If so, with the place within the state dict.
    """
    places = [place for group in state_dict["param_groups"] for place in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for place, parameter in zip(places, parameters, strict=False):  # of unlike many torch says so
        own = state_dict["state"].get(place, {})
        for name, blank in remembered.get(parameter, {}).items():
            if name not in own or not isinstance(blank, Tensor):
                continue
            value, where = own[name], f"state/{place}/{name}"
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise ValueError(f"{where} must be a tensor of floating-point numbers, got {_described(value)}")
            if value.shape != blank.shape:
                found, wanted = list(value.shape), list(blank.shape)
                raise ValueError(f"{where} has the shape {found}, but here it must have {wanted}")


def _described(value: Any) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else repr(value)
