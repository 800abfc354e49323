"""Preconditioned descent on any curvature backend: what KFAC and EKFAC are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend
from kfacopt.damping import LevenbergMarquardt, RelativeDamping
from kfacopt.layers.coverage import Coverage, CoverageRow, covered_rows
from kfacopt.layers.layer import Layer
from kfacopt.layers.plain import PlainMatrix, plain_matrices_in
from kfacopt.likelihoods import KFACType
from kfacopt.likelihoods.estimator import LossFunction, TermsEstimator
from kfacopt.likelihoods.fisher import Fisher
from kfacopt.optim import carried, deprecated, groups, memory, stored
from kfacopt.optim.capturing import CapturingOptimizer, Params
from kfacopt.optim.checks import backend_of, check_group, check_known
from kfacopt.optim.descent import descend
from kfacopt.optim.sightings import Sightings, warn_of_none
from kfacopt.optim.step import ClippedGradients, Direction, Grafted, Step, StepLength, TrustRegion, Updates
from kfacopt.optim.step.by_owners import ByOwners
from kfacopt.optim.step.chosen import SPECTRAL, Bound, Rate, chosen
from kfacopt.optim.trust import outcome_of_step
from kfacopt.replicas import Sharding
from kfacopt.schedules import Interval
from kfacopt.sharding import wholes


class SecondOrderOptimizer(CapturingOptimizer):
    r"""Preconditioned gradient descent with momentum and weight decay, on any curvature backend.

    With `g` the gradient in `.grad`, `C` the backend's curvature of the mean loss, and c its factor over the plain one:

    .. code-block:: text

        m ← momentum · m + (1 - momentum) g           bias-corrected, with Nesterov's look-ahead
        u ← (C + damping I)⁻¹ m                       the direction: layer by layer, or as the backend will
        u ← sqrt(outputs) u / ‖u‖_F                   its length, layer by layer (`Grafted`); or, with kl_clip=…,
        ν ← min(1, sqrt(c kl_clip / Σ lr² uᵀm))       one number for all layers, lr before any schedule
        θ ← (1 - lr · weight_decay) θ - lr · ν u

    Parameters without curvature (see `coverage`) are updated by AdamW with learning rate `adamw_lr`, which follows
    `lr` in proportion when a scheduler changes it; in a param group with `"curvature": False` AdamW's rate is `lr`.

    What a step does in the cases nobody plans:

    - No backward reached the model since the last step: the last curvature is used again. If there has been none at
      all, every layer takes AdamW's step (matrices: the spectral one's own, without curvature); a warning says so once.
    - A parameter has no gradient: it is left alone; its layer's other parameters take AdamW's step.
    - A gradient is not finite: the step is skipped as a whole, statistics included, and counted (`health()`).
    - The loss is multiplied by a constant, its data are weighted, micro-batches are added without dividing: what the
      gradient at the prediction tells of that (`kfacopt.likelihoods.weights`), or the target where the loop calls the
      very `loss_func`, is in the curvature too, so that with relative damping a constant does not change the step. A
      constant of squared errors is told by the value of the loss. What none of these tell (weights of squared errors, a
      factor of soft labels, in the functional form) is taken to be one; a warning says so once where the value of the
      loss contradicts it or cannot verify it, and steps that follow a quadratic model (`lr="auto"`) are refused where
      it contradicts. A user's own `Likelihood` is taken at its word.
    - The scale of a GradScaler, and what gradients were divided by to average, is no factor; clipping is the step's.
    - Training or evaluation mode makes no difference: what counts is a backward, so validation is never captured.
    - Several processes train under `torch.nn.parallel.DistributedDataParallel` or `torch.distributed.fsdp.fully_shard`:
      gradients and curvature are of all their data, a step that one of them cannot take is taken by none, and gradients
      that nobody averaged are refused. What is saved resumes in any number of them.

    Args:
        model: The model whose parameters are trained, or torch's `DistributedDataParallel` around it, or sharded by
            `fully_shard` before; hooks watch every module of it until `close()`.
        loss_func: The loss, as torch's module (those of `kfacopt.likelihoods.likelihood_from`) or a `Likelihood`; with
            `curvature="empirical"` any module or function. Of a model with several outputs a dict of losses by their
            names, or a tuple of losses by their order, each alone or as `(weight, loss)`; the loop may add them up as
            it likes, and leave some out.
            It is not called: the loop may use the functional form, multiply the loss and weight its data; the curvature
            is that of the loss that is differentiated (see the notes).
        params: torch's params or param groups; default: all of the model's. A group may set any of `lr`, `damping`,
            `momentum`, `weight_decay`, `ema_decay`, `adamw_lr`, and `curvature` (False: AdamW with the group's `lr`).
        lr: Learning rate; a float or a tensor without axes; default: 0.04, by how much a step moves each output of a
            layer, or 0.3 where `kl_clip` or `step_length` says how long steps are. Let it go to zero over the run. Or
            `"auto"`, short for `step_length=QuadraticModel()`: learning rate and momentum minimise the exact quadratic
            model in each step, and `momentum`, `kl_clip` and `relative_clip` are not used. (`lr` is then 1, for
            schedules to multiply.)
        damping: Added to the curvature of the mean loss, in its units; or a `kfacopt.RelativeDamping` (default: of a
            half with the spectral step, else the class's own), which follows
            each layer's mean eigenvalue and so fits losses and models of any scale (a group's `"damping"` is then its
            factor, as long as the group's `"relative_damping"` is True).
        momentum: Of the gradient, before it is preconditioned; default: 0.95 with the spectral step, else 0.9.
        weight_decay: Decoupled, of all parameters; default: none, but for the cautious one of the spectral step (its
            `decay`), which whoever says this, for all or for a param group, does without.
        ema_decay: Decay of the statistics' running averages, for each update of them.
        kl_clip: Default: `"grafted"`, each layer's step has a fixed length (`Grafted`), which needs no bound and no
            constant to tune. A number: bound on `lr² uᵀ m / c`, twice the step's Kullback-Leibler divergence, with the
            `lr` before any schedule (so that a schedule shortens clipped steps too). None: the natural gradient times
            `lr`, whatever its length. The first group's counts.
        relative_clip: Bound on the length of each layer's step over that of its parameters, with the `lr` before any
            schedule; `None`: no bound.
        adamw_lr: AdamW's rate, where there is no curvature; default: spectral step 0.01 (embeddings 0.04), else 1e-3.
        factor_every: Steps between two updates of the statistics: an int, a callable of the step, or a schedule of
            `kfacopt.schedules`; None: the backend's default.
        refresh_every: Steps between two refreshes of a layer's inverse or eigenbasis, likewise; the layers' refreshes
            are spread over the interval.
        damping_rule: A `kfacopt.LevenbergMarquardt` that adapts `damping`; default: it stays.
        curvature: `"mc"` (Monte-Carlo Fisher), `"ggn"` (exact), `"empirical"`, or a `kfacopt.Fisher`.
        kfac_approx: `"expand"` or `"reduce"` for layers that share weights (Eschenhagen et al. 2023).
        separate_weight_and_bias: Weight and bias of a layer get a block each, not one together.
        prediction: `model output -> tensor`, where the loss is taken of several tensors of the output, of which one is
            to have curvature; else the loss tells.
        extra_terms: Whether something is added to the loss that depends on the prediction too (a z-loss, an entropy
            bonus). The gradient there is not read then, and the curvature is that of `loss_func` alone, taken to have
            no weights; where that depends on the target (class weights, ignored targets), call `loss_func` itself.
        backend: The curvature, with options of its own; default: the class's, with `factor_every`, `refresh_every`; its
            half power with KFAC's and EKFAC's spectral step.
        direction: Where a step goes; default: `Grafted(Preconditioned(momentum))`, without the length where `kl_clip`
            or `step_length` says it, or the step length's own. Of KFAC and EKFAC, where neither those three nor
            `backend`, `damping_rule` or `lr="auto"` say otherwise, `ClippedGradients(Spectral(momentum))`.
        step_length: How far it goes; default: `TrustRegion(kl_clip, relative_clip)`.
        sharding: Which processes train together, and how many hold what is of a layer; default: the engine's, one.

    Raises:
        TypeError, ValueError: A loss, parameter or option that cannot be handled, by name; nothing was changed then.
    """

    backend_type: ClassVar[Callable[..., CurvatureBackend] | None] = None
    """The backend of a subclass; it takes `factor_every` and `refresh_every`."""
    untuned_backend: ClassVar[Callable[..., CurvatureBackend] | None] = None
    """That of the spectral step, which a subclass takes where nothing is said of a step; None: it never does."""

    _own_attributes = ("backend", "damping_rule", "direction", "step_length", "_terms", "_sightings")
    _own_state_key = "backend"

    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction,
        params: Params | None = None,
        *,
        lr: Rate = None,
        damping: float | RelativeDamping | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        ema_decay: float = 0.8,
        kl_clip: Bound = "grafted",
        relative_clip: float | None = None,
        adamw_lr: float | None = None,
        factor_every: Interval | None = None,
        refresh_every: Interval | None = None,
        damping_rule: LevenbergMarquardt | None = None,
        curvature: Fisher | str = "mc",
        kfac_approx: KFACType | str = KFACType.EXPAND,
        separate_weight_and_bias: bool = False,
        prediction: Callable[[Any], Tensor] | None = None,
        extra_terms: bool = False,
        backend: CurvatureBackend | None = None,
        direction: Direction | None = None,
        step_length: StepLength | None = None,
        sharding: Sharding | None = None,
        **old: Any,
    ) -> None:
        params, backend = deprecated.backend_by_position(type(self), params, backend)
        fisher = deprecated.fisher_of(type(self), curvature, old)
        intervals = {"factor_every": factor_every, "refresh_every": refresh_every}
        untuned = self.untuned_backend if backend is None and damping_rule is None else None
        step = chosen(lr, momentum, kl_clip, relative_clip, direction, step_length, spectral=untuned is not None)
        made_by = untuned if step.usual is SPECTRAL else self.backend_type
        self.backend = backend_of(type(self).__name__, backend, made_by, intervals)
        self.damping_rule, self.direction, self.step_length = damping_rule, step.direction, step.step_length
        self._terms, self._ended_at = 0.0, math.nan
        self._sightings = Sightings()
        bounds = TrustRegion(None if isinstance(kl_clip, str) else kl_clip, relative_clip)
        defaults = step.defaults(damping, ema_decay, adamw_lr, weight_decay, bounds)
        estimator = TermsEstimator(
            loss_func,
            fisher=fisher,
            kfac_approx=kfac_approx,
            separate_weight_and_bias=separate_weight_and_bias,
            prediction=prediction,
            extra_terms=extra_terms,
        )
        needs = {"direction": self.direction.wants_replays(0), "step_length (lr)": self.step_length.wants_replays(0)}
        check_known(estimator.likelihoods.values(), needs | {"damping_rule": damping_rule is not None})
        super().__init__(model, estimator, params, defaults, sharding)
        if not self._layers and not self._plain:
            warn_of_none(self.coverage(), self._parameters(curvature=True))

    # -- what is covered -------------------------------------------------------------------------------------------

    @property
    def _fed(self) -> CurvatureBackend:
        return self.backend

    def _wants_replays(self) -> bool:
        return (self.damping_rule is not None and self.damping_rule.due(self._step)) or self._solves_on_replays()

    def _solves_on_replays(self) -> bool:
        return self.direction.wants_replays(self._step) or self.step_length.wants_replays(self._step)

    def _alone(self) -> str | None:
        # Whoever runs forwards again sees the data of this process, and needs parameters that are there as a whole.
        parts = [p for p in (self.direction, self.step_length) if any(map(p.wants_replays, {0, self._step}))]
        return next((repr(part) for part in parts if self._sharded or not part.shares_replays), None)

    def _refusal(self, layer: Layer) -> str | None:
        why = self.direction.refusal(layer) or super()._refusal(layer)
        if why is not None:
            self._refused |= dict.fromkeys(layer.parameters.values(), layer.handler.structure)
        return why

    def _attach(self) -> None:
        if any(group["relative_damping"] for group in self.param_groups):
            self.backend.mean_eigenvalues()  # a backend that cannot tell says so here, not in the first step
        self._refused: dict[nn.Parameter, str] = {}
        super()._attach()
        self._open_capture().passes.needs_squares = self._reached.measures = self.direction.reads_inputs
        self._find_plain()

    def _find_plain(self) -> None:
        """Matrices without curvature that the direction steps all the same."""
        self._plain: dict[nn.Parameter, PlainMatrix] = {}
        self._stepped: list[nn.Parameter] = []  # steps share it: the first fills it
        self._by_owners = ByOwners()
        if (treatment := self.direction.plain_treatment) is None:
            return
        taken = set(self._refused).union(*(layer.parameters.values() for layer in self._layers))
        wanted = [p for p in self._parameters(curvature=True) if p.requires_grad and p not in taken]
        self._plain, self._rest = plain_matrices_in(self._rest, self.model, wanted, treatment)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters that the model holds get curvature from the next forward on."""
        super().add_param_group(groups.with_own_decay(groups.with_plain_damping(param_group), self.defaults))
        self.param_groups[-1].setdefault("base_lr", float(self.param_groups[-1]["lr"]))

    def _check_groups(self) -> None:
        check_group(self.param_groups[-1])

    def coverage(self) -> Coverage:
        """How every parameter of the model is treated, and why: a table when printed.

        A layer that trains otherwise than planned, as no backward shows its curvature, is said to.
        """
        rows = covered_rows(self._layers, [self.backend.treatment(layer) for layer in self._layers])
        rows = [self._as_it_is(layer, row) for layer, row in zip(self._layers, rows, strict=True)]
        held = {id(p) for p in self.model.parameters()}
        foreign = sum(id(p) not in held for group in self.param_groups for p in group["params"])
        outside = [CoverageRow("(outside)", (f"{foreign} of params=",), "AdamW", "not held by the model")]
        return Coverage([*rows, *self._rest, *(outside if foreign else [])])

    def _as_it_is(self, layer: Layer, row: CoverageRow) -> CoverageRow:
        if layer.name not in self._sightings.unseen:
            return row
        if self.backend.ready(layer):
            why = f"no backward has shown its curvature for {self._sightings.missed[layer.name]} updates ({row.why})"
            return replace(row, treatment=f"{row.treatment}, stale", why=why)
        treatment = self.direction.plain_treatment or "AdamW"
        return replace(row, treatment=treatment, why=f"no backward has shown its curvature yet ({row.why})")

    def health(self) -> dict[str, float]:
        """Numbers worth logging, of the last step: damping, Kullback-Leibler divergence, condition, overhead, ...

        `unseen_layers` counts covered layers whose curvature no backward shows (`coverage()` says how they train),
        `dropped_updates` those of statistics that were not finite; `condition` is of layers whose inverses are here.
        """
        settings = groups.settings_of(self._layers, self.param_groups, self.backend)
        return self._report | {"unseen_layers": float(len(self._sightings.unseen))} | self.backend.health(settings)

    # -- the step --------------------------------------------------------------------------------------------------

    def _take_step(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        started, tally = time.perf_counter(), self._open_capture().tally
        for group in self.param_groups:
            group["base_lr"] = groups.peak_rate(group)
        self._terms = self._agreed.terms or self._terms
        undone = self._settle_scale()
        scale = self._estimator.likelihood.gradient_scale(self._terms)
        found = wholes({p: g * scale for p, g in gradients.items()} if scale != 1.0 else gradients)
        settings = groups.settings_of(self._layers, self.param_groups, self.backend)
        self.backend.fold(self._step, settings)
        if self._agreed.passes:
            settings = groups.settings_of(self._layers, self.param_groups, self.backend)
        with torch.enable_grad():  # a backend of the user's may differentiate
            self.backend.refresh(self._step, settings)
        refreshed = time.perf_counter()
        expected = [layer for layer in self._layers if layer.name in self._expected] if self._expected else []
        self._sightings.note(expected, self._agreed.rows, found, self.backend)
        step = Step(
            self._step,
            found,
            self._layers,
            self.backend,
            settings,
            self.param_groups,
            self.state,
            self._estimator,
            tally.replays,
            scale * undone,
            loss_factor=self._scaling.factor,
            plain=self._plain,
            processes=self._processes,
            norms=None if self._agreed.norms is None else [abs(scale) * norm for norm in self._agreed.norms],
            **self._reached.told(),
            _stepped=self._stepped,
        )
        updates = self.step_length.scaled(step, self._by_owners.updates(step, self.direction, self.step_length))
        self._report |= self.direction.health() | self.step_length.health()
        if updates is None:
            self._report["skipped_steps"] += 1.0
        else:
            self._write(step, updates)
        self._note_times(tally.seconds, refreshed - started)

    def _write(self, step: Step, updates: Updates) -> None:
        """Move the parameters, and the damping where its rule judges this step."""
        judged = (rule_ := self.damping_rule) is not None and rule_.due(self._step) and self._agreed.replays
        before = {p: p.clone() for p in step.gradients} if judged else {}
        for group in self.param_groups:
            descend(group, self.state, step.gradients, updates, self._refused)
        if rule_ is None or not judged:
            return
        delta = wholes({p: p - old for p, old in before.items()})
        with self._sharded.out_of_turn():
            outcome = outcome_of_step(
                self._estimator,
                self.backend,
                step.replays,
                delta,
                step.gradients,
                step.settings,
                step.gradient_scale,
                self._processes,
            )
        self._report |= {"rho": outcome.rho, "kl": outcome.divergence}
        for group in self.param_groups if outcome.comparable else []:
            group["damping"] = rule_.adjusted(float(group["damping"]), outcome.rho)

    def _note_times(self, factor_seconds: float, refresh_seconds: float) -> None:
        now = time.perf_counter()
        whole, self._ended_at = now - self._ended_at, now
        curvature = factor_seconds + refresh_seconds
        if math.isfinite(whole):
            self._report["step_ms"] = 1e3 * whole
            share = min(1.0, curvature / whole)
            # Averaged: the last step alone would show a spike or nothing, as the logging interval has it.
            self._report["overhead"] = 0.95 * self._report.get("overhead", share) + 0.05 * share
            self.backend.observe(factor_seconds, max(whole - curvature, 1e-9))
        self._report |= {"factor_ms": 1e3 * factor_seconds, "damping": float(self.param_groups[0]["damping"])}

    # -- state -----------------------------------------------------------------------------------------------------

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Fetch what others hold for `state_dict()` of process `to`, None: all; to be called by all, as Lightning does.

        Inverses that a state lacks are renewed in its first step; one that lacks statistics (`Sharding`) is refused.
        """
        self.backend.consolidate(to)

    def _own_state(self) -> dict[str, Any]:
        if carried.asked_by_checkpoint():  # in all processes
            self.backend.consolidate(None)
        return super()._own_state() | {
            "backend": self.backend.state_dict(),
            "direction": self.direction.state_dict(),
            "step_length": self.step_length.state_dict(),
            "terms": self._terms,
        }

    def _blank(self) -> dict[nn.Parameter, dict[str, Any]]:
        stepped = {*self._plain, *(p for layer in self._layers for p in layer.parameters.values())}
        held = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        blank = {p: memory.blank(p, p in stepped) for p in held}
        for p, more in self._remembered().items():
            blank[p] |= more
        return blank

    def _remembered(self) -> dict[nn.Parameter, dict[str, Any]]:
        return self.direction.remembered(self._layers, self._plain)

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        if "direction" not in own and isinstance(self.direction, ClippedGradients):
            raise ValueError(
                f"this state is of version 0.1, which knew the natural gradient alone, and {type(self).__name__} was "
                f"made for {self.direction!r}: to go on as there, make it with kl_clip=, say 0.03"
            )
        stored.read("curvature/backend", self.backend, own["backend"])
        super()._load_own_state(own)
        if "direction" not in own and isinstance(self.direction, Grafted):
            # 0.1 knew no other than the natural gradient's own length; its bound comes with its param groups.
            self.direction = self.direction.direction
        stored.read("curvature/direction", self.direction, own.get("direction", {}))
        # Before 0.2 the quadratic model's state was called "step_rule", and no other length had one.
        if length := own.get("step_length", own.get("step_rule")):
            stored.read("curvature/step_length", self.step_length, length)
        self._terms = float(own["terms"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._ended_at = math.nan
        super().__setstate__(state)
