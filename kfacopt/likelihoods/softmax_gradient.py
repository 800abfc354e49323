"""What the gradient of a cross-entropy tells of its target.

For one row of logits the gradient is `k (s_y p - t_y∘w)` with an unknown k > 0, which all rows share unless the loss
weights its data. It sums to zero over the classes, whatever the target; and for hard labels there are only C such
vectors, of which one fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacopt.likelihoods.precision import Precision, largest_magnitude
from kfacopt.linalg.tensors import magnitude, row_pieces


@dataclass(frozen=True)
class Smoothing:
    """Class weights w `[c]` (`None`: ones) and label smoothing ε: t_y = (1-ε) e_y + ε/C.

    >>> smoothing = Smoothing(torch.tensor([1.0, 3.0]), 0.5)
    >>> p = torch.tensor([[0.5, 0.5]])
    >>> smoothing.curvature(torch.tensor([1]), p), smoothing.gradient(p, torch.tensor([1]))
    (tensor([2.5000]), tensor([[ 1., -1.]]))
    """

    weights: Tensor | None
    label_smoothing: float

    def label_weight(self, labels: Tensor, like: Tensor) -> Tensor:
        """w_y of every row `[m]`."""
        return like.new_ones(labels.shape) if self.weights is None else self.weights[labels]

    def curvature(self, labels: Tensor, like: Tensor) -> Tensor:
        """s_y = sum_c t_c w_c of every row `[m]`."""
        if self.weights is None:
            return like.new_ones(labels.shape)
        return self._per_class(self.weights)[labels]

    def gradient(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """s_y p - t_y∘w of every row `[m c]`."""
        return self.gradient_(probabilities.clone(), labels)

    def gradient_(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """`gradient`, written over the probabilities."""
        gradient, label_weight = probabilities, self.label_weight(labels, probabilities)
        if self.weights is not None:
            gradient.mul_(self.curvature(labels, probabilities)[:, None])
        height = (self.label_smoothing - 1.0) * label_weight
        gradient.scatter_add_(-1, labels[:, None], height[:, None])
        if self.label_smoothing > 0:
            gradient -= self.label_smoothing / probabilities.shape[1] * self._or_ones(probabilities)
        return gradient

    def products(self, gradient: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """For every label y, gradient · d_y and ‖d_y‖² (d_y = s_y p - t_y∘w), each `[m c]`."""
        weights, part = self._or_ones(probabilities), self.label_smoothing / probabilities.shape[1]
        curvature, height = self._per_class(weights), (1.0 - self.label_smoothing) * weights
        along_p = (gradient * probabilities).sum(-1, keepdim=True)
        dot = curvature * along_p - height * gradient - part * (gradient @ weights)[:, None]
        length = probabilities.square().sum(-1, keepdim=True)
        cross = height * probabilities + part * (probabilities @ weights)[:, None]
        constant = height * (height + 2.0 * part * weights) + part**2 * weights.square().sum()
        return dot, (curvature.square() * length - 2.0 * curvature * cross + constant).clamp_min(0)

    def fits(self, classes: int) -> bool:
        """Whether the weights, if there are any, are of so many classes."""
        return self.weights is None or len(self.weights) == classes

    def double(self) -> Smoothing:
        """The same in float64."""
        weights = None if self.weights is None else self.weights.double()
        return Smoothing(weights, self.label_smoothing)

    def _per_class(self, weights: Tensor) -> Tensor:
        return (1.0 - self.label_smoothing) * weights + self.label_smoothing * weights.mean()

    def _or_ones(self, like: Tensor) -> Tensor:
        return like.new_ones(like.shape[-1]) if self.weights is None else self.weights


@dataclass(frozen=True)
class ReadLabels:
    """Labels `[m]`, and what follows from them.

    Attributes:
        labels: A label for every row, also of those that are not part of the loss `[m]`.
        live: Which rows are part of the loss `[m]`.
        gradient: The gradient of every row at its label, of factor 1 `[m c]`.
        recognised: Whether the labels explain the gradient.
    """

    labels: Tensor
    live: Tensor
    gradient: Tensor
    recognised: bool


def class_axes(
    gradient: Tensor, precision: Precision, prediction: Tensor | None = None, smoothing: Smoothing | None = None
) -> list[int]:
    """The axes that may be that of the classes, 1 or the last, the likeliest first.

    It is the one along which the gradient sums to zero; both do so only by rare coincidence. The gradients of a
    well-fitted `prediction` are small differences of probabilities near one, whose rounding is allowed for.

    Raises:
        ValueError: If neither does; the gradient is not that of a cross-entropy.

    >>> u = torch.tensor([[[0.5, -0.5], [0.25, -0.25], [0.1, -0.1]]])
    >>> class_axes(u, Precision.of(u)), class_axes(u.mT, Precision.of(u))
    ([2], [1])
    """
    axes = [0] if gradient.ndim == 1 else sorted({1, gradient.ndim - 1})
    wide = gradient.float() if gradient.dtype != torch.float64 else gradient
    sums = [wide.sum(axis).abs().sum() for axis in axes]
    total, *residuals = torch.stack([magnitude(wide), *sums]).tolist()
    residual = dict(zip(axes, residuals, strict=True))
    # The gradient of a single class is zero, which says nothing.
    axes.sort(key=lambda axis: (residual[axis], gradient.shape[axis] == 1))
    # float16 rounds gradients below its smallest number to zero: that much of the sum is lost.
    allowed = precision.sum * total + precision.quantum * gradient.numel()
    if residual[axes[0]] > allowed and prediction is not None and prediction.shape[axes[0]] > 1:
        allowed += _rounding(prediction, gradient, axes[0], total, smoothing)
    if residual[axes[0]] > allowed:  # false for numbers that are not finite
        raise ValueError(
            f"the gradient that reached the prediction {list(gradient.shape)} is not that of "
            f"CrossEntropyLoss: over the classes (axis {' or '.join(map(str, axes))}) it sums to "
            f"{residual[axes[0]] / total:.2g} of its size, not to 0. Pass the loss_func that the "
            "training loop uses, and say which output it is applied to"
        )
    return [axis for axis in axes if not residual[axis] > allowed]


def unused_outputs(gradient: Tensor, probabilities: Tensor, live: Tensor) -> list[int]:
    """Classes that never have a gradient although they have a probability: the loss is of the other outputs alone.

    >>> p = torch.tensor([[0.5, 0.3, 0.2]])
    >>> unused_outputs(torch.tensor([[0.2, -0.2, 0.0]]), p, torch.tensor([True]))
    [2]
    """
    # A gradient of probability and target that is exactly zero is one of rounding, or none at all; rounding it is where
    # no entry of the row is negative, as the label's would be.
    telling = live & (gradient < 0).any(-1)
    unused = (gradient == 0).all(0) & (probabilities * telling[:, None] > 1e-2).any(0)
    found: list[int] = unused.nonzero().flatten().tolist()
    return found


def _rounding(prediction: Tensor, gradient: Tensor, axis: int, total: float, smoothing: Smoothing | None) -> float:
    """What the gradients' sum may have lost to rounding, from their factor k: `Σ|u|` over what it would be for k = 1.

    That is `Σ 2 (1 - p_max)`, or with label smoothing the length of `s_y p - t_y∘w` for the label y that is nearest.
    Sums over the rows that have a gradient: of others, as data that are masked, the model may be as unsure as it likes.
    """
    wide, live = prediction.detach().double(), (gradient != 0).any(axis)
    if smoothing is not None and smoothing.label_smoothing > 0 and smoothing.fits(prediction.shape[axis]):
        probabilities = wide.softmax(axis).movedim(axis, -1)[live]
        squares = smoothing.double().products(torch.zeros_like(probabilities), probabilities)[1]
        lack = squares.amin(-1).sqrt().sum()
    else:
        lack = -2.0 * torch.expm1(wide.log_softmax(axis).amax(axis))[live].sum()
    factor = total / max(float(lack), torch.finfo(torch.float64).tiny)
    return 4.0 * torch.finfo(prediction.dtype).eps * factor * prediction.numel()


def read_labels(gradient: Tensor, probabilities: Tensor, smoothing: Smoothing, precision: Precision) -> ReadLabels:
    """The labels whose gradients are, up to one factor, the rows `[m c]` of `gradient`."""
    lowest, labels = gradient.min(-1)
    # Without a negative entry, p - 1 was rounded to zero at the label; other entries may have underflowed.
    if bool((rounded := lowest >= 0).any()):
        labels = labels.masked_scatter(rounded, probabilities[rounded].argmax(-1))
    size = torch.maximum(-lowest, gradient.amax(-1))
    inverse = largest_magnitude(lowest.amin(), size.amax()).reciprocal()
    # Multiplied with it, so that loss scaling does not over- or underflow squares.
    size, quantum = size * inverse, precision.quantum * inverse
    candidates = iter([labels])
    if smoothing.label_smoothing > 0:
        gradient, inverse = gradient * inverse, torch.ones_like(inverse)
        candidates = _smoothed_candidates(gradient, probabilities, smoothing, precision)
    for labels in candidates:
        found = _fitted(gradient, inverse, probabilities, labels, size, quantum, smoothing, precision)
        if found.recognised:
            break
    return found


def _fitted(
    gradient: Tensor,
    inverse: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    size: Tensor,
    quantum: Tensor,
    smoothing: Smoothing,
    precision: Precision,
) -> ReadLabels:
    """Labels of the rows that have a gradient, those of the rest, and whether they explain `inverse * gradient`."""
    labels = labels.clone()
    live, zero = torch.ones_like(labels, dtype=torch.bool), size == 0
    if bool(zero.any()):
        # A row whose gradient was rounded to zero has all its probability on the label. Any other row without a
        # gradient was left out of the loss.
        likeliest = probabilities[zero].topk(min(2, probabilities.shape[1]))
        labels[zero] = likeliest.indices[:, 0]
        live[zero] = likeliest.values[:, 1:].sum(-1) <= 2.0 * quantum
    expected = smoothing.gradient(probabilities, labels)
    length = torch.linalg.vector_norm(expected, dim=-1)
    dot, size_of = (torch.cat(parts) for parts in zip(*_compared(gradient, inverse, expected), strict=True))
    cosine = dot / (length * size_of)
    # Where probabilities and labels nearly agree, rounding decides where their difference points: a difference of 3% of
    # the label is several times bfloat16's rounding, and an entry of 64 quanta is itself exact to 2%. Rows below are
    # not judged; smaller bounds would refuse right gradients, larger ones leave too few rows to find a wrong loss by.
    curvature = smoothing.curvature(labels, probabilities)
    telling = (length > 3e-2 * curvature) & (size > 64.0 * quantum) & ~zero
    wrong = telling & (cosine < 1.0 - precision.cosine)
    if probabilities.shape[1] == 2:
        # All gradients of two classes lie along one line: that a label fits says only that all have the same factor,
        # which those of soft targets have not.
        factor = torch.where(telling, dot, 0.0).sum() / torch.where(telling, length.square(), 0.0).sum()
        same = (dot / (factor * length.square()) - 1.0).abs() <= precision.factor
        wrong |= telling & (length > precision.telling * curvature) & ~same
    return ReadLabels(labels, live, expected, recognised=not bool(wrong.any()))


def _compared(gradient: Tensor, inverse: Tensor, expected: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of some rows at a time, the products of `inverse * gradient` with what is expected, and its lengths."""
    for some in row_pieces(gradient):
        scaled = gradient[some] * inverse
        yield torch.linalg.vecdot(scaled, expected[some]), torch.linalg.vector_norm(scaled, dim=-1)


def _smoothed_candidates(
    gradient: Tensor, probabilities: Tensor, smoothing: Smoothing, precision: Precision
) -> Iterator[Tensor]:
    """The labels that a gradient under label smoothing may be of, the likeliest first."""
    yield _smoothed_labels(gradient, probabilities, smoothing, precision)
    yield _nearest_labels(gradient, probabilities, smoothing)
    # A fit that is exact leaves rounding, which points anywhere: its labels make the least of it.
    yield smoothing.products(torch.zeros_like(gradient), probabilities)[1].argmin(-1)


def _nearest_labels(gradient: Tensor, probabilities: Tensor, smoothing: Smoothing) -> Tensor:
    """The labels under label smoothing where each row has a factor of its own: by direction alone."""
    dot, length = smoothing.products(gradient, probabilities)
    return (dot / length.sqrt().clamp_min(torch.finfo(dot.dtype).tiny)).argmax(-1)


def _smoothed_labels(gradient: Tensor, probabilities: Tensor, smoothing: Smoothing, precision: Precision) -> Tensor:
    """The labels under label smoothing, where the sign of the gradient does not tell them.

    Directions alone can be ambiguous too (two classes have but one), so the factor k, common to all rows, is estimated
    from the rows with the longest gradients; given k, labels are as far apart as their one-hot vectors.
    """
    lengths = gradient.square().sum(-1)
    # Up to 64 rows and, below, the 4 factors that explain one of them best: enough for one to be right, at a cost that
    # does not grow with the batch.
    some = lengths.topk(min(64, len(lengths))).indices
    told = lengths[some].double()
    dot, length = smoothing.double().products(gradient[some].double(), probabilities[some].double())
    tiny = torch.finfo(torch.float64).tiny
    agreement = dot[0] / length[0].sqrt().clamp_min(tiny)
    candidates = agreement.topk(min(4, agreement.numel())).indices
    factors = (dot[0] / length[0].clamp_min(tiny))[candidates].clamp_min(tiny)
    fitted = [(k * (k * length - 2.0 * dot)).amin(-1) + told for k in factors]
    relative = torch.stack([(residual * (told > 0)).sum() for residual in fitted]) / told.sum()
    # Two classes that are all but certain can be explained twice: all labels nearly fitted, or all labels wrong.
    # Training makes the first (the largest factor) the likelier.
    # A relative squared error; a hundredth of what the cosine may be off by, as all rows must agree on one factor.
    fits = relative < 1e-2 * precision.cosine
    factor = torch.where(fits.any(), (fits * factors).amax(), factors[relative.argmin()])
    dot, length = smoothing.products(gradient, probabilities)
    return (factor.to(dot.dtype) * length - 2.0 * dot).argmin(-1)
