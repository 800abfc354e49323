"""A step's write: what was decided of some parameters, AdamW's step for the others of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kfacopt.optim import groups, memory, rule
from kfacopt.optim.step import Updates
from kfacopt.sharding import shard_like, shard_of, shards


def descend(
    group: Mapping[str, Any],
    state: memory.State,
    gradients: Mapping[nn.Parameter, Tensor],
    updates: Updates,
    structures: Mapping[nn.Parameter, str],
) -> None:
    """Move the parameters of one param group; of sharded ones each process moves its shards.

    Args:
        group: With its hyper-parameters.
        state: The optimizer's.
        gradients: Of the step; parameters without one stay.
        updates: Of the parameters that do not take AdamW's step, whole.
        structures: Of layers that the direction leaves to AdamW, by parameter.
    """
    tensors, steps, rest, decayed = list[Tensor](), list[Tensor](), list[nn.Parameter](), dict[int, float]()
    for p in group["params"]:
        if (update := updates.tensors.get(p)) is None:
            rest += [p] if p in gradients and p not in updates.resting else []
            continue
        if updates.decays and (decay := updates.decays.get(p)) is not None:
            decayed[len(tensors)] = float(group["lr"]) * decay
        tensors.append(shard_of(p))
        steps.append(shard_like(update, p))
    rule.decay_cautiously([tensors[n] for n in decayed], [steps[n] for n in decayed], list(decayed.values()))
    rule.descend(
        tensors,
        steps,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        scale=updates.scale,
    )
    for rate, parts in _by_rate(group, rest, structures).items():
        rule.adamw_step(
            [shard_of(p) for p in parts],
            [shards(gradients, p) for p in parts],
            [memory.adamw_state(state, p) for p in parts],
            lr=rate,
            betas=group["adamw_betas"],
            eps=group["adamw_eps"],
            weight_decay=group["weight_decay"],
        )


def _by_rate(
    group: Mapping[str, Any], parameters: list[nn.Parameter], structures: Mapping[nn.Parameter, str]
) -> dict[float, list[nn.Parameter]]:
    """Parameters by AdamW's learning rate: embeddings have their own."""
    result: dict[float, list[nn.Parameter]] = {}
    rates = {False: groups.adamw_rate(group), True: groups.embedding_rate(group)}
    for parameter in parameters:
        result.setdefault(rates[structures.get(parameter) == "one-hot"], []).append(parameter)
    return result
