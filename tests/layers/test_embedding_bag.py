"""Bags of words: the rows of an embedding whose words are weighted and summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import handler_for
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.compound import CompoundHandler, ModuleCall
from kfacopt.likelihoods import KFACType

WORDS = torch.tensor([[3, 1, 0], [5, 5, 2]])
FLAT, OFFSETS = torch.tensor([3, 1, 0, 5, 5, 2, 4]), torch.tensor([0, 2, 2, 6])
WEIGHTS = torch.tensor([0.5, -1.0, 2.0, 0.25, 3.0, 1.0, -0.5], dtype=torch.float64)
FORMS: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "mean": ({}, (WORDS,), {}),
    "sum": ({"mode": "sum"}, (WORDS,), {}),
    "padding": ({"padding_idx": 5}, (WORDS,), {}),
    "offsets": ({}, (FLAT, OFFSETS), {}),
    "offsets, by name": ({"mode": "sum"}, (), {"input": FLAT, "offsets": OFFSETS}),
    "offsets and padding": ({"padding_idx": 3}, (FLAT, OFFSETS), {}),
    "last offset": ({"include_last_offset": True}, (FLAT, torch.tensor([0, 2, 2, 6, 7])), {}),
    "weights": ({"mode": "sum"}, (FLAT, OFFSETS, WEIGHTS), {}),
    "weights, padding": ({"mode": "sum", "padding_idx": 1}, (FLAT, OFFSETS), {"per_sample_weights": WEIGHTS}),
    "weights of equal bags": ({"mode": "sum"}, (WORDS, None, WEIGHTS[:6].reshape(2, 3)), {}),
    "only empty bags": ({}, (FLAT[:0], torch.tensor([0, 0])), {}),
}


@pytest.mark.parametrize(("options", "inputs", "kwargs"), FORMS.values(), ids=FORMS)
def test_rows_sum_to_each_bags_gradient(
    options: dict[str, Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    bag = nn.EmbeddingBag(6, 3, **options).double()
    handler = handler_for(bag)
    assert isinstance(handler, CompoundHandler)
    (part,) = handler.parts(bag)
    output = bag(*inputs, **kwargs)
    (call,) = handler.calls(bag, ModuleCall(inputs, kwargs, output)).values()
    cotangents = torch.randn(2, *output.shape, dtype=torch.float64)
    one_hot = part.handler.input_rows(bag, call.inputs, {}, ("weight",), KFACType.EXPAND)
    gradients = part.handler.gradient_rows(bag, call.arrange([cotangents]), KFACType.EXPAND)
    rows = Rows(one_hot, gradients, torch.tensor(1.0))
    assert isinstance(rows.inputs, OneHot)
    assert rows.gradients.shape == (2, *call.shape)
    matrices = torch.einsum("vnso,nsi->vnoi", rows.gradients, rows.inputs.dense(torch.float64))
    for v, cotangent in enumerate(cotangents):
        for n in range(len(output)):
            (truth,) = torch.autograd.grad(output[n], bag.weight, cotangent[n], retain_graph=True)
            torch.testing.assert_close(part.handler.unpack(bag, matrices[v, n], ("weight",))["weight"], truth)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "max"}, "mode='max'"),
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ],
)
def test_what_is_no_product_trains_by_adamw(options: dict[str, Any], word: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(6, 3, **options), nn.Linear(3, 2))
    made = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), factor_every=1, refresh_every=1, kl_clip=0.03)
    (row,) = (row for row in made.coverage().rows if row.module == "0")
    assert row.treatment == "AdamW"
    assert word in row.why
    before = model[0].weight.detach().clone()
    nn.functional.cross_entropy(model(WORDS), torch.tensor([0, 1])).backward()
    made.step()
    assert not torch.equal(before, model[0].weight)


def test_a_bag_of_a_nested_tensor_is_said_to_train_by_adamw() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(6, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            words = torch.nested.nested_tensor_from_jagged(x.flatten(), torch.tensor([0, 1, 6]))
            return self.head(self.bag(words))

    model = Nested()
    made = kfacopt.KFAC(model, nn.CrossEntropyLoss(), factor_every=1, refresh_every=1, kl_clip=0.03)
    nn.functional.cross_entropy(model(WORDS), torch.tensor([0, 1])).backward()
    with pytest.warns(UserWarning, match="no backward shows the curvature of 'bag'"):
        made.step()
    treated = {row.module: row.treatment for row in made.coverage().rows}
    assert treated["bag"] == "AdamW"
    assert treated["head"] == "KFAC"
