"""What a newcomer gets wrong: each is refused with what to do instead, or means what was meant."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from kfacopt.operators import EKFACLinearOperator, GGNLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

Setting = tuple[nn.Module, nn.Module, list[nn.Parameter]]
OPERATORS = [EKFACLinearOperator, GGNLinearOperator, KFACLinearOperator]


@pytest.fixture(name="setting")
def make_setting() -> Setting:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, nn.CrossEntropyLoss(), list(model.parameters())


def batch(number: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 4, generator=generator), torch.randint(0, 2, (number,), generator=generator)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("check", [True, False])
def test_data_that_cannot_be_data(operator: Any, check: bool, setting: Setting) -> None:
    cases: list[tuple[str, Any]] = [
        ("generator.*only once", (pair for pair in [batch()])),
        ("list_iterator.*only once", iter([batch()])),
        ("data is empty", []),
        (r"a tensor of shape \[8, 4\].*data=\[\(X, y\)\]", batch()),
        (r"a tensor of shape \[2, 4\]", batch(2)),  # which would unpack
        ("a tuple of length 1", [batch()[:1]]),
    ]
    for message, data in cases:
        with pytest.raises(ValueError, match=message):
            operator(*setting, data, check_deterministic=check) @ torch.ones(23)


def test_more_data_that_cannot_be_data(setting: Setting) -> None:
    operator = KFACLinearOperator(*setting, [batch()])
    trace = operator.trace
    with pytest.raises(ValueError, match="only once"):
        operator.update(iter([batch()]))
    assert torch.equal(operator.trace, trace)


@pytest.mark.parametrize("damping", [torch.tensor(0.5), numpy.float32(0.5)])
def test_damping_of_any_kind_of_number(damping: Any, setting: Setting) -> None:
    for operator in (kind(*setting, [batch()]) for kind in (EKFACLinearOperator, KFACLinearOperator)):
        found, want = (
            KFACInverseLinearOperator(operator, d, use_exact_damping=True) @ torch.ones(23) for d in (damping, 0.5)
        )
        assert torch.equal(found, want)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), (1.0, -1.0), (1.0, 1.0, 1.0)])
def test_damping_that_is_none(damping: Any, setting: Setting) -> None:
    with pytest.raises(ValueError, match="damping must be a number of at least zero"):
        KFACInverseLinearOperator(KFACLinearOperator(*setting, [batch()]), damping)


def test_vectors_of_another_dtype_and_scalars_as_operators(setting: Setting) -> None:
    operator = EKFACLinearOperator(*setting, [batch()])
    with pytest.raises(ValueError, match=r"EKFACLinearOperator is of torch.float32, but .* torch.float64"):
        operator @ torch.ones(23, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"cannot add float .* IdentityLinearOperator"):
        operator + 1.0  # type: ignore[operator]
