"""The seam that an optimizer holds: statistics in, preconditioned gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.linalg.polar import PolarFactor
from kfacopt.sharding import Processes

LayerTensors = Mapping[Layer, Mapping[str, Tensor]]
"""For each layer, tensors shaped as its share of its parameters (`Layer.share`), by role (`"weight"`, `"bias"`)."""


class Settings(NamedTuple):
    """A layer's hyper-parameters at a step, read from its param group."""

    damping: float
    ema_decay: float


class CurvatureBackend(ABC):
    """Turns gradients into natural gradients; subclass it to plug your own curvature into every optimizer.

    In one optimizer step these are called in this order, always on the same thread:

    1. `update(layer, rows)` inside the user's backward, for each layer and micro-batch, on steps where `wants_rows`
       said so: keep what you need of the rows (running sums); they are of the *sum* over the loss terms, and
       `rows.new_terms` says how many terms that is.
    2. `rescale(factors)`, only where the user's loss is not the plain mean: multiply the layers' sums.
    3. `fold(step, settings)`: average what was added into the statistics. If the step is skipped because a gradient is
       not finite, `discard()` is called instead, and nothing after it.
    4. `refresh(step, settings)`: bring caches up to date where they are due.
    5. `solve(gradients, settings)`: `(C + damping I)^-1 gradient` for each layer. A layer that is left out of the
       result is updated by AdamW in this step.

    A backend that wants no rows (`wants_rows` is always False) makes the optimizer's curvature options moot.

    The model may be called and differentiated within `refresh` and `solve`: capture is paused there, gradients are
    enabled. `.grad` is not to be written to.
    """

    all_places: ClassVar[bool] = False
    """Whether rows of every place are wanted under KFAC-reduce too (`Rows.reduce` is set then)."""

    needs_inputs: ClassVar[bool] = True
    """Whether rows' inputs are read; where not, `inputs` of layers with outer products have no columns, at no cost."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Who solves otherwise than the class below says anew who can.
        if not {"solve", "steepest", "whiten", "unwhiten"}.isdisjoint(vars(cls)) and "solvers" not in vars(cls):
            cls.solvers = CurvatureBackend.solvers  # type: ignore[method-assign]

    newton: bool = True
    """Whether `solve` is `(C + damping I)⁻¹`: a trust region then takes `uᵀm` for `uᵀ (C + damping I) u`."""

    def refusal(self, layer: Layer) -> str | None:
        """Why a layer is left to AdamW, as a phrase for `coverage()`; None: it is not.

        By default such layers as have rows of a kind that one must know of (`Rows.transposed`).
        """
        tied = layer.handler.structure == "tied"
        return f"tied, and {type(self).__name__} takes no transposed rows" if tied else None

    def attach(self, layers: Sequence[Layer]) -> None:  # noqa: B027 - a backend need not care
        """Take note of the layers to come. Called again when parameters are frozen, unfrozen or added."""

    def join(self, processes: Processes, averaged: bool) -> None:
        """Take note of the processes that train together, before `attach`: statistics are to be of all their data.

        Args:
            processes: Sums and means over them; of one process they are the identity.
            averaged: Whether each process's loss is a mean over its terms; False: a sum. The loss that the gradients
                are of is the mean of the processes' losses.

        Raises:
            NotImplementedError: Here, if there are several.
        """
        if processes.size > 1:
            raise NotImplementedError(
                f"{processes.size} processes train together, but {type(self).__name__} has no join(): each would "
                f"precondition with the curvature of its own data. Subclass kfacopt.LayerwiseBackend, or reduce over "
                f"the processes in fold()"
            )

    def wants_rows(self, step: int) -> bool:
        """Whether the forwards of step `step` are to deliver rows; without them there is no extra cost."""
        return True

    def update(self, layer: Layer, rows: Rows) -> None:  # noqa: B027
        """Take in one micro-batch's rows at one layer."""

    def fold(self, step: int, settings: Mapping[Layer, Settings]) -> None:  # noqa: B027
        """Average what was added since the last step into the statistics."""

    def rescale(self, factors: Mapping[Layer, float]) -> None:
        """Multiply what was added since the last `fold`, layer by layer: the loss turned out to have a factor."""
        raise NotImplementedError(
            f"{type(self).__name__} has no rescale(): a loss with a constant factor, or micro-batches whose losses are "
            f"added without dividing, needs it"
        )

    def refresh(self, step: int, settings: Mapping[Layer, Settings]) -> None:  # noqa: B027
        """Bring caches up to date where they are due."""

    def mean_eigenvalues(self) -> dict[Layer, float]:
        """Trace over dimension of each layer's curvature, as far as known: relative damping multiplies it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no mean_eigenvalues(): relative damping needs it. Pass damping= as a number"
        )

    def discard(self) -> None:  # noqa: B027
        """Forget what was added since the last `fold`."""

    @abstractmethod
    def solve(self, gradients: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        """Precondition; the gradients are not to be written to."""

    def ready(self, layer: Layer) -> bool:
        """Whether `layer` has curvature to solve with; without it takes AdamW's step."""
        return True

    def solvers(self, layers: Sequence[Layer]) -> Mapping[Layer, Collection[int]] | None:
        """By layer, the ranks of the processes that can solve for it with what they have, within `by_itself()`.

        Where parameters are sharded, a layer's momentum is then brought to one of these alone. None, as here: nobody
        can, all have to be asked together.
        """
        return None

    def by_itself(self) -> AbstractContextManager[None]:
        """Within it each process asks for layers of its own, as `solvers` says, and nothing is sent."""
        raise NotImplementedError(f"{type(self).__name__} has solvers(), but no by_itself()")

    def whiten(self, tensors: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        """`Sᵀ tensors` for each layer, with any S such that `S Sᵀ = (C + damping I)⁻¹`; unready layers are left out."""
        raise NotImplementedError(
            f"{type(self).__name__} has no whiten(): a direction in the curvature's metric needs it"
        )

    def unwhiten(self, tensors: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        """`S tensors` for each layer, with the S of `whiten`: `unwhiten(whiten(g)) = solve(g)`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no unwhiten(): a direction in the curvature's metric needs it"
        )

    def steepest(
        self, layers: Sequence[Layer], matrices: Tensor, settings: Mapping[Layer, Settings], polar: PolarFactor
    ) -> Tensor:
        """`S polar(Sᵀ M)` with the S of `whiten`, of layers that are ready and whose matrices have one shape.

        Args:
            layers: One for each matrix.
            matrices: `[b *k o i]`.
            settings: Of the layers.
            polar: The polar factor of a batch of matrices.
        """
        held = {layer: layer.unpack(matrix) for layer, matrix in zip(layers, matrices, strict=True)}
        whitened = self.whiten(held, settings)
        factors = polar(torch.stack([layer.pack(whitened[layer]) for layer in layers]))
        found = self.unwhiten({la: la.unpack(f) for la, f in zip(layers, factors, strict=True)}, settings)
        return torch.stack([layer.pack(found[layer]) for layer in layers])

    def multiply(self, tensors: LayerTensors) -> dict[Layer, dict[str, Tensor]]:
        """`C tensors`, undamped, of the layers that are `ready`; the Levenberg-Marquardt rule needs it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no multiply(): damping_rule= needs it (the quadratic model's value), and so "
            f"does kl_clip= where the direction is not Newton's"
        )

    def treatment(self, layer: Layer) -> str:
        """How `layer` is approximated, for `coverage()`."""
        return type(self).__name__

    def observe(self, factor_seconds: float, step_seconds: float) -> None:  # noqa: B027
        """Told after each step how long capturing rows took, and the step without any curvature."""

    def health(self, settings: Mapping[Layer, Settings]) -> dict[str, float]:
        """Numbers worth logging."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python from which `load_state_dict` restores the backend bit for bit."""
        return {}

    def consolidate(self, to: int | None) -> None:  # noqa: B027
        """Fetch what other processes hold, so that the next `state_dict` has it; all processes call it.

        Args:
            to: Which process is to have it; None: all.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over a state."""
