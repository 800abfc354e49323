"""Learning rate and momentum that minimise the exact quadratic model on the step's own batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacopt.damping import LevenbergMarquardt
from kfacopt.likelihoods.fisher import Curvature
from kfacopt.linalg.tensors import inner_product
from kfacopt.optim.step.base import Direction, Step, StepLength, Updates
from kfacopt.optim.step.preconditioned import Preconditioned
from kfacopt.replay import path
from kfacopt.replay.loss_change import reduction_ratio
from kfacopt.replay.metric import Metric


class QuadraticModel(StepLength):
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

    shares_replays = True

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

    def direction(self) -> Direction:
        """The preconditioned gradient, without momentum: the last step is the model's own second direction."""
        return Preconditioned(momentum=None)

    def wants_replays(self, step: int) -> bool:
        return step % self.every == 0

    def scaled(self, step: Step, updates: Updates) -> Updates:
        """`α Δ + μ δ₀`, at learning rate one; the last step is kept in the optimizer's state."""
        parameters = list(updates.tensors)
        if not parameters:
            return updates
        candidates = [[-updates.tensors[p] for p in parameters]]
        if all("last_step" in step.state[p] for p in parameters):
            candidates.append([step.state[p]["last_step"] for p in parameters])
        if step.replays and self.wants_replays(step.number):
            gradient = [step.gradients[p] for p in parameters]
            metric = step.metric(parameters, Curvature.GGN)
            self._choose(step.number, metric, gradient, candidates, step.loss_factor)
        delta = _combined(candidates, self._chosen)
        for p, d in zip(parameters, delta, strict=True):
            step.state[p]["last_step"] = d
        return Updates({p: -d for p, d in zip(parameters, delta, strict=True)})

    def health(self) -> dict[str, float]:
        """Numbers worth logging: both coefficients, the model's damping, the last reduction ratio."""
        return dict(self._report)

    def _choose(
        self, step: int, metric: Metric, gradient: list[Tensor], candidates: list[list[Tensor]], factor: float
    ) -> None:
        """Minimise the model; the damping and the divergence are those of the loss without its `factor`."""
        linearization = metric.linearization
        rows = [linearization.jacobian(c) for c in candidates]
        curved = torch.tensor([[metric.inner(a, b) for b in rows] for a in rows], dtype=torch.float64)
        lengths = torch.tensor([[inner_product(a, b) for b in candidates] for a in candidates], dtype=torch.float64)
        slopes = torch.tensor([inner_product(gradient, c) for c in candidates], dtype=torch.float64)
        if not math.isfinite(self._damping):
            self._damping = self._initial * float(curved[0, 0] / lengths[0, 0].clamp_min(1e-300)) / factor
        model = curved + factor * self._damping * lengths
        if not bool(model.isfinite().all() and slopes.isfinite().all()):
            self._chosen = (0.0, 0.0)
            return
        # Nearly parallel candidates make the model singular: the shortest solution then.
        scale = model.diagonal().clamp_min(1e-300).rsqrt()
        whitened = scale[:, None] * model * scale
        solution = -scale * (torch.linalg.pinv(whitened, rtol=1e-7, hermitian=True) @ (scale * slopes))
        divergence = float(solution @ curved @ solution) / factor
        promised = float(slopes @ solution + 0.5 * solution @ model @ solution)
        alpha, *more = solution.tolist()
        self._chosen = (alpha, more[0] if more else 0.0)
        self._report = {"alpha": alpha, "mu": self._chosen[1], "model_damping": self._damping, "kl": 0.5 * divergence}
        if self._rule.due(step + self._rule.every - 1) and promised < 0.0:
            rho = reduction_ratio(path.loss_change(linearization, _combined(candidates, self._chosen)), promised)
            self._damping = self._rule.adjusted(self._damping, rho)
            self._report["rho"] = rho

    def state_dict(self) -> dict[str, Any]:
        """Plain Python."""
        return {"damping": self._damping, "chosen": list(self._chosen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._damping, self._chosen = float(state["damping"]), (float(state["chosen"][0]), float(state["chosen"][1]))


def _combined(candidates: Sequence[list[Tensor]], factors: tuple[float, float]) -> list[Tensor]:
    result = list(torch._foreach_mul(candidates[0], factors[0]))
    if len(candidates) > 1 and factors[1] != 0.0:
        torch._foreach_add_(result, candidates[1], alpha=factors[1])
    return result
