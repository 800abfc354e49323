"""Transposed convolutions: every hyper-parameter, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import handler_for
from kfacopt.likelihoods import KFACType

Check = Callable[..., None]
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS: dict[int, type[Transposed]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "stride over the kernel": {"kernel_size": 2, "stride": 3},
    "padding": {"padding": 1},
    "output padding": {"stride": 3, "output_padding": 2, "padding": 1},
    "output padding below the dilation": {"dilation": 3, "output_padding": 2},
    "dilation": {"dilation": 2, "padding": 1},
    "all at once": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "output_padding": 1},
    "groups, no bias": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4},
    "1x1": {"kernel_size": 1},
    "1x1 far apart": {"kernel_size": 1, "stride": 3, "output_padding": 1},
}


def transposed(axes: int, **options: Any) -> Transposed:
    return CONVOLUTIONS[axes](4, 8, **{"kernel_size": 3 if axes < 3 else 2, **options}).double()


def image(axes: int) -> Tensor:
    return torch.randn(2, 4, *(4, 3, 3)[:axes], dtype=torch.float64)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_rows(axes: int, options: dict[str, Any], check_rows: Check) -> None:
    check_rows(transposed(axes, **options), image(axes))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_unbatched(
    axes: int, groups: int, check_rows_sum_to_gradient: Check, check_reduce_is_mean_and_sum: Check
) -> None:
    layer = transposed(axes, groups=groups, stride=2)
    check_rows_sum_to_gradient(layer, image(axes)[0])
    check_reduce_is_mean_and_sum(layer, image(axes)[0])


@st.composite
def layers(draw: st.DrawFn) -> tuple[Transposed, Tensor]:
    """Any small transposed convolution, with an input that it accepts."""
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, dilation, size = each(1, 3), each(1, 3), each(1, 3), each(1, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    whole = [
        (n - 1) * s + d * (k - 1) + 1 + o for n, s, d, k, o in zip(size, stride, dilation, kernel, extra, strict=True)
    ]
    layer = CONVOLUTIONS[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=stride,
        padding=tuple(draw(st.integers(0, (w - 1) // 2)) for w in whole),
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    ).double()
    batch = () if draw(st.booleans()) else (draw(st.integers(1, 2)),)
    torch.manual_seed(0)
    return layer, torch.randn(*batch, layer.in_channels, *size, dtype=torch.float64)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layers())
def test_rows_of_any_transposed_convolution(
    check_rows_sum_to_gradient: Check, check_reduce_is_mean_and_sum: Check, case: tuple[Transposed, Tensor]
) -> None:
    check_rows_sum_to_gradient(*case)
    check_reduce_is_mean_and_sum(*case)


@pytest.mark.parametrize("size", [(8, 6), (2, 8, 8, 6)])
@pytest.mark.parametrize("keyword", [False, True])
def test_an_output_size_is_followed(size: tuple[int, ...], keyword: bool) -> None:
    """Asked for in the call: the rows' sum is the weight's gradient, at as many places as the output has."""
    layer, x = transposed(2, stride=2, padding=1), image(2)
    handler = handler_for(layer)
    assert handler is not None
    output = layer(x, list(size))
    assert output.shape == (2, 8, 8, 6)
    call = ((x,), {"output_size": list(size)}) if keyword else ((x, list(size)), {})
    inputs = handler.input_rows(layer, *call, ("weight", "bias"), KFACType.EXPAND)
    cotangent = torch.randn_like(output)
    gradients = handler.gradient_rows(layer, cotangent.unsqueeze(0), KFACType.EXPAND)
    assert isinstance(inputs, Tensor)
    ours = handler.unpack(layer, torch.einsum("nso,nsi->oi", gradients[0], inputs), ("weight", "bias"))
    truth = torch.autograd.grad(output, [layer.weight, layer.bias], cotangent)
    for name, gradient in zip(("weight", "bias"), truth, strict=True):
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("approx", list(KFACType))
def test_half_inputs_under_autocast_keep_their_dtype(approx: KFACType) -> None:
    layer, x = nn.ConvTranspose2d(2, 3, 3, stride=2), torch.randn(2, 2, 4, 4, dtype=torch.bfloat16)
    handler = handler_for(layer)
    assert handler is not None
    expected = handler.input_rows(layer, (x,), {}, ("weight", "bias"), approx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = handler.input_rows(layer, (x,), {}, ("weight", "bias"), approx)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, expected)


def test_an_empty_batch_has_no_rows() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3)
    handler = handler_for(layer)
    assert handler is not None
    for approx, places in ((KFACType.EXPAND, 36), (KFACType.REDUCE, 1)):
        assert handler.input_rows(layer, (torch.zeros(0, 2, 4, 4),), {}, ("weight",), approx).shape == (0, places, 18)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_decoder_has_curvature(optimizer: Any) -> None:
    """An autoencoder of images, whose every parameter is covered and whose loss falls."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 3, stride=2, padding=1, output_padding=1),
    )
    made = optimizer(model, nn.MSELoss(), factor_every=1, refresh_every=1)
    assert all(row.treatment.startswith(optimizer.__name__) for row in made.coverage().rows)
    x, losses = torch.randn(16, 1, 8, 8), []
    for _ in range(20):
        made.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        made.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
