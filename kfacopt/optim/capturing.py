"""The one lifecycle of every optimizer here: attach, capture, step, zero_grad, state, copies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend
from kfacopt.capture.listener import Capture
from kfacopt.capture.recording import without_autocast
from kfacopt.layers.base import Rows
from kfacopt.layers.coverage import CoverageRow, find_layers
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.linalg.tensors import all_finite
from kfacopt.optim.checks import check_model, check_params

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

    Raises:
        TypeError, ValueError: A model or parameter that cannot be handled, by name; nothing was changed then.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ()
    """Beside those of this class, what a copy or a pickle has."""
    _own_state_key: ClassVar[str] = ""
    """A key that tells this class's `curvature` section from another's; "": a state without a section is taken too."""

    def __init__(
        self, model: nn.Module, estimator: FisherEstimator, params: Params | None, defaults: dict[str, Any]
    ) -> None:
        check_model(model)
        check_params(params)
        self.model = model
        self._estimator = estimator
        self._capture: Capture | None = None
        self._layers: list[Layer] = []
        self._rest: list[CoverageRow] = []
        self._step = 0
        self._report: dict[str, float] = {"skipped_steps": 0.0}
        self._reached: set[str] = set()
        self._expected: set[str] = set()
        super().__init__(model.parameters() if params is None else params, defaults)
        self._attach()

    # -- what is captured ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _fed(self) -> CurvatureBackend | None:
        """The backend that rows are delivered to; None: no layer is captured."""

    @abstractmethod
    def _wants_replays(self) -> bool:
        """Whether the coming step runs its forwards again."""

    def _refusal(self, layer: Layer) -> str | None:
        """Why a layer is left to AdamW, as a phrase for `coverage()`; None: it is not."""
        return None

    def _wants_terms(self) -> bool:
        """Whether the coming step has to know the number of loss terms."""
        return self._estimator.likelihood.reduction == "sum"

    def _attach(self) -> None:
        """Find the layers anew and hook them; blocks of layers that stay keep their statistics."""
        self._frozen_pattern = self._requires_grad_pattern()
        deliver, discard, all_places = _ignore, _ignore, False
        if (backend := self._fed) is not None:
            wanted, excluded = self._parameters(curvature=True), self._parameters(curvature=False)
            separate = self._estimator.separate_weight_and_bias
            self._layers, self._rest = find_layers(self.model, wanted, excluded, separate, self._refusal)
            backend.attach(self._layers)
            deliver, discard, all_places = self._deliver, backend.discard, backend.all_places
        if self._capture is not None:
            self._capture.close()
        self._capture = Capture(self.model, self._layers, self._estimator, deliver, discard)
        self._capture.all_places = all_places
        self._arm()

    def _deliver(self, layer: Layer, rows: Rows) -> None:
        assert self._fed is not None
        self._fed.update(layer, rows)
        self._reached.add(layer.name)

    def _arm(self) -> None:
        """Tell the capture what the coming step needs."""
        capture, backend = self._open_capture(), self._fed
        capture.wants_rows = backend is not None and backend.wants_rows(self._step)
        capture.wants_terms, capture.wants_replays = self._wants_terms(), self._wants_replays()
        self._expected = {layer.name for layer in self._layers} if capture.wants_rows else set()

    def _open_capture(self) -> Capture:
        assert self._capture is not None
        return self._capture

    def _parameters(self, curvature: bool) -> list[nn.Parameter]:
        return [p for g in self.param_groups if g.get("curvature", True) is curvature for p in g["params"]]

    def _requires_grad_pattern(self) -> tuple[bool, ...]:
        return tuple(p.requires_grad for group in self.param_groups for p in group["params"])

    def _follow_freezing(self) -> None:
        """Attach anew where parameters were frozen or unfrozen since; what was captured for this step stays."""
        if self._requires_grad_pattern() != self._frozen_pattern:
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

    def close(self) -> None:
        """Remove every hook from the model. The optimizer can still step, with the curvature it has."""
        self._open_capture().close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what backwards since the last step left in the statistics is forgotten with their gradients."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._forget()
            self._follow_freezing()

    def _forget(self) -> None:
        """Forget what arrived since the last step."""
        if self._fed is not None:
            self._fed.discard()
        self._reached.clear()
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_freezing()
        gradients = {p: _dense_gradient(p) for g in self.param_groups for p in g["params"] if p.grad is not None}
        if not all_finite(list(gradients.values())):
            self._report["skipped_steps"] += 1.0
            self._forget()
        elif not gradients:
            self._forget()
        else:
            capture, device = self._open_capture(), next(iter(gradients)).device
            with capture.paused(), without_autocast(device):
                self._take_step(gradients)
            self._step += 1
        self._reached.clear()
        self._open_capture().reset()
        self._arm()
        return loss

    @abstractmethod
    def _take_step(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Move the parameters, or count a skipped step; the gradients are finite and not to be written to."""

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, and `curvature`: tensors and plain Python only, resuming bit for bit."""
        result: dict[str, Any] = super().state_dict()
        result["curvature"] = self._own_state()
        return result

    def _own_state(self) -> dict[str, Any]:
        """What `curvature` holds; a subclass adds to it."""
        tally = self._open_capture().tally
        return {
            "estimator": self._estimator.state_dict(),
            "step": self._step,
            "skipped_steps": self._report["skipped_steps"],
            "pending_terms": float(tally.terms),
            "pending_passes": tally.passes,
        }

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        """Take over what `_own_state` returned, or raise a ValueError before anything is changed."""
        self._estimator.load_state_dict(own["estimator"], next(self.model.parameters()).device)
        self._step, self._report["skipped_steps"] = int(own["step"]), float(own["skipped_steps"])
        capture = self._open_capture()
        capture.reset()
        capture.tally.terms = float(own.get("pending_terms", 0.0))
        capture.tally.passes = int(own.get("pending_passes", 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            KeyError: If its `curvature` section is missing or of another kind of optimizer.
            ValueError: If it is of another model or backend; nothing is changed then.
        """
        own, key = state_dict.get("curvature"), self._own_state_key
        if key and (own is None or key not in own):
            raise KeyError(
                f"this state dict has no 'curvature' section with {key!r}: it is not one of a {type(self).__name__}"
            )
        self._follow_freezing()
        before = self._own_state()
        if own is not None:
            self._load_own_state(own)
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "curvature"})
        except (ValueError, KeyError):
            self._load_own_state(before)
            raise
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        own = ("model", "_estimator", "_step", "_report", "_layers", *self._own_attributes)
        tally = self._open_capture().tally
        state: dict[str, Any] = super().__getstate__()
        return state | {name: self.__dict__[name] for name in own} | {"_pending": (float(tally.terms), tally.passes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy or an unpickled optimizer; load_state_dict comes here too, without it
            self._capture, self._rest, self._reached = None, [], set()
            pending = self.__dict__.pop("_pending")
            self._attach()
            tally = self._open_capture().tally
            tally.terms, tally.passes = pending


def _ignore(*_: Any) -> None:
    """No layer is captured, so nothing is delivered."""


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise TypeError(
            f"a gradient of shape {tuple(gradient.shape)} is sparse: make the embedding with sparse=False, or give its "
            f"parameters to torch.optim.SparseAdam"
        )
    return gradient
