"""The Jacobian of a model's predictions over a data set, and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.linalg.operator import LinearOperator, Shapes, by_columns
from kfacopt.operators.empirical_risk import Batches, CurvatureLinearOperator
from kfacopt.operators.matrix_free.products import Linearization, as_function


class _JacobianBase(CurvatureLinearOperator):
    """Shapes and batches that both have; predictions of all data are stacked along their first axis."""

    FIXED_DATA_ORDER = True

    def __init__(
        self,
        model_func: nn.Module,
        params: Sequence[nn.Parameter],
        data: Batches,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        self._shape_of_predictions: list[int] | None = None
        super().__init__(
            model_func,
            None,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )

    def _predictions_shape(self) -> Shapes:
        if self._shape_of_predictions is None:
            X, _ = next(self._loop_over_data("_predictions_shape"))
            values = [p.detach() for p in self._params]
            with torch.no_grad():
                shape = as_function(self._model_func, self._params, X)(values).shape
            self._shape_of_predictions = [self._N_data, *shape[1:]]
        return [self._shape_of_predictions]

    def _linearize(self, X: Any) -> Linearization:
        model = Linearization(as_function(self._model_func, self._params, X), self._params)
        shape, expected = list(model.value.shape), [self._batch_size(X), *self._predictions_shape()[0][1:]]
        if shape != expected:
            raise ValueError(
                f"the prediction for a mini-batch has shape {shape}, not {expected}: predictions are stacked along "
                "their first axis, which must be the data, and the others must agree"
            )
        return model

    def _require_whole(self, data: int) -> None:
        if data != self._predictions_shape()[0][0]:
            raise ValueError(f"num_data={self._num_data}, but the mini-batches have {data} data together")

    def _mirror(self) -> dict[str, Any]:
        return {
            "model_func": self._model_func,
            "params": self._params,
            "data": self._data,
            "progressbar": self._progressbar,
            "check_deterministic": False,
            "num_data": self._num_data,
            "batch_size_fn": self._batch_size_fn,
        }


class JacobianLinearOperator(_JacobianBase):
    """`J`: from parameters to the predictions of all data, `[N, *prediction]`.

    Args:
        model_func: The model.
        params: Its parameters to differentiate with respect to.
        data: Mini-batches `(X, y)` in a fixed order; y is not used.
        progressbar: As for `CurvatureLinearOperator`, and so are the others.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> JacobianLinearOperator(model, list(model.parameters()), [(X, torch.zeros(2))]) @ torch.tensor([1.0, 1.0])
    tensor([3., 7.])
    """

    def _get_out_shape(self) -> Shapes:
        return self._predictions_shape()

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        parts = []
        for X, _ in self._loop_over_data("_matmat"):
            model = self._linearize(X)
            parts += by_columns(lambda column, m=model: [m.jvp(column)], M)  # type: ignore[misc]
        self._require_whole(sum(len(part) for part in parts))
        return [torch.cat(parts)]

    def _adjoint(self) -> LinearOperator:
        return TransposedJacobianLinearOperator(**self._mirror())


class TransposedJacobianLinearOperator(_JacobianBase):
    """`Jᵀ`: from vectors shaped as the predictions of all data, `[N, *prediction]`, to parameters.

    Arguments are those of `JacobianLinearOperator`.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> TransposedJacobianLinearOperator(model, list(model.parameters()), [(X, torch.zeros(2))]) @ torch.ones(2)
    tensor([4., 6.])
    """

    def _get_in_shape(self) -> Shapes:
        return self._predictions_shape()

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        (matrix,) = M
        total = [matrix.new_zeros(*p.shape, matrix.shape[-1]) for p in self._params]
        start = 0
        for X, _ in self._loop_over_data("_matmat"):
            model = self._linearize(X)
            end = start + model.value.shape[0]
            for k, column in enumerate(matrix[start:end].unbind(-1)):
                for sum_, part in zip(total, model.vjp(column), strict=True):
                    sum_[..., k].add_(part)
            start = end
        self._require_whole(start)
        return total

    def _adjoint(self) -> LinearOperator:
        return JacobianLinearOperator(**self._mirror())
