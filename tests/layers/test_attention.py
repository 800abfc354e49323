"""Multi-head attention is refused by name; its products can be found in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfacopt.layers import handler_for
from kfacopt.layers.attention import projection_edges


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("in_proj_weight", "in_proj_bias")),
        ({"bias": False}, ("in_proj_weight",)),
        (
            {"kdim": 3, "vdim": 2, "add_bias_kv": True},
            (
                "in_proj_bias",
                "q_proj_weight",
                "k_proj_weight",
                "v_proj_weight",
                "bias_k",
                "bias_v",
            ),
        ),
    ],
)
def test_projections_are_refused(options: dict[str, object], names: tuple[str, ...]) -> None:
    attention = nn.MultiheadAttention(4, 2, **options)
    handler = handler_for(attention)
    assert handler is not None
    assert "multi_head_attention_forward" in str(handler.refusal(attention))
    assert handler.roles(attention) == names
    assert set(names) == {n for n, _ in attention.named_parameters(recurse=False)}


def test_the_output_projection_is_refused_for_its_own_reason() -> None:
    projection = nn.MultiheadAttention(4, 2).out_proj
    handler = handler_for(projection)
    assert handler is not None
    assert "never called" in str(handler.refusal(projection))
    assert handler.roles(projection) == ("weight", "bias")


def test_every_parameter_of_a_transformer_layer_is_told_apart() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    treated: set[str] = set()
    refused: set[str] = set()
    for path, module in layer.named_modules():
        handler = handler_for(module)
        if handler is not None:
            names = {f"{path}.{role}" for role in handler.roles(module)}
            (refused if handler.refusal(module) else treated).update(names)
    assert treated | refused == {name for name, _ in layer.named_parameters()}
    assert all(name.startswith("self_attn") for name in refused)
    assert torch.is_grad_enabled()


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


def test_two_calls_that_cannot_be_told_apart_have_no_products() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    attention.in_proj_weight.requires_grad_(False)  # the walk finds no end above the second call
    x = torch.randn(3, 5, 4)
    first = attention(x, x, x)[0]
    assert len(projection_edges(attention, first)) == 1
    assert projection_edges(attention, attention(first, first, first)[0]) == []


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
