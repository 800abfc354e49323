"""Embeddings as linear layers on one-hot rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfacopt.layers import OneHot, Rows, handler_for
from kfacopt.likelihoods import KFACType

Check = Callable[..., None]


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 2), ()])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_rows(shape: tuple[int, ...], padding_idx: int | None, check_rows_sum_to_gradient: Check) -> None:
    layer = nn.Embedding(6, 3, padding_idx=padding_idx).double()
    check_rows_sum_to_gradient(layer, torch.randint(6, shape))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_per_example_gradients(dtype: torch.dtype) -> None:
    layer = nn.Embedding(6, 3, padding_idx=2).double()
    handler = handler_for(layer)
    assert handler is not None
    x = torch.tensor([[2, 1, 1], [5, 0, 2]], dtype=dtype)
    cotangent = torch.randn(2, 3, 3, dtype=torch.float64)
    one_hot = handler.input_rows(layer, (x,), {}, ("weight",), KFACType.EXPAND)
    rows = Rows(
        one_hot,
        handler.gradient_rows(layer, cotangent[None], KFACType.EXPAND),
        torch.tensor(2.0),
    )
    assert isinstance(rows.inputs, OneHot)
    for n in range(2):
        (truth,) = torch.autograd.grad(layer(x[n]), layer.weight, cotangent[n])
        ours = torch.einsum("so,si->oi", rows.gradients[0, n], rows.inputs.dense(torch.float64)[n])
        torch.testing.assert_close(ours, handler.pack(layer, {"weight": truth}))


def test_padded_places_have_no_gradient() -> None:
    layer = nn.Embedding(6, 3, padding_idx=2)
    handler = handler_for(layer)
    assert handler is not None
    one_hot = handler.input_rows(layer, (torch.tensor([[2, 1]]),), {}, ("weight",), KFACType.EXPAND)
    rows = Rows(one_hot, torch.ones(4, 1, 2, 3), torch.tensor(1.0))
    assert not rows.gradients[:, :, 0].any()
    assert rows.gradients[:, :, 1].all()


def test_counts_are_the_diagonal_of_the_second_moment() -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    one_hot = OneHot(torch.tensor([[0, 3, 3], [3, 1, 0]]), 5, mask)
    dense = one_hot.dense(torch.float64)
    moment: Tensor = torch.einsum("nsi,nsj->ij", dense, dense)
    assert torch.equal(moment.diag(), one_hot.counts(torch.float64))
    assert torch.equal(moment, moment.diag().diag())
    unmasked = OneHot(one_hot.indices, 5)
    assert unmasked.counts(torch.float32).tolist() == [2, 1, 0, 3, 0]


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_refusals_name_the_option(option: str) -> None:
    layer = nn.Embedding(6, 3, **{option: True})
    handler = handler_for(layer)
    assert handler is not None
    reason = handler.refusal(layer)
    assert reason is not None
    assert option in reason
