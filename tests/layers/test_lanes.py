"""Products of patches that are not formed, against those of the patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import ConvolutionHandler, handler_for, lanes
from kfacopt.layers.lanes import UnformedPatches
from kfacopt.likelihoods import KFACType
from kfacopt.operators import EKFACLinearOperator, KFACLinearOperator

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of tests are smaller than those that lanes are faster for."""
    monkeypatch.setattr(lanes, "_FEWEST", 1)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Any, Tensor]:
    """Any small convolution of one group and stride one along its first axis, with an input that it accepts."""
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int, first: int | None = None) -> tuple[int, ...]:
        drawn = tuple(draw(st.integers(low, high)) for _ in range(axes))
        return drawn if first is None else (first, *drawn[1:])

    kernel, dilation = each(1, 3, first=draw(st.integers(2, 4))), each(1, 2)
    padding: str | tuple[int, ...] = draw(st.just("same") | st.just("valid") | st.just(each(0, 2)))
    size = tuple(d * (k - 1) + 3 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True))
    layer = CONVOLUTIONS[axes](
        draw(st.integers(1, 3)),
        2,
        kernel,
        stride=1 if padding == "same" else each(1, 3, first=1),
        padding=padding,
        dilation=dilation,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    ).double()
    torch.manual_seed(0)
    images = torch.randn(draw(st.integers(1, 3)), layer.in_channels, *size, dtype=torch.float64)
    return layer, images.to(memory_format=torch.channels_last) if axes == 2 and draw(st.booleans()) else images


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=layers(), bias=st.booleans(), many=st.sampled_from([1, 1000]), at_once=st.sampled_from([1, 2**18]))
def test_products_are_those_of_the_patches(case: tuple[Any, Tensor], bias: bool, many: int, at_once: int) -> None:
    layer, images = case
    roles = ("weight", "bias") if bias else ("weight",)
    assert UnformedPatches.suits(layer, images, roles)
    expected = ConvolutionHandler().input_rows(layer, (images,), {}, roles, KFACType.EXPAND)
    assert isinstance(expected, Tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "_MANY", many)
        patch.setattr(lanes, "ELEMENTS_IN_CACHE", at_once)
        rows = ConvolutionHandler().unformed_rows(layer, (images,), {}, roles)
        assert rows is not None
        assert rows.shape == expected.shape
        assert rows.dtype == expected.dtype
        flat, gradients = expected.flatten(0, 1), torch.randn(*expected.shape[:2], 3, dtype=torch.float64)
        torch.testing.assert_close(rows.covariance(), flat.mT @ flat)
        torch.testing.assert_close(rows.per_datum(gradients), gradients.mT @ expected)
        torch.testing.assert_close(rows.averaged(), expected.mean(1, keepdim=True))
        assert torch.equal(rows.some(slice(1, None)).formed(), expected[1:])
        assert torch.equal(rows.formed(), expected)
        assert rows.formed() is rows.formed()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 2, 3, stride=2),
        nn.Conv2d(4, 2, 3, groups=2),
        nn.Conv2d(4, 2, (1, 3)),
        nn.Conv2d(4, 2, (17, 1)),
    ],
    ids=["stride", "groups", "nothing to share", "tall kernel"],
)
def test_whose_patches_are_formed(layer: nn.Conv2d) -> None:
    images = torch.randn(2, 4, 20, 20)
    assert ConvolutionHandler().unformed_rows(layer, (images,), {}, ("weight", "bias")) is None


def test_rows_of_a_bias_alone_and_of_no_data_are_formed() -> None:
    layer, handler = nn.Conv2d(1, 2, 3), ConvolutionHandler()
    assert handler.unformed_rows(layer, (torch.ones(2, 1, 5, 5),), {}, ("bias",)) is None
    assert handler.unformed_rows(layer, (torch.ones(0, 1, 5, 5),), {}, ("weight",)) is None


def test_one_image_and_half_precision() -> None:
    layer, images = nn.Conv2d(2, 3, 3, padding=1), torch.randn(2, 5, 5)
    rows = ConvolutionHandler().unformed_rows(layer, (), {"input": images.bfloat16()}, ("weight", "bias"))
    assert rows is not None
    assert rows.shape == (1, 25, 19)
    assert rows.dtype == torch.float32
    assert rows.to(torch.float64).covariance().dtype == torch.float64


class Scaled(ConvolutionHandler):
    """Rows of its own: they are asked for, not those of the class below."""

    def input_rows(self, *arguments: Any) -> Tensor:
        rows = super().input_rows(*arguments)
        assert isinstance(rows, Tensor)
        return 2.0 * rows


def test_rows_of_a_handler_that_inherits_are_its_own() -> None:
    assert Scaled().unformed_rows(nn.Conv2d(1, 1, 3), (torch.ones(2, 1, 5, 5),), {}, ("weight",)) is None


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, (2, 3)), nn.Tanh())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2 * 5 * 4, 3)).double()


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("approx", list(KFACType))
@pytest.mark.parametrize("separate", [True, False])
def test_operators_do_not_depend_on_it(
    operator: type[KFACLinearOperator], approx: KFACType, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = small_network(), (torch.randn(40, 1, 6, 6, dtype=torch.float64), torch.arange(40) % 3)
    found = []
    for fewest in (1, 10**9):
        monkeypatch.setattr(lanes, "_FEWEST", fewest)
        made = operator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [batch],
            kfac_approx=approx,
            separate_weight_and_bias=separate,
            fisher_type="type-2",
        )
        torch.manual_seed(1)
        found.append(made @ torch.randn(made.shape[1], dtype=torch.float64))
    torch.testing.assert_close(*found)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "KFAC": kfacopt.KFAC,
    "EKFAC": kfacopt.EKFAC,
    "natural gradient": lambda model, loss: kfacopt.KFAC(model, loss, kl_clip=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_does_not_depend_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fewest in (1, 10**9):
        monkeypatch.setattr(lanes, "_FEWEST", fewest)
        model = small_network()
        loss_func = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[name](model, loss_func)
        torch.manual_seed(2)
        for _ in range(4):
            loss = loss_func(model(torch.randn(8, 1, 6, 6, dtype=torch.float64)), torch.arange(8) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_kfac_forms_no_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rows: UnformedPatches) -> Tensor:
        raise AssertionError("patches are formed")

    monkeypatch.setattr(UnformedPatches, "_form", refuse)
    model, loss_func = small_network(), nn.CrossEntropyLoss()
    optimizer = kfacopt.KFAC(model, loss_func)
    loss_func(model(torch.randn(8, 1, 6, 6, dtype=torch.float64)), torch.arange(8) % 3).backward()
    optimizer.step()
    handler = handler_for(model[0])
    assert handler is not None
    rows = handler.unformed_rows(model[0], (torch.randn(8, 1, 6, 6),), {}, ("weight",))
    assert rows is not None
    with pytest.raises(AssertionError, match="formed"):  # it would be seen
        rows.formed()


def test_what_is_not_a_number_shows() -> None:
    images = torch.randn(3, 2, 6, 6)
    images[1, 0, 5, 5] = float("nan")
    rows = ConvolutionHandler().unformed_rows(nn.Conv2d(2, 1, 3), (images,), {}, ("weight",))
    assert rows is not None
    assert not rows.covariance().sum().isfinite()
