"""The one lifecycle of every optimizer here: attach, capture, step, zero_grad, state, copies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend
from kfacopt.capture.listener import Capture
from kfacopt.capture.recording import without_autocast
from kfacopt.fsdp import ShardedModel
from kfacopt.layers.base import Rows
from kfacopt.layers.coverage import CoverageRow, find_layers
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.optim import carried, checks, memory, stored
from kfacopt.optim.chosen_layers import ChosenLayers
from kfacopt.optim.groups import dense_gradients
from kfacopt.optim.reached import Reached
from kfacopt.optim.scaling import LossScaling
from kfacopt.optim.sightings import OF_ANOTHER_GRADIENT, uses_out_of_sight
from kfacopt.optim.together import Agreement, agreed
from kfacopt.replicas import Sharding, joined

Params = Iterable[Any]


class CapturingOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose hooks watch a model; a subclass says what a step does with what they saw.

    The life of a step: the user's forward and backward are captured as `_arm` asked for; `step` collects the gradients,
    skips a step that has one that is not finite, and otherwise calls `_take_step` with the capture paused; then what
    was captured is forgotten and the next step armed.

    A subclass calls `super().__init__` once its own attributes are set, and names in `_own_attributes` those that a
    copy or a pickle is to have.

    Args:
        model: The model whose parameters are trained.
        estimator: Of the loss.
        params: torch's params or param groups; None: all of the model's.
        defaults: torch's, the hyper-parameters of the param groups.
        sharding: Which processes train together, and what they divide.

    Raises:
        TypeError, ValueError: A model or parameter that cannot be handled, by name; nothing was changed then.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ()
    """Beside those of this class, what a copy or a pickle has."""
    _own_state_key: ClassVar[str] = ""
    """A key that tells this class's `curvature` section from another's; "": a state without a section is taken too."""
    _takes_complex: ClassVar[bool] = True  # whether such parameters train, by a rule without curvature

    def __init__(
        self,
        model: nn.Module,
        estimator: FisherEstimator,
        params: Params | None,
        defaults: dict[str, Any],
        sharding: Sharding | None = None,
    ) -> None:
        model, self._processes = joined(model, sharding)
        checks.check_model(model, self._takes_complex)
        self._sharded = ShardedModel(model)
        self._sharded.reshard()  # else the parameters below would be copies
        checks.check_params(params)
        self._step = 0
        checks.check_processes(self._processes, self._alone)
        self._agreed = Agreement()
        self.model = model
        self._estimator = estimator
        self._capture: Capture | None = None
        self._layers: list[Layer] = []
        self._rest: list[CoverageRow] = []
        self._report: dict[str, float] = {"skipped_steps": 0.0}
        self._reached = Reached()
        self._scaling = LossScaling()
        self._expected: set[str] = set()
        self._unseen_uses: dict[nn.Parameter, str] = {}
        super().__init__(model.parameters() if params is None else params, defaults)
        checks.check_copies(self._sharded, self.param_groups)
        self._attach()

    # -- what is captured ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _fed(self) -> CurvatureBackend | None:
        """The backend that rows are delivered to; None: no layer is captured."""

    @abstractmethod
    def _wants_replays(self) -> bool:
        """Whether the coming step runs its forwards again."""

    def _solves_on_replays(self) -> bool:
        """Whether the coming step goes where the forwards that are run again say."""
        return self._wants_replays()

    def _alone(self) -> str | None:
        """What cannot be done in several processes yet, as the subject of a sentence; None: all can."""
        return type(self).__name__

    def _refusal(self, layer: Layer) -> str | None:
        """Why a layer is left to AdamW, as a phrase for `coverage()`; None: it is not."""
        return None if self._fed is None else self._fed.refusal(layer)

    def _wants_terms(self) -> bool:
        """Whether the coming step has to know the number of loss terms."""
        return self._estimator.likelihood.reduction == "sum"

    def _attach(self) -> None:
        """Find the layers anew and hook them; blocks of layers that stay keep their statistics."""
        self._chosen = ChosenLayers(self.param_groups, self._unseen_uses)
        self._reached.waiting = True  # for all that is known: what waits may come from a state
        self._sharded = ShardedModel(self.model)
        self._sharded.reshard()
        self._named = dict(self.model.named_parameters())
        deliver: Callable[..., None] = self._discard  # without a backend there are no layers to deliver of
        all_places, needs_inputs = False, True
        if (backend := self._fed) is not None:
            wanted = self._parameters(curvature=True)
            excluded = dict.fromkeys(self._parameters(curvature=False), "its param group has 'curvature': False")
            excluded |= self._unseen_uses
            separate = self._estimator.separate_weight_and_bias
            self._layers, self._rest = find_layers(self.model, wanted, excluded, separate, self._refusal)
            self._chosen.are(self._layers)
            backend.join(self._processes, self._estimator.likelihood.reduction != "sum")
            backend.attach(self._layers)
            deliver = self._deliver
            all_places, needs_inputs = backend.all_places, backend.needs_inputs
        self._processes.device = next(self.model.parameters()).device
        is_paused = self._capture is not None and self._capture.is_paused
        if self._capture is not None:
            self._capture.close()
        self._capture = Capture(self.model, self._layers, self._estimator, deliver, self._discard, self._sharded)
        self._capture.passes.all_places, self._capture.passes.needs_inputs = all_places, needs_inputs
        self._capture.is_paused = is_paused
        self._arm()

    def _deliver(self, layer: Layer, rows: Rows) -> None:
        assert self._fed is not None
        self._fed.update(layer, rows)
        self._reached.add(layer, rows)

    def _discard(self) -> None:
        """Forget the rows that were delivered since the last step."""
        if self._fed is not None and self._reached.waiting:
            self._fed.discard()
        self._reached.clear()

    def _arm(self) -> None:
        """Tell the capture what the coming step needs."""
        capture, backend = self._open_capture(), self._fed
        wants_rows = bool(self._layers) and backend is not None and backend.wants_rows(self._step)
        capture.arm(wants_rows, self._wants_terms(), self._wants_replays())
        self._expected = {layer.name for layer in self._layers} if capture.wants_rows else set()
        if self._processes.size > 1:
            self._estimator.begin_stream(self._step, self._processes.rank)

    def _open_capture(self) -> Capture:
        assert self._capture is not None
        return self._capture

    def _parameters(self, curvature: bool) -> list[nn.Parameter]:
        return [p for g in self.param_groups if g.get("curvature", True) is curvature for p in g["params"]]

    def _follow_changes(self) -> None:
        """Attach anew where parameters train, are used or are held otherwise than before; what was captured stays."""
        if not self._chosen.hold(self.param_groups, self._unseen_uses):
            tally, expected = self._open_capture().tally, self._expected
            self._attach()
            self._open_capture().tally = tally
            self._expected &= expected  # a layer that was not hooked when the forward ran owes no rows

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters that the model holds get curvature from the next forward on."""
        super().add_param_group(param_group)
        try:
            self._check_groups()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._capture is not None:
            self._attach()

    def _check_groups(self) -> None:
        """Refuse param groups that are out of range, with a TypeError or ValueError."""

    def health(self) -> dict[str, float]:
        """Numbers worth logging, of the last step; `skipped_steps` in all, as gradients were not finite."""
        return dict(self._report)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context forwards and backwards are nobody's: none of them counts for the step.

        A backward for its own sake (saliency, a gradient of the inputs) needs no pause: only what leaves gradients of
        the parameters in `.grad` counts. Contexts may be nested.

        >>> import kfacopt
        >>> model = nn.Linear(2, 1)
        >>> optimizer = kfacopt.KFAC(model, nn.MSELoss())
        >>> with optimizer.paused():
        ...     model(torch.ones(3, 2)).square().mean().backward()
        """
        before, self._open_capture().is_paused = self._open_capture().is_paused, True
        try:
            yield
        finally:
            self._open_capture().is_paused = before

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can still step, with the curvature it has."""
        self._open_capture().close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what backwards since the last step left in the statistics is forgotten with their gradients."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._forget()
            self._follow_changes()

    def _forget(self) -> None:
        """Forget what arrived since the last step."""
        self._discard()
        self._open_capture().reset_tally()

    # -- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters; those without a gradient stay as they are, as in torch's optimizers.

        Args:
            closure: Evaluates the loss and calls `backward`, as for torch's optimizers; called once.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If the step needs batches that cannot be had; nothing was changed then.
            TypeError: If a gradient is sparse.
        """
        if not self.state and carried.asked_by_checkpoint():
            return carried.allocate(self.param_groups, self.state, self._blank())  # gradients and rates are zero
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients, solves = dense_gradients(self.param_groups), self._solves_on_replays()
        self._agreed = agreed(
            self._processes, self._open_capture(), self._layers, self._reached, gradients, self._check, solves
        )
        self._processes.quiet = not self._agreed.waiting
        self._reached.settle(self._agreed.rows, self._layers, self._processes)
        if self._agreed.in_the_loss:
            if solves:
                raise RuntimeError(OF_ANOTHER_GRADIENT)
            self._open_capture().tally.replayable = False
        self._unseen_uses |= uses_out_of_sight(self._layers, self._agreed, self._unseen_uses)
        self._follow_changes()
        if not self._agreed.finite:
            self._report["skipped_steps"] += 1.0
            self._forget()
        elif not gradients:
            self._forget()
        else:
            with self.paused(), without_autocast(next(iter(gradients)).device):
                self._take_step(gradients)
            self._step += 1
        self._reached.clear()
        self._open_capture().reset()
        self._arm()
        return loss

    def _check(self) -> None:
        """Refuse what several processes cannot do yet; an engine may have come since the optimizer was made."""
        checks.check_processes(self._processes, self._alone)
        if self._processes.is_open:
            checks.check_engine(self.model)
            checks.check_unchanged(self.model, self._sharded)

    def _settle_scale(self) -> float:
        """Take in by which factor the loss of this step's backwards differs from the plain one.

        Returns:
            What brings the user's gradients at the predictions to the scale of `.grad`.
        """
        tally = self._open_capture().tally
        solves, parameters = self._solves_on_replays(), self.model.parameters()
        self._scaling.settle(tally, self._estimator, parameters, solves, self._processes, self._agreed.passes)
        batches = self._reached.batches_of(self._layers) if tally.passes else {}
        if self._fed is not None and batches and (lacking := self._scaling.rescaling(tally, self._estimator, batches)):
            self._fed.rescale(lacking)
        return self._scaling.undone

    @abstractmethod
    def _take_step(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Move the parameters, or count a skipped step; the gradients are finite and not to be written to."""

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, and `curvature`: tensors and plain Python only, resuming bit for bit.

        For `torch.distributed.checkpoint`, which drops a section of its own, curvature is in the first param group.
        """
        result: dict[str, Any] = super().state_dict()
        if carried.asked_by_checkpoint():
            return carried.with_curvature(result, self.param_groups, self._own_state(), self._blank())
        result["param_groups"][0].pop(carried.KEY, None)
        return result | {"curvature": self._own_state()}

    def _blank(self) -> dict[nn.Parameter, dict[str, Any]]:
        """By parameter, all that a step may remember of it, as it is before the first."""
        return {}

    def _remembered(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Of that, what has another shape than the parameter."""
        return {}

    def _own_state(self) -> dict[str, Any]:
        """What `curvature` holds; a subclass adds to it."""
        return (
            self._open_capture().tally.state_dict()
            | self._reached.state_dict()
            | {
                "estimator": self._estimator.state_dict(),
                "processes": self._processes.size,
                "step": self._step,
                "skipped_steps": self._report["skipped_steps"],
                "loss_factor": self._scaling.factor,
                "unseen_uses": {n: why for n, p in self._named.items() if (why := self._unseen_uses.get(p))},
            }
        )

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        """Take over what `_own_state` returned, or raise a ValueError before anything is changed."""
        stored.read("curvature/estimator", self._estimator, own["estimator"], next(self.model.parameters()).device)
        self._step, self._report["skipped_steps"] = int(own["step"]), float(own["skipped_steps"])
        self._scaling.factor = float(own.get("loss_factor", 1.0))
        self._open_capture().reset()
        self._open_capture().tally.load_state_dict(own)
        self._reached.load_state_dict(own, next(self.model.parameters()).device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            KeyError: If its `curvature` section is missing or of another kind of optimizer.
            ValueError: If it is damaged, shards of a whole one, or another model's or backend's; nothing is changed.
        """
        own = carried.curvature_of(state_dict)
        stored.check_section(own, self._own_state_key, type(self).__name__)
        self._follow_changes()
        before, unseen_uses = self._own_state(), self._unseen_uses
        held_before = {name: self.__dict__[name] for name in ("state", "param_groups", *self._own_attributes)}

        def undo() -> None:
            self.__dict__.update(held_before)
            self._unseen_uses = unseen_uses
            self._follow_changes()
            self._load_own_state(before)

        with stored.taken_over(type(self).__name__, undo):
            here = stored.packed(self.state, self.param_groups) | {"curvature": before}
            stored.check_stored(state_dict | {"curvature": own}, here, self.param_groups, self.defaults)
            rest = carried.without_curvature(state_dict, self.param_groups)
            if own is not None:
                uses, held = own.get("unseen_uses", {}), self._named
                self._unseen_uses = {held[name]: why for name, why in uses.items() if name in held}
                self._follow_changes()
                self._load_own_state(own)
            stored.check_remembered(rest, self.param_groups, self._remembered())
            super().load_state_dict(rest)
        memory.without_blanks(self.state)
        if own is not None and max(self._processes.size, int(own.get("processes", 1))) > 1:
            self._forget()  # what waits for the step is one process's part of it
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        common = ("model", "_estimator", "_processes", "_agreed", "_step", "_report", "_layers", "_reached", "_scaling")
        own = (*common, "_unseen_uses", *self._own_attributes)
        state: dict[str, Any] = super().__getstate__() | {"_pending": self._open_capture().tally.state_dict()}
        return state | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, without it
            self._capture, self._rest = None, []
            pending = self.__dict__.pop("_pending")
            self._attach()
            self._open_capture().tally.load_state_dict(pending)
