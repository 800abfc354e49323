"""The step: a `torch.optim.Optimizer` that holds a curvature backend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend, Settings
from kfacopt.capture import Capture
from kfacopt.damping import LevenbergMarquardt, compare_losses
from kfacopt.estimator import CurvatureOptions, FisherEstimator, find_prediction
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import Likelihood
from kfacopt.optim import rule
from kfacopt.optim.checks import check_group, check_model
from kfacopt.optim.coverage import Coverage, covered_rows, find_layers

Params = Iterable[Any]


class SecondOrderOptimizer(torch.optim.Optimizer):
    r"""Preconditioned gradient descent with momentum, weight decay and a trust region, on any curvature backend.

    With `g` the gradient in `.grad`, `C` the backend's curvature of the mean loss:

    .. code-block:: text

        u ← (C + damping I)⁻¹ g                       layer by layer, or as the backend will
        ν ← min(1, sqrt(kl_clip / Σ lr² uᵀg))         one number for all layers
        m ← momentum · m + ν u
        θ ← (1 - lr · weight_decay) θ - lr · m

    Parameters without curvature (see `coverage`) are updated by AdamW with learning rate `adamw_lr`, which follows
    `lr` in proportion when a scheduler changes it; in a param group with `"curvature": False` AdamW's rate is `lr`.

    What a step does in the cases nobody plans:

    - No backward reached the model since the last step: the last curvature is used again. If there has been none at
      all, a RuntimeError says so and nothing changes.
    - A gradient is not finite: the step is skipped as a whole, statistics included, and counted (`health()`).
    - Training or evaluation mode makes no difference: what counts is a backward, so validation is never captured.

    Args:
        model: The model whose parameters are trained; hooks watch every module of it until `close()`.
        loss_func: The loss, as torch's module (`CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`) or a `Likelihood`. It
            is not called: the loop may use the functional form.
        backend: The curvature.
        params: torch's params or param groups; default: all of the model's. A group may set any of `lr`, `damping`,
            `momentum`, `weight_decay`, `ema_decay`, `adamw_lr`, and `curvature` (False: AdamW with the group's `lr`).
        lr: Learning rate; a float or a tensor without axes.
        damping: Added to the curvature of the mean loss, in its units.
        momentum: Of the preconditioned gradient.
        weight_decay: Decoupled.
        ema_decay: Decay of the statistics' running averages, for each update of them.
        kl_clip: Bound on `lr² uᵀ g`, twice the step's Kullback-Leibler divergence; `None`: no bound. Of the first group.
        adamw_lr: AdamW's learning rate where there is no curvature.
        damping_rule: A `kfacopt.LevenbergMarquardt` that adapts `damping`; default: it stays.
        curvature: See `kfacopt.CurvatureOptions`.

    Raises:
        TypeError, ValueError: A loss, parameter or option that cannot be handled, by name; the model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module | Likelihood,
        backend: CurvatureBackend,
        params: Params | None = None,
        *,
        lr: float | Tensor = 0.1,
        damping: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema_decay: float = 0.95,
        kl_clip: float | None = 1e-2,
        adamw_lr: float = 1e-3,
        damping_rule: LevenbergMarquardt | None = None,
        **curvature: Unpack[CurvatureOptions],
    ) -> None:
        check_model(model)
        self.model = model
        self.backend = backend
        self.damping_rule = damping_rule
        self._estimator = FisherEstimator(loss_func, **curvature)
        self._capture: Capture | None = None
        self._layers: list[Layer] = []
        self._step = 0
        self._report: dict[str, float] = {"skipped_steps": 0.0}
        self._ended_at = math.nan
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "kl_clip": math.inf if kl_clip is None else kl_clip,
            "adamw_lr": adamw_lr,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "curvature": True,
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        self._attach()

    # -- what is covered -------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Find the layers anew and hook them; blocks of layers that stay keep their statistics."""
        wanted, excluded = self._parameters(curvature=True), self._parameters(curvature=False)
        layers, rest = find_layers(self.model, wanted, excluded, self._estimator.separate_weight_and_bias)
        held = {id(p) for p in self.model.parameters()}
        foreign = [p for p in [*wanted, *excluded] if id(p) not in held]
        self._frozen_pattern = self._requires_grad_pattern()
        self.backend.attach(layers)
        self._layers, self._rest, self._foreign = layers, rest, len(foreign)
        self._home = {id(p): (layer, role) for layer in layers for role, p in layer.parameters.items()}
        if self._capture is not None:
            self._capture.close()
        self._capture = Capture(self.model, layers, self._estimator, self.backend.update)
        self._arm()

    def _arm(self) -> None:
        assert self._capture is not None
        self._capture.wants_rows = self.backend.wants_rows(self._step)
        self._capture.wants_terms = self._estimator.likelihood.reduction == "sum"
        self._capture.wants_replays = self.damping_rule is not None and self.damping_rule.due(self._step)

    def _parameters(self, curvature: bool) -> list[nn.Parameter]:
        return [p for group in self.param_groups if bool(group["curvature"]) is curvature for p in group["params"]]

    def _requires_grad_pattern(self) -> tuple[bool, ...]:
        return tuple(p.requires_grad for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters that the model holds get curvature from the next forward on."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.setdefault("base_lr", float(group["lr"]))
        if self._capture is not None:
            self._attach()

    def coverage(self) -> Coverage:
        """How every parameter of the model is treated, and why: a table when printed."""
        treatments = [self.backend.treatment(layer) for layer in self._layers]
        return Coverage([*covered_rows(self._layers, treatments), *self._rest])

    def health(self) -> dict[str, float]:
        """Numbers worth logging, of the last step: damping, Kullback-Leibler divergence, condition, overhead, ..."""
        return self._report | self.backend.health(self._settings())

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can still step, with the curvature it has."""
        if self._capture is not None:
            self._capture.close()

    # -- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters.

        Args:
            closure: Evaluates the loss and calls `backward`, as for torch's optimizers; called once.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If no backward has ever reached the model, so that there is no curvature.
            TypeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capture = self._open_capture()
        if self._requires_grad_pattern() != self._frozen_pattern:
            self._attach()
            capture = self._open_capture()
        gradients = {p: _dense_gradient(p) for g in self.param_groups for p in g["params"] if p.grad is not None}
        if not rule.all_finite(list(gradients.values())):
            self._skip(capture)
            return loss
        with capture.paused():
            self._take_step(capture, gradients)
        capture.reset()
        self._step += 1
        self._arm()
        return loss

    def _open_capture(self) -> Capture:
        assert self._capture is not None
        return self._capture

    def _skip(self, capture: Capture) -> None:
        self.backend.discard()
        capture.reset()
        self._report["skipped_steps"] += 1.0

    def _take_step(self, capture: Capture, gradients: dict[nn.Parameter, Tensor]) -> None:
        started, settings, tally = time.perf_counter(), self._settings(), capture.tally
        scale = self._estimator.likelihood.gradient_scale(float(tally.terms))
        if scale != 1.0:
            gradients = {p: g * scale for p, g in gradients.items()}
        self.backend.advance(self._step, settings)
        advanced = time.perf_counter()
        natural = self._natural_gradients(gradients, settings)
        if not natural and self._layers and any(id(p) in self._home for p in gradients):
            if self._step == 0 and tally.passes == 0:
                raise RuntimeError(_NO_CURVATURE)
        updates = {p: u for p, u in natural.items() if u is not None}
        replay = self.damping_rule is not None and bool(tally.replays)
        before = {p: p.clone() for p in gradients} if replay else {}
        self._write(gradients, updates)
        if replay:
            self._adjust_damping(capture, gradients, updates, before, scale)
        self._note_times(started, advanced, capture)

    def _natural_gradients(
        self, gradients: Mapping[nn.Parameter, Tensor], settings: Mapping[Layer, Settings]
    ) -> dict[nn.Parameter, Tensor]:
        packed = {
            layer: {role: gradients[p] for role, p in layer.parameters.items()}
            for layer in self._layers
            if all(p in gradients for p in layer.parameters.values())
        }
        solved = self.backend.solve(packed, settings)
        return {layer.parameters[role]: u for layer, parts in solved.items() for role, u in parts.items()}

    def _write(self, gradients: Mapping[nn.Parameter, Tensor], updates: Mapping[nn.Parameter, Tensor]) -> None:
        length = self._squared_length(gradients, updates)
        nu = rule.kl_scale(length, float(self.param_groups[0]["kl_clip"]))
        self._report |= {"kl_scale": nu, "kl": 0.5 * nu * nu * length}
        for group in self.param_groups:
            present = [p for p in group["params"] if p in gradients]
            second = [p for p in present if p in updates]
            rule.momentum_step(
                second,
                [updates[p] for p in second],
                [self._momentum_buffer(p) for p in second],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                scale=nu,
            )
            rest = [p for p in present if p not in updates]
            rule.adamw_step(
                rest,
                [gradients[p] for p in rest],
                [self._adamw_state(p) for p in rest],
                lr=_adamw_rate(group),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )

    def _squared_length(
        self, gradients: Mapping[nn.Parameter, Tensor], updates: Mapping[nn.Parameter, Tensor]
    ) -> float:
        """Sum over the groups of lr² uᵀ g."""
        total = 0.0
        for group in self.param_groups:
            second = [p for p in group["params"] if p in updates]
            if second:
                inner = rule.inner_product([updates[p] for p in second], [gradients[p] for p in second])
                total += float(group["lr"]) ** 2 * float(inner)
        return total

    def _adjust_damping(
        self,
        capture: Capture,
        gradients: Mapping[nn.Parameter, Tensor],
        updates: Mapping[nn.Parameter, Tensor],
        before: Mapping[nn.Parameter, Tensor],
        scale: float,
    ) -> None:
        assert self.damping_rule is not None
        likelihood, select = self._estimator.likelihood, self._estimator.prediction
        change = compare_losses(
            likelihood, capture.tally.replays, lambda output: find_prediction(output, select), scale
        )
        delta = {p: p - old for p, old in before.items()}
        predicted = float(rule.inner_product([delta[p] for p in gradients], [gradients[p] for p in gradients]))
        moved = {
            layer: {role: delta[p] for role, p in layer.parameters.items()}
            for layer in self._layers
            if all(p in updates for p in layer.parameters.values())
        }
        settings = self._settings()
        for layer, parts in self.backend.multiply(moved).items():
            for role, product in parts.items():
                d = moved[layer][role]
                predicted += 0.5 * float((d * (product + settings[layer].damping * d)).sum())
        rho = change.loss_change / predicted if predicted < 0.0 else math.nan
        self._report |= {"rho": rho, "kl": change.divergence}
        for group in self.param_groups:
            group["damping"] = self.damping_rule.adjusted(float(group["damping"]), rho)

    def _note_times(self, started: float, advanced: float, capture: Capture) -> None:
        now, factor = time.perf_counter(), capture.tally.seconds
        whole, self._ended_at = now - self._ended_at, now
        curvature = factor + (advanced - started)
        if math.isfinite(whole):
            self._report["overhead"] = min(1.0, curvature / whole)
            self.backend.observe(factor, max(whole - curvature, 1e-9))
        self._report |= {"factor_ms": 1e3 * factor, "damping": float(self.param_groups[0]["damping"])}

    # -- param groups and state ------------------------------------------------------------------------------------

    def _settings(self) -> dict[Layer, Settings]:
        """Every layer's hyper-parameters; its parameters must agree on them."""
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        result = {}
        for layer in self._layers:
            found = {
                Settings(float(groups[id(p)]["damping"]), float(groups[id(p)]["ema_decay"]))
                for p in layer.parameters.values()
            }
            if len(found) > 1:
                raise ValueError(
                    f"the parameters of {layer.name!r} lie in param groups with different damping or ema_decay, but "
                    f"share one block: give them the same, or pass separate_weight_and_bias=True"
                )
            result[layer] = found.pop()
        return result

    def _momentum_buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _adamw_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, and `curvature`: tensors and plain Python only, resuming bit for bit."""
        result: dict[str, Any] = super().state_dict()
        result["curvature"] = {
            "backend": self.backend.state_dict(),
            "estimator": self._estimator.state_dict(),
            "step": self._step,
            "skipped_steps": self._report["skipped_steps"],
        }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            KeyError: If it has no `curvature` section: it is another optimizer's.
            ValueError: If it is of another model; nothing is changed then.
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
        self._step = int(curvature["step"])
        self._report["skipped_steps"] = float(curvature["skipped_steps"])
        self._open_capture().reset()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "backend", "damping_rule", "_estimator", "_step", "_report")
        state: dict[str, Any] = super().__getstate__()
        return state | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, without it
            self._capture, self._ended_at = None, math.nan
            self._attach()


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


def _adamw_rate(group: Mapping[str, Any]) -> float:
    """AdamW's learning rate: the group's own without curvature, else `adamw_lr` in proportion to the scheduled `lr`."""
    if not group["curvature"]:
        return float(group["lr"])
    base = float(group["base_lr"])
    return float(group["adamw_lr"]) * (float(group["lr"]) / base if base > 0.0 else 1.0)
