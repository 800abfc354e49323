"""Natural gradient descent with the curvature of the very batch, for problems where the best step pays most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend, Settings
from kfacopt.damping import LevenbergMarquardt
from kfacopt.likelihoods.estimator import LossFunction, TermsEstimator
from kfacopt.likelihoods.fisher import Curvature, Fisher
from kfacopt.linalg.tensors import all_finite, inner_product
from kfacopt.optim import deprecated
from kfacopt.optim.capturing import CapturingOptimizer, Params
from kfacopt.optim.checks import check_group, check_known
from kfacopt.optim.step import GridLineSearch, Step, Updates
from kfacopt.optim.step.acceleration import GeodesicAcceleration
from kfacopt.optim.step.solved import Solves
from kfacopt.optim.stored import read
from kfacopt.replay.loss_change import reduction_ratio
from kfacopt.replay.recorder import ProductRecorder
from kfacopt.solvers.base import Solver
from kfacopt.solvers.gram import Gram


class NaturalGradient(CapturingOptimizer):
    r"""Descends along `(C + damping I)⁻¹ g`, with `C` the curvature of the loss on the step's own batches.

    .. code-block:: text

        C ← GGN, Fisher or Hessian of the mean loss     of all forwards since the last step, run again as they were
        x ← (C + damping I)⁻¹ g                         by the solver, to its tolerance or exactly
        α ← lr, or the best of a grid of step sizes     by the loss on the same batches
        θ ← (1 - lr · weight_decay) θ - α x

    No closure is needed: hooks keep each forward's inputs, random state and autocast context, and what backward
    leaves at the prediction tells the targets. Buffers (running statistics) stay as they are. Every parameter of the
    model that has a gradient takes part, whatever its layer.

    A constant factor of the loss and weights of its data are in the curvature as in the gradient, as far as they are
    told (see `SecondOrderOptimizer`); a loss whose value contradicts that there is none that is not told is refused.

    Several processes under `torch.nn.parallel.DistributedDataParallel` take one step together, of all their data: each
    needs some in every step.

    A loss of several terms, as of a physics-informed network, is a dict: the model returns a dict of tensors, and
    `loss_func={"interior": nn.MSELoss(), "boundary": (10.0, nn.MSELoss())}` names the loss of each and its weight.

    Args:
        model: The model whose forward is called in training; hooks watch it until `close()`.
        loss_func: The loss, as torch's module or a `Likelihood`; or a dict of losses, each alone or `(weight, loss)`.
        params: torch's params or param groups, with `lr` and `weight_decay`; default: all of the model's.
        curvature: `"ggn"` (default), `"mc"`, `"empirical"`, `"hessian"`, or a `kfacopt.Fisher`.
        solver: `kfacopt.CG()` or `kfacopt.Gram()`; default: `Gram()`.
        lr: Learning rate: step size, or the unit of the line search's.
        damping: Added to the curvature of the mean loss, in its units.
        weight_decay: Decoupled.
        line_search: A `kfacopt.GridLineSearch`; default: the step size is `lr`.
        acceleration: A `kfacopt.GeodesicAcceleration`; default: steps are straight.
        damping_rule: A `kfacopt.LevenbergMarquardt` that adapts `damping`; default: it stays.
        prediction: `model output -> tensor`, where the loss is taken of several tensors of the output, of which one is
            to have curvature; else the loss tells.
        extra_terms: See `SecondOrderOptimizer`.

    Raises:
        TypeError, ValueError: A loss, parameter or option that cannot be handled, by name; nothing was changed then.
        RuntimeError: In `step`, a loss with weights or a factor that cannot be told. Of several processes, with a
            solver of one's own that does not say `shares_replays`, or parameters sharded by `fully_shard`.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = NaturalGradient(model, torch.nn.MSELoss(), damping=1e-6)
    >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
    >>> torch.nn.functional.mse_loss(model(x), y).backward()
    >>> optimizer.step()  # a linear model: this is the least squares solution
    >>> optimizer.zero_grad()
    >>> torch.nn.functional.mse_loss(model(x), y).backward()
    >>> bool(model.weight.grad.abs().max() < 1e-4)
    True
    """

    _own_attributes = ("fisher", "solver", "line_search", "damping_rule", "direction")
    _own_state_key = "solver"
    _takes_complex = False

    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction,
        params: Params | None = None,
        *,
        curvature: Fisher | str = "ggn",
        solver: Solver | None = None,
        lr: float = 1.0,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        line_search: GridLineSearch | None = None,
        acceleration: GeodesicAcceleration | None = None,
        damping_rule: LevenbergMarquardt | None = None,
        prediction: Callable[[Any], Tensor] | None = None,
        extra_terms: bool = False,
        **old: Any,
    ) -> None:
        self.fisher = deprecated.fisher_of(type(self), curvature, old)
        self.solver = Gram() if solver is None else solver
        self.solver.check(self.fisher.kind)
        self.line_search, self.damping_rule = line_search, damping_rule
        self.direction = Solves(self.solver, self.fisher.kind, acceleration, line_search)
        # A preconditioner's statistics are sampled, whatever the curvature is.
        sampled = Fisher("mc", self.fisher.samples, self.fisher.seed)
        empirical = self.fisher.kind is Curvature.EMPIRICAL and self.solver.backend is None
        estimator = TermsEstimator(
            loss_func, fisher=sampled, prediction=prediction, extra_terms=extra_terms, any_loss=empirical
        )
        needs = {"line_search": line_search, "acceleration": acceleration, "damping_rule": damping_rule}
        check_known(estimator.likelihoods.values(), {name: part is not None for name, part in needs.items()})
        if self.fisher.kind is Curvature.HESSIAN and not all(x.is_hessian for x in estimator.likelihoods.values()):
            raise ValueError(
                f"curvature='hessian': what stands for the Hessian of {list(estimator.likelihoods.values())} at the "
                f"prediction is the Fisher information (the loss' own is zero, or depends on the target): use 'ggn'"
            )
        if self.solver.backend is not None and "" not in estimator.likelihoods:
            raise ValueError("a preconditioner needs a single loss term, but loss_func is a dict: leave it out of CG()")
        super().__init__(model, estimator, params, {"lr": lr, "damping": damping, "weight_decay": weight_decay})

    @property
    def _fed(self) -> CurvatureBackend | None:
        return self.solver.backend

    def _wants_replays(self) -> bool:
        return True

    def _alone(self) -> str | None:
        if self._sharded or not self.solver.shares_replays:
            under = " under fully_shard" if self._sharded else ""
            return f"{type(self).__name__} with {type(self.solver).__name__}{under}"
        return None

    def _wants_terms(self) -> bool:
        return True

    def _check_groups(self) -> None:
        """All groups share one linear system and so one damping."""
        for group in self.param_groups:
            check_group(group)
        dampings = {float(group["damping"]) for group in self.param_groups}
        if len(dampings) > 1:
            raise ValueError(f"all parameters share one linear system, but param groups have the dampings {dampings}")

    # -- the step --------------------------------------------------------------------------------------------------

    def _take_step(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        self._check_groups()
        tally = self._open_capture().tally
        if not self._agreed.replayed_by_all:
            if any(bool(g.any()) for g in gradients.values()):
                raise RuntimeError(self._nothing_seen())
            return
        undone = self._settle_scale()
        scale = self._estimator.likelihood.gradient_scale(self._agreed.terms)
        gradients = {p: g * scale for p, g in gradients.items()} if scale != 1.0 else gradients
        step = Step(
            self._step,
            gradients,
            self._layers,
            self.solver.backend,
            dict.fromkeys(self._layers, Settings(float(self.param_groups[0]["damping"]), _EMA_DECAY)),
            self.param_groups,
            self.state,
            self._estimator,
            tally.replays,
            scale * undone,
            ProductRecorder() if self.solver.records else None,
            processes=self._processes,
        )
        updates = self.direction.updates(step)
        if not all_finite(list(updates.tensors.values())):
            self._report["skipped_steps"] += 1.0
            self._adapt(math.nan)
            return
        if self.line_search is not None:
            updates = self.line_search.scaled(step, updates)
        self._report |= {"damping": self.direction.damping, "step_size": updates.scale} | self.direction.health()
        self._adapt(self._write(step, updates))

    def _write(self, step: Step, updates: Updates) -> float:
        """Move the parameters; the reduction ratio where the damping rule wants it."""
        parameters, delta = list(updates.tensors), step.displacement(updates)
        linearization, promised = step.linearization(parameters), 0.0
        judged = self.damping_rule is not None and self.damping_rule.due(self._step)
        if judged:
            metric, gradient = step.metric(parameters, self.fisher.kind), [step.gradients[p] for p in parameters]
            curved = inner_product(delta, metric.multiply(delta)) + self.direction.damping * inner_product(delta, delta)
            promised = inner_product(delta, gradient) + 0.5 * curved
        before = [p.clone() for p in parameters] if any(g["weight_decay"] for g in self.param_groups) else []
        torch._foreach_add_(list[Tensor](parameters), delta)
        rho = reduction_ratio(linearization.loss_change(), promised) if judged else math.nan
        self._decay(dict(zip(parameters, before, strict=False)))
        return rho

    def _decay(self, before: Mapping[nn.Parameter, Tensor]) -> None:
        """Decoupled weight decay of the parameters as they were before the step."""
        for group in self.param_groups:
            rate = float(group["lr"]) * float(group["weight_decay"])
            present = [p for p in group["params"] if p in before]
            if rate > 0.0 and present:
                torch._foreach_add_(present, [before[p] for p in present], alpha=-rate)

    def _adapt(self, rho: float) -> None:
        if self.damping_rule is None:
            return
        damping = self.direction.damping
        if self.damping_rule.due(self._step):
            self._report["rho"] = rho
            damping = self.damping_rule.adjusted(damping, rho)
        for group in self.param_groups:
            group["damping"] = damping

    def _nothing_seen(self) -> str:
        names = [name for name in self._estimator.likelihoods if name]
        wanted = f" with the outputs {names}" if names else ""
        return (
            f"no forward of the model{wanted} followed by a backward has arrived since the last step: call the model "
            f"itself (not a copy, and not only its parts), with gradients enabled, and zero_grad() before the forward. "
            f"Where the loss is of derivatives of the model, let a module take them and return the residual, and give "
            f"the optimizer that"
        )

    # -- state -----------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        search = {} if self.line_search is None else self.line_search.state_dict()
        return super()._own_state() | {
            "solver": self.solver.state_dict(),
            "step_length": search,
        }

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        read("curvature/solver", self.solver, own["solver"])
        super()._load_own_state(own)
        if self.line_search is not None:
            # Before 0.2 the line search's state was one number.
            found = own.get("step_length") or {"last": own.get("last_size")}
            read("curvature/step_length", self.line_search, found)


_EMA_DECAY = 0.8
"""Of a preconditioner's statistics."""
