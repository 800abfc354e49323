"""What an optimizer remembers of each parameter: the running average of its gradient, or AdamW's moments."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.layers.layer import Layer
from kfacopt.optim import rule
from kfacopt.optim.groups import Groups

State = MutableMapping[Any, Any]
"""`torch.optim.Optimizer.state`: a dict for each parameter."""


def averaged(
    groups: Groups, state: State, gradients: Mapping[nn.Parameter, Tensor], layers: Sequence[Layer]
) -> dict[nn.Parameter, Tensor]:
    """Gradients with momentum of the parameters that have curvature; the running averages move on."""
    covered = {id(p) for layer in layers for p in layer.parameters.values()}
    result: dict[nn.Parameter, Tensor] = {}
    for group in groups:
        by_age: dict[int, list[nn.Parameter]] = {}
        for p in group["params"]:
            if p in gradients and id(p) in covered:
                by_age.setdefault(_age(state[p], p), []).append(p)
        for age, held in by_age.items():
            means = rule.averaged_gradients(
                [gradients[p] for p in held],
                [state[p]["momentum_buffer"] for p in held],
                momentum=float(group["momentum"]),
                step=age,
            )
            result |= dict(zip(held, means, strict=True))
    return result


def _age(state: dict[str, Any], parameter: nn.Parameter) -> int:
    """How many gradients a parameter's momentum has seen; counts one more."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"], state["momentum_steps"] = torch.zeros_like(parameter), 0
    age: int = state["momentum_steps"]
    state["momentum_steps"] = age + 1
    return age


def adamw_state(state: State, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's moments and step count of a parameter, zero at first."""
    own: dict[str, Tensor] = state[parameter]
    if "exp_avg" not in own:
        own["step"] = torch.zeros(())
        own["exp_avg"], own["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return own
