"""The loss at the end of a chain: its gradient and its Hessian with respect to the prediction, datum by datum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfacopt.likelihoods import (
    Bernoulli,
    Categorical,
    FisherType,
    Gaussian,
    Likelihood,
    LossTerms,
    likelihood_from,
)


class OutputDerivatives(NamedTuple):
    """Gradient in the prediction's shape and Hessian blocks `[n d d]`, d the numbers of one datum's prediction."""

    gradient: Tensor
    hessian: Tensor


AtOutput = Callable[[Tensor], OutputDerivatives]
"""From a prediction to the loss's derivatives there."""


class ModuleLoss:
    """One of torch's three losses with a target; its derivatives by autograd, so whatever its arguments.

    Args:
        loss_func: `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`, reduction `"mean"` or `"sum"`.
        y: The target.

    Raises:
        TypeError: If the loss is another.
        ValueError: If its reduction is `"none"`, or (at a prediction) the target does not fit.
    """

    def __init__(self, loss_func: nn.Module, y: Tensor) -> None:
        if isinstance(loss_func, Likelihood):
            raise TypeError(
                f"loss_func {type(loss_func).__name__} is a Likelihood, whose value is not known: pass torch's loss"
            )
        if type(likelihood_from(loss_func)) not in (Bernoulli, Categorical, Gaussian):
            raise TypeError(
                f"loss_func {type(loss_func).__name__} is not supported here: pass CrossEntropyLoss, MSELoss or "
                f"BCEWithLogitsLoss"
            )
        if loss_func.reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_func {type(loss_func).__name__} has reduction={loss_func.reduction!r}, which is no number: use "
                f"'mean' or 'sum'"
            )
        self._loss_func, self._y = loss_func, y

    def __call__(self, prediction: Tensor) -> OutputDerivatives:
        loss_func = copy.deepcopy(self._loss_func).to(prediction)
        y = self._y.to(prediction) if self._y.is_floating_point() else self._y.to(prediction.device)
        classes = isinstance(loss_func, nn.CrossEntropyLoss)
        if classes and prediction.ndim < 2:
            raise ValueError(f"CrossEntropyLoss needs a prediction [n c ...], got {list(prediction.shape)}")
        if not classes and y.shape != prediction.shape:
            raise ValueError(
                f"target has shape {list(y.shape)}, prediction {list(prediction.shape)}: {type(loss_func).__name__} "
                f"would broadcast them against each other or fail; reshape one to the other"
            )
        with torch.enable_grad():
            f = prediction.detach().requires_grad_()
            value = loss_func(f, y)
            if not bool(value.isfinite()):
                raise ValueError(
                    f"the loss is {float(value.detach())} on this batch (diverged, or every row is ignored)"
                )
            (gradient,) = torch.autograd.grad(value, f, create_graph=True)
            flat = gradient.reshape(f.shape[0], -1)
            rows = []
            for j in range(flat.shape[1]):
                (row,) = torch.autograd.grad(flat[:, j].sum(), f, retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(f) if row is None else row)
        hessian = torch.stack([row.reshape(f.shape[0], -1) for row in rows], dim=1)
        return OutputDerivatives(gradient.detach(), hessian.add(hessian.mT).mul_(0.5))


class TermsLoss:
    """The loss as a likelihood read it off a backward, when no target is at hand.

    Args:
        likelihood: Of the loss.
        terms: At the prediction.
        gradient: Of the loss with respect to the prediction.
        scale: What the Hessian of the sum over the terms is multiplied with.
    """

    def __init__(self, likelihood: Likelihood, terms: LossTerms, gradient: Tensor, scale: float) -> None:
        self._likelihood, self._terms, self._gradient, self._scale = likelihood, terms, gradient, scale

    def __call__(self, prediction: Tensor) -> OutputDerivatives:
        gradient = self._gradient.to(prediction)
        data = prediction.shape[0]
        hessian = prediction.new_zeros(data, prediction[0].numel(), prediction[0].numel())
        for vectors in self._likelihood.cotangents(self._terms, FisherType.TYPE2):
            columns = vectors.to(prediction).reshape(vectors.shape[0], data, -1)
            hessian += torch.einsum("vni,vnj->nij", columns, columns)
        return OutputDerivatives(gradient, hessian * self._scale)
