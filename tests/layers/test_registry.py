"""Looking handlers up, registering one's own, and modules that must be refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kfacopt.layers import LayerHandler, handler_for, register_handler
from kfacopt.layers.embedding import EmbeddingHandler
from kfacopt.layers.linear import LinearHandler
from kfacopt.layers.registry import HandlerRegistry, RefusedHandler
from kfacopt.likelihoods import KFACType


class Scale(nn.Module):
    """A user's layer: one factor per feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ScaleHandler(LayerHandler):
    structure = "elementwise"
    parameter_names = ("factor",)

    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        x: Tensor = inputs[0].detach()
        return x[:, None, :, None]

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return gradient.unsqueeze(2)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["factor"].unsqueeze(-1)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {"factor": matrix.squeeze(-1)}


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass that changes nothing."""


def refusal(module: nn.Module) -> str:
    handler = handler_for(module)
    assert handler is not None
    return handler.refusal(module) or ""


def test_unknown_layers_have_no_handler() -> None:
    assert handler_for(Scale(3)) is None
    assert handler_for(nn.ReLU()) is None
    assert handler_for(nn.TransformerEncoderLayer(4, 2, 8)) is None


def test_a_users_layer(check_rows_sum_to_gradient: Any) -> None:
    with register_handler(Scale, ScaleHandler()):
        check_rows_sum_to_gradient(Scale(3).double(), torch.randn(4, 3, dtype=torch.float64))
    assert handler_for(Scale(3)) is None


def test_subclasses_that_keep_forward_inherit() -> None:
    assert isinstance(handler_for(Named(3, 2)), LinearHandler)
    assert refusal(Named(3, 2)) == ""


def test_subclasses_with_a_forward_are_refused_until_registered() -> None:
    layer = Doubled(3, 2)
    assert "forward of its own" in refusal(layer)
    own = EmbeddingHandler()
    with register_handler(Doubled, own):
        assert handler_for(layer) is own
        assert refusal(layer) == ""
    assert "forward of its own" in refusal(layer)


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    layer = nn.Embedding(3, 2)
    layer.forward = lambda input: 2 * nn.functional.embedding(input, layer.weight)  # type: ignore[method-assign]
    assert "replaced" in refusal(layer)


def test_the_nearest_type_and_the_newest_registration_win() -> None:
    registry = HandlerRegistry({nn.Linear: LinearHandler()})
    first, second = LinearHandler(), LinearHandler()
    one = registry.register(Named, first)
    two = registry.register(Named, second)
    assert registry.lookup(Named(3, 2)) is second
    one.remove()
    assert registry.lookup(Named(3, 2)) is second
    two.remove()
    two.remove()
    assert registry.lookup(Named(3, 2)) not in (first, second, None)
    again = registry.register(Named, first), registry.register(Named, first)
    again[0].remove()
    assert registry.lookup(Named(3, 2)) is first


@pytest.mark.parametrize(
    ("module_type", "handler", "words"),
    [
        (nn.Linear(1, 1), LinearHandler(), "register the class"),
        (int, LinearHandler(), "subclass of torch.nn.Module"),
        (nn.Linear, LinearHandler, "forget to call"),
    ],
)
def test_bad_registrations_are_named(module_type: Any, handler: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        register_handler(module_type, handler)


def test_a_refused_module_has_no_rows() -> None:
    handler, layer = RefusedHandler("a reason"), nn.Linear(3, 2)
    for call in (
        lambda: handler.input_rows(layer, (), {}, ("weight",), KFACType.EXPAND),
        lambda: handler.gradient_rows(layer, torch.ones(1, 1, 2), KFACType.EXPAND),
        lambda: handler.pack(layer, {}),
        lambda: handler.unpack(layer, torch.ones(2, 3), ("weight",)),
    ):
        with pytest.raises(RuntimeError, match="Linear has no rows: a reason"):
            call()


def _computed() -> list[nn.Module]:
    return [
        parametrizations.orthogonal(nn.Embedding(4, 2)),
        parametrizations.weight_norm(nn.ConvTranspose2d(3, 2, 2)),
        prune.l1_unstructured(nn.BatchNorm1d(3), "bias", 0.5),
    ]


def test_computed_parameters_are_refused() -> None:
    for layer in _computed():
        assert "computed from other parameters" in refusal(layer), layer


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyConv2d(3, 3)])
def test_lazy_modules_are_refused(lazy: nn.Module) -> None:
    assert "lazy" in refusal(lazy)


def test_a_lazy_module_that_has_seen_data_is_not() -> None:
    layer = nn.LazyLinear(2)
    layer(torch.zeros(4, 3))
    assert refusal(layer) == ""
