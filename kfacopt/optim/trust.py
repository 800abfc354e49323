"""How far the quadratic model can be trusted: the step that was taken against the step it promised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend, Settings
from kfacopt.capture.records import Replay
from kfacopt.layers.layer import Layer, by_layer
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.linalg.tensors import inner_product
from kfacopt.replay.loss_change import LossChange, loss_change, parts_of, reduction_ratio
from kfacopt.sharding import Processes

_LARGEST_RATIO = 8.0
"""Of `u·(f' - f)` to `gᵀδ`, beyond which u is held to be scaled.

Both are the loss's first-order change, the one with the predictions' true change and the other with their linear one:
they agree for short steps and differ by a small factor for long ones. A GradScaler's factor is 2^16 at first, and stays
far above 8; a loss scale below it that cannot be told is taken for the step's own."""


class Outcome(NamedTuple):
    """`rho`: reduction ratio, not a number where no reduction was promised; `divergence`: mean KL(before ‖ after).

    `comparable`: False where the user's gradient at the prediction is evidently scaled (a GradScaler) by a factor that
    the likelihood cannot tell.
    """

    rho: float
    divergence: float
    comparable: bool = True


def outcome_of_step(
    estimator: FisherEstimator,
    backend: CurvatureBackend,
    replays: Sequence[Replay],
    step: Mapping[nn.Parameter, Tensor],
    gradients: Mapping[nn.Parameter, Tensor],
    settings: Mapping[Layer, Settings],
    gradient_scale: float,
    processes: Processes,
) -> Outcome:
    """Reduction ratio `ρ = (L(θ + δ) - L(θ)) / (gᵀδ + ½ δᵀ(C + damping I)δ)` (Martens & Grosse 2015, section 6.5).

    Args:
        estimator: Of the likelihood and of the prediction in an output.
        backend: Multiplies with C.
        replays: The step's forwards.
        step: δ by parameter; the parameters hold θ + δ.
        gradients: g at θ, of the mean loss.
        settings: Each layer's damping at which the step was computed.
        gradient_scale: Brings the user's gradient at the prediction to that of the mean loss.
        processes: Those that train together: the loss is the mean of theirs.
    """
    own = loss_change(parts_of(replays, estimator, gradient_scale, processes), estimator)
    untold = float(any(replay.terms.weights is None for replay in replays))
    linear, divergence, untold = processes.mean([own.linear, own.divergence, untold])
    change = LossChange(linear, divergence)
    moved = [p for p in step if p in gradients]
    promised = inner_product([step[p] for p in moved], [gradients[p] for p in moved])
    if untold and promised < 0.0 and change.linear < _LARGEST_RATIO * promised:
        return Outcome(math.nan, change.divergence, comparable=False)
    moves = by_layer(settings, step)
    for layer, products in backend.multiply(moves).items():
        for role, product in products.items():
            delta = moves[layer][role]
            promised += 0.5 * float((delta * (product + settings[layer].damping * delta)).sum())
    return Outcome(reduction_ratio(change.total, promised), change.divergence)
