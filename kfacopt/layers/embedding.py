"""`torch.nn.Embedding`: a linear layer on one-hot inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, OneHot, Structure, input_tensor
from kfacopt.likelihoods import KFACType


class EmbeddingHandler(LayerHandler):
    """Rows of `y = W e_index`: one-hot, kept as indices. The matrix `[o V]` is weightᵀ.

    `reduce` is treated as `expand`: an average of one-hot rows has a dense `[V V]` second moment, while that of the
    rows is diagonal. Places that hold `padding_idx` are masked, as torch gives that row of the weight no gradient.

    >>> layer, handler = nn.Embedding(7, 2), EmbeddingHandler()
    >>> x = torch.tensor([[1, 6, 0]])
    >>> handler.input_rows(layer, (x,), {}, ("weight",), KFACType.EXPAND).indices
    tensor([[1, 6, 0]])
    """

    structure: ClassVar[Structure] = "one-hot"
    parameter_names: tuple[str, ...] = ("weight",)

    def refusal(self, module: nn.Module) -> str | None:
        return embedding_refusal(module) or super().refusal(module)

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> OneHot:
        assert isinstance(module, nn.Embedding)
        indices = input_tensor(inputs, kwargs)
        data = indices.shape[0] if indices.ndim else 1
        places = indices.shape[1:].numel()
        indices = indices.reshape(data, places)
        padding = module.padding_idx
        mask = None if padding is None else indices != padding
        return OneHot(indices, module.num_embeddings, mask)

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        samples, *batch, features = gradient.shape
        data = batch[0] if batch else 1
        return gradient.reshape(samples, data, torch.Size(batch[1:]).numel(), features)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return rearrange(parts["weight"], "i o -> o i")

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {"weight": rearrange(matrix, "o i -> i o")}


def embedding_refusal(module: nn.Module) -> str | None:
    """Why an `nn.Embedding` or `nn.EmbeddingBag` is asked for something that is no product with its weight."""
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    if module.max_norm is not None:
        return "max_norm changes the weight in the forward pass"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq makes the gradient another function's than the loss's"
    return "sparse=True gives sparse gradients" if module.sparse else None
