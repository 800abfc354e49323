"""`torch.nn.EmbeddingBag`: an embedding whose words are summed or averaged before anybody sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfacopt.layers.base import LayerHandler, OneHot
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part, PartCall
from kfacopt.layers.embedding import EmbeddingHandler, embedding_refusal
from kfacopt.likelihoods import KFACType


class EmbeddingBagHandler(CompoundHandler):
    """A `torch.nn.EmbeddingBag` as the embedding within it: a bag's words are the places of one datum.

    Handled exactly: `mode="sum"`, with `per_sample_weights` too, and `"mean"`; bags of equal lengths or by `offsets`;
    `padding_idx`. The rows are those of an embedding of which each word's output is multiplied by its weight (one, or
    one over the number of words that count) and summed; what a bag has fewer than the longest of its batch are rows of
    zeros. Of a nested tensor no words are found, and the optimizer says so.

    >>> handler, bag = EmbeddingBagHandler(), nn.EmbeddingBag(5, 2, mode="max")
    >>> handler.refusal(bag)
    "mode='max' uses other words for each number of the output"
    """

    def __init__(self) -> None:
        super().__init__("treated as the embedding within it", ("weight",))
        self._words = BaggedWordsHandler()

    def refusal(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.EmbeddingBag)
        if module.mode == "max":
            return "mode='max' uses other words for each number of the output"
        return embedding_refusal(module) or LayerHandler.refusal(self, module)

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        if self.refusal(module) is not None:
            return ()
        return (Part("", "each word's share of its bag", self, self._words, {"weight": "weight"}),)

    @torch.no_grad()
    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        assert isinstance(module, nn.EmbeddingBag)
        words, offsets, weights = (_argument(call, *which) for which in enumerate(_ARGUMENTS))
        if words.is_nested:
            return {}
        starts = _starts(module, words, offsets)
        flat = words.flatten()
        counted = torch.ones_like(flat, dtype=torch.bool)
        if module.padding_idx is not None:
            counted = flat != module.padding_idx
        weight = counted.to(call.output.dtype)
        if weights is not None:
            weight = weight * weights.detach().flatten()
        indices, factors, kept = (_by_bag(t, starts) for t in (flat, weight, counted))
        if module.mode == "mean":
            factors = factors / kept.sum(1, keepdim=True).clamp(min=1)
        shape = torch.Size((*indices.shape, module.embedding_dim))
        edge = get_gradient_edge(call.output)
        return {"": PartCall((indices, kept), shape, (edge,), partial(_spread, factors))}


class BaggedWordsHandler(EmbeddingHandler):
    """Rows of the words of bags: the inputs of a call are the words and which of them count, both `[n s]`."""

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> OneHot:
        assert isinstance(module, nn.EmbeddingBag)
        indices, kept = inputs
        return OneHot(indices, module.num_embeddings, kept)


_ARGUMENTS = ("input", "offsets", "per_sample_weights")


def _argument(call: ModuleCall, place: int, name: str) -> Any:
    return call.inputs[place] if len(call.inputs) > place else call.kwargs.get(name)


def _starts(module: nn.EmbeddingBag, words: Tensor, offsets: Tensor | None) -> list[int]:
    """Where in the flat words each bag starts, and the last one ends."""
    if offsets is None:
        return list(range(0, words.numel() + 1, words.shape[1]))
    starts: list[int] = offsets.tolist()
    return starts if module.include_last_offset else [*starts, words.numel()]


def _by_bag(flat: Tensor, starts: Sequence[int]) -> Tensor:
    """Flat words `[L]` as `[n s]`; zero where a bag has fewer than the longest.

    >>> _by_bag(torch.tensor([4, 5, 6]), [0, 1, 1, 3])
    tensor([[4, 0],
            [0, 0],
            [5, 6]])
    """
    bags = [flat[start:end] for start, end in pairwise(starts)]
    return nn.utils.rnn.pad_sequence(bags, batch_first=True) if bags else flat.new_zeros(0, 0)


def _spread(factors: Tensor, arrived: Sequence[Tensor | None]) -> Tensor:
    """Gradients of the bags, `[v n o]`, as those of their words, `[v n s o]`."""
    (gradient,) = arrived
    assert gradient is not None
    return gradient.unsqueeze(2) * factors.unsqueeze(-1)
