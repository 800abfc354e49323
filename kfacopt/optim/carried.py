"""Curvature in what `torch.distributed.checkpoint` carries of an optimizer: its `state` and its `param_groups`.

`get_optimizer_state_dict` drops any other section without a word, and a checkpoint is read into a state that must have
its keys and shapes beforehand. Curvature grows as training goes on, and is the same in all processes: it travels as
one value of the first param group, which needs no shape. What a parameter's own state lacks is zeros there.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, MutableMapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.fsdp import is_sharded
from kfacopt.optim.groups import Groups
from kfacopt.sharding import laid_out_as

KEY = "curvature_state"
_ASKS = "torch.distributed.checkpoint.state_dict"


def asked_by_checkpoint() -> bool:
    """Whether `get_optimizer_state_dict` or `set_optimizer_state_dict` of torch is who calls.

    >>> asked_by_checkpoint()
    False
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _ASKS:
            return True
        frame = frame.f_back
    return False


def pack(own: Mapping[str, Any]) -> bytes:
    """A section of a state dict as one value.

    >>> unpack(pack({"step": 3}))
    {'step': 3}
    """
    file = io.BytesIO()
    torch.save(dict(own), file)
    return file.getvalue()


def unpack(packed: bytes) -> dict[str, Any]:
    """What `pack` was given; its tensors lie on the CPU."""
    found: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return found


def announce(groups: Groups) -> None:
    """Leave the key in an optimizer's param groups: a flattened checkpoint is read by the keys that are there."""
    groups[0].setdefault(KEY, b"")


def allocate(groups: Groups, state: MutableMapping[Any, Any], blank: Mapping[nn.Parameter, dict[str, Any]]) -> None:
    """Give an optimizer that has no state yet the keys that a checkpoint is read into."""
    announce(groups)
    for parameter, values in blank.items():
        state[parameter] = values


def with_curvature(
    state_dict: dict[str, Any], groups: Groups, own: Mapping[str, Any], blank: Mapping[nn.Parameter, Mapping[str, Any]]
) -> dict[str, Any]:
    """Bring curvature into a state dict, and its parameters' states to the keys that they may have.

    Args:
        state_dict: torch's, with `state` by number; it is changed.
        groups: The optimizer's.
        own: The `curvature` section.
        blank: What a parameter's state is before anything was remembered.
    """
    announce(groups)
    state: MutableMapping[int, Any] = state_dict["state"]
    for number, parameter in enumerate(p for group in groups for p in group["params"]):
        if parameter in blank:
            state[number] = {**blank[parameter], **state.get(number, {})}
    state_dict["param_groups"][0][KEY] = pack(own)
    return state_dict


def curvature_of(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The curvature in a state dict, wherever it is: in a section of its own, or in the param groups.

    Raises:
        ValueError: If what the param groups have cannot be read.
    """
    groups = state_dict.get("param_groups")
    held = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list | tuple) else []
    for number, packed in enumerate(group.get(KEY) for group in held):
        if packed:
            try:
                return unpack(packed)
            except Exception as error:
                raise ValueError(f"param_groups/{number}/{KEY} of this state dict cannot be read: {error}") from error
    return state_dict.get("curvature")


def without_curvature(state_dict: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """The rest of a state dict.

    What it has of a parameter is laid out as the parameter is here: that of a whole model goes into a sharded one.

    Args:
        state_dict: torch's, with `state` by number, or by name as `torch.distributed.checkpoint` hands it over.
        groups: The optimizer's that is to take it over.

    Raises:
        ValueError: If it has one process's shards of what is whole here.
    """
    rest = {key: value for key, value in state_dict.items() if key != "curvature"}
    stored = [key for group in rest["param_groups"] for key in group["params"]]
    home = dict(zip(stored, (p for group in groups for p in group["params"]), strict=False))
    rest["state"] = {k: _laid_out(own, home[k]) if k in home else own for k, own in rest["state"].items()}
    rest["param_groups"] = [{k: v for k, v in group.items() if k != KEY} for group in rest["param_groups"]]
    return rest


def _laid_out(own: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    result = dict(own)
    for name, value in own.items():
        if not isinstance(value, Tensor) or is_sharded(value) == is_sharded(parameter):
            continue
        if is_sharded(value):
            raise ValueError(
                f"the state dict has one process's shards of a parameter's {name!r}, which is whole here: state_dict() "
                f"of a sharded model goes into one that is sharded alike. Use torch.distributed.checkpoint "
                f"(get_optimizer_state_dict) to go to another number of processes"
            )
        if value.shape == parameter.shape:
            result[name] = laid_out_as(value.to(parameter.device), parameter)
    return result
