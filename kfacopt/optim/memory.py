"""What an optimizer remembers of each parameter: the running average of its gradient, or AdamW's moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.linalg.tensors import tensor_of_parts
from kfacopt.optim import rule
from kfacopt.optim.groups import Groups
from kfacopt.sharding import shard_of, shards

State = MutableMapping[Any, Any]
"""`torch.optim.Optimizer.state`: a dict for each parameter."""

Key = tuple[nn.Parameter, slice | None]
"""A parameter, or some rows of it."""


def averaged(
    groups: Groups,
    state: State,
    gradients: Mapping[nn.Parameter, Tensor],
    parameters: Collection[nn.Parameter],
    freshness: float = 1.0,
    resting: Collection[nn.Parameter] = frozenset(),
) -> dict[nn.Parameter, Tensor]:
    """Gradients with momentum of some parameters, of sharded ones this process's shards; the running averages move on.

    A new gradient weighs `freshness` times `1 - momentum`. Of those that rest the result is not asked.
    """
    covered = {id(p) for p in parameters if p in gradients}
    result: dict[nn.Parameter, Tensor] = {}
    for group in groups:
        momentum = max(0.0, 1.0 - freshness * (1.0 - float(group["momentum"])))
        by_weight: dict[float, tuple[list[nn.Parameter], list[Tensor]]] = {}
        for p in group["params"]:
            if id(p) in covered:
                own = state[p]
                held, buffers = by_weight.setdefault(_weight(own, p, momentum), ([], []))
                held.append(p)
                buffers.append(shard_of(own["momentum_buffer"]))
        for weight, (held, buffers) in by_weight.items():
            now = [shards(gradients, p) for p in held]
            asked = [n for n, p in enumerate(held) if p not in resting]
            means = rule.averaged_gradients(now, buffers, momentum=momentum, weight=weight, asked=asked)
            result |= dict(zip((held[n] for n in asked), means, strict=True))
    return result


def _weight(state: dict[str, Any], parameter: nn.Parameter, momentum: float) -> float:
    """Sum of the weights of the gradients in a parameter's running average; moves on by one gradient."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"], state["momentum_weight"] = torch.zeros_like(parameter), 0.0
    weight: float = state["momentum_weight"]
    state["momentum_weight"] = rule.next_weight(momentum, weight)
    return weight


def blank(parameter: nn.Parameter, averaged: bool) -> dict[str, Any]:
    """All that is remembered of a parameter, as nothing is: AdamW's moments, and the running average if it has one."""
    result: dict[str, Any] = {"step": torch.zeros(())}
    names = ["exp_avg", "exp_avg_sq", *(["momentum_buffer"] if averaged else [])]
    result |= {name: torch.zeros_like(parameter, requires_grad=False) for name in names}
    return result | ({"momentum_weight": 0.0} if averaged else {})


def without_blanks(state: State) -> None:
    """Forget what says nothing, as `blank` and `blank_row_squares` made it for a checkpoint."""
    for own in state.values():
        pairs = {"step": ("exp_avg", "exp_avg_sq"), "momentum_weight": ("momentum_buffer",)}
        pairs |= {key: (key.replace("weight", "squares", 1),) for key in own if key.startswith("row_weight")}
        for weight, values in pairs.items():
            if weight in own and float(own[weight]) == 0.0:
                for name in (weight, *values):
                    own.pop(name, None)


def blank_row_squares(key: Key, shape: Sequence[int]) -> dict[str, Any]:
    """A matrix' running mean squares of rows, as nothing is remembered of it: `shape` is `[*k o]`."""
    parameter, rows = key
    held, weight = _names_of(rows)
    return {held: torch.zeros(tuple(shape), dtype=parameter.dtype, device=parameter.device), weight: 0.0}


def _names_of(rows: slice | None) -> tuple[str, str]:
    """Under which names the running average of some rows, and the weight in it, are kept."""
    place = "" if rows is None else f"[{rows.start}:{rows.stop}]"
    return f"row_squares{place}", f"row_weight{place}"


def row_squares(
    state: State, keys: Sequence[Key], shapes: Sequence[torch.Size], squares: Tensor, decay: float
) -> Tensor:
    """Running averages of rows' mean squares, `[rows]`, of some parameters or their rows each; bias-corrected.

    The parameters, of one dtype, hold views of one tensor.

    Args:
        state: The optimizer's.
        keys: Whose rows are after each other in `squares`.
        shapes: Of each one's rows, `[*k o]`.
        squares: `[rows]`, of this step.
        decay: Of the running averages.
    """
    owns = [state[parameter] for parameter, _ in keys]
    names = [_names_of(rows) for _, rows in keys]
    held = [own[name] for own, (name, _) in zip(owns, names, strict=True) if name in own]
    whole = tensor_of_parts(held) if len(held) == len(keys) else None
    if whole is None:
        # In the parameter's dtype, which is what torch makes of it when a state is loaded.
        blanks = [own.get(n, squares.new_zeros(s)) for own, (n, _), s in zip(owns, names, shapes, strict=True)]
        whole = torch.cat([blank.flatten() for blank in blanks]).to(keys[0][0].dtype)
        parts = whole.split([shape.numel() for shape in shapes])
        for own, (name, _), part, shape in zip(owns, names, parts, shapes, strict=True):
            own[name] = part.view(shape)
    # A step that is not finite is skipped; what is remembered of it would make every later one so, too.
    squares = torch.where(squares.isfinite(), squares, whole.to(squares.dtype))
    whole.lerp_(squares.to(whole.dtype), 1.0 - decay)
    weights: list[float] = []
    for own, (_, name) in zip(owns, names, strict=True):
        own[name] = rule.next_weight(decay, own.get(name, 0.0))
        weights.append(own[name])
    if min(weights) == max(weights):
        return whole.to(squares.dtype) / weights[0]
    counts = torch.tensor([shape.numel() for shape in shapes], device=squares.device)
    return whole.to(squares.dtype) / squares.new_tensor(weights).repeat_interleave(counts)


def adamw_state(state: State, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's moments and step count of a parameter, zero at first; of a sharded one this process's shards."""
    own: dict[str, Tensor] = state[parameter]
    if "exp_avg" not in own:
        own["step"] = torch.zeros(())
        own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return {name: shard_of(own[name]) for name in ("step", "exp_avg", "exp_avg_sq")}
