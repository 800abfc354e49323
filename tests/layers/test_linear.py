"""Linear layers on any leading shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kfacopt.layers import handler_for
from kfacopt.likelihoods import KFACType

Check = Callable[..., None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (2, 3, 2, 3)])
def test_rows(shape: tuple[int, ...], bias: bool, check_rows: Check) -> None:
    check_rows(nn.Linear(3, 2, bias=bias).double(), torch.randn(shape, dtype=torch.float64))


def test_a_single_vector_is_one_datum(check_rows_sum_to_gradient: Check) -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(3, dtype=torch.float64)
    check_rows_sum_to_gradient(layer, x)
    handler = handler_for(layer)
    assert handler is not None
    assert handler.input_rows(layer, (x,), {}, ("weight",), KFACType.REDUCE).shape == (1, 1, 3)
    assert handler.gradient_rows(layer, torch.ones(4, 2), KFACType.REDUCE).shape == (4, 1, 1, 2)


def test_an_empty_batch_has_no_rows() -> None:
    layer = nn.Linear(3, 2)
    handler = handler_for(layer)
    assert handler is not None
    rows = handler.input_rows(layer, (torch.empty(0, 5, 3),), {}, ("weight", "bias"), KFACType.EXPAND)
    assert rows.shape == (0, 5, 4)
    assert handler.gradient_rows(layer, torch.empty(1, 0, 5, 2), KFACType.EXPAND).shape == (
        1,
        0,
        5,
        2,
    )


def test_keyword_input_and_dtype() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    handler = handler_for(layer)
    assert handler is not None
    rows = handler.input_rows(layer, (), {"input": x}, ("weight", "bias"), KFACType.EXPAND)
    assert rows.dtype == torch.bfloat16
    assert not rows.requires_grad
    torch.testing.assert_close(rows[:, 0, :3], x.detach(), rtol=0, atol=0)
    assert (rows[..., 3] == 1).all()


def test_an_input_that_is_no_tensor_is_named() -> None:
    layer = nn.Linear(3, 2)
    handler = handler_for(layer)
    assert handler is not None
    with pytest.raises(TypeError, match="a layer's input to be a tensor, got list"):
        handler.input_rows(layer, ([1.0, 2.0, 3.0],), {}, ("weight",), KFACType.EXPAND)


def test_columns_keep_their_order() -> None:
    layer = nn.Linear(3, 2)
    handler = handler_for(layer)
    assert handler is not None
    parts = {"bias": torch.ones(2), "weight": torch.zeros(2, 3)}
    assert handler.pack(layer, parts).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
