"""The projections of multi-head attention: layers in the table, products in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfacopt.layers.attention import projection_edges
from kfacopt.layers.coverage import covered_rows, find_layers
from kfacopt.layers.layer import by_parameter


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, ["in_proj_weight[0:4]", "in_proj_bias[0:4]"]),
        ({"bias": False}, ["in_proj_weight[0:4]"]),
        ({"kdim": 3, "vdim": 2, "add_bias_kv": True}, ["q_proj_weight", "in_proj_bias[0:4]"]),
    ],
)
@pytest.mark.parametrize("separate", [False, True])
def test_projections_are_layers(options: dict[str, Any], labels: list[str], separate: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, **options)
    layers, rest = find_layers(attention, list(attention.parameters()), {}, separate)
    rows = covered_rows(layers, [""] * len(layers))
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.module.removesuffix(".weight").removesuffix(".bias"), []).extend(row.parameters)
    assert list(found) == ["q_proj", "k_proj", "v_proj", "out_proj"] or not options
    assert found["q_proj"] == labels
    assert found["out_proj"] == (["weight"] if options.get("bias") is False else ["weight", "bias"])
    assert len({layer.name for layer in layers}) == len(layers) == len(found) * (len(labels) if separate else 1)
    left = [] if "kdim" not in options else [("bias_k", "bias_v")]
    assert [row.parameters for row in rest] == left
    assert all("in no part of MultiheadAttention" in row.why for row in rest)
    held = by_parameter({layer: layer.values() for layer in layers})
    assert all(torch.equal(value, p) for p, value in held.items())
    assert len(held) == len(list(attention.parameters())) - 2 * len(left)


def test_the_output_projection_alone_is_refused() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options)

    attention = Own(4, 2)
    layers, rest = find_layers(attention, list(attention.parameters()), {}, separate=False)
    assert layers == []
    assert {p for row in rest for p in row.parameters} == {"in_proj_weight", "in_proj_bias", "weight", "bias"}
    why = {row.module: row.why for row in rest}
    assert "forward of its own" in why[""]
    assert "never called" in why["out_proj"]


@pytest.mark.parametrize(
    ("options", "frozen", "left"),
    [
        ({}, ["in_proj_weight"], {"in_proj_bias"}),
        ({}, ["out_proj.weight"], {"bias"}),
        ({"kdim": 3}, ["k_proj_weight"], {"in_proj_bias"}),
    ],
)
def test_a_bias_whose_weight_is_frozen_is_refused(options: dict[str, Any], frozen: list[str], left: set[str]) -> None:
    attention = nn.MultiheadAttention(4, 2, **options)
    for name in frozen:
        attention.get_parameter(name).requires_grad_(False)
    _, rest = find_layers(attention, list(attention.parameters()), {}, separate=False)
    assert {p for row in rest if row.treatment == "AdamW" for p in row.parameters} == left
    assert all("does not show the product" in row.why for row in rest if row.treatment == "AdamW")


def test_projections_tied_between_modules_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    layers, rest = find_layers(model, list(model.parameters()), {}, separate=False)
    assert [(row.module, row.parameters, row.why) for row in rest] == [
        ("a", ("in_proj_weight",), "tied to b.in_proj_weight")
    ]
    assert {layer.roles for layer in layers if layer.name.startswith("a.q")} == {("bias",)}


def test_a_layer_that_shares_a_parameter_with_a_refused_one_is_refused() -> None:
    attention = nn.MultiheadAttention(4, 2)
    refusal = {"k_proj": "it is Tuesday"}
    layers, rest = find_layers(
        attention, list(attention.parameters()), {}, separate=False, refusal=lambda layer: refusal.get(layer.name)
    )
    assert [layer.name for layer in layers] == ["out_proj"]
    assert {row.module: row.why for row in rest}["k_proj"] == "it is Tuesday"
    assert {row.module for row in rest} == {"q_proj", "k_proj", "v_proj"}


# What torch's own attention can be asked for: options of the module, of the call, and how many
# different tensors are query, key and value.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "self": ({}, {}, 1),
    "self, no attention weights": ({}, {"need_weights": False}, 1),
    "self, no bias": ({"bias": False}, {"need_weights": False}, 1),
    "self, bias_k and zero": ({"add_bias_kv": True, "add_zero_attn": True}, {}, 1),
    "cross": ({}, {"need_weights": False}, 2),
    "cross, no bias": ({"bias": False}, {}, 2),
    "three inputs": ({}, {}, 3),
    "separate weights": ({"kdim": 3, "vdim": 2}, {}, 3),
    "separate weights, no bias": ({"kdim": 3, "vdim": 2, "bias": False}, {}, 3),
}


def call(attention: nn.MultiheadAttention, different: int, batch: tuple[int, ...] = (3,), **options: Any) -> Tensor:
    def tokens(length: int, features: int) -> Tensor:
        shape = (*batch, length) if attention.batch_first else (length, *batch)
        return torch.randn(*shape, features, dtype=torch.float64, requires_grad=True)

    query = key = value = tokens(2, 4)
    if different > 1:
        key = value = tokens(5, attention.kdim)
    if different > 2:
        value = tokens(5, attention.vdim)
    output: Tensor = attention(query, key, value, **options)[0]
    return output


def check_projections(attention: nn.MultiheadAttention, output: Tensor) -> set[str]:
    """Rows of all products of a weight sum to its gradient; returns the covered names."""
    products = projection_edges(attention, output)
    cotangents = torch.randn(2, *output.shape, dtype=output.dtype)
    edges = [p.edge for p in products]
    arrived = torch.autograd.grad([output], edges, [cotangents], retain_graph=True, is_grads_batched=True)
    sums: dict[str, Tensor] = {}
    for product, gradient in zip(products, arrived, strict=True):
        g = product.gradient_rows(gradient)
        assert g.shape[:3] == (2, *product.inputs.shape[:2])
        ours = [torch.einsum("vnso,nsi->voi", g, product.inputs), g.sum((1, 2))]
        for name, part in zip(product.names, ours, strict=False):
            sums[name] = sums[name] + part if name in sums else part
    parameters = dict(attention.named_parameters())
    for v, cotangent in enumerate(cotangents):
        truth = torch.autograd.grad(output, [parameters[n] for n in sums], cotangent, retain_graph=True)
        for name, gradient in zip(sums, truth, strict=True):
            torch.testing.assert_close(sums[name][v], gradient, rtol=1e-10, atol=1e-10)
    return set(sums)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("options", "how", "different"), FORMS.values(), ids=FORMS.keys())
def test_projections(
    options: dict[str, Any],
    how: dict[str, Any],
    different: int,
    batch: tuple[int, ...],
    batch_first: bool,
) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options).double()
    covered = check_projections(attention, call(attention, different, batch, **how))
    left = {"bias_k", "bias_v"} | ({"in_proj_bias"} if "kdim" in options else set())
    assert covered == {n for n, _ in attention.named_parameters()} - left


def test_a_datums_rows_are_its_own() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    output = attention(x, x, x)[0]
    cotangent = torch.randn_like(output)
    for product in projection_edges(attention, output):
        (gradient,) = torch.autograd.grad([output], [product.edge], [cotangent], retain_graph=True)
        rows = product.gradient_rows(gradient[None])[0]
        weight = dict(attention.named_parameters())[product.names[0]]
        for n in range(3):
            alone = attention(x[n : n + 1], x[n : n + 1], x[n : n + 1])[0]
            (truth,) = torch.autograd.grad(alone, weight, cotangent[n : n + 1])
            ours = torch.einsum("so,si->oi", rows[n], product.inputs[n])
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
        if product.names[0] == "in_proj_weight":
            assert torch.equal(product.inputs, x)


def test_masks_dropout_and_inputs_without_gradient() -> None:
    attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.float64)
    for options in (
        {"attn_mask": mask, "is_causal": True, "need_weights": False},
        {"attn_mask": mask, "key_padding_mask": padding},
    ):
        assert len(check_projections(attention, attention(x, x, x, **options)[0])) == 4


def test_the_second_of_two_calls_finds_only_its_own_products() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    first = attention(x, x, x)[0]
    products = projection_edges(attention, attention(first, first, first)[0])
    assert [p.names[0] for p in products] == ["out_proj.weight", "in_proj_weight"]
    assert torch.equal(products[1].inputs, first)


def test_in_a_transformer_layer() -> None:
    layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True).double()
    outputs: dict[nn.MultiheadAttention, Tensor] = {}
    for attention in (layer.self_attn, layer.multihead_attn):
        attention.register_forward_hook(lambda m, _, out: outputs.update({m: out[0]}))
    x, memory = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
    layer(x, memory)
    counts = [len(projection_edges(m, outputs[m])) for m in (layer.self_attn, layer.multihead_attn)]
    assert counts == [2, 3]


@pytest.mark.parametrize("frozen", ["out_proj.weight", "in_proj_weight", "in_proj_bias"])
def test_frozen_parameters_are_in_no_product(frozen: str) -> None:
    attention = nn.MultiheadAttention(4, 2).double()
    dict(attention.named_parameters())[frozen].requires_grad_(False)
    covered = check_projections(attention, call(attention, 2))
    with_its_bias = {frozen, frozen.replace("weight", "bias")}
    assert covered == {n for n, _ in attention.named_parameters()} - with_its_bias


def test_two_calls_are_told_apart_by_their_inputs() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    attention.in_proj_weight.requires_grad_(False)  # without `above` the walk finds no end above the second call
    x = torch.randn(3, 5, 4)
    first = attention(x, x, x)[0]
    assert len(projection_edges(attention, first)) == 1
    second = attention(first, first, first)[0]
    assert projection_edges(attention, second) == []
    assert first.grad_fn is not None
    assert [p.names[0] for p in projection_edges(attention, second, above=[first.grad_fn])] == ["out_proj.weight"]


def test_under_autocast_rows_are_half() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(3, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(x, x, x)[0]
    products = projection_edges(attention, output)
    assert [p.inputs.dtype for p in products] == [torch.bfloat16, torch.bfloat16]


def test_all_or_nothing() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(3, 5, 4, requires_grad=True)
    with torch.no_grad():
        assert projection_edges(attention, attention(x, x, x)[0]) == []
    checkpointed = checkpoint(lambda t: attention(t, t, t)[0], x, use_reentrant=True)
    assert projection_edges(attention, checkpointed) == []
    assert projection_edges(attention, x * 2) == []


def test_parametrized_weights_are_in_no_product() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    nn.utils.parametrizations.orthogonal(attention.out_proj)
    x = torch.randn(3, 5, 4)
    products = projection_edges(attention, attention(x, x, x)[0])
    assert [p.names[0] for p in products] == ["in_proj_weight"]
