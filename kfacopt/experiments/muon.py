"""Muon as a rival that is fast on a CPU, and Muon with AdamW as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring all singular values of a matrix near 1 by Newton-Schulz iteration.

    Each step replaces X by a X + (b X Xᵀ + c (X Xᵀ)²) X (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). torch's Muon does this in bfloat16, which is right for an accelerator; a
    CPU without bfloat16 instructions takes some twenty times as long as in float32, so there it is done in float32.

    Args:
        matrix: Any `[m n]`.
        coefficients: a, b, c.
        steps: How many.
        eps: The least norm that the matrix is divided by.

    Returns:
        The matrix U f(S) Vᵀ, with f(S) near 1, in float32 or bfloat16.
    """
    a, b, c = coefficients
    wide = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    if matrix.shape[0] > matrix.shape[1]:
        wide = wide.mT
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.addmm(wide, polynomial, wide, beta=a)
    return wide.mT if matrix.shape[0] > matrix.shape[1] else wide


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with its iteration in float32 on a CPU, see `orthogonalize`.

    Arguments, param groups and state are those of torch's class; so is every update, up to the rounding of bfloat16.
    Kernels of convolutions, which torch's class refuses, are matrices with a row for each output channel here.

    Args:
        params: Parameters of at least two dimensions, or param groups of them.
        options: Those of `torch.optim.Muon`.

    Raises:
        ValueError: A parameter is a vector.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        # torch's class checks the options, of one matrix that passes its other check, and completes them.
        defaults = torch.optim.Muon([torch.zeros(1, 1, requires_grad=True)], **options).defaults
        Optimizer.__init__(self, params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon is for matrices and kernels, got a parameter {tuple(parameter.shape)}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all matrices that have a gradient.

        Args:
            closure: Reevaluates the network and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        update = orthogonalize(direction.flatten(1), group["ns_coefficients"], group["ns_steps"], group["eps"])
        lr = float(group["lr"])
        rows, columns = update.shape
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1.0, rows / columns))
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype).reshape(parameter.shape), alpha=-lr * ratio)


_ALGORITHMS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {"muon": Muon, "adamw": AdamW}


class MuonAdamW(Optimizer):
    """Muon for some parameters and AdamW for others, as one optimizer.

    The arithmetic is that of `Muon` and of `torch.optim.AdamW`; here they only share param groups and state, so that
    schedulers, checkpoints and trainers see a single optimizer. A group's `algorithm`, `"muon"` or `"adamw"`, says who
    updates it; its other keys are those of the torch optimizer.

    Args:
        params: Param groups, each with an `algorithm`.

    Raises:
        ValueError: A group has no known `algorithm`, or Muon is given a vector.

    >>> from torch import nn
    >>> weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    >>> optimizer = MuonAdamW([
    ...     {"params": [weight], "algorithm": "muon", "lr": 0.02},
    ...     {"params": [bias], "algorithm": "adamw", "lr": 1e-3},
    ... ])
    >>> (weight.sum() + bias.sum()).backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[weight]), sorted(optimizer.state[bias])
    (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(params), {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which must say its `algorithm`; what else it lacks is torch's default."""
        algorithm = param_group.get("algorithm")
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"a param group of MuonAdamW needs algorithm='muon' or 'adamw', got {algorithm!r}")
        # The torch optimizer checks the group and completes it with its defaults.
        (checked,) = _ALGORITHMS[algorithm]([dict(param_group)]).param_groups
        super().add_param_group(checked)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Reevaluates the network and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, optimizer_type in _ALGORITHMS.items():
            groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if groups:
                # The optimizer is built anew for each step, around the very groups and state that this one owns: what a
                # scheduler or `load_state_dict` writes is always seen.
                optimizer = optimizer_type(groups)
                optimizer.state = self.state
                optimizer.step()
        return loss
