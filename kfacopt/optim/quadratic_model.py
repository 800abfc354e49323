"""Learning rate and momentum that minimise the exact quadratic model on the step's own batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.damping import LevenbergMarquardt
from kfacopt.estimator import FisherEstimator
from kfacopt.forwards import Replay
from kfacopt.linalg.tensors import inner_product
from kfacopt.linearization import BatchLinearization
from kfacopt.metric import Curvature, Metric
from kfacopt.optim import path


class QuadraticModel:
    """Chooses the step among `α Δ + μ δ₀`, Δ the preconditioned gradient and δ₀ the last step.

    The two numbers minimise `gᵀδ + ½ δᵀ(F + damping I)δ`, `F` the exact Gauss-Newton matrix of the step's own batches
    (Martens & Grosse 2015, sections 6.4 and 7): no learning rate and no momentum is to be tuned. It costs a forward
    and three to four backward passes; between two choices the last ones are used again. `damping` follows the
    reduction ratio of the loss on the same batches (section 6.5), from the curvature along the first direction; it is
    what bounds the step.

    Args:
        every: Steps between two choices.
        damping: Where the damping starts, over the mean curvature along the first direction.
        damping_rule: How it goes on; its `every` is in steps, and counts where a choice falls on them.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, every: int = 1, damping: float = 1.0, damping_rule: LevenbergMarquardt | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if not damping > 0.0:
            raise ValueError(f"damping must be positive, got {damping}")
        self.every = every
        self._initial = damping
        self._rule = LevenbergMarquardt(every=5 * every) if damping_rule is None else damping_rule
        self._damping = math.nan
        self._chosen = (0.0, 0.0)
        self._report: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the forwards of step `step` are needed."""
        return step % self.every == 0

    def updates(
        self,
        step: int,
        estimator: FisherEstimator,
        replays: Sequence[Replay],
        gradients: Mapping[nn.Parameter, Tensor],
        directions: Mapping[nn.Parameter, Tensor],
        state: MutableMapping[Any, Any],
        gradient_scale: float,
    ) -> dict[nn.Parameter, Tensor]:
        """What to subtract from each parameter of `directions`, at learning rate one.

        Args:
            step: Number of the step.
            estimator: Of the loss.
            replays: The step's forwards.
            gradients: Of the mean loss.
            directions: `(C + damping I)⁻¹ g` of the parameters with curvature.
            state: Of the optimizer; the last step is kept there.
            gradient_scale: Brings the user's gradient at the prediction to that of the mean loss.
        """
        parameters = list(directions)
        if not parameters:
            return {}
        candidates = [[-directions[p] for p in parameters]]
        if all("last_step" in state[p] for p in parameters):
            candidates.append([state[p]["last_step"] for p in parameters])
        if replays and self.due(step):
            g = [gradients[p] for p in parameters]
            linearization = BatchLinearization(parameters, replays, estimator, gradient_scale)
            linearization.match(g)
            self._choose(step, linearization, g, candidates)
        delta = _combined(candidates, self._chosen)
        for p, d in zip(parameters, delta, strict=True):
            state[p]["last_step"] = d
        return {p: -d for p, d in zip(parameters, delta, strict=True)}

    def health(self) -> dict[str, float]:
        """Numbers worth logging: both coefficients, the model's damping, the last reduction ratio."""
        return dict(self._report)

    def _choose(
        self,
        step: int,
        linearization: BatchLinearization,
        gradient: list[Tensor],
        candidates: list[list[Tensor]],
    ) -> None:
        metric = Metric(linearization, Curvature.GGN)
        rows = [linearization.jacobian(c) for c in candidates]
        curved = torch.tensor([[metric.inner(a, b) for b in rows] for a in rows], dtype=torch.float64)
        lengths = torch.tensor([[inner_product(a, b) for b in candidates] for a in candidates], dtype=torch.float64)
        slopes = torch.tensor([inner_product(gradient, c) for c in candidates], dtype=torch.float64)
        if not math.isfinite(self._damping):
            self._damping = self._initial * float(curved[0, 0] / lengths[0, 0].clamp_min(1e-300))
        model = curved + self._damping * lengths
        if not bool(model.isfinite().all() and slopes.isfinite().all()):
            self._chosen = (0.0, 0.0)
            return
        # Nearly parallel candidates make the model singular: the shortest solution then.
        scale = model.diagonal().clamp_min(1e-300).rsqrt()
        whitened = scale[:, None] * model * scale
        solution = -scale * (torch.linalg.pinv(whitened, rtol=1e-7, hermitian=True) @ (scale * slopes))
        divergence = float(solution @ curved @ solution)
        promised = float(slopes @ solution + 0.5 * solution @ model @ solution)
        alpha, *more = solution.tolist()
        self._chosen = (alpha, more[0] if more else 0.0)
        self._report = {"alpha": alpha, "mu": self._chosen[1], "model_damping": self._damping, "kl": 0.5 * divergence}
        if self._rule.due(step + self._rule.every - 1) and promised < 0.0:
            rho = path.loss_change(linearization, _combined(candidates, self._chosen)) / promised
            self._damping = self._rule.adjusted(self._damping, rho)
            self._report["rho"] = rho

    def state_dict(self) -> dict[str, Any]:
        """Plain Python."""
        return {"damping": self._damping, "chosen": list(self._chosen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._damping, self._chosen = float(state["damping"]), (float(state["chosen"][0]), float(state["chosen"][1]))


def step_rule_of(lr: float | Tensor | QuadraticModel | str) -> QuadraticModel | None:
    """The step rule that a learning rate stands for; None for a number.

    Raises:
        ValueError: If it is a string other than "auto".

    >>> step_rule_of("auto").every, step_rule_of(0.1)
    (1, None)
    """
    if isinstance(lr, QuadraticModel):
        return lr
    if isinstance(lr, str):
        if lr != "auto":
            raise ValueError(f"lr must be a number, 'auto' or a kfacopt.QuadraticModel, got {lr!r}")
        return QuadraticModel()
    return None


def _combined(candidates: Sequence[list[Tensor]], factors: tuple[float, float]) -> list[Tensor]:
    result = list(torch._foreach_mul(candidates[0], factors[0]))
    if len(candidates) > 1 and factors[1] != 0.0:
        torch._foreach_add_(result, candidates[1], alpha=factors[1])
    return result
