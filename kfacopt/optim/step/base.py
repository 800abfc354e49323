"""The seam of a step: what a direction and a step length read, and what they hand on.

.. code-block:: text

    Direction     step -> updates at length one
    StepLength    step, updates -> updates, or None: the step is skipped
    optimizer     θ ← (1 - lr · weight_decay) θ - lr · scale · update

A new one is one new file: subclass `Direction` or `StepLength` and pass an object of it to an optimizer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend, Settings
from kfacopt.capture.records import Replay
from kfacopt.exchange import whole_of_each
from kfacopt.fsdp import is_sharded
from kfacopt.layers.layer import Layer, by_layer, by_parameter
from kfacopt.layers.plain import PlainMatrix
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.likelihoods.fisher import Curvature
from kfacopt.linalg.polar import PolarFactor
from kfacopt.linalg.tensors import all_finite
from kfacopt.optim import memory
from kfacopt.optim.groups import Groups
from kfacopt.replay import path
from kfacopt.replay.linearization import BatchLinearization
from kfacopt.replay.metric import Metric
from kfacopt.replay.recorder import ProductRecorder
from kfacopt.sharding import Processes

ByParameter = Mapping[nn.Parameter, Tensor]
"""A tensor shaped as the parameter, for each of some parameters."""


def _to_all(shards: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Whole tensors, in all processes."""
    return dict(zip(shards, whole_of_each(list(shards.values()), list(shards)), strict=True))


@dataclass(eq=False)
class Step:
    """One step of an optimizer, as its direction and its length see it.

    Attributes:
        number: Counted from 0.
        gradients: Of the mean loss, for every parameter that has one; not to be written to.
        layers: The layers with curvature.
        backend: The curvature, with fresh caches.
        settings: Each layer's damping and decay.
        groups: The optimizer's `param_groups`.
        state: The optimizer's `state`: a dict for each parameter, saved with it.
        estimator: Of the loss.
        replays: The step's forwards, where `wants_replays` asked for them.
        gradient_scale: What brings the user's gradients at the predictions to those of the mean loss.
        recorder: Records the products of forwards that are run again, where the direction wants that.
        loss_factor: Of the user's loss, over the plain one: of gradients and curvature alike. Kullback-Leibler
            divergences are those of the plain one.
        plain: Matrices without curvature that the direction may step (`Direction.plain_treatment`), by parameter.
        processes: Those that train together; gradients and curvature are of all of them.
        norms: Of the gradients, in their order, where they are known.
        rows: How many rows a layer's products have in a step of all processes together, by name; the most so far.
        large: What to multiply each input with so that it has an ordinary size, `[*k i]`, by the names of the layers
            that have inputs for which that is not one; where the direction asks (`reads_inputs`).
        input_sizes: The mean square of a layer's inputs, by name; where the direction asks.
    """

    number: int
    gradients: ByParameter
    layers: Sequence[Layer]
    backend: CurvatureBackend | None
    settings: Mapping[Layer, Settings]
    groups: Groups
    state: MutableMapping[Any, Any]
    estimator: FisherEstimator
    replays: Sequence[Replay] = ()
    gradient_scale: float = 1.0
    recorder: ProductRecorder | None = None
    loss_factor: float = 1.0
    plain: Mapping[nn.Parameter, PlainMatrix] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)
    norms: Sequence[float] | None = None
    rows: Mapping[str, float] = field(default_factory=dict)
    large: Mapping[str, Tensor] = field(default_factory=dict)
    input_sizes: Mapping[str, float] = field(default_factory=dict)
    _linearizations: dict[tuple[int, ...], BatchLinearization] = field(default_factory=dict, repr=False)
    _metrics: dict[tuple[int, Curvature], Metric] = field(default_factory=dict, repr=False)
    _averages: dict[int, dict[nn.Parameter, Tensor]] = field(default_factory=dict, repr=False)
    _brought: Callable[[dict[nn.Parameter, Tensor]], dict[nn.Parameter, Tensor]] = field(default=_to_all, repr=False)
    _stepped: list[nn.Parameter] = field(default_factory=list, repr=False)  # until layers are chosen anew: the same

    def averaged(
        self, freshness: float = 1.0, resting: Collection[nn.Parameter] = frozenset()
    ) -> dict[nn.Parameter, Tensor]:
        """The gradients' momentum, bias-corrected and with Nesterov's look-ahead, of layers and of plain matrices.

        Where the step is divided (`Direction.by_layers`), of those whose step is taken in this process.

        The running averages move on once a step, however many ask; their decay is each group's `momentum`.

        Args:
            freshness: What the new gradient weighs, in units of `1 - momentum`.
            resting: Of whom nobody asks in this step, the same in all processes; their averages move on, too.

        Raises:
            RuntimeError: If somebody in the same step averaged other gradients (`UnitGradients` around a part).
        """
        key = id(self.gradients)
        if self._averages and key not in self._averages:
            raise RuntimeError(
                "two parts of a direction average different gradients in the same step, but there is one momentum: put "
                "UnitGradients around the whole direction, not around a part"
            )
        if not self._averages:
            shards = memory.averaged(self.groups, self.state, self.gradients, self.stepped, freshness, resting)
            self._averages[key] = self._brought(shards)
        return self._averages[key]

    @property
    def stepped(self) -> list[nn.Parameter]:
        """The parameters of the layers with curvature, each once however many layers share it, and plain matrices."""
        if not self._stepped:
            held = [p for layer in self.layers for p in layer.parameters.values()]
            self._stepped += dict.fromkeys([*held, *self.plain])
        return self._stepped

    # -- the curvature ---------------------------------------------------------------------------------------------

    def solve(self, tensors: ByParameter) -> dict[nn.Parameter, Tensor]:
        """`(C + damping I)⁻¹ tensors`, of the layers that are there as a whole and have curvature."""
        with torch.enable_grad():  # a backend of the user's may differentiate
            return by_parameter(self._backend.solve(self.by_layer(tensors), self.settings))

    def multiply(self, tensors: ByParameter) -> dict[nn.Parameter, Tensor]:
        """`(C + damping I) tensors`, likewise."""
        shares = self.by_layer(tensors)
        with torch.enable_grad():
            products = self._backend.multiply(shares)
        damped = {
            layer: {role: c + self.settings[layer].damping * shares[layer][role] for role, c in parts.items()}
            for layer, parts in products.items()
        }
        return by_parameter(damped)

    def ready(self, layer: Layer) -> bool:
        """Whether a layer has curvature by now."""
        return self._backend.ready(layer)

    def steepest(self, layers: Sequence[Layer], matrices: Tensor, polar: PolarFactor) -> Tensor:
        """`S polar(Sᵀ M)`, with some S of which `S Sᵀ = (C + damping I)⁻¹`; of layers that have curvature.

        Args:
            layers: Whose matrices have one shape.
            matrices: `[b *k o i]`, one for each layer.
            polar: The polar factor of a batch of matrices.
        """
        with torch.enable_grad():  # a backend of the user's may differentiate
            return self._backend.steepest(layers, matrices, self.settings, polar)

    def by_layer(self, tensors: ByParameter) -> dict[Layer, dict[str, Tensor]]:
        """Tensors by layer and role; layers of which a parameter is missing are left out."""
        return by_layer(self.layers, tensors)

    @property
    def _backend(self) -> CurvatureBackend:
        if self.backend is None:
            raise RuntimeError("this step's optimizer holds no curvature backend: its direction cannot ask for one")
        return self.backend

    # -- the step's own batches ------------------------------------------------------------------------------------

    def linearization(self, parameters: Sequence[nn.Parameter]) -> BatchLinearization:
        """The step's forwards as functions of some parameters: run again once, for all who ask for the same.

        Of several processes each has its own forwards: what is shaped as the parameters is the mean over all, which
        must ask for it together.

        Raises:
            RuntimeError: If parameters are sharded.
        """
        if any(map(is_sharded, parameters)):
            raise RuntimeError(
                f"the model is sharded by fully_shard over {self.processes.size} processes: its forwards cannot be run "
                f"again yet. Directions and step lengths that ask for them work under DistributedDataParallel"
            )
        key = tuple(id(p) for p in parameters)
        if key not in self._linearizations:
            made = BatchLinearization(
                parameters, self.replays, self.estimator, self.gradient_scale, self.recorder, self.processes
            )
            made.match([self.gradients[p] for p in parameters])
            self._linearizations[key] = made
        return self._linearizations[key]

    def metric(self, parameters: Sequence[nn.Parameter], curvature: Curvature) -> Metric:
        """The curvature of the step's own batches, undamped: one for all who ask for the same (its samples are too)."""
        linearization = self.linearization(parameters)
        key = id(linearization), curvature
        if key not in self._metrics:
            self._metrics[key] = Metric(linearization, curvature)
        return self._metrics[key]

    def displacement(self, updates: Updates) -> list[Tensor]:
        """What the updates add to their parameters at the groups' learning rates, in the order of the updates."""
        rates = {id(p): float(group["lr"]) for group in self.groups for p in group["params"]}
        straight = [-rates[id(p)] * u for p, u in updates.tensors.items()]
        return path.at(straight, updates.bend, updates.scale)


class Prospect(NamedTuple):
    """What a step at the groups' learning rates promises under its quadratic model; see `kfacopt.optim.step.prospect`.

    Attributes:
        slope: How much the loss falls along it to first order, a number.
        cost: What the slope is to be at least: of a step for which it is less, that part is taken.
    """

    slope: Tensor
    cost: float


@dataclass(eq=False)
class Updates:
    """What is subtracted from parameters at learning rate one; parameters that are left out take AdamW's step.

    Attributes:
        tensors: By parameter, shaped as it; of a step that was divided (`Direction.by_layers`) sharded as it, too.
        image: `(C + damping I) u` by parameter, where the direction knows it: for `u = (C + damping I)⁻¹ m` it is m.
            None: whoever wants it asks `Step.multiply`.
        scale: The length that was chosen so far; everything is to be multiplied with it.
        bend: Second derivative of the step's path, what is added to the parameters is
            `scale · (-lr u) + ½ scale² · bend`, in the order of `tensors`; None: the path is straight.
        check: A number that is finite exactly if all of `tensors` are, where the direction knows one.
        decays: By parameter, which part of it is taken off at learning rate one, of those entries that the update makes
            smaller anyway (`rule.decay_cautiously`).
        resting: Parameters that stay as they are in this step.
        products: By parameter, the inner products of `tensors` with the image, where they are known and it is not here.
        prospect: What it promises, where a direction of fixed length has asked.
    """

    tensors: dict[nn.Parameter, Tensor]
    image: ByParameter | None = None
    scale: float = 1.0
    bend: list[Tensor] | None = None
    check: Tensor | None = None
    decays: Mapping[nn.Parameter, float] = field(default_factory=dict)
    resting: frozenset[nn.Parameter] = frozenset()
    products: Mapping[nn.Parameter, float] | None = None
    prospect: Prospect | None = None

    @property
    def finite(self) -> bool:
        """Whether all of it is."""
        if self.check is not None:
            return math.isfinite(float(self.check))
        return all_finite(list(self.tensors.values()))

    def as_promised(self) -> Updates | None:
        """As much of them as their slope pays for (`prospect`); None: they are not finite. Reads one number, or two."""
        if self.prospect is None or self.check is None:
            return self if self.finite else None
        slope, cost = self.prospect
        check, read = torch.stack([self.check.to(slope), slope]).tolist()
        if not math.isfinite(check):
            return None
        return self if read >= self.scale * cost else replace(self, scale=max(0.0, read / cost))

    def scaled(self, factor: float) -> Updates:
        """The same direction, `factor` times as long."""
        return replace(self, scale=factor * self.scale)

    def scaled_apart(self, factors: Mapping[nn.Parameter, float]) -> Updates:
        """Each parameter's own factor; those that are left out stay."""
        if all(factor == 1.0 for factor in factors.values()):
            return self
        image = None if self.image is None else _times(self.image, factors)
        products = self.products
        if products is not None:
            products = {p: factors.get(p, 1.0) ** 2 * number for p, number in products.items()}
        tensors = _times(self.tensors, factors)
        return replace(self, tensors=tensors, image=image, products=products, prospect=None)


class _Part:
    """What directions and lengths have in common: an optimizer asks them for defaults, health and state.

    Attributes:
        shares_replays: Whether what they do with forwards that are run again is right in several processes: decided by
            what `Step.linearization` and `Step.metric` average over them, never by rows of one's own.
    """

    shares_replays: bool = False

    def defaults(self) -> dict[str, float]:
        """Scalars for the optimizer's param groups, where schedulers and users write them; read them from there."""
        return {}

    def wants_replays(self, step: int) -> bool:
        """Whether the forwards of step `step` are to be kept, to be run again (`Step.linearization`)."""
        return False

    def health(self) -> dict[str, float]:
        """Numbers worth logging, of the last step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python; what belongs to a parameter is better kept in `Step.state`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""


Remembered = dict[nn.Parameter, dict[str, Any]]
"""By parameter, values of the optimizer's state."""


class Direction(_Part, ABC):
    """Where a step goes.

    Attributes:
        plain_treatment: What it does with matrices that have no curvature (`Step.plain`), as a phrase for `coverage()`;
            None: nothing, they train by AdamW.
        reads_inputs: Whether it asks for the size of inputs (`Step.large`).
    """

    plain_treatment: str | None = None
    reads_inputs: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Who goes elsewhere than the class below says anew whether it goes by layers.
        if "updates" in vars(cls) and "by_layers" not in vars(cls):
            cls.by_layers = Direction.by_layers  # type: ignore[method-assign]

    def refusal(self, layer: Layer) -> str | None:
        """Why a layer is left to AdamW, as a phrase for `coverage()`; None: it is not.

        No statistics are taken of such a layer. A layer may also be left out of a step's updates as it comes.
        """
        return None

    def remembered(self, layers: Sequence[Layer], plain: Mapping[nn.Parameter, PlainMatrix]) -> Remembered:
        """What it keeps in `Step.state` beside the momentum, as it is before the first step.

        `torch.distributed.checkpoint` reads a checkpoint into a state that is there already.
        """
        return {}

    def by_layers(self, step: Step) -> bool:
        """Whether it takes the step of each layer and plain matrix by itself; here: no.

        That is: it asks in each step for `step.averaged()`, reads of other layers no more than shapes, asks the other
        processes nothing that they are not all asked, remembers of parameters what `remembered` says, and leaves
        `Updates.scale` at one. Where parameters are sharded, each process is then asked for some of them: `averaged`
        has no others, and `step.gradients` are shards. Else all gather the whole momentum, and compute everything.
        """
        return False

    @abstractmethod
    def updates(self, step: Step) -> Updates:
        """What to subtract at learning rate and length one."""


class StepLength(_Part, ABC):
    """How far a step goes.

    Attributes:
        reads_shards: Whether it is content with updates of which each process has its shards, with their inner products
            in the place of their image; else all are gathered, and computed everywhere (`Direction.by_layers`).
    """

    reads_shards: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "scaled" in vars(cls):
            cls.reads_shards = bool(vars(cls).get("reads_shards", False))

    def direction(self) -> Direction | None:
        """The direction that this length is made for, where the user names none; None: any will do."""
        return None

    @abstractmethod
    def scaled(self, step: Step, updates: Updates) -> Updates | None:
        """The updates at their length; None: the step is not taken (and counted as skipped)."""


def _times(tensors: ByParameter, factors: Mapping[nn.Parameter, float]) -> dict[nn.Parameter, Tensor]:
    return {p: t * factors[p] if factors.get(p, 1.0) != 1.0 else t for p, t in tensors.items()}
