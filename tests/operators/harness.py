"""Operators of every kind over one small problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacopt.operators import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from tests.cases import BY_NAME

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
WITH_LOSS = (HessianLinearOperator, GGNLinearOperator, FisherMCLinearOperator, EFLinearOperator)
ALL = (*WITH_LOSS, JacobianLinearOperator, TransposedJacobianLinearOperator)
KINDS = [pytest.param(kind, id=kind.__name__.removesuffix("LinearOperator")) for kind in ALL]
LOSS_KINDS = [pytest.param(kind, id=kind.__name__.removesuffix("LinearOperator")) for kind in WITH_LOSS]


def build(kind: Any, model: Any, loss: Any, data: Any, params: Any = None, **options: Any) -> Any:
    """An operator of any kind; a Jacobian takes no loss."""
    params = list(model.parameters()) if params is None else params
    return kind(*((model, loss) if kind in WITH_LOSS else (model,)), params, data, **options)


def ones(operator: Any) -> Tensor:
    """A vector it may be applied to."""
    return torch.ones(operator.shape[1], dtype=operator.dtype)


def build_and_apply(kind: Any, **options: Any) -> Tensor:
    """Some inputs are only seen when the operator is used."""
    operator = build(kind, **options)
    result: Tensor = operator @ ones(operator)
    return result


def problem(name: str = "mlp-ce") -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Model, loss and mini-batches of 4 and 2 data."""
    model, loss, x, y = BY_NAME[name].make()
    return model, loss, list(zip(x.split([4, 2]), y.split([4, 2]), strict=True))
