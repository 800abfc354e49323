"""Matrices `Jᵀ B J` with the model's Jacobian J: the generalised Gauss-Newton, and the Fishers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kfacopt.linalg.operator import by_columns
from kfacopt.operators.empirical_risk import CurvatureLinearOperator
from kfacopt.operators.matrix_free.products import Linearization, as_function, loss_hessian_product


class GaussNewtonLinearOperator(CurvatureLinearOperator):
    """`Jᵀ B J` over a data set; a subclass says what B is. Arguments are those of `CurvatureLinearOperator`.

    A product costs about 2 gradients of time and of memory, whatever the number of parameters; K columns share the
    forward.
    """

    SELF_ADJOINT = True

    @abstractmethod
    def _middle(self, prediction: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Products with B on a batch: tensors shaped as the prediction, of the loss as its reduction has it."""

    def _matmat_batch(self, X: Any, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        model = Linearization(as_function(self._model_func, self._params, X), self._params)
        middle = self._middle(model.value, y)
        return by_columns(lambda column: model.vjp(middle(model.jvp(column))), M)


class GGNLinearOperator(GaussNewtonLinearOperator):
    """The generalised Gauss-Newton matrix: B is the Hessian of the loss with respect to the prediction.

    For torch's three losses it is the Fisher (Martens 2020, arXiv:1412.1193, section 9.2), class weights, ignored
    targets, label smoothing, soft targets and `pos_weight` included. Arguments are those of `CurvatureLinearOperator`.

    >>> import torch
    >>> model, loss = torch.nn.Linear(2, 1, bias=False).double(), torch.nn.MSELoss(reduction="sum")
    >>> X = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    >>> ggn = GGNLinearOperator(model, loss, list(model.parameters()), [(X, X.new_zeros(1, 1))])
    >>> ggn @ torch.tensor([1.0, 0.0], dtype=torch.float64)
    tensor([2., 4.], dtype=torch.float64)
    """

    def _middle(self, prediction: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        assert self._loss_func is not None
        loss_func = self._loss_func
        return loss_hessian_product(lambda at: loss_func(at, y), prediction)
