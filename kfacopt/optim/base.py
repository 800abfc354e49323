"""The step: a `torch.optim.Optimizer` that holds a curvature backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend
from kfacopt.capture import Capture, without_autocast
from kfacopt.coverage import Coverage, CoverageRow, covered_rows, find_layers
from kfacopt.damping import RELATIVE_DAMPING, LevenbergMarquardt, RelativeDamping
from kfacopt.estimator import CurvatureOptions, FisherEstimator
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import Likelihood
from kfacopt.optim import groups, memory, rule, step_length
from kfacopt.optim.checks import check_group, check_model
from kfacopt.optim.quadratic_model import QuadraticModel, step_rule_of
from kfacopt.optim.replaying import evaluated
from kfacopt.optim.trust import outcome_of_step

Params = Iterable[Any]


class SecondOrderOptimizer(torch.optim.Optimizer):
    r"""Preconditioned gradient descent with momentum, weight decay and a trust region, on any curvature backend.

    With `g` the gradient in `.grad`, `C` the backend's curvature of the mean loss:

    .. code-block:: text

        m ← momentum · m + (1 - momentum) g           bias-corrected, with Nesterov's look-ahead
        u ← (C + damping I)⁻¹ m                       layer by layer, or as the backend will
        ν ← min(1, sqrt(kl_clip / Σ lr² uᵀm))         one number for all layers, lr before any schedule
        θ ← (1 - lr · weight_decay) θ - lr · ν u

    Parameters without curvature (see `coverage`) are updated by AdamW with learning rate `adamw_lr`, which follows
    `lr` in proportion when a scheduler changes it; in a param group with `"curvature": False` AdamW's rate is `lr`.

    What a step does in the cases nobody plans:

    - No backward reached the model since the last step: the last curvature is used again. If there has been none at
      all, a RuntimeError says so and nothing changes.
    - A parameter has no gradient: it is left alone; its layer's other parameters take AdamW's step.
    - A gradient is not finite: the step is skipped as a whole, statistics included, and counted (`health()`).
    - Training or evaluation mode makes no difference: what counts is a backward, so validation is never captured.

    Args:
        model: The model whose parameters are trained; hooks watch every module of it until `close()`.
        loss_func: The loss, as torch's module (`CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`) or a `Likelihood`.
            It is not called: the loop may use the functional form.
        backend: The curvature.
        params: torch's params or param groups; default: all of the model's. A group may set any of `lr`, `damping`,
            `momentum`, `weight_decay`, `ema_decay`, `adamw_lr`, and `curvature` (False: AdamW with the group's `lr`).
        lr: Learning rate; a float or a tensor without axes. Or `"auto"`, or a `kfacopt.QuadraticModel`: learning rate
            and momentum minimise the exact quadratic model in each step, and `momentum`, `kl_clip` and
            `relative_clip` are not used. (`lr` is then 1, for schedules to multiply.)
        damping: Added to the curvature of the mean loss, in its units; or a `kfacopt.RelativeDamping`, which follows
            each layer's mean eigenvalue and so fits losses and models of any scale (a group's `"damping"` is then its
            factor, as long as the group's `"relative_damping"` is True).
        momentum: Of the gradient, before it is preconditioned.
        weight_decay: Decoupled.
        ema_decay: Decay of the statistics' running averages, for each update of them.
        kl_clip: Bound on `lr² uᵀ m`, twice the step's Kullback-Leibler divergence, with the `lr` before any schedule
            (so that a schedule shortens clipped steps too); `None`: no bound. The first group's counts.
        relative_clip: Bound on the length of each layer's step over that of its parameters, with the `lr` before any
            schedule; `None`: no bound.
        adamw_lr: AdamW's learning rate where there is no curvature.
        damping_rule: A `kfacopt.LevenbergMarquardt` that adapts `damping`; default: it stays.
        curvature: See `kfacopt.CurvatureOptions`.

    Raises:
        TypeError, ValueError: A loss, parameter or option that cannot be handled, by name; nothing was changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module | Likelihood,
        backend: CurvatureBackend,
        params: Params | None = None,
        *,
        lr: float | Tensor | QuadraticModel | Literal["auto"] = 0.3,
        damping: float | RelativeDamping = RELATIVE_DAMPING,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema_decay: float = 0.8,
        kl_clip: float | None = 0.03,
        relative_clip: float | None = None,
        adamw_lr: float = 1e-3,
        damping_rule: LevenbergMarquardt | None = None,
        **curvature: Unpack[CurvatureOptions],
    ) -> None:
        check_model(model)
        self.model = model
        self.backend = backend
        self.damping_rule = damping_rule
        self.step_rule = step_rule_of(lr)
        self._estimator = FisherEstimator(loss_func, **curvature)
        self._capture: Capture | None = None
        self._layers: list[Layer] = []
        self._step = 0
        self._terms = 0.0
        self._report: dict[str, float] = {"skipped_steps": 0.0}
        self._ended_at = math.nan
        defaults = groups.with_plain_damping({"damping": damping}) | {
            "lr": lr if self.step_rule is None else 1.0,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "kl_clip": math.inf if kl_clip is None else kl_clip,
            "relative_clip": math.inf if relative_clip is None else relative_clip,
            "adamw_lr": adamw_lr,
            "adamw_betas": (0.9, 0.999),
            "adamw_eps": 1e-8,
            "curvature": True,
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        self._attach()

    # -- what is covered -------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Find the layers anew and hook them; blocks of layers that stay keep their statistics."""
        self._frozen_pattern = self._requires_grad_pattern()
        wanted, excluded = self._parameters(curvature=True), self._parameters(curvature=False)
        if any(group["relative_damping"] for group in self.param_groups):
            self.backend.mean_eigenvalues()  # a backend that cannot tell says so here, not in the first step
        separate = self._estimator.separate_weight_and_bias
        self._layers, self._rest = find_layers(self.model, wanted, excluded, separate)
        self.backend.attach(self._layers)
        if self._capture is not None:
            self._capture.close()
        self._capture = Capture(self.model, self._layers, self._estimator, self.backend.update, self.backend.discard)
        self._capture.all_places = self.backend.all_places
        self._arm()

    def _arm(self) -> None:
        capture = self._open_capture()
        capture.wants_rows = self.backend.wants_rows(self._step)
        capture.wants_terms = self._estimator.likelihood.reduction == "sum"
        capture.wants_replays = self.damping_rule is not None and self.damping_rule.due(self._step)
        capture.wants_replays |= self.step_rule is not None and self.step_rule.due(self._step)

    def _open_capture(self) -> Capture:
        assert self._capture is not None
        return self._capture

    def _parameters(self, curvature: bool) -> list[nn.Parameter]:
        return [p for group in self.param_groups if group["curvature"] is curvature for p in group["params"]]

    def _requires_grad_pattern(self) -> tuple[bool, ...]:
        return tuple(p.requires_grad for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters that the model holds get curvature from the next forward on."""
        super().add_param_group(groups.with_plain_damping(param_group))
        try:
            check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.param_groups[-1].setdefault("base_lr", float(self.param_groups[-1]["lr"]))
        if self._capture is not None:
            self._attach()

    def coverage(self) -> Coverage:
        """How every parameter of the model is treated, and why: a table when printed."""
        treatments = [self.backend.treatment(layer) for layer in self._layers]
        held = {id(p) for p in self.model.parameters()}
        foreign = sum(id(p) not in held for group in self.param_groups for p in group["params"])
        outside = [CoverageRow("(outside)", (f"{foreign} of params=",), "AdamW", "not held by the model")]
        return Coverage([*covered_rows(self._layers, treatments), *self._rest, *(outside if foreign else [])])

    def health(self) -> dict[str, float]:
        """Numbers worth logging, of the last step: damping, Kullback-Leibler divergence, condition, overhead, ..."""
        return self._report | self.backend.health(groups.settings_of(self._layers, self.param_groups, self.backend))

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can still step, with the curvature it has."""
        if self._capture is not None:
            self._capture.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what backwards since the last step left in the statistics is forgotten with their gradients."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self.backend.discard()
            self._capture.reset_tally()

    # -- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters.

        Args:
            closure: Evaluates the loss and calls `backward`, as for torch's optimizers; called once.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If no backward has ever reached the model, so that there is no curvature.
            TypeError: If a gradient is sparse.
        """
        loss = evaluated(closure)
        capture = self._open_capture()
        if self._requires_grad_pattern() != self._frozen_pattern:
            tally = capture.tally
            self._attach()
            capture = self._open_capture()
            capture.tally = tally
        gradients = {p: _dense_gradient(p) for g in self.param_groups for p in g["params"] if p.grad is not None}
        if not rule.all_finite(list(gradients.values())):
            self.backend.discard()
            self._report["skipped_steps"] += 1.0
        elif gradients:
            device = next(iter(gradients)).device
            with capture.paused(), without_autocast(device):
                self._take_step(capture, gradients)
            self._step += 1
        capture.reset()
        self._arm()
        return loss

    def _take_step(self, capture: Capture, gradients: dict[nn.Parameter, Tensor]) -> None:
        started, tally = time.perf_counter(), capture.tally
        self._terms = float(tally.terms) or self._terms
        scale = self._estimator.likelihood.gradient_scale(self._terms)
        if scale != 1.0:
            gradients = {p: g * scale for p, g in gradients.items()}
        settings = groups.settings_of(self._layers, self.param_groups, self.backend)
        self.backend.fold(self._step, settings)
        if tally.passes:
            settings = groups.settings_of(self._layers, self.param_groups, self.backend)
        if self._step == 0 and tally.passes == 0 and self._layers and self.backend.wants_rows(0):
            raise RuntimeError(_NO_CURVATURE)
        averaged = gradients
        if self.step_rule is None:
            averaged = memory.averaged(self.param_groups, self.state, gradients, self._layers)
        with torch.enable_grad():  # a backend of the user's may differentiate
            self.backend.refresh(self._step, settings)
            refreshed = time.perf_counter()
            solved = self.backend.solve(self._by_layer(averaged), settings)
        updates = {layer.parameters[role]: u for layer, parts in solved.items() for role, u in parts.items()}
        if self.step_rule is not None:
            of_step = (self._step, self._estimator, tally.replays)
            updates = self.step_rule.updates(*of_step, gradients, updates, self.state, scale)
            self._report |= self.step_rule.health()
        judged = self.damping_rule is not None and bool(tally.replays) and tally.replayable
        before = {p: p.clone() for p in gradients} if judged else {}
        self._write(gradients, averaged, updates)
        if self.damping_rule is not None and judged:
            delta = {p: p - old for p, old in before.items()}
            outcome = outcome_of_step(self._estimator, self.backend, tally.replays, delta, gradients, settings, scale)
            self._report |= {"rho": outcome.rho, "kl": outcome.divergence}
            for group in self.param_groups if outcome.comparable else []:
                group["damping"] = self.damping_rule.adjusted(float(group["damping"]), outcome.rho)
        self._note_times(tally.seconds, refreshed - started)

    def _by_layer(self, gradients: Mapping[nn.Parameter, Tensor]) -> dict[Layer, dict[str, Tensor]]:
        return {
            layer: {role: gradients[p] for role, p in layer.parameters.items()}
            for layer in self._layers
            if all(p in gradients for p in layer.parameters.values())
        }

    def _write(
        self,
        gradients: Mapping[nn.Parameter, Tensor],
        averaged: Mapping[nn.Parameter, Tensor],
        updates: dict[nn.Parameter, Tensor],
    ) -> None:
        nu = 1.0
        if self.step_rule is None:
            length = step_length.bound_layers(self.param_groups, self._layers, averaged, updates)
            nu = rule.kl_scale(length, float(self.param_groups[0]["kl_clip"]))
            self._report |= {"kl_scale": nu, "kl": 0.5 * nu * nu * length}
        if not math.isfinite(nu):
            self._report["skipped_steps"] += 1.0
            return
        for group in self.param_groups:
            present = [p for p in group["params"] if p in gradients]
            second = [p for p in present if p in updates]
            rule.descend(
                second,
                [updates[p] for p in second],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                scale=nu,
            )
            rest = [p for p in present if p not in updates]
            rule.adamw_step(
                rest,
                [gradients[p] for p in rest],
                [memory.adamw_state(self.state, p) for p in rest],
                lr=groups.adamw_rate(group),
                betas=group["adamw_betas"],
                eps=group["adamw_eps"],
                weight_decay=group["weight_decay"],
            )

    def _note_times(self, factor_seconds: float, refresh_seconds: float) -> None:
        now = time.perf_counter()
        whole, self._ended_at = now - self._ended_at, now
        curvature = factor_seconds + refresh_seconds
        if math.isfinite(whole):
            share = min(1.0, curvature / whole)
            # Averaged: the last step alone would show a spike or nothing, as the logging interval has it.
            self._report["overhead"] = 0.95 * self._report.get("overhead", share) + 0.05 * share
            self.backend.observe(factor_seconds, max(whole - curvature, 1e-9))
        self._report |= {
            "factor_ms": 1e3 * factor_seconds,
            "damping": float(self.param_groups[0]["damping"]),
        }

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, and `curvature`: tensors and plain Python only, resuming bit for bit."""
        result: dict[str, Any] = super().state_dict()
        result["curvature"] = {
            "backend": self.backend.state_dict(),
            "estimator": self._estimator.state_dict(),
            "step_rule": None if self.step_rule is None else self.step_rule.state_dict(),
            "step": self._step,
            "terms": self._terms,
            "pending_terms": float(self._open_capture().tally.terms),
            "pending_passes": self._open_capture().tally.passes,
            "skipped_steps": self._report["skipped_steps"],
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            KeyError: If it has no `curvature` section: it is another optimizer's.
            ValueError: If it is of another model or backend; nothing is changed then.
        """
        if "curvature" not in state_dict:
            raise KeyError("this state dict has no 'curvature' section: it was not written by a kfacopt optimizer")
        curvature = state_dict["curvature"]
        before = self.backend.state_dict()
        self.backend.load_state_dict(curvature["backend"])
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        except (ValueError, KeyError):
            self.backend.load_state_dict(before)
            raise
        device = next(self.model.parameters()).device
        self._estimator.load_state_dict(curvature["estimator"], device)
        if self.step_rule is not None and curvature["step_rule"] is not None:
            self.step_rule.load_state_dict(curvature["step_rule"])
        self._step, self._terms = int(curvature["step"]), float(curvature["terms"])
        self._report["skipped_steps"] = float(curvature["skipped_steps"])
        capture = self._open_capture()
        capture.reset()
        capture.tally.terms = float(curvature["pending_terms"])
        capture.tally.passes = int(curvature["pending_passes"])
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "backend", "damping_rule", "step_rule", "_estimator", "_step", "_terms", "_report")
        tally = self._open_capture().tally
        state: dict[str, Any] = super().__getstate__()
        return state | {name: self.__dict__[name] for name in own} | {"_pending": (float(tally.terms), tally.passes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, without it
            self._capture, self._ended_at = None, math.nan
            self._attach()
            tally = self._open_capture().tally
            tally.terms, tally.passes = self.__dict__.pop("_pending")


_NO_CURVATURE = (
    "no curvature has been captured: no loss.backward() through the model's modules has reached a prediction since "
    "the optimizer was made. Call the model itself (not a copy or a compiled one made before), with gradients enabled"
)


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise TypeError(
            f"a gradient of shape {tuple(gradient.shape)} is sparse: make the embedding with sparse=False, or give its "
            f"parameters to torch.optim.SparseAdam"
        )
    return gradient
