"""Cross-entropy on logits as a categorical likelihood."""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from torch import Generator, Tensor

from kfacopt.likelihoods.base import Likelihood, LossTerms
from kfacopt.likelihoods.deferred import DeferredRows
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.precision import (
    Precision,
    check_prediction,
    check_reduction,
    widest,
)
from kfacopt.likelihoods.softmax_gradient import ReadLabels, Smoothing, class_axes, read_labels, unused_outputs
from kfacopt.linalg.tensors import row_pieces


class Categorical(Likelihood):
    """Cross-entropy on logits, torch's `CrossEntropyLoss`.

    One row of logits f with p = softmax(f), label y and class weights w has the loss `-sum_c w_c t_c log p_c` with
    `t = (1-ε) e_y + ε/C`, the gradient `s p - t∘w` with `s = sum_c t_c w_c`, and the Hessian `s (diag p - p pᵀ)`. The
    mean divides by the sum of w_y over the labels that are not ignored.

    Predictions are `[c]`, `[n c]`, torch's `[n c d1 ...]` or `[n ... c]` as language models return them. Without a
    target, the class axis is the one along which the gradient sums to zero, labels are those whose gradient points
    along the user's, rows without any gradient that are not saturated were ignored, and outputs without any that have
    a probability are no classes of the loss (of the first 3 of 10 outputs, say).

    Args:
        class_weights: Weight of every class `[c]`, not negative.
        ignore_index: Targets of this value are left out.
        label_smoothing: ε, from 0 to 1.
        reduction: `"mean"` or `"sum"` as torch has it. `"none"` is read as `"mean"`, since what happens to the numbers
            outside the loss function cannot be seen.

    Note:
        Probability targets are exact when given. Read from the gradient they need `class_weights=None` (the
        Hessian is then the same for any), and the terms' gradients stay unknown. A model that merges data and positions
        into one axis `[(n t) c]` hides which terms share a graph; the type-2 Fisher is exact for `[n t c]`.

    >>> logits = torch.zeros(2, 2, requires_grad=True)
    >>> loss = 128 * torch.nn.functional.cross_entropy(logits, torch.tensor([1, -100]))
    >>> terms = Categorical().terms(logits, gradient=torch.autograd.grad(loss, logits)[0])
    >>> terms.count.item(), terms.scale.tolist(), terms.gradient[0].tolist()
    (1.0, [1.0, 0.0], [0.5, -0.5])
    """

    is_separable: ClassVar[bool] = True
    loss_nodes: tuple[str, ...] = ("NllLoss", "NllLoss2D")

    def __init__(
        self,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        if class_weights is not None and bool((class_weights < 0).any()):
            raise ValueError("class_weights has negative entries, with which the loss is not convex")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={label_smoothing} is not between 0 and 1")
        self.class_weights = class_weights
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = check_reduction(reduction, ("mean", "sum", "none"), "Categorical")

    def __repr__(self) -> str:
        return (
            f"Categorical(class_weights={self.class_weights}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r})"
        )

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; the target is class indices or probabilities."""
        check_prediction(prediction, gradient, "CrossEntropyLoss")
        if prediction.ndim == 0:
            raise ValueError("prediction is a single number, but CrossEntropyLoss needs an axis of classes")
        if target is not None:
            return self._from_target(prediction.detach(), target)
        if gradient is not None:
            return self._from_gradient(prediction.detach(), gradient)
        if not self._unweighted or prediction.ndim > 2:
            raise ValueError(
                f"prediction of shape {list(prediction.shape)} with "
                f"class_weights={self.class_weights}: without a target or a gradient neither the "
                "class axis of more than two nor the weights of the rows are known; pass "
                "target=... or gradient=..."
            )
        layout = RowLayout.of(prediction, prediction.ndim - 1)
        return self._without_gradient(layout, layout.rows(prediction.detach()), None)

    def terms_of_softmax(self, prediction: Tensor, gradient: Tensor) -> LossTerms | None:
        """See `Likelihood.terms_of_softmax`: the classes lie where the gradient's sum is least."""
        if not self._unweighted:
            return None
        axes = {min(1, prediction.ndim - 1), prediction.ndim - 1}
        layout = RowLayout.of(prediction, min(axes, key=lambda axis: float(gradient.float().sum(axis).abs().sum())))
        live = (layout.rows(gradient) != 0).any(-1)
        return self._without_gradient(layout, layout.rows(prediction.detach()), live)

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor | None:
        """`-Σ t·log p` with the targets t that the gradient u = share · scale · (p - t) stands for."""
        logs = widest(terms.parameters).log_softmax(-1)
        # A masked class (logit -inf) has neither probability nor gradient.
        each = torch.where(logs.isfinite(), (gradient - share * terms.scale[:, None] * logs.exp()) * logs, 0.0)
        return each.sum()

    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> Tensor:
        """Gradients p - e_y at labels y drawn from p."""
        logits = terms.parameters
        rows, classes = logits.shape
        device = logits.device if generator is None else generator.device
        uniform = torch.rand(rows, mc_samples, generator=generator, device=device, dtype=logits.dtype)
        # Inverting the distribution function takes one random number a draw, and unlike torch.multinomial it does not
        # fail (on CUDA: not for good) when a batch has diverged.
        uniform = uniform.to(logits.device)
        vectors = logits.new_empty(mc_samples, rows, classes)
        # Of a vocabulary nothing but the vectors is as large as the logits.
        for some in row_pieces(logits):
            probabilities = logits[some].softmax(-1)
            cumulative = probabilities.cumsum(-1)
            labels = torch.searchsorted(cumulative, uniform[some] * cumulative[:, -1:], right=True)
            labels = rearrange(labels.clamp_(max=classes - 1), "m v -> v m")
            self._sampled(terms.scale[some], probabilities, labels, out=vectors[:, some])
        return vectors

    def square_root_columns(self, outputs: int) -> int:
        """One fewer than classes: all logits may rise together, which the softmax does not notice."""
        return max(1, outputs - 1)

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        """Cholesky's root of `scale (diag p - p pᵀ)` in closed form, a vector for each class k but the last.

        With the probability `q_k = Σ_{j>k} p_j` of all later classes, and `q_-1 = 1`, eliminating class after class
        leaves `√(p_k q_k / q_(k-1)) (e_k - Σ_{i>k} (p_i / q_k) e_i)`. Sums of positive numbers and no difference: no
        digit is lost, however sure the model is.
        """
        probabilities = terms.parameters.softmax(-1)
        classes = probabilities.shape[-1]
        chosen = torch.arange(self.square_root_columns(classes), device=probabilities.device)[columns]
        later = torch.zeros_like(probabilities)
        later[:, :-1] = probabilities[:, 1:].flip(-1).cumsum(-1).flip(-1)
        own, rest = probabilities[:, chosen], later[:, chosen]
        nothing = rest == 0  # is left to share out
        share = torch.where(nothing, 0.0, own / (own + rest))
        deviation = (share * terms.scale[:, None]).sqrt().T
        heights = -deviation * torch.where(nothing, 0.0, rest.rsqrt()).T
        follows = torch.arange(classes, device=chosen.device) > chosen[:, None]
        vectors = heights[:, :, None] * probabilities * follows[:, None, :]
        vectors[torch.arange(len(chosen), device=chosen.device), :, chosen] = deviation * rest.sqrt().T
        return vectors

    def hessian_product(self, terms: LossTerms, vectors: Tensor) -> Tensor:
        """`scale (p∘v - p (p·v))`."""
        probabilities = terms.parameters.softmax(-1)
        weighted = probabilities * vectors
        return (weighted - probabilities * weighted.sum(-1, keepdim=True)) * terms.scale[:, None]

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum of scale · KL between the softmax distributions before and after."""
        before = widest(old.parameters).log_softmax(-1)
        after = widest(new.parameters).log_softmax(-1)
        probabilities = before.exp()
        # A masked class (logit -inf) has no probability, but -inf - -inf is not a number.
        terms = torch.where(probabilities > 0, probabilities * (before - after), 0.0)
        return (terms.sum(-1) * old.scale).sum().to(old.parameters.dtype)

    def _sampled(self, scale: Tensor, probabilities: Tensor, labels: Tensor, out: Tensor) -> Tensor:
        """`sqrt(scale / v) (p - e_y)` at labels `[v m]`, written to `out`, `[v m c]`."""
        deviation = (scale / labels.shape[0]).sqrt()
        torch.mul(probabilities.expand_as(out), deviation[:, None], out=out)
        height = -deviation.expand_as(labels)
        return out.scatter_add_(-1, labels[..., None], height[..., None])

    @property
    def _unweighted(self) -> bool:
        """Whether the Hessian is the same for all targets."""
        return self.class_weights is None or bool((self.class_weights == 1.0).all())

    def _weights(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        if self.class_weights.shape != logits.shape[1:]:
            raise ValueError(
                f"class_weights has shape {list(self.class_weights.shape)}, but the prediction has "
                f"{logits.shape[1]} classes"
            )
        return self.class_weights.to(logits)

    def _from_target(self, prediction: Tensor, target: Tensor) -> LossTerms:
        axis = min(1, prediction.ndim - 1)
        if target.is_floating_point():
            if target.shape != prediction.shape:
                raise ValueError(self._wrong_shape(prediction, target))
            layout = RowLayout.of(prediction, axis)
            logits = layout.rows(prediction)
            return self._from_probabilities(layout, logits, layout.rows(target).to(logits))
        shape = prediction.shape
        if target.shape != shape[:axis] + shape[axis + 1 :]:
            axis = prediction.ndim - 1  # as language models have it
            if target.shape != shape[:axis]:
                raise ValueError(self._wrong_shape(prediction, target))
        layout = RowLayout.of(prediction, axis)
        labels, logits = target.reshape(-1).long(), layout.rows(prediction)
        live = labels != self.ignore_index
        labels = torch.where(live, labels, 0)
        outside, all_live = torch.stack([((labels < 0) | (labels >= logits.shape[1])).any(), live.all()]).tolist()
        if outside:
            raise ValueError(
                f"target has labels outside 0 … {logits.shape[1] - 1} that are not ignore_index={self.ignore_index}"
            )
        smoothing = Smoothing(self._weights(logits), self.label_smoothing)

        def gradient(some: slice) -> Tensor:
            found = smoothing.gradient_(logits[some].softmax(-1), labels[some])
            return found if all_live else _of_live(found, live[some])

        deferred = DeferredRows(len(logits), logits.dtype, gradient)
        return self._from_labels(layout, logits, deferred, labels, live)

    def _from_gradient(self, prediction: Tensor, gradient: Tensor) -> LossTerms:
        precision, smoothing = Precision.of(prediction, gradient), Smoothing(self.class_weights, self.label_smoothing)
        doubtful = None
        for axis in class_axes(gradient, precision, prediction, smoothing):
            layout = RowLayout.of(prediction, axis)
            found, logits = self._read(layout, prediction, gradient, precision)
            if not found.recognised and (
                unused := unused_outputs(layout.rows(gradient), logits.softmax(-1), found.live)
            ):
                layout = layout.without(unused)
                found, logits = self._read(layout, prediction, gradient, precision)
                if not found.recognised:
                    raise ValueError(self._of_others(unused, prediction))
            if found.recognised:
                return self._from_labels(layout, logits, _of_live(found.gradient, found.live), found.labels, found.live)
            doubtful = doubtful or (layout, logits, found.live)
        if doubtful is not None and self._unweighted:
            return self._without_gradient(*doubtful)
        raise ValueError(
            f"the gradient that reached the prediction {list(prediction.shape)} is not that of "
            f"CrossEntropyLoss with these class weights and hard labels ({self!r}): pass the "
            "loss_func that the training loop uses; probability targets together with class "
            "weights need the target itself"
        )

    def _read(
        self, layout: RowLayout, prediction: Tensor, gradient: Tensor, precision: Precision
    ) -> tuple[ReadLabels, Tensor]:
        """Labels, and logits `[m c]`, where the loss is of the outputs that the layout has."""
        logits = layout.rows(prediction)
        smoothing = Smoothing(self._weights(logits), self.label_smoothing)
        return read_labels(layout.rows(gradient).to(logits.dtype), logits.softmax(-1), smoothing, precision), logits

    def _from_labels(
        self, layout: RowLayout, logits: Tensor, gradient: Tensor | DeferredRows, labels: Tensor, live: Tensor
    ) -> LossTerms:
        smoothing = Smoothing(self._weights(logits), self.label_smoothing)
        alive = live.to(logits.dtype)
        return LossTerms.of(
            layout,
            logits,
            scale=smoothing.curvature(labels, logits) * alive,
            count=(smoothing.label_weight(labels, logits) * alive).sum(),
            gradient=gradient,
            reads_target=True,
        )

    def _from_probabilities(self, layout: RowLayout, logits: Tensor, target: Tensor) -> LossTerms:
        smoothed = (1.0 - self.label_smoothing) * target + self.label_smoothing / logits.shape[1]
        weights = self._weights(logits)
        weighted = smoothed if weights is None else smoothed * weights
        scale = weighted.sum(-1)
        return LossTerms.of(
            layout,
            logits,
            scale=scale,
            count=logits.new_tensor(float(logits.shape[0])),  # torch: not the weights, for these
            gradient=scale[:, None] * logits.softmax(-1) - weighted,
            reads_target=True,
        )

    def _without_gradient(self, layout: RowLayout, logits: Tensor, live: Tensor | None) -> LossTerms:
        scale = logits.new_ones(logits.shape[0]) if live is None else live.to(logits.dtype)
        return LossTerms.of(layout, logits, scale=scale, count=scale.sum(), gradient=None)

    def _of_others(self, unused: list[int], prediction: Tensor) -> str:
        return (
            f"the loss does not depend on the outputs {unused} of the prediction {list(prediction.shape)}, to which "
            f"the softmax of CrossEntropyLoss gives a probability, and is not that of the other outputs with "
            f"{self!r} either: let the model return the outputs that are classes of the loss (or say where they are "
            f"with prediction=lambda output: ...)"
        )

    def _wrong_shape(self, prediction: Tensor, target: Tensor) -> str:
        return (
            f"target of shape {list(target.shape)} and dtype {target.dtype} does not fit the "
            f"prediction {list(prediction.shape)}: CrossEntropyLoss takes class indices [n d1 ...] "
            "for a prediction [n c d1 ...] (or [n ... c]), or probabilities in the prediction's "
            "shape"
        )


def _of_live(gradient: Tensor, live: Tensor) -> Tensor:
    """Gradients `[m c]`, in place zero in the rows that are not part of the loss."""
    return gradient.mul_(live.to(gradient.dtype)[:, None])
