"""Convolutions: every hyper-parameter, in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einconv import index_pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kfacopt.layers import handler_for, patches
from kfacopt.layers.patches import averaged_pattern
from kfacopt.likelihoods import KFACType

# torch says once that it pads an even kernel unevenly, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Check = Callable[..., None]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "same, even kernel, dilated": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "dilation": {"dilation": 2, "padding": 1},
    "all at once": {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    "groups": {"groups": 2},
    "groups, no bias": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4},
    "depthwise, same": {"groups": 4, "padding": "same", "kernel_size": 2},
    "1x1": {"kernel_size": 1},
    "reflect": {"padding_mode": "reflect", "padding": 1},
    "replicate, stride": {"padding_mode": "replicate", "padding": 2, "stride": 2},
    "circular": {"padding_mode": "circular", "padding": 1, "groups": 2},
    "circular, same, even": {"padding_mode": "circular", "padding": "same", "kernel_size": 2},
}


def convolution_of(axes: int, **options: Any) -> Convolution:
    options = {"kernel_size": 3 if axes < 3 else 2, **options}
    return CONVOLUTIONS[axes](4, 8, **options).double()


def image(axes: int) -> torch.Tensor:
    return torch.randn(2, 4, *(6, 5, 4)[:axes], dtype=torch.float64)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_rows(axes: int, options: dict[str, Any], check_rows: Check) -> None:
    check_rows(convolution_of(axes, **options), image(axes))


UNEQUAL: dict[str, tuple[int, dict[str, Any]]] = {
    "rectangular kernel": (2, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)}),
    "one axis of the kernel": (2, {"kernel_size": (1, 3), "dilation": (3, 2), "padding": "same"}),
    "only one axis same uneven": (2, {"kernel_size": (2, 3), "padding": "same"}),
    "large kernel": (2, {"kernel_size": (4, 5), "padding": (1, 2), "groups": 2}),
    "large kernel 3d": (3, {"kernel_size": (3, 3, 2), "padding": 1, "dilation": (1, 2, 1)}),
    "circular padding": (2, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"}),
}


@pytest.mark.parametrize(("axes", "options"), UNEQUAL.values(), ids=UNEQUAL.keys())
def test_rows_with_unequal_axes(axes: int, options: dict[str, Any], check_rows: Check) -> None:
    check_rows(convolution_of(axes, **options), image(axes))


@pytest.mark.parametrize("entrywise", [0, 10**6], ids=["one copy", "by kernel entry"])
def test_both_ways_to_fill_patches(entrywise: int, monkeypatch: pytest.MonkeyPatch, check_rows: Check) -> None:
    monkeypatch.setattr(patches, "_ENTRYWISE_KERNEL", entrywise)
    options = {"kernel_size": (3, 2), "stride": 2, "dilation": (1, 2), "padding": 1, "groups": 2}
    check_rows(convolution_of(2, **options), image(2))


def test_channels_last_input(check_rows: Check) -> None:
    check_rows(convolution_of(2), image(2).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_unbatched(
    axes: int,
    groups: int,
    check_rows_sum_to_gradient: Check,
    check_reduce_is_mean_and_sum: Check,
) -> None:
    layer = convolution_of(axes, groups=groups)
    check_rows_sum_to_gradient(layer, image(axes)[0])
    check_reduce_is_mean_and_sum(layer, image(axes)[0])


@st.composite
def layers(draw: st.DrawFn) -> tuple[Convolution, torch.Tensor]:
    """Any small convolution, with an input that it accepts."""
    axes, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilation = each(1, 3), each(1, 2)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: str | tuple[int, ...] = draw(st.just("same") | st.just("valid") | st.just(each(0, 2)))
    # Large enough for the dilated kernel, and for what reflection takes from inside.
    size = tuple(d * (k - 1) + 3 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True))
    layer = CONVOLUTIONS[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=1 if padding == "same" else each(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    ).double()
    batch = () if draw(st.booleans()) else (draw(st.integers(1, 2)),)
    torch.manual_seed(0)
    return layer, torch.randn(*batch, layer.in_channels, *size, dtype=torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers())
def test_rows_of_any_convolution(
    check_rows_sum_to_gradient: Check,
    check_reduce_is_mean_and_sum: Check,
    case: tuple[Convolution, torch.Tensor],
) -> None:
    check_rows_sum_to_gradient(*case)
    check_reduce_is_mean_and_sum(*case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 12),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
)
def test_averaged_pattern_is_the_mean_of_einconvs(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    size = max(size, dilation * (kernel - 1) + 1 - 2 * padding, 1)
    expected = index_pattern(size, kernel, stride, padding, dilation).double().mean(1)
    with pytest.MonkeyPatch.context() as patch:
        for longest in (patches._LONGEST_PATTERN, 0):
            patch.setattr(patches, "_LONGEST_PATTERN", longest)
            torch.testing.assert_close(averaged_pattern(size, kernel, stride, padding, dilation), expected)


def test_reduce_of_a_long_signal_needs_little_memory() -> None:
    layer = nn.Conv1d(1, 1, 400, stride=1)
    handler = handler_for(layer)
    assert handler is not None
    rows = handler.input_rows(layer, (torch.ones(1, 1, 10_000),), {}, ("weight",), KFACType.REDUCE)
    torch.testing.assert_close(rows, torch.ones(1, 1, 400), rtol=1e-4, atol=0)


@pytest.mark.parametrize("approx", list(KFACType))
def test_ambient_autocast_changes_nothing(approx: KFACType) -> None:
    layer, x = nn.Conv2d(2, 3, 3, dilation=2, padding=1), torch.randn(2, 2, 7, 7)
    handler = handler_for(layer)
    assert handler is not None
    roles = ("weight", "bias")
    expected = handler.input_rows(layer, (x,), {}, roles, approx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = handler.input_rows(layer, (x,), {}, roles, approx)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("approx", list(KFACType))
def test_half_inputs_keep_their_dtype(approx: KFACType) -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5, dtype=torch.bfloat16)
    handler = handler_for(layer)
    assert handler is not None
    rows = handler.input_rows(layer, (x,), {}, ("weight", "bias"), approx)
    assert rows.dtype == torch.bfloat16


def test_refusals() -> None:
    layer = nn.LazyConv2d(3, 3)
    handler = handler_for(layer)
    assert handler is not None
    assert "lazy" in str(handler.refusal(layer))
    assert handler.roles(layer) == ("weight", "bias")
