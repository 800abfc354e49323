"""A weight that an embedding and an output layer share (GPT-2, Press & Wolf 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, OneHot, Structure
from kfacopt.layers.embedding import EmbeddingHandler
from kfacopt.layers.linear import LinearHandler
from kfacopt.likelihoods import KFACType


class TiedEmbeddingHandler(LayerHandler):
    """Rows of a weight `W` `[V o]` that is an embedding's and a linear layer's: two kinds, of one matrix `[o V]`.

    The matrix is Wᵀ, as the embedding has it: its calls give rows g (of the embedding's output) and a (one-hot words).
    The linear layer's calls give the rows of the transposed matrix, g of its output and a of its input
    (`Rows.transposed`): the weight's gradient is `Σ g aᵀ` over the former plus `Σ a gᵀ` over the latter.

    Args:
        embedding: The handler of the embeddings.
        linear: The handler of the linear layers.
    """

    structure: ClassVar[Structure] = "tied"
    parameter_names: tuple[str, ...] = ("weight",)

    def __init__(self, embedding: LayerHandler, linear: LayerHandler) -> None:
        self._embedding, self._linear = embedding, linear

    @classmethod
    def of(cls, handlers: Mapping[nn.Module, LayerHandler | None]) -> TiedEmbeddingHandler | None:
        """The handler for a weight that such modules hold; None if they are not embeddings and linear layers, alike."""
        kinds: dict[type[nn.Module], set[tuple[str, LayerHandler | None]]] = {}
        for module, handler in handlers.items():
            kinds.setdefault(type(module), set()).add((module.extra_repr(), handler))
        found = [(kind, next(iter(described))[1]) for kind, described in kinds.items() if len(described) == 1]
        embeddings = [h for kind, h in found if issubclass(kind, nn.Embedding) and isinstance(h, EmbeddingHandler)]
        linears = [h for kind, h in found if issubclass(kind, nn.Linear) and isinstance(h, LinearHandler)]
        whole = len(kinds) == 2 and len(embeddings) == len(linears) == 1
        return cls(embeddings[0], linears[0]) if whole else None

    def transposes(self, module: nn.Module) -> bool:
        """Whether the calls of `module` are of the transposed matrix: those of linear layers."""
        return not isinstance(module, nn.Embedding)

    def _handler(self, module: nn.Module) -> LayerHandler:
        return self._linear if self.transposes(module) else self._embedding

    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor | OneHot:
        return self._handler(module).input_rows(module, inputs, kwargs, roles, approx)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return self._handler(module).gradient_rows(module, gradient, approx)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return self._embedding.pack(module, parts)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return self._embedding.unpack(module, matrix, roles)
