"""Models written out: attention as linear layers and a softmax, a bag as its words, steps one by one, a
tied weight as two weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.layers import handler_for
from kfacopt.layers.layer import Layer


class ExplicitAttention(nn.Module):
    """What a `torch.nn.MultiheadAttention` computes, with its parameters in modules of their own; without dropout.

    The projections see `[n t e]`, whatever the layout outside.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.outer_batch_first = attention.num_heads, attention.batch_first
        self.add_zero = attention.add_zero_attn
        self.bias_k, self.bias_v = deepcopy(attention.bias_k), deepcopy(attention.bias_v)
        self.batch_first, self.in_proj_bias = attention.batch_first, None  # what TransformerEncoderLayer looks at
        size, packed = attention.embed_dim, attention.in_proj_weight
        separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weights = separate if packed is None else packed.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        assert self.out_proj.weight.shape == (size, size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.ndim == 3
        swap = batched and not self.outer_batch_first
        inputs = [t.transpose(0, 1) if swap else t if batched else t.unsqueeze(0) for t in (query, key, value)]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(t) for layer, t in zip(projections, inputs, strict=True))
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        if self.add_zero:
            k, v = (torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        for mask, axes in ((attn_mask, (0, 0)), (key_padding_mask, (1, 1))):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)
                whole = nn.functional.pad(mask, (0, scores.shape[-1] - mask.shape[-1]))
                scores = scores + (whole if axes == (0, 0) else whole.reshape(-1, 1, 1, whole.shape[-1]))
        weights = scores.softmax(-1)
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        output = output.transpose(0, 1) if swap else output if batched else output.squeeze(0)
        return output, weights.mean(1) if need_weights else None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class ExplicitBag(nn.Module):
    """What a `torch.nn.EmbeddingBag` computes, with an embedding of one word after the other and a weighted sum.

    Words that a shorter bag lacks are the padding, which is a word of its own if the bag has none.
    """

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.mode, self.last, self.padding = bag.mode, bag.include_last_offset, bag.padding_idx
        self.words = nn.Embedding(bag.num_embeddings, bag.embedding_dim, bag.padding_idx, dtype=bag.weight.dtype)
        self.words.weight = nn.Parameter(bag.weight.detach().clone())

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if offsets is not None:
            ends = [*offsets[1:].tolist()] + ([] if self.last else [len(input)])
            starts = offsets.tolist()[: len(ends)]
            length = max(end - start for start, end in zip(starts, ends, strict=True))
            place = torch.tensor(starts)[:, None] + torch.arange(length)
            inside = place < torch.tensor(ends)[:, None]
            assert self.padding is not None or bool(inside.all()), "what is lacking needs a padding"
            place = place.clamp(max=len(input) - 1)
            input = torch.where(inside, input[place], 0 if self.padding is None else self.padding)
            per_sample_weights = None if per_sample_weights is None else per_sample_weights[place]
        counts = torch.ones_like(input) if self.padding is None else (input != self.padding).to(input)
        weights = counts if per_sample_weights is None else counts * per_sample_weights
        summed = (self.words(input) * weights.unsqueeze(-1)).sum(1)
        return summed / counts.sum(1, keepdim=True).clamp(min=1) if self.mode == "mean" else summed


class ExplicitRecurrent(nn.Module):
    """What a recurrent module or cell computes, with a linear layer for each of its matrices; no packed sequences."""

    def __init__(self, module: nn.RNNBase | nn.RNNCellBase) -> None:
        super().__init__()
        self.is_cell = isinstance(module, nn.RNNCellBase)
        self.kind = type(module).__name__.removesuffix("Cell")
        self.nonlinearity = getattr(module, "nonlinearity", "tanh")
        self.batch_first, self.hidden = self.is_cell or module.batch_first, module.hidden_size
        self.endings = [("",)]
        if not self.is_cell:
            ways = ("", "_reverse") if module.bidirectional else ("",)
            self.endings = [tuple(f"_l{layer}{way}" for way in ways) for layer in range(module.num_layers)]
        held = dict(module.named_parameters())
        for name, weight in held.items():
            if name.startswith("weight_"):
                matrix = name.removeprefix("weight_")
                self.add_module(matrix, _linear(weight, held.get(f"bias_{matrix}")))

    def step(self, x: Tensor, state: list[Tensor], ending: str) -> list[Tensor]:
        """One step, of which the product with the input is `x`."""
        h = self.get_submodule(f"hh{ending}")(state[0])
        if self.kind == "RNN":
            return [(x + h).relu() if self.nonlinearity == "relu" else (x + h).tanh()]
        if self.kind == "GRU":
            (r, z, n), (u, v, w) = x.chunk(3, -1), h.chunk(3, -1)
            z = (z + v).sigmoid()
            return [(1 - z) * (n + (r + u).sigmoid() * w).tanh() + z * state[0]]
        i, f, g, o = (x + h).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return [self.get_submodule(f"hr{ending}")(h) if hasattr(self, f"hr{ending}") else h, c]

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        x = x.unsqueeze(1) if self.is_cell else x if self.batch_first else x.transpose(0, 1)
        first = self.endings[0][0]
        sizes = [self.get_submodule(f"hh{first}").in_features, self.hidden][: 2 if self.kind == "LSTM" else 1]
        count = sum(map(len, self.endings))
        starts = [x.new_zeros(count, len(x), size) for size in sizes]
        if hx is not None:
            given = hx if isinstance(hx, tuple) else (hx,)
            starts = [state.reshape(count, len(x), -1) for state in given]
        last: list[list[Tensor]] = []
        for layer in self.endings:
            runs = []
            for ending in layer:
                products = self.get_submodule(f"ih{ending}")(x)
                state, outputs = [start[len(last)] for start in starts], {}
                times = range(x.shape[1])
                for t in reversed(times) if "reverse" in ending else times:
                    state = self.step(products[:, t], state, ending)
                    outputs[t] = state[0]
                last.append(state)
                runs.append(torch.stack([outputs[t] for t in times], 1))
            x = torch.cat(runs, -1)
        ends = [torch.stack(some) for some in zip(*last, strict=True)]
        if self.is_cell:
            return (ends[0][0], ends[1][0]) if self.kind == "LSTM" else ends[0][0]
        return x if self.batch_first else x.transpose(0, 1), tuple(ends) if self.kind == "LSTM" else ends[0]


RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)

WRITTEN: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.MultiheadAttention: ExplicitAttention,
    nn.EmbeddingBag: ExplicitBag,
    **dict.fromkeys(RECURRENT, ExplicitRecurrent),
}


def explicit_model(model: nn.Module) -> nn.Module:
    """A copy of a model, each module in it whose layers are no modules written out."""
    if type(model) in WRITTEN:
        return WRITTEN[type(model)](model)
    copy = deepcopy(model)
    for module in list(copy.modules()):
        for name, child in module.named_children():
            if type(child) in WRITTEN:
                setattr(module, name, WRITTEN[type(child)](child))
    return copy


def counterpart(model: nn.Module, layer: Layer) -> tuple[nn.Module, Layer]:
    """The model written out, and the layer there that is the same as a part of a module."""
    written = explicit_model(model)
    (path,) = (path for path, module in model.named_modules() if module is layer.modules[0])
    within = "" if layer.part is None else layer.part.name
    linear = written.get_submodule(".".join(filter(None, [path, within])))
    linear = linear.words if isinstance(linear, ExplicitBag) else linear
    handler = handler_for(linear)
    assert handler is not None
    return written, Layer(layer.name, (linear,), handler, {role: linear.get_parameter(role) for role in layer.roles})


def untied(model: nn.Module, layer: Layer) -> tuple[nn.Module, Layer, Layer]:
    """A copy of a model whose linear layers have a weight of their own; the embeddings, and those linear layers."""
    copy = deepcopy(model)
    paths = {path: module for path, module in model.named_modules() if module in layer.modules}
    heads = [copy.get_submodule(path) for path, module in paths.items() if isinstance(module, nn.Linear)]
    words = [copy.get_submodule(path) for path, module in paths.items() if isinstance(module, nn.Embedding)]
    own = nn.Parameter(layer.parameters["weight"].detach().clone())
    layers = []
    for modules in (words, heads):
        for module in modules if modules is heads else ():
            module.weight = own
        handler = handler_for(modules[0])
        assert handler is not None
        layers.append(Layer(layer.name, tuple(modules), handler, {"weight": modules[0].get_parameter("weight")}))
    return copy, layers[0], layers[1]
