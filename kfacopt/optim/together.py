"""What the processes of a step agree on before anything moves: a step is taken by all of them, or by none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from kfacopt.capture.listener import Capture
from kfacopt.exchange import norms_of_shards
from kfacopt.fsdp import is_sharded
from kfacopt.layers.layer import Layer
from kfacopt.linalg.tensors import lengths
from kfacopt.optim.reached import Reached
from kfacopt.sharding import Processes, shard_of

_SAME = 1e-5
"""Relative distance up to which two processes' gradients are the same: rounding of a float32 sum on other hardware."""


@dataclass(frozen=True)
class Agreement:
    """What arrived since the last step, in all processes together.

    Attributes:
        finite: Whether all gradients are.
        passes: Curvature passes.
        terms: Loss terms, over the number of processes: gradients are averaged over them.
        replays: Whether some forward can be run again, and none that took part cannot.
        replayed_by_all: Whether each process has a forward to run again.
        in_the_loss: Whether a loss is of a derivative of the model.
        verified: Whether every gradient at a prediction was found to be that of the announced loss.
        rows: How many rows were delivered of each layer, by name.
        waiting: Whether any may have been (`Reached.waiting`).
        used_elsewhere: The layers that act on the loss outside their module, by name how.
        norms: Of the gradients, in their order, of sharded ones as wholes.
    """

    finite: bool = True
    passes: int = 0
    terms: float = 0.0
    replays: bool = False
    replayed_by_all: bool = False
    in_the_loss: bool = False
    verified: bool = True
    rows: Mapping[str, float] = field(default_factory=dict)
    waiting: bool = True
    used_elsewhere: Mapping[str, str] = field(default_factory=dict)
    norms: Sequence[float] | None = None


def agreed(
    processes: Processes,
    capture: Capture,
    layers: Sequence[Layer],
    reached: Reached,
    gradients: Mapping[nn.Parameter, Tensor],
    check: Callable[[], None],
    solves: bool,
) -> Agreement:
    """Settle what this process saw, and ask all of them.

    Args:
        processes: Those that train together.
        capture: Of this one.
        layers: The covered ones; the same in all processes.
        reached: What was delivered of them.
        gradients: Of the step.
        check: Raises an error if this process cannot take the step.
        solves: Whether the step goes where forwards that are run again say.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: If this process cannot take the step.
        RuntimeError: If another cannot, has other gradients, or no forward to run again where the step goes by them.
    """
    refusal = _settled(processes, capture, check)
    tally = capture.tally
    # What an engine shards it has averaged too: only of other gradients all processes have the same.
    held = list(gradients.values())
    own = lengths([shard_of(g) for g in held])
    parted = [norm for g, norm in zip(held, own, strict=True) if is_sharded(g)]
    whole = [norm for g, norm in zip(held, own, strict=True) if not is_sharded(g)] if parted else own
    size, sharded = sum(whole, 0.0), sum(parted, 0.0)
    elsewhere = {layer.name: how for layer, how in capture.passes.used_elsewhere.items()}
    table = processes.table(
        [
            float(refusal is not None),
            float(len(gradients)),
            size if math.isfinite(size) else math.inf,
            sharded if math.isfinite(sharded) else math.inf,
            float(tally.passes),
            float(tally.terms),
            float(len({id(replay.call) for replay in tally.replays})),
            float(tally.replayable),
            float(capture.derivatives.in_the_loss),
            float(tally.verified),
            float(len(elsewhere)),
            float(reached.waiting),
        ]
    )
    refused, counts, sizes, parts, *told = zip(*table, strict=True)
    passes, terms, replays, replayable, derived, verified, others, waiting = told
    if any(refused):
        processes.raise_together(refusal)
    finite = all(map(math.isfinite, (*sizes, *parts)))
    others_differ = all(map(math.isfinite, sizes)) and max(sizes) - min(sizes) > _SAME * max(sizes)
    if max(counts) > min(counts) or others_differ:
        raise RuntimeError(_OTHER_GRADIENTS)
    if solves and any(replays) and not all(replays):
        raise RuntimeError(_NOT_ALL_REPLAY)
    if max(others) > 0 and processes.size > 1:
        elsewhere = {name: how for seen_by_one in processes.gathered(elsewhere) for name, how in seen_by_one.items()}
    return Agreement(
        finite=finite,
        passes=int(sum(passes)),
        terms=sum(terms) / len(terms),
        # A sharded model's forward needs all processes.
        replays=any(replays) and all(replayable) and (not parted or max(replays) == min(replays)),
        replayed_by_all=min(replays) > 0.0,
        in_the_loss=any(derived),
        verified=all(verified),
        rows=_of_all(processes, layers, reached.rows) if any(passes) else dict(reached.rows),
        waiting=any(waiting),
        used_elsewhere=elsewhere,
        norms=norms_of_shards(processes, held, own) if parted and finite else own,
    )


def _of_all(processes: Processes, layers: Sequence[Layer], rows: Mapping[str, float]) -> dict[str, float]:
    """How many rows were delivered of each layer, by name, in all processes together."""
    if processes.size == 1 or not layers:
        return dict(rows)
    totals = processes.sum_vector([rows.get(layer.name, 0.0) for layer in layers])
    return {layer.name: total for layer, total in zip(layers, totals, strict=True) if total}


def _settled(processes: Processes, capture: Capture, check: Callable[[], None]) -> Exception | None:
    """Why this process cannot take the step: the others have to be told before it is raised."""
    try:
        check()
        capture.settle()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        if processes.size == 1:
            raise
        return error
    return None


_OTHER_GRADIENTS = (
    "the processes have different gradients, and their weights would drift apart: let an engine of torch's average "
    "them before the step, torch.nn.parallel.DistributedDataParallel around the model (and no step right after a "
    "backward in its no_sync()), or torch.distributed.fsdp.fully_shard of all of it"
)

_NOT_ALL_REPLAY = (
    "this step goes by forwards that are run again, but not every process had one with a loss since the last step: "
    "give each of them data in every step"
)
