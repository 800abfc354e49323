"""A step's forwards, run again with their graphs: the model as the loss saw it, linear around its parameters.

Jacobian-vector products are made by differentiating twice (the gradient is linear in the cotangent, so its derivative
with respect to the cotangent is the Jacobian), which needs nothing of the model but that its backward is
differentiable. The graphs are kept from product to product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfacopt.estimator import FisherEstimator
from kfacopt.forwards import Call, Replay
from kfacopt.likelihoods import Gaussian, Likelihood, LossTerms
from kfacopt.linalg.cg import inner_product
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
        return self.gradient if known is None or isinstance(self.likelihood, Gaussian) else known * self.share

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
        self._cotangents: list[Tensor] = []
        self._used: list[int] = []
        self._gradients: list[Tensor] = []
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
            # The fused attention kernels have no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), recording:
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

    def _backward(self, cotangents: Tensors, create_graph: bool = False) -> Sequence[Tensor | None]:
        predictions = [piece.prediction for piece in self.pieces]
        return torch.autograd.grad(
            predictions,
            self.parameters,
            list(cotangents),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )

    def transposed(self, rows: Tensors) -> list[Tensor]:
        """`Jᵀ w`, for `w` as rows `[m c]` of each piece."""
        largest = max((float(w.abs().amax()) for w in rows if w.numel()), default=0.0)
        # Half precision would lose small numbers.
        half = any(p.prediction.dtype in (torch.float16, torch.bfloat16) for p in self.pieces)
        scale = largest if half and largest > 0.0 else 1.0
        found = self._backward([p.terms.restore(w[None] / scale)[0] for p, w in zip(self.pieces, rows, strict=True)])
        return [
            torch.zeros_like(p) if g is None else g * scale if scale != 1.0 else g
            for p, g in zip(self.parameters, found, strict=True)
        ]

    def jacobian(self, vectors: Tensors) -> list[Tensor]:
        """`J v` as rows `[m c]` of each piece, for `v` shaped as the parameters."""
        return [self._rows_or_zero(p, g) for p, g in zip(self.pieces, self._second(vectors, ()), strict=True)]

    def both(self, vectors: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """`J v`, and the second derivative of the predictions along `v` weighted by the loss' gradient."""
        found = self._second(vectors, self.parameters)
        head, tail = found[: len(self.pieces)], found[len(self.pieces) :]
        rows = [self._rows_or_zero(piece, g) for piece, g in zip(self.pieces, head, strict=True)]
        bent = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, tail, strict=True)]
        return rows, bent

    def jacobian_columns(self, index: int, columns: slice) -> list[Tensor]:
        """Columns `[k m c]` of the Jacobian with respect to one parameter, for each piece."""
        self._differentiate_backward()
        parameter = self.parameters[index]
        chosen = range(*columns.indices(parameter.numel()))
        if index not in self._used:
            return [p.gradient.new_zeros(len(chosen), *p.gradient.shape) for p in self.pieces]
        position = self._used.index(index)
        result: list[list[Tensor]] = [[] for _ in self.pieces]
        unit = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        for column in chosen:
            unit[column] = 1.0
            found = torch.autograd.grad(
                [self._gradients[position]],
                self._cotangents,
                [unit.view_as(parameter)],
                retain_graph=True,
                allow_unused=True,
            )
            unit[column] = 0.0
            for rows, piece, g in zip(result, self.pieces, found, strict=True):
                rows.append(self._rows_or_zero(piece, g))
        return [torch.stack(rows) for rows in result]

    def _differentiate_backward(self) -> None:
        """Make the graph of the gradient as a function of its cotangents, once."""
        if self._cotangents:
            return
        restored = [p.terms.restore(p.gradient[None])[0] for p in self.pieces]
        self._cotangents = [c.detach().requires_grad_() for c in restored]
        with torch.enable_grad():
            found = self._backward(self._cotangents, create_graph=True)
        self._used = [i for i, g in enumerate(found) if g is not None and g.requires_grad]
        self._gradients = [g for g in found if g is not None and g.requires_grad]

    def _second(self, vectors: Tensors, more: Sequence[Tensor]) -> Sequence[Tensor | None]:
        self._differentiate_backward()
        chosen = [vectors[i] for i in self._used]
        inputs = [*self._cotangents, *more]
        if not chosen:
            return [None] * len(inputs)
        return torch.autograd.grad(self._gradients, inputs, chosen, retain_graph=True, allow_unused=True)

    @staticmethod
    def _rows_or_zero(piece: Piece, gradient: Tensor | None) -> Tensor:
        return torch.zeros_like(piece.gradient) if gradient is None else piece.rows(gradient)

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
