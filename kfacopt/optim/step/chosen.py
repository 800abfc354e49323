"""Which direction and which step length an optimizer's arguments stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from kfacopt.backends.base import CurvatureBackend
from kfacopt.damping import RELATIVE_DAMPING, RelativeDamping
from kfacopt.optim.groups import with_own_decay, with_plain_damping
from kfacopt.optim.step.base import Direction, StepLength
from kfacopt.optim.step.grafted import Grafted
from kfacopt.optim.step.preconditioned import Preconditioned
from kfacopt.optim.step.quadratic_model import QuadraticModel
from kfacopt.optim.step.rescaled import ClippedGradients
from kfacopt.optim.step.spectral import Spectral
from kfacopt.optim.step.trust_region import TrustRegion
from kfacopt.schedules import SPECTRAL_FACTOR_EVERY, SPECTRAL_REFRESH_EVERY

Rate = float | Tensor | QuadraticModel | Literal["auto"] | None
"""A learning rate; or who chooses it; None: what fits the step length."""
Bound = float | None | Literal["grafted"]
"""On the Kullback-Leibler divergence; None: there is none; "grafted": none, as each layer's step has a fixed length."""

GRAFTED_RATE = 0.04
"""Default learning rate of steps whose length is fixed layer by layer: by how much a step moves each output."""
BOUNDED_RATE = 0.3
"""Default learning rate of a natural gradient that something else bounds."""


class Numbers(NamedTuple):
    """What goes with a direction where its user says nothing else."""

    momentum: float
    damping: RelativeDamping
    adamw_lr: float


NATURAL = Numbers(0.9, RELATIVE_DAMPING, 1e-3)
"""Of the natural gradient."""

SPECTRAL = Numbers(0.95, RelativeDamping(0.5), 1e-2)
"""Of the spectral step. Half of a factor's mean eigenvalue: directions that matter are to be divided by their own
curvature, and the length is not the damping's to bound. From a twenty-fifth of it to twice of it a character model
trained alike."""


def of_spectral_step(kind: Callable[..., CurvatureBackend]) -> Callable[..., CurvatureBackend]:
    """A kind of backend as the spectral step has it by default: the curvature's half power, on schedules of its own."""
    return partial(kind, factor_every=SPECTRAL_FACTOR_EVERY, refresh_every=SPECTRAL_REFRESH_EVERY, exponent=0.5)


class Chosen(NamedTuple):
    """The two decisions of a step, its rate and momentum, and which numbers go with them."""

    rate: float | Tensor
    momentum: float
    direction: Direction
    step_length: StepLength
    usual: Numbers

    def defaults(
        self,
        damping: float | RelativeDamping | None,
        ema_decay: float,
        adamw_lr: float | None,
        weight_decay: float | None,
        bounds: TrustRegion,
    ) -> dict[str, Any]:
        """The hyper-parameters of the step, as torch's param groups have them.

        Args:
            damping: None: what goes with the step; so with `adamw_lr` and `weight_decay`.
            ema_decay: Of the statistics.
            adamw_lr: AdamW's learning rate where there is no curvature.
            weight_decay: Of all parameters.
            bounds: On the step's length.
        """
        defaults = with_plain_damping({"damping": self.usual.damping if damping is None else damping}) | {
            "lr": self.rate,
            "momentum": self.momentum,
            "weight_decay": 0.0,
            "ema_decay": ema_decay,
            **bounds.defaults(),
            "adamw_lr": self.usual.adamw_lr if adamw_lr is None else adamw_lr,
            "adamw_betas": (0.9, 0.999),
            "adamw_eps": 1e-8,
            "curvature": True,
            **self.direction.defaults(),
            **self.step_length.defaults(),
        }
        return defaults | ({} if weight_decay is None else with_own_decay({"weight_decay": weight_decay}, defaults))


def chosen(
    lr: Rate,
    momentum: float | None,
    kl_clip: Bound,
    relative_clip: float | None,
    direction: Direction | None,
    step_length: StepLength | None,
    spectral: bool,
) -> Chosen:
    """The parts that an optimizer's arguments of these names stand for.

    Args:
        spectral: Whether the step is the spectral one, which won on most tasks, where the others say nothing of where
            it goes or how far.

    Raises:
        ValueError: If they contradict each other, or are none.

    >>> chosen(None, None, "grafted", None, None, None, spectral=False).direction
    Grafted(Preconditioned(momentum=0.9), length_of=layer_length)
    >>> chosen(0.1, None, "grafted", None, None, None, spectral=True).momentum
    0.95
    >>> chosen(None, None, 0.03, None, None, None, spectral=True)[:3]
    (0.3, 0.9, Preconditioned(momentum=0.9))
    """
    if isinstance(kl_clip, str) and kl_clip != "grafted":
        raise ValueError(f"kl_clip must be a number, None for no bound, or 'grafted', got {kl_clip!r}")
    if isinstance(lr, str):
        if lr != "auto":
            raise ValueError(f"lr must be a number, 'auto' or a kfacopt.QuadraticModel, got {lr!r}")
        lr = QuadraticModel()
    if isinstance(lr, QuadraticModel):
        if step_length is not None:
            raise ValueError("lr='auto' chooses the step length itself: leave step_length out, or give lr a number")
        step_length = lr
        lr = 1.0
    grafted = kl_clip == "grafted" and step_length is None
    if isinstance(step_length, QuadraticModel):
        lr = 1.0
    elif lr is None:
        lr = GRAFTED_RATE if grafted else BOUNDED_RATE
    length = step_length or TrustRegion(None if isinstance(kl_clip, str) else kl_clip, relative_clip)
    usual = SPECTRAL if spectral and grafted and direction is None else NATURAL
    momentum = usual.momentum if momentum is None else momentum
    if direction is None and usual is SPECTRAL:
        direction = ClippedGradients(Spectral(momentum))
    elif direction is None:
        own = length.direction() or Preconditioned(momentum)
        direction = Grafted(own) if grafted else own
    return Chosen(lr, momentum, direction, length, usual)
