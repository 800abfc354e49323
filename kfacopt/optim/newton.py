"""Newton's method in a trust region, with the exact Hessian of a chain of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfacopt.capture.records import Replay
from kfacopt.fsdp import ShardedModel
from kfacopt.likelihoods import Likelihood
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.linalg.tensors import flat, split_like
from kfacopt.operators.chain.hessian import ChainHessian
from kfacopt.operators.chain.loss import AtOutput, OutputDerivatives, TermsLoss
from kfacopt.operators.chain.parse import elements_of
from kfacopt.optim.capturing import CapturingOptimizer
from kfacopt.optim.checks import check_model, check_processes
from kfacopt.optim.subproblem import Curvatures, ExactTrustRegion, GaussNewton, TrustRegionStrategy
from kfacopt.replay.loss_change import loss_change, parts_of, reduction_ratio
from kfacopt.sharding import unwrapped

DEFAULT_STRATEGIES = (GaussNewton(), ExactTrustRegion())
"""Gauss-Newton leads; where it stalls, the exact Hessian shows the way."""


class TrustRegionNewton(CapturingOptimizer):
    r"""Newton's method for an `nn.Sequential`, with exact curvature made safe by a trust region.

    With `g` the gradient of the batch's loss and `C` its Gauss-Newton matrix, or its exact and indefinite Hessian:

    .. code-block:: text

        d ← argmin gᵀd + ½ dᵀCd,  |d| ≤ radius
        ρ ← (L(θ + d) - L(θ)) / (gᵀd + ½ dᵀCd)            on the same batch
        ρ < ¼: radius ← |d| / 4;   ρ > ¾ and |d| ≈ radius: radius ← 2 radius
        θ ← θ + d  if the loss fell; else θ stays, bit for bit, and d is sought again in the smaller region

    The strategies are tried in turn: the next one where the one before was rejected at every attempt, or lowered the
    loss by less than `progress` of what the predictions leave to gain. By default Gauss-Newton leads, and where it
    stalls (near a saddle point it sees no way down) the exact Hessian's negative curvature is followed. Alone, the
    exact Hessian is slower, and with ReLU runs into kinks that its second derivatives do not see; the plain damped
    inverse `(H + damping I)⁻¹ g` is attracted by saddle points and is none of the strategies.

    For deep, narrow chains and small, fixed batches (see `ChainHessian` for what they cost and which layers fit). The
    loop is torch's: the batch and its targets are read from the forward and the backward before `step()`, and one more
    forward judges each step. There is no learning rate: the radius is the length of the step.

    Several processes under `torch.nn.parallel.DistributedDataParallel` take the step of one with all their data: inputs
    and derivatives at the predictions are gathered, and each factors the whole, in the time that one would take.

    Args:
        model: The chain, all of whose trainable parameters are trained.
        loss_func: The loss, as torch's module or a `kfacopt.Likelihood`; it is not called. Weights of
            a `MSELoss` in the loop are told only where the loop calls it, and refused otherwise.
        strategies: `GaussNewton()`, `ExactTrustRegion()`, `SaddleFree(rank=...)` or your own; one or several.
        radius: First radius, a length in the space of all parameters.
        largest_radius: Bound on it.
        attempts: Steps that each strategy tries in smaller and smaller regions.
        progress: See above; 0 goes on to the next strategy only after a rejection.

    Raises:
        TypeError, ValueError: A model that is no chain, a loss or an option that cannot be handled, by name.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> optimizer = TrustRegionNewton(model, nn.CrossEntropyLoss())
    >>> nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.arange(8) % 2).backward()
    >>> optimizer.step()
    >>> optimizer.health()["accepted"]
    1.0
    """

    _own_attributes = ("strategies",)

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module | Likelihood,
        strategies: TrustRegionStrategy | Sequence[TrustRegionStrategy] = DEFAULT_STRATEGIES,
        *,
        radius: float = 1.0,
        largest_radius: float = 1e3,
        attempts: int = 6,
        progress: float = 0.01,
    ) -> None:
        model, processes = unwrapped(model)
        check_model(model)
        self._sharded = ShardedModel(model)
        check_processes(processes, self._alone)
        elements_of(model, torch.float64)
        strategies = (strategies,) if isinstance(strategies, TrustRegionStrategy) else tuple(strategies)
        if not strategies or not all(isinstance(strategy, TrustRegionStrategy) for strategy in strategies):
            raise TypeError(
                f"strategies must be one or several TrustRegionStrategy objects such as GaussNewton() or "
                f"ExactTrustRegion(), got {strategies!r}"
            )
        if not 0.0 < radius <= largest_radius < math.inf:
            raise ValueError(f"0 < radius <= largest_radius must hold, got {radius} and {largest_radius}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        if not 0.0 <= progress < 1.0:
            raise ValueError(f"progress must lie in [0, 1), got {progress}")
        self.strategies = strategies
        defaults = {
            "radius": [radius] * len(strategies),
            "shift": [1e-3] * len(strategies),
            "largest_radius": largest_radius,
            "attempts": attempts,
            "progress": progress,
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model, FisherEstimator(loss_func), trained, defaults)

    @property
    def _fed(self) -> None:
        return None

    def _wants_replays(self) -> bool:
        return True

    def _alone(self) -> str | None:
        return f"{type(self).__name__} under fully_shard" if self._sharded else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refused but for the first: a trust region is one for all parameters.

        Raises:
            ValueError: If there is a group already.
        """
        if self.param_groups:
            raise ValueError("TrustRegionNewton has one param group: the trust region is one for all parameters")
        super().add_param_group(param_group)

    def health(self) -> dict[str, float]:
        """Numbers worth logging.

        Of the last step `accepted`, `attempts` and their `cost` (factorisations or products); of its last attempt
        `rho`, `radius`, `shift` and the place of its `strategy`; `skipped_steps` in all, as gradients were not finite.
        """
        return super().health()

    def _trained(self) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = self.param_groups[0]["params"]
        if [id(p) for p in parameters] != [id(p) for p in self.model.parameters() if p.requires_grad]:
            raise RuntimeError("which parameters are trainable has changed: make a new TrustRegionNewton")
        return parameters

    def _take_step(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Move the parameters, or leave them exactly as they are.

        Raises:
            RuntimeError: If not exactly one backward reached the model since the last step, or the gradients are not
                those of its loss alone.
        """
        parameters, group = self._trained(), self.param_groups[0]
        self._report |= {"accepted": 0.0, "attempts": 0.0, "cost": 0.0, "rho": math.nan}
        if not any(bool(g.any()) for g in gradients.values()):
            return
        replays = self._open_capture().tally.replays
        replay, undone = self._processes.together(lambda: _only(replays, self.model)), self._settle_scale()
        if len(gradients) < len(parameters):
            raise RuntimeError("a parameter of the chain has no gradient: call backward before step")
        gradient = flat([gradients[p].double() for p in parameters])
        # What the loop's loss counts a term, beside the weights that the terms have.
        scale = self._estimator.likelihood.term_share(float(replay.terms.count))
        scale = scale if replay.terms.weights is None else undone * scale
        own = TermsLoss(self._estimator.likelihood, replay.terms, undone * replay.gradient, scale)
        inputs, at_output = self._of_all(replay.call.inputs[0], own, replay.gradient.double())

        def make(kind: type[ChainHessian]) -> ChainHessian:
            return kind.at_output(self.model, at_output, inputs, tolerance=1e-3)

        curvatures, best = Curvatures(make), _Trial(0.0, None)
        before = [p.clone() for p in group["params"]]
        per_mean = self._estimator.likelihood.gradient_scale(self._agreed.terms)  # the loop's loss may be a sum
        for place, strategy in enumerate(self.strategies):
            curvature = strategy.curvature(curvatures)
            if place == 0:
                _check_gradient(curvature, gradient)
            trial = self._search(place, curvature, gradient, replay, before, per_mean)
            best = min(best, trial, key=lambda one: one.change)
            wanted = float(group["progress"]) * per_mean * curvature.output_decrement()
            if best.step is not None and -best.change >= wanted:
                break
        if best.step is not None:
            self._write(before, best.step)
            self._report["accepted"] = 1.0

    def _of_all(self, inputs: Tensor, own: AtOutput, like: Tensor) -> tuple[Tensor, AtOutput]:
        """The inputs of all processes, and the derivatives of the mean of their losses at the predictions.

        Args:
            inputs: Of this process, data first.
            own: Derivatives of its loss.
            like: Of the shape of its prediction, in the precision of the chain's operators.
        """
        processes = self._processes
        if processes.size == 1:
            return inputs, own
        counts = [int(count) for (count,) in processes.table([float(len(inputs))])]
        found = [processes.rows(part.contiguous(), counts) / processes.size for part in own(like)]
        return processes.rows(inputs.contiguous(), counts), lambda prediction: OutputDerivatives(*found)

    def _search(
        self,
        place: int,
        curvature: ChainHessian,
        gradient: Tensor,
        replay: Replay,
        before: list[Tensor],
        per_mean: float,
    ) -> _Trial:
        """The first step of a strategy that lowers the loss, in smaller and smaller regions; nothing stays written."""
        group, found = self.param_groups[0], _Trial(0.0, None)
        radii, shifts = list(group["radius"]), list(group["shift"])
        for _ in range(int(group["attempts"])):
            radius = radii[place]
            step, shifts[place], cost = self.strategies[place].propose(curvature, gradient, radius, shifts[place])
            promised = per_mean * float(step @ (gradient + 0.5 * (curvature @ step)))
            try:
                self._write(before, step)
                change = self._loss_change(replay)
            finally:
                for p, old in zip(group["params"], before, strict=True):
                    p.copy_(old)
            rho, length = reduction_ratio(change, promised), float(step.norm())
            # The textbook's numbers (Nocedal & Wright 2006, algorithm 4.1): a model that promised over four times the
            # gain is wrong at this length, one that is right to within a quarter may be trusted further out.
            # 0.7 says which steps the region cut short: a strategy may stop short of the boundary by its tolerance (0.2
            # by default). Above 0.8 such regions might not grow again; far below, steps that the region did not bind
            # would enlarge it, and one bad step would be rejected many times.
            if not rho >= 0.25:
                radii[place] = max(0.25 * min(length, radius), _SMALLEST_RADIUS)
            elif rho > 0.75 and length > 0.7 * radius:
                radii[place] = min(2.0 * radius, float(group["largest_radius"]))
            self._report["attempts"] += 1.0
            self._report["cost"] += float(cost)
            if change < 0.0:
                found = _Trial(change, step)
                break
        self._report |= {"rho": rho, "radius": radii[place], "shift": shifts[place], "strategy": float(place)}
        group["radius"], group["shift"] = radii, shifts
        return found

    def _write(self, before: list[Tensor], step: Tensor) -> None:
        for p, old, piece in zip(self.param_groups[0]["params"], before, split_like(step, before), strict=True):
            p.copy_(old + piece)

    def _loss_change(self, replay: Replay) -> float:
        """Of the mean loss; infinite where a prediction is not finite."""
        estimator = self._estimator
        scale = self._scaling.undone * estimator.likelihood.gradient_scale(self._agreed.terms)
        parts = parts_of([replay], estimator, scale, self._processes)
        return self._processes.mean([loss_change(parts, estimator).total])[0]


class _Trial(NamedTuple):
    """A step and the change of the mean loss that it made; None: none that lowers it."""

    change: float
    step: Tensor | None


_SMALLEST_RADIUS = 1e-10
"""Where the trust region stops shrinking: below, rounding decides what a step does."""


def _only(replays: list[Replay], model: nn.Module) -> Replay:
    """The one forward of a step.

    Raises:
        RuntimeError: If there is none, there are several, or it is not of the whole chain with one tensor.
    """
    if not replays:
        raise RuntimeError(
            "no backward has reached the model since the last step: TrustRegionNewton reads the batch from the forward "
            "and the backward before each step, with gradients enabled and through the model itself"
        )
    if len(replays) > 1:
        raise RuntimeError(
            f"{len(replays)} backwards have reached the model since the last step: TrustRegionNewton takes one batch a "
            f"step (no gradient accumulation); call zero_grad() after a backward that is not to count"
        )
    call = replays[0].call
    if call.module is not model or len(call.inputs) != 1 or call.kwargs or not isinstance(call.inputs[0], Tensor):
        raise RuntimeError(
            f"the forward was of {type(call.module).__name__} with {len(call.inputs)} arguments and {len(call.kwargs)} "
            f"keywords: TrustRegionNewton needs a call of the whole chain with one tensor"
        )
    return replays[0]


def _check_gradient(hessian: ChainHessian, gradient: Tensor) -> None:
    """Refuse gradients that are not of this loss on this batch.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    own = flat(hessian.gradient)
    difference = float((own - gradient).norm())
    if difference > 1e-2 * float(gradient.norm()):
        raise RuntimeError(
            f"the gradients in .grad are not those of the loss on the last batch (they differ by "
            f"{difference / float(gradient.norm()):.1%}): TrustRegionNewton takes no clipped or accumulated gradients, "
            f"and no penalty besides loss_func"
        )
