"""What the user's loss counts each term, from its gradient at the prediction: the one place where factors are read.

A loss may be multiplied by a constant, its data weighted, micro-batches added without dividing. With the target known,
the gradient d_m of each plain loss term is too, and the user's gradient is `u_m = w_m · share · d_m` (share: what the
loss function itself counts a term): the weight w_m is read off, and the Hessian of the user's loss is
`Σ_m w_m · share · Hessian_m`. No label is needed for that but those that the likelihood has read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kfacopt.likelihoods.base import Likelihood, LossTerms
from kfacopt.likelihoods.deferred import DeferredRows
from kfacopt.likelihoods.precision import Precision
from kfacopt.linalg.tensors import row_products


def weighed(likelihood: Likelihood, terms: LossTerms, gradient: Tensor) -> LossTerms:
    """The terms with their weights in the user's loss: exactly one, or one number, for all where that explains them.

    Args:
        likelihood: Of the terms.
        terms: As `likelihood.terms` returned them.
        gradient: The user's gradient at the prediction, in its shape.

    Returns:
        The terms, `scale` and `gradient` multiplied with `weights`; as they are where they are weighed, or (`weights`
        None) no target could be read, or the gradient is not that of weighted terms.

    >>> from kfacopt.likelihoods import Categorical
    >>> logits, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])
    >>> losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    >>> (gradient,) = torch.autograd.grad((torch.tensor([5.0, 1.0]) * losses).mean(), logits)
    >>> weighed(Categorical(), Categorical().terms(logits, gradient=gradient), gradient).weights
    tensor([5., 1.])
    """
    own = terms.held_gradient
    if terms.weights is not None or own is None or not terms.reads_target or terms.rows is None:
        return terms
    precision = Precision.of(terms.parameters.new_empty(0, dtype=gradient.dtype))
    length, squares, along = row_products(terms.rows(gradient).to(own.dtype), own)
    common, each = along.sum() / squares.sum(), along / squares  # of ignored rows both are zero
    # Rows whose gradient is a small difference of probabilities do not tell their weight, and hardly have curvature.
    size = squares.sqrt()
    telling = size > precision.telling * terms.scale * _largest(terms.output_scale)
    telling &= common * size > 64.0 * precision.quantum
    differ = (each / common - 1.0).abs() > precision.factor
    # A squared sine of 4%: half precision, and smoothed labels, stay within; other losses have rows that do not.
    askew = (along * each < (1.0 - 0.04) * length) | (each / common < -precision.factor)
    factor = common / likelihood.term_share(float(terms.count))
    several, other = (telling & differ).any(), (telling & askew).any()
    found, apart, wrong = torch.stack([factor.double(), several.double(), other.double()]).tolist()
    if wrong or found < 0.0:
        return terms
    if not 0.0 < found < float("inf"):  # nothing tells: no row has a gradient, or a number is not finite
        return times(terms, 1.0)
    if not apart:
        return times(terms, 1.0 if abs(found - 1.0) <= precision.factor else found)
    return times(terms, torch.where(telling, each / common, 1.0) * found)


def times(terms: LossTerms, factor: Tensor | float) -> LossTerms:
    """The terms, each counted `factor` (`[m]`, or one number) times as much as it was."""
    held = terms.held_gradient
    if not isinstance(factor, Tensor):
        if factor == 1.0:
            ones = torch.ones_like(terms.scale)
            return terms if terms.weights is not None else replace(terms, weights=ones, gradient=held)
        factor = torch.full_like(terms.scale, factor)
    weights = factor if terms.weights is None else terms.weights * factor
    gradient = (
        held.times(factor) if isinstance(held, DeferredRows) else None if held is None else held * factor[:, None]
    )
    return replace(terms, scale=terms.scale * factor, gradient=gradient, weights=weights)


def mean_weight(terms: LossTerms) -> float:
    """Of the terms that are part of the loss; 1 where the weights are not known.

    >>> from kfacopt.likelihoods import Gaussian
    >>> terms = Gaussian().terms(torch.zeros(2, 1))
    >>> mean_weight(times(terms, torch.tensor([1.0, 3.0])))
    2.0
    """
    if terms.weights is None:
        return 1.0
    plain = torch.where(terms.weights > 0, terms.scale / terms.weights, 0.0)
    return float(terms.scale.sum() / plain.sum()) if bool(plain.any()) else 1.0


def _largest(output_scale: Tensor | None) -> float:
    return 1.0 if output_scale is None else float(output_scale.amax().clamp_min(1e-20))
