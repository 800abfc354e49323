"""A step's forwards, run again with their graphs: the model as the loss saw it, linear around its parameters.

Products with the Jacobian need nothing of the model but that its backward is differentiable (see
`kfacopt.double_backward`). The graphs are kept from product to product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfacopt.double_backward import DoubleBackward, gradients, twice_differentiable
from kfacopt.estimator import FisherEstimator
from kfacopt.forwards import Call, Replay
from kfacopt.likelihoods import Likelihood, LossTerms
from kfacopt.linalg.tensors import inner_product
from kfacopt.products import ProductRecorder

Tensors = Sequence[Tensor]


@dataclass(eq=False)
class Piece:
    """One prediction of one forward.

    Attributes:
        prediction: With its graph.
        terms: Its loss terms, as rows `[m c]`.
        likelihood: Of the terms.
        share: What a term's loss counts in the whole loss: the weight over the number of terms.
        gradient: Of the whole loss with respect to the rows, `[m c]`.
        call: The forward.
        name: Of the loss term.
    """

    prediction: Tensor
    terms: LossTerms
    likelihood: Likelihood
    share: float
    gradient: Tensor
    call: Call
    name: str

    @property
    def loss_gradient(self) -> Tensor:
        """The gradient, free of loss scaling and clipping where the likelihood could read the labels."""
        known = self.terms.gradient
        return known * self.share if known is not None and self.terms.reads_target else self.gradient

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the prediction's shape as rows `[m c]`."""
        assert self.terms.rows is not None
        return self.terms.rows(tensor)


class BatchLinearization:
    """The predictions of a step's forwards as functions of the parameters.

    Args:
        parameters: What to differentiate with respect to.
        replays: The forwards, with the user's gradient at each prediction.
        estimator: Of the loss terms.
        gradient_scale: Brings the user's gradient to that of the mean loss.
        recorder: Records the forwards' products with weights.

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
    ) -> None:
        if not all(replay.whole for replay in replays):
            raise RuntimeError(
                "several forwards of the model's parts, called one after the other, led to one prediction: only the "
                "last could be run again, and the others' curvature would be missing. Call them within one module"
            )
        self.parameters = list(parameters)
        self.estimator, self.recorder = estimator, recorder
        self._replays, self._scale = list(replays), gradient_scale
        self.pieces = self._run_again()
        self._straight: DoubleBackward | None = None
        self._curved: DoubleBackward | None = None
        self.loss_gradient = self.transposed([piece.gradient for piece in self.pieces])

    def match(self, gradient: Tensors) -> None:
        """Bring the gradients at the predictions to the scale of the parameters' gradient.

        A loss scale, a clipped norm or a mean over micro-batches is a factor of the whole gradient that the user's
        gradients at the predictions need not have.
        """
        own, whole = inner_product(self.loss_gradient, self.loss_gradient), inner_product(gradient, gradient)
        both = inner_product(gradient, self.loss_gradient)
        parallel = both > 0.0 and both * both > (1.0 - 1e-3) * own * whole  # else something was added to the loss
        factor = both / own if parallel else 1.0
        if abs(factor - 1.0) > 1e-2:
            for piece in self.pieces:
                piece.gradient = factor * piece.gradient
            self.loss_gradient = list(torch._foreach_mul(self.loss_gradient, factor))

    def _run_again(self) -> list[Piece]:
        counts: dict[str, float] = {}
        for replay in self._replays:
            counts[replay.name] = counts.get(replay.name, 0.0) + float(replay.terms.count)
        pieces = []
        for call, members in _by_call(self._replays):
            recording = nullcontext() if self.recorder is None else self.recorder.recording()
            with torch.enable_grad(), twice_differentiable(), recording:
                output = call.run()
            predictions = self.estimator.predictions(output)
            for replay in members:
                _require_same(replay, predictions[replay.name])
                pieces.append(self._piece(replay, predictions[replay.name], counts[replay.name]))
        return pieces

    def _piece(self, replay: Replay, prediction: Tensor, count: float) -> Piece:
        terms = replay.terms
        assert terms.rows is not None
        gradient = self._scale * terms.rows(replay.gradient).to(terms.parameters.dtype)
        share = self.estimator.weights[replay.name] / count
        return Piece(
            prediction, terms, self.estimator.likelihoods[replay.name], share, gradient, replay.call, replay.name
        )

    def transposed(self, rows: Tensors) -> list[Tensor]:
        """`Jᵀ w`, for `w` as rows `[m c]` of each piece."""
        largest = max((float(w.abs().amax()) for w in rows if w.numel()), default=0.0)
        # Half precision would lose small numbers.
        half = any(p.prediction.dtype in (torch.float16, torch.bfloat16) for p in self.pieces)
        scale = largest if half and largest > 0.0 else 1.0
        cotangents = [p.terms.restore(w[None] / scale)[0] for p, w in zip(self.pieces, rows, strict=True)]
        found = gradients(self._predictions, self.parameters, cotangents)
        return list(torch._foreach_mul(found, scale)) if scale != 1.0 else found

    def jacobian(self, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """`J v` as rows `[m c]` of each piece, for `v` shaped as the parameters; None stands for zeros."""
        if self._straight is None:
            self._straight = DoubleBackward(self._predictions, self.parameters)
        return self._rows(self._straight.jacobian(vectors))

    def both(self, vectors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """`J v`, and the second derivative of the predictions along `v` weighted by the loss' gradient."""
        if self._curved is None:
            weights = [p.terms.restore(p.gradient[None])[0] for p in self.pieces]
            # Its graph serves `jacobian` as well.
            self._straight = self._curved = DoubleBackward(self._predictions, self.parameters, weights)
        along, bent = self._curved.both(vectors)
        return self._rows(along), bent

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
        """The loss at the parameters as they are now, minus the loss at those of the linearization.

        `u·(f' - f) + share · divergence`, which needs no target.
        """
        change = 0.0
        for piece, new in zip(self.pieces, self._terms_now(), strict=True):
            difference = new.parameters - piece.terms.parameters
            change += float((piece.loss_gradient * difference).sum(dtype=torch.float64))
            change += piece.share * float(piece.likelihood.divergence(piece.terms, new))
        return change if math.isfinite(change) else math.inf

    def second_difference(self, step: Tensors, length: float) -> list[Tensor]:
        """Second derivative of the predictions along `step`, as rows `[m c]`, from two more forwards at `± length`."""
        with moved(self.parameters, step, length):
            ahead = self._terms_now()
        with moved(self.parameters, step, -length):
            behind = self._terms_now()
        return [
            ((a.parameters - p.terms.parameters) + (b.parameters - p.terms.parameters)) / length**2
            for p, a, b in zip(self.pieces, ahead, behind, strict=True)
        ]

    def _terms_now(self) -> list[LossTerms]:
        """Each piece's terms at the parameters as they are now.

        The forwards run with gradients enabled: a model may differentiate itself.
        """
        result = []
        for call, members in _by_call(self._replays):
            with torch.enable_grad():
                predictions = self.estimator.predictions(call.run())
            for replay in members:
                result.append(replay.terms.at(predictions[replay.name].detach()))
        return result


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


def _by_call(replays: Sequence[Replay]) -> list[tuple[Call, list[Replay]]]:
    grouped: dict[int, tuple[Call, list[Replay]]] = {}
    for replay in replays:
        grouped.setdefault(id(replay.call), (replay.call, []))[1].append(replay)
    return list(grouped.values())


def _require_same(replay: Replay, prediction: Tensor) -> None:
    assert replay.terms.rows is not None
    old, new = replay.terms.parameters, replay.terms.rows(prediction.detach())
    half = prediction.dtype in (torch.float16, torch.bfloat16)
    tolerance = 0.1 if half else 1e-3
    if old.shape != new.shape or not bool((new - old).norm() <= tolerance * (1e-30 + old.norm())):
        raise RuntimeError(
            f"{type(replay.call.module).__name__}, run again with the same inputs and random state, does not return "
            f"the prediction that the loss saw: its forward depends on something else (random numbers that are not "
            f"torch's, inputs or parameters changed in place before the step), so its curvature cannot be had"
        )
