"""A step's write: what was decided of some parameters, AdamW's step for the others of a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kfacopt.optim import groups, memory, rule
from kfacopt.optim.step import Updates
from kfacopt.sharding import shard_like, shard_of, shards


def descend(
    group: Mapping[str, Any], state: memory.State, gradients: Mapping[nn.Parameter, Tensor], updates: Updates
) -> None:
    """Move the parameters of one param group; of sharded ones each process moves its shards.

    Args:
        group: With its hyper-parameters.
        state: The optimizer's.
        gradients: Of the step; parameters without one stay.
        updates: Of the parameters that do not take AdamW's step, whole.
    """
    moved = {p: (shard_of(p), shard_like(updates.tensors[p], p)) for p in group["params"] if p in updates.tensors}
    rest = [p for p in group["params"] if p in gradients and p not in updates.tensors]
    if decayed := [p for p in moved if p in updates.decays]:
        tensors, steps = zip(*(moved[p] for p in decayed), strict=True)
        rule.decay_cautiously(tensors, steps, [float(group["lr"]) * updates.decays[p] for p in decayed])
    rule.descend(
        [tensor for tensor, _ in moved.values()],
        [step for _, step in moved.values()],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        scale=updates.scale,
    )
    rule.adamw_step(
        [shard_of(p) for p in rest],
        [shards(gradients, p) for p in rest],
        [memory.adamw_state(state, p) for p in rest],
        lr=groups.adamw_rate(group),
        betas=group["adamw_betas"],
        eps=group["adamw_eps"],
        weight_decay=group["weight_decay"],
    )
