"""A loss of which nothing is known but its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Generator, Tensor

from kfacopt.likelihoods.base import Likelihood, LossTerms
from kfacopt.likelihoods.precision import check_prediction, wide_enough


class AnyLoss(Likelihood):
    """A differentiable loss of any kind, for `curvature="empirical"`: the second moment of its data's gradients.

    The loss is taken to be a mean over the data (the first axis of the prediction), or a sum if its `reduction` says
    so; whether it is multiplied by a constant cannot be told.

    Args:
        loss_func: What the loop calls. Operators call it with prediction and target; optimizers never do.

    >>> loss = AnyLoss(torch.nn.SoftMarginLoss())
    >>> loss.terms(torch.zeros(4, 1), gradient=torch.full((4, 1), 0.25)).gradient.flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """

    is_level: ClassVar[bool] = True
    is_known: ClassVar[bool] = False
    is_hessian = False

    def __init__(self, loss_func: Callable[..., Any]) -> None:
        self.loss_func = loss_func
        self.reduction = "sum" if getattr(loss_func, "reduction", "mean") == "sum" else "mean"

    def __repr__(self) -> str:
        return f"AnyLoss({name_of(self.loss_func)})"

    @torch.no_grad()
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """See `Likelihood.terms`; a target is what the loss function takes."""
        check_prediction(prediction, gradient, name_of(self.loss_func))
        data = prediction.shape[0] if prediction.ndim else 1
        rows_of = partial(_rows, data)
        numbers = rows_of(prediction.detach())
        if target is not None:
            with torch.enable_grad():
                at = prediction.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss_func(at, target).sum(), at)
        rows = None
        if gradient is not None:
            rows = rows_of(gradient) * (1.0 if self.reduction == "sum" else float(data))
        return LossTerms(
            parameters=numbers,
            scale=numbers.new_ones(data),
            count=numbers.new_tensor(float(data)),
            gradient=rows,
            restore=partial(_restored, prediction.shape, prediction.dtype),
            rows=rows_of,
        )

    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> NoReturn:
        """Not known."""
        self._refuse()

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> NoReturn:
        """Not known."""
        self._refuse()

    def divergence(self, old: LossTerms, new: LossTerms) -> NoReturn:
        """Not known."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(f"loss_func {name_of(self.loss_func)}: its curvature is not known; use curvature='empirical'")


def _rows(data: int, tensor: Tensor) -> Tensor:
    """All numbers of a datum as one row `[m c]`: nothing is known of terms within it."""
    return tensor.reshape(data, -1).to(wide_enough(tensor.dtype))


def _restored(shape: torch.Size, dtype: torch.dtype, vectors: Tensor) -> Tensor:
    return vectors.to(dtype).reshape(-1, *shape)


def name_of(loss_func: object) -> str:
    """A function's name, or that of an object's class."""
    return str(getattr(loss_func, "__name__", type(loss_func).__name__))
