"""The diagonal of the Fisher for parameters of modules that no handler covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfacopt.blocks.base import Block, chunks_of_data
from kfacopt.blocks.statistics import RunningAverage
from kfacopt.capture.buffers import copied_buffers
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods.estimator import find_prediction
from kfacopt.operators.kronecker.sweep import Chunk
from kfacopt.operators.matrix_free.products import parameter_names


class DiagonalOfUncovered:
    """`(1/M) Σ_vn (∂⟨v_n, f_n⟩/∂θ)²` for parameters wherever they are used, from per-datum gradients (vmap).

    Args:
        model: Its first axis of inputs and prediction must be the data, and a datum's prediction its own.
        params: The parameters.
        budget: Elements that the per-datum gradients may have at once.

    Attributes:
        averages: One for each parameter, shaped as it is.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], budget: int) -> None:
        self._model, self._params, self._budget = model, list(params), budget
        self._names = parameter_names(model, params)
        self.averages = [RunningAverage() for _ in params]

    @torch.no_grad()
    def update(self, X: Any, chunk: Chunk) -> None:
        """Add a mini-batch's cotangents."""
        if not self._params:
            return
        self._refuse_batch_statistics()
        data = chunk.cotangents.shape[1]
        inputs = _require_batch(X, data)
        values = [p.detach() for p in self._params]

        def inner(own: Sequence[Tensor], x: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
            single = {k: v.unsqueeze(0) for k, v in x.items()} if isinstance(x, Mapping) else x.unsqueeze(0)
            output = functional_call(self._model, dict(zip(self._names, own, strict=True)), (single,))
            prediction = find_prediction(output).squeeze(0)
            return (prediction * cotangent).sum(), prediction

        per_datum = vmap(grad(inner, has_aux=True), in_dims=(None, 0, 0))
        totals = [torch.zeros_like(v) for v in values]
        elements = sum(v.numel() for v in values)
        for part in chunks_of_data(data, elements, self._budget):
            some = {k: v[part] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[part]
            for cotangent in chunk.cotangents:
                with sdpa_kernel(SDPBackend.MATH), copied_buffers(self._model):
                    gradients, predictions = per_datum(values, some, cotangent[part])
                self._require_independent(chunk, part, predictions)
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient.square_().sum(0)
        for average, total in zip(self.averages, totals, strict=True):
            average.add(total, chunk.terms.count if chunk.first else 0.0)

    def accumulate(self) -> None:
        """Average what was added into the averages over all data."""
        for average, parameter in zip(self.averages, self._params, strict=True):
            average.accumulate()
            if average.value is None:
                average.value = torch.zeros_like(parameter.detach())

    def _refuse_batch_statistics(self) -> None:
        for path, module in self._model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or not module.track_running_stats
            ):
                raise ValueError(
                    f"{path!r} normalises by the mini-batch, so per-datum gradients of {', '.join(self._names)} do not "
                    "exist: call model.eval(), or leave them out of params"
                )

    def _require_independent(self, chunk: Chunk, part: slice, predictions: Tensor) -> None:
        rows = chunk.terms.rows
        assert rows is not None
        whole = chunk.terms.restore(chunk.terms.parameters.unsqueeze(0))[0][part]
        if not torch.allclose(whole, predictions, rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
            names = ", ".join(self._names)
            raise ValueError(
                "the prediction of a datum depends on the rest of its mini-batch (batch normalisation in train mode?), "
                f"so per-datum gradients of {names} do not exist: call model.eval(), or leave them out of params"
            )


def _require_batch(X: Any, data: int) -> Any:
    tensors = list(X.values()) if isinstance(X, Mapping) else [X]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.shape[0] != data:
            what = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"uncovered='diagonal' takes apart mini-batches along the first axis of their inputs, which must be "
                f"the number of data {data}: got {what}"
            )
    return X


def refusal(layer: Layer) -> str | None:
    """Why an operator has no factors of a layer that an optimizer has, as a phrase; None: it has."""
    tied = layer.handler.structure == "tied"
    return "tied: an embedding's weight and a linear layer's, of which operators have no factors yet" if tied else None


def refusal_of_sought(layer: Layer) -> str | None:
    """As `refusal`; and of layers that only a forward shows (`Part.sought`): of those the diagonal is sure."""
    if layer.part is not None and layer.part.sought:
        return "only a forward shows whether it has factors"
    return refusal(layer)


def require_found(layer: Layer, block: Block) -> None:
    """Zero is no curvature of a layer whose products were not found.

    Raises:
        NotImplementedError: If no forward showed them.
    """
    if layer.part is not None and layer.part.sought and not block.estimated:
        raise NotImplementedError(
            f"no Kronecker factors for {layer.name}: the forward of {type(layer.modules[0]).__name__} makes no product "
            "that shows them. Leave it out of params, pass uncovered='diagonal', or register a handler with "
            "kfacopt.register_handler"
        )
