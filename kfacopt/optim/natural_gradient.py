"""Natural gradient descent with the curvature of the very batch, for problems where the best step pays most."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.backends.base import Settings
from kfacopt.backends.gram import Gram
from kfacopt.backends.preconditioner import Preconditioner
from kfacopt.backends.solver import Problem, Solver
from kfacopt.capture import Capture, without_autocast
from kfacopt.coverage import find_layers
from kfacopt.damping import LevenbergMarquardt
from kfacopt.estimator import LossFunction, TermsEstimator
from kfacopt.layers.layer import Layer
from kfacopt.linalg.tensors import inner_product
from kfacopt.linearization import BatchLinearization
from kfacopt.metric import Curvature, Metric
from kfacopt.optim import path, rule
from kfacopt.optim.acceleration import GeodesicAcceleration
from kfacopt.optim.base import Params
from kfacopt.optim.checks import check_model
from kfacopt.optim.line_search import GridLineSearch
from kfacopt.optim.replaying import ReplayingOptimizer, evaluated
from kfacopt.products import ProductRecorder


class NaturalGradient(ReplayingOptimizer):
    r"""Descends along `(C + damping I)⁻¹ g`, with `C` the curvature of the loss on the step's own batches.

    .. code-block:: text

        C ← GGN, Fisher or Hessian of the mean loss     of all forwards since the last step, run again as they were
        x ← (C + damping I)⁻¹ g                         by the solver, to its tolerance or exactly
        α ← lr, or the best of a grid of step sizes     by the loss on the same batches
        θ ← (1 - lr · weight_decay) θ - α x

    No closure is needed: hooks keep each forward's inputs, random state and autocast context, and what backward
    leaves at the prediction tells the targets. Buffers (running statistics) stay as they are. Every parameter of the
    model that has a gradient takes part, whatever its layer.

    A loss of several terms, as of a physics-informed network, is a dict: the model returns a dict of tensors, and
    `loss_func={"interior": nn.MSELoss(), "boundary": (10.0, nn.MSELoss())}` names the loss of each and its weight.

    Args:
        model: The model whose forward is called in training; hooks watch it until `close()`.
        loss_func: The loss, as torch's module or a `Likelihood`; or a dict of losses, each alone or `(weight, loss)`.
        params: torch's params or param groups, with `lr` and `weight_decay`; default: all of the model's.
        curvature: `"ggn"` (default), `"mc"`, `"empirical"` or `"hessian"` (`kfacopt.Curvature`).
        solver: `kfacopt.CG()` or `kfacopt.Gram()`; default: `Gram()`.
        lr: Learning rate: step size, or the unit of the line search's.
        damping: Added to the curvature of the mean loss, in its units.
        weight_decay: Decoupled.
        line_search: A `kfacopt.GridLineSearch`; default: the step size is `lr`.
        acceleration: A `kfacopt.GeodesicAcceleration`; default: steps are straight.
        damping_rule: A `kfacopt.LevenbergMarquardt` that adapts `damping`; default: it stays.
        mc_samples, seed: Of `curvature="mc"`: labels drawn for each loss term, and the generator's seed.
        prediction: `model output -> tensor`, for models whose output does not say which tensor the loss reads.

    Raises:
        TypeError, ValueError: A loss, parameter or option that cannot be handled, by name; nothing was changed then.

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

    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction,
        params: Params | None = None,
        *,
        curvature: Curvature | str = Curvature.GGN,
        solver: Solver | None = None,
        lr: float = 1.0,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        line_search: GridLineSearch | None = None,
        acceleration: GeodesicAcceleration | None = None,
        damping_rule: LevenbergMarquardt | None = None,
        mc_samples: int = 1,
        seed: int = 0,
        prediction: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.curvature = _curvature(curvature)
        self.solver = Gram() if solver is None else solver
        self.line_search, self.acceleration, self.damping_rule = line_search, acceleration, damping_rule
        self.solver.check(self.curvature)
        if mc_samples != 1 and self.curvature is not Curvature.MC:
            raise ValueError(
                f"mc_samples={mc_samples} has no meaning with curvature={self.curvature.value!r}: only 'mc'"
            )
        self._estimator = TermsEstimator(loss_func, mc_samples=mc_samples, seed=seed, prediction=prediction)
        if self.solver.backend is not None and "" not in self._estimator.likelihoods:
            raise ValueError("a preconditioner needs a single loss term, but loss_func is a dict: leave it out of CG()")
        self._layers: list[Layer] = []
        self._step, self._last_size, self._report = 0, 0.0, {"skipped_steps": 0.0}
        defaults = {"lr": lr, "damping": damping, "weight_decay": weight_decay}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._attach()

    def _attach(self) -> None:
        backend = self.solver.backend
        if backend is None:
            self._capture = Capture(self.model, [], self._estimator, _nothing, _nothing)
        else:
            wanted = [p for group in self.param_groups for p in group["params"]]
            self._layers, _ = find_layers(self.model, wanted, [], self._estimator.separate_weight_and_bias)
            backend.attach(self._layers)
            self._capture = Capture(self.model, self._layers, self._estimator, backend.update, backend.discard)
            self._capture.all_places = backend.all_places
        self._arm()

    def _arm(self) -> None:
        capture, backend = self._open_capture(), self.solver.backend
        capture.wants_rows = backend is not None and backend.wants_rows(self._step)
        capture.wants_terms = capture.wants_replays = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. All groups share one linear system and so one damping."""
        super().add_param_group(param_group)
        try:
            _check_groups(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # -- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: Evaluates the loss and calls `backward`, as for torch's optimizers; called once.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If no backward through the model has arrived since the last step, or a forward cannot be run
                again as it was.
        """
        loss = evaluated(closure)
        capture = self._open_capture()
        _check_groups(self.param_groups)
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not rule.all_finite(gradients):
            if self.solver.backend is not None:
                self.solver.backend.discard()
            self._report["skipped_steps"] += 1.0
        elif parameters:
            if not capture.tally.replays:
                raise RuntimeError(self._nothing_seen())
            with capture.paused(), without_autocast(gradients[0].device):
                self._take_step(parameters, gradients)
            self._step += 1
        capture.reset()
        self._arm()
        return loss

    def _take_step(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        tally, damping = self._open_capture().tally, float(self.param_groups[0]["damping"])
        scale = self._estimator.likelihood.gradient_scale(float(tally.terms))
        gradients = [g * scale for g in gradients] if scale != 1.0 else gradients
        recorder = ProductRecorder() if self.solver.records else None
        linearization = BatchLinearization(parameters, tally.replays, self._estimator, scale, recorder)
        linearization.match(gradients)
        problem = Problem(Metric(linearization, self.curvature), gradients, damping, self._preconditioner(parameters))
        solved = self.solver.solve(problem)
        if not rule.all_finite(solved.direction):
            self._report["skipped_steps"] += 1.0
            self._adapt(damping, math.nan)
            return
        damping = damping if solved.damping is None else solved.damping
        steps = [self._scaled(parameters, direction) for direction in (*solved.earlier, solved.direction)]
        step = path.backtracked(linearization, steps, solved.stats)
        bend = None
        if self.acceleration is not None and solved.again is not None:
            probe, limit = self.acceleration.probe * (self._last_size or 1.0), self.acceleration.limit
            bend = path.bend(linearization, step, solved.again, probe, math.inf if self.line_search else limit)
        length = self._length(linearization, step, bend)
        self._report |= {"damping": damping, "step_size": length} | solved.stats
        rho = self._write(problem, parameters, path.at(step, bend, length), damping)
        self._adapt(damping, rho)

    def _preconditioner(self, parameters: list[nn.Parameter]) -> Preconditioner | None:
        """The backend's solve with what this step's batches told it, or None."""
        backend, damping = self.solver.backend, float(self.param_groups[0]["damping"])
        if backend is None:
            return None
        settings = dict.fromkeys(self._layers, Settings(damping, _EMA_DECAY))
        backend.fold(self._step, settings)
        backend.refresh(self._step, settings)
        return Preconditioner(backend, settings, parameters)

    def _length(self, linearization: BatchLinearization, step: list[Tensor], bend: list[Tensor] | None) -> float:
        """How far to go along the path: 1, or the line search's choice."""
        if self.line_search is None:
            return 1.0

        def loss_change(size: float) -> float:
            return path.loss_change(linearization, path.at(step, bend, size))

        self._last_size = self.line_search.best(loss_change, self._last_size, self._step)
        return self._last_size

    def _scaled(self, parameters: list[nn.Parameter], direction: list[Tensor]) -> list[Tensor]:
        """The step of size one: minus the direction, times each group's learning rate."""
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        return [-rates[id(p)] * x for p, x in zip(parameters, direction, strict=True)]

    def _write(self, problem: Problem, parameters: list[nn.Parameter], step: list[Tensor], damping: float) -> float:
        """Move the parameters; the reduction ratio where the damping rule wants it."""
        judged = self.damping_rule is not None and self.damping_rule.due(self._step)
        promised = 0.0
        if judged:
            curved = inner_product(step, problem.metric.multiply(step)) + damping * inner_product(step, step)
            promised = inner_product(step, problem.gradient) + 0.5 * curved
        torch._foreach_add_(list(parameters), step)
        rho = problem.linearization.loss_change() / promised if judged and promised < 0.0 else math.nan
        for group in self.param_groups:
            decay = float(group["lr"]) * float(group["weight_decay"])
            present = [p for p in group["params"] if p.grad is not None]
            if decay > 0.0 and present:
                # What is decayed are the parameters before the step.
                by_id = {id(p): s for p, s in zip(parameters, step, strict=True)}
                torch._foreach_add_(present, [p - by_id[id(p)] for p in present], alpha=-decay)
        return rho

    def _adapt(self, damping: float, rho: float) -> None:
        if self.damping_rule is None:
            return
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
            f"itself (not a copy, and not only its parts), with gradients enabled, and zero_grad() before the forward"
        )

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, and `curvature`: tensors and plain Python only, resuming bit for bit."""
        result: dict[str, Any] = super().state_dict()
        result["curvature"] = {
            "solver": self.solver.state_dict(),
            "estimator": self._estimator.state_dict(),
            "step": self._step,
            "last_size": self._last_size,
            "skipped_steps": self._report["skipped_steps"],
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            KeyError: If it has no `curvature` section: it is another optimizer's.
        """
        if "curvature" not in state_dict or "solver" not in state_dict["curvature"]:
            raise KeyError("this state dict has no 'curvature' section with a solver: it is not a NaturalGradient's")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        own = state_dict["curvature"]
        self.solver.load_state_dict(own["solver"])
        self._estimator.load_state_dict(own["estimator"], next(self.model.parameters()).device)
        self._step, self._last_size = int(own["step"]), float(own["last_size"])
        self._report["skipped_steps"] = float(own["skipped_steps"])
        self._open_capture().reset()

    def __getstate__(self) -> dict[str, Any]:
        own = ["model", "curvature", "solver", "line_search", "acceleration", "damping_rule"]
        own += ["_estimator", "_step", "_last_size", "_report", "_layers"]
        state: dict[str, Any] = super().__getstate__()
        return state | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, without it
            self._capture = None
            self._attach()


_EMA_DECAY = 0.8
"""Of a preconditioner's statistics."""


def _nothing(*_: Any) -> None:
    """No layer is captured, so nothing is delivered."""


def _curvature(value: Curvature | str) -> Curvature:
    try:
        return Curvature(value)
    except ValueError:
        known = ", ".join(repr(member.value) for member in Curvature)
        raise ValueError(f"curvature must be one of {known}, got {value!r}") from None


def _check_groups(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for name in ("lr", "damping", "weight_decay"):
            try:
                value = float(group[name])
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"{name} must be one number, got {group[name]!r}") from None
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must lie in [0, inf), got {value}")
        if float(group["damping"]) == 0.0:
            raise ValueError("damping must be positive: directions that no datum excites have no curvature")
    dampings = {float(group["damping"]) for group in groups}
    if len(dampings) > 1:
        raise ValueError(f"all parameters share one linear system, but param groups have the dampings {dampings}")
