"""A step's forwards, run again with their graphs: the model as the loss saw it, linear around its parameters.

Products with the Jacobian need nothing of the model but that its backward is differentiable (see
`kfacopt.replay.double_backward`). The graphs are kept from product to product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfacopt.capture.records import Call, Replay
from kfacopt.capture.tensor_hooks import HooksSince
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.linalg.tensors import inner_product
from kfacopt.replay.double_backward import DoubleBackward, gradients, guard_of, twice_differentiable
from kfacopt.replay.loss_change import Part, as_rows, loss_change, parts_of, predictions_again, terms_now
from kfacopt.replay.recorder import ProductRecorder
from kfacopt.sharding import Processes

Tensors = Sequence[Tensor]


@dataclass(eq=False)
class Piece(Part):
    """A part of the loss, and its prediction with its graph."""

    prediction: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the prediction's shape as rows `[m c]`."""
        return as_rows(self.terms, tensor)


class BatchLinearization:
    """The predictions of a step's forwards as functions of the parameters.

    Of several processes each has its own predictions, and rows of them; what is shaped as the parameters, and the loss,
    is the mean over all of them, the same in each. All must ask for it then, in the same order.

    Args:
        parameters: What to differentiate with respect to.
        replays: The forwards, with the user's gradient at each prediction.
        estimator: Of the loss terms.
        gradient_scale: Brings the user's gradient to that of the mean loss.
        recorder: Records the forwards' products with weights.
        processes: Those that train together.

    Raises:
        RuntimeError: If a forward run again gives another prediction than the one that the loss saw, or is only a part
            of what led to it.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        replays: Sequence[Replay],
        estimator: FisherEstimator,
        gradient_scale: float,
        recorder: ProductRecorder | None = None,
        processes: Processes = Processes(),  # noqa: B008 - it asks for the group whenever it needs it
    ) -> None:
        self.processes = processes
        self.parameters = list(parameters)
        self.estimator, self.recorder = estimator, recorder
        since = HooksSince()
        parts = parts_of(replays, estimator, gradient_scale, processes)
        self.pieces = processes.together(lambda: self._run_again(parts))
        self.guard = guard_of(self._predictions, since)
        self._straight: DoubleBackward | None = None
        self._curved: DoubleBackward | None = None
        self.loss_gradient = self.transposed([piece.gradient for piece in self.pieces])

    def match(self, gradient: Tensors) -> None:
        """Bring the gradients at the predictions to the scale of the parameters' gradient.

        A clipped norm is a factor of the whole gradient that the user's gradients at the predictions do not have, and
        so is a loss scale of a likelihood that does not tell it: then it is taken out of the loss' gradient as well.
        """
        own, whole = inner_product(self.loss_gradient, self.loss_gradient), inner_product(gradient, gradient)
        both = inner_product(gradient, self.loss_gradient)
        # A squared cosine within 1e-3 of 1, an angle of 2°: half precision stays within. A penalty that was added to
        # the loss mostly turns the gradient by more, and then its length says nothing of a factor.
        parallel = both > 0.0 and both * both > (1.0 - 1e-3) * own * whole
        factor = both / own if parallel else 1.0
        if abs(factor - 1.0) > 1e-2:  # less is half precision's rounding: better the gradients as they are
            for piece in self.pieces:
                piece.gradient = factor * piece.gradient
                piece.loss_gradient = piece.loss_gradient if piece.told else piece.gradient
            self.loss_gradient = list(torch._foreach_mul(self.loss_gradient, factor))

    def _run_again(self, parts: Sequence[Part]) -> list[Piece]:
        if not all(part.replay.whole for part in parts):
            raise RuntimeError(
                "several forwards of the model's parts, called one after the other, led to one prediction: only the "
                "last could be run again, and the others' curvature would be missing. Call them within one module"
            )
        pieces: list[Piece] = []
        last: Call | None = None
        for part in parts:
            if part.replay.call is not last:
                last = part.replay.call
                recording = nullcontext() if self.recorder is None else self.recorder.recording()
                with twice_differentiable(), recording:
                    predictions = predictions_again(last, self.estimator)
            _require_same(part.replay, predictions[part.replay.name])
            pieces.append(Piece(**vars(part), prediction=predictions[part.replay.name]))
        return pieces

    def transposed(self, rows: Tensors) -> list[Tensor]:
        """`Jᵀ w`, for `w` as rows `[m c]` of each piece."""
        largest = max((float(w.abs().amax()) for w in rows if w.numel()), default=0.0)
        # Half precision would lose small numbers.
        half = any(p.prediction.dtype in (torch.float16, torch.bfloat16) for p in self.pieces)
        scale = largest if half and largest > 0.0 else 1.0
        cotangents = [p.terms.restore(w[None] / scale)[0] for p, w in zip(self.pieces, rows, strict=True)]
        found = gradients(self._predictions, self.parameters, cotangents, self.guard)
        return self.processes.average(list(torch._foreach_mul(found, scale)) if scale != 1.0 else found)

    def jacobian(self, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """`J v` as rows `[m c]` of each piece, for `v` shaped as the parameters; None stands for zeros."""
        if self._straight is None:
            self._straight = DoubleBackward(self._predictions, self.parameters, None, self.guard)
        return self._rows(self._straight.jacobian(vectors))

    def both(self, vectors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """`J v`, and the second derivative of the predictions along `v` weighted by the loss' gradient."""
        if self._curved is None:
            weights = [p.terms.restore(p.loss_gradient[None])[0] for p in self.pieces]
            # Its graph serves `jacobian` as well.
            self._straight = self._curved = DoubleBackward(self._predictions, self.parameters, weights, self.guard)
        along, bent = self._curved.both(vectors)
        return self._rows(along), self.processes.average(bent)

    def jacobian_columns(self, index: int, columns: slice) -> list[Tensor]:
        """Columns `[k m c]` of the Jacobian with respect to one parameter, for each piece."""
        parameter, tangents = self.parameters[index], list[Tensor | None]([None] * len(self.parameters))
        unit = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        tangents[index] = unit.view_as(parameter)
        found = []
        for column in range(*columns.indices(parameter.numel())):
            unit[column] = 1.0
            found.append(self.jacobian(tangents))
            unit[column] = 0.0
        return [torch.stack(rows) for rows in zip(*found, strict=True)]

    @property
    def _predictions(self) -> list[Tensor]:
        return [piece.prediction for piece in self.pieces]

    def _rows(self, found: Tensors) -> list[Tensor]:
        return [piece.rows(tensor) for piece, tensor in zip(self.pieces, found, strict=True)]

    def loss_change(self) -> float:
        """The loss at the parameters as they are now, minus the loss at those of the linearization."""
        return self.processes.mean([loss_change(self.pieces, self.estimator).total])[0]

    def second_difference(self, step: Tensors, length: float) -> list[Tensor]:
        """Second derivative of the predictions along `step`, as rows `[m c]`, from two more forwards at `± length`."""
        with moved(self.parameters, step, length):
            ahead = terms_now(self.pieces, self.estimator)
        with moved(self.parameters, step, -length):
            behind = terms_now(self.pieces, self.estimator)
        return [
            ((a.parameters - p.terms.parameters) + (b.parameters - p.terms.parameters)) / length**2
            for p, a, b in zip(self.pieces, ahead, behind, strict=True)
        ]


@contextmanager
def moved(parameters: Sequence[nn.Parameter], step: Tensors, length: float) -> Iterator[None]:
    """Within this context the parameters are `θ + length · step`; afterwards what they were.

    Their storage is swapped, not written to, so that graphs that saved them stay valid.
    """
    before = [p.data for p in parameters]
    try:
        for p, old, new in zip(parameters, before, torch._foreach_add(before, list(step), alpha=length), strict=True):
            p.data = new.to(old.dtype)
        yield
    finally:
        for p, old in zip(parameters, before, strict=True):
            p.data = old


def _require_same(replay: Replay, prediction: Tensor) -> None:
    assert replay.terms.rows is not None
    old, new = replay.terms.parameters, replay.terms.rows(prediction.detach())
    # Another mask or batch changes a prediction by its own size; another attention kernel and order of sums change it
    # by rounding, which grows with the depth: 13 epsilons of bfloat16, 100 of float16, 8,000 of float32 are let pass.
    tolerance = 0.1 if prediction.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if old.shape != new.shape or not bool((new - old).norm() <= tolerance * (1e-30 + old.norm())):
        raise RuntimeError(
            f"{type(replay.call.module).__name__}, run again with the same inputs and random state, does not return "
            f"the prediction that the loss saw: its forward depends on something else (random numbers that are not "
            f"torch's, inputs or parameters changed in place before the step), so its curvature cannot be had"
        )
