"""What every operator of a loss over a data set has: the loop over the data, the weights of the batches, the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.capture.buffers import copied_buffers
from kfacopt.fsdp import is_sharded
from kfacopt.likelihoods.divisor import mean_divisor
from kfacopt.linalg.operator import LinearOperator, Shapes
from kfacopt.operators.matrix_free.products import (
    Linearization,
    as_function,
    check_leaves_parameters,
    parameter_names,
)
from kfacopt.optional import required

Batches = Iterable[tuple[Any, Tensor]]
"""Mini-batches `(X, y)`; X is a tensor, or anything the model takes where `batch_size_fn` tells its size."""

Loss = Callable[[Tensor, Tensor], Tensor]

_CHANGED = (
    "not deterministic: {} came out differently the second time. Put the model into eval mode (dropout), turn off "
    "shuffling, drop_last and augmentation of the data, or pass check_deterministic=False if you know that it does "
    "not matter"
)


class Chained:
    """Several data sets one after the other, again and again.

    Raises:
        ValueError: If one can be iterated over only once.
    """

    def __init__(self, *parts: Batches) -> None:
        self._parts = [_repeatable(part) for part in parts]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for part in self._parts:
            yield from part


class CurvatureLinearOperator(LinearOperator):
    """A matrix of the empirical risk `L(θ) = loss_func(model_func(all X), all y)` over a data set.

    The loss is that of all data as though they were one batch: with `reduction="mean"` a mini-batch counts by what its
    mean divides by (class weights and ignored targets included; by its data where the loss is none of torch's), with
    `"sum"` mini-batches add up. How the data are cut into mini-batches makes no difference, unless the model itself
    mixes data (batch normalisation).

    Args:
        model_func: The model; parameters, gradients and buffers are left as they are.
        loss_func: `loss_func(prediction, y)`, a scalar; it has an attribute `reduction`, `"mean"` or `"sum"`. None
            where the matrix does not depend on a loss.
        params: Parameters of the model: the space that the operator acts on.
        data: Mini-batches `(X, y)` that can be iterated over again and again, at least one. `X` may be a mapping,
            which the model moves to its device itself.
        progressbar: Show one (tqdm) while data are run through.
        check_deterministic: Compare two sweeps over the data, and two products, and refuse what differs.
        num_data: Number of data; None: counted when it is needed.
        block_sizes: Numbers of parameters in each block of a block-diagonal approximation; None: one block.
        batch_size_fn: Tells the batch size of an `X` that is no tensor.

    Raises:
        ValueError: If blocks are not supported or do not add up, if `X` is a mapping and `batch_size_fn` is None, if
            `loss_func` has no reduction that is understood, if a parameter is not the model's or is given twice, or if
            data are empty, no pairs, or can be iterated over only once.
        TypeError: If the model is no module, or does not return a tensor.
        RuntimeError: If model or data are not deterministic.
    """

    SUPPORTS_BLOCKS: bool = False
    FIXED_DATA_ORDER: bool = False

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Loss | None,
        params: Sequence[nn.Parameter],
        data: Batches,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        block_sizes: list[int] | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        self._model_func, self._loss_func = model_func, loss_func
        self._params = list(params)
        self._block_sizes = self._checked_blocks(block_sizes)
        self._data, self._progressbar = _repeatable(data), progressbar
        self._batch_size_fn = batch_size_fn
        self._num_data = num_data
        if loss_func is not None:
            _check_reduction(loss_func)
        if not self._params:
            raise ValueError("params is empty: an operator needs parameters to act on")
        if any(map(is_sharded, self._params)):
            raise RuntimeError(
                "params are sharded (fully_shard, tensor parallelism), but an operator works on whole ones, in one "
                "process: load the model's full state dict into one that is not sharded"
            )
        parameter_names(model_func, self._params)
        check_leaves_parameters(model_func)
        super().__init__(self._get_in_shape(), self._get_out_shape())
        if check_deterministic:
            self._check_deterministic()

    def _get_in_shape(self) -> Shapes:
        return [p.shape for p in self._params]

    def _get_out_shape(self) -> Shapes:
        return [p.shape for p in self._params]

    @property
    def device(self) -> torch.device:
        device: torch.device = _only("device", {p.device for p in self._params})
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = _only("dtype", {p.dtype for p in self._params})
        return dtype

    @property
    def _N_data(self) -> int:
        if self._num_data is None:
            self._num_data = sum(self._batch_size(X) for X, _ in self._loop_over_data("_N_data"))
        return self._num_data

    # -- products --------------------------------------------------------------------------------------------------

    def _matmat_batch(self, X: Any, y: Tensor, M: list[Tensor]) -> list[Tensor]:
        """The mini-batch's matrix, of the loss as its reduction has it, times K columns."""
        raise NotImplementedError(f"{type(self).__name__} must define _matmat_batch or _matmat")

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        total: list[Tensor] = []
        whole = 0.0
        for X, y in self._loop_over_data("_matmat"):
            weight = self._weight(X, y)
            if weight == 0.0:
                continue  # every target is ignored: the mean over nothing is not a number
            whole += weight
            parts = self._matmat_batch(X, y, M)
            if not total:
                total = parts
                continue
            for sum_, part in zip(total, parts, strict=True):
                # The mean so far moves towards the batch's by the batch's share.
                sum_.lerp_(part, weight / whole) if self._averages() else sum_.add_(part)
        return total or [M[0].new_zeros(*s, M[0].shape[-1]) for s in self._out_shape]

    def _averages(self) -> bool:
        return self._loss_func is not None and getattr(self._loss_func, "reduction", None) == "mean"

    def _weight(self, X: Any, y: Tensor) -> float:
        """What the batch's mean counts in the mean over all data; one for sums."""
        if not self._averages():
            return 1.0
        divisor = mean_divisor(self._loss_func, y)
        return float(self._batch_size(X)) if divisor is None else divisor

    def _batch_size(self, X: Any) -> int:
        if self._batch_size_fn is not None:
            return self._batch_size_fn(X)
        if isinstance(X, Tensor):
            return X.shape[0]
        raise ValueError(f"the inputs of a mini-batch are a {type(X).__name__}: batch_size_fn must tell their number")

    def _loop_over_data(self, desc: str, data: Batches | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Mini-batches on the operator's device; a mapping is the model's to move.

        In the loop's body the model's buffers are copies: activation checkpointing runs the model again in a backward.
        """
        for X, y in self._batches(desc, data):
            with copied_buffers(self._model_func):
                yield X, y

    def _batches(self, desc: str, data: Batches | None = None) -> Iterator[tuple[Any, Tensor]]:
        """As `_loop_over_data`, with the model's own buffers: several of these may run side by side."""
        batches: Batches = self._data if data is None else data
        if self._progressbar:
            batches = _with_progressbar(batches, f"{type(self).__name__}.{desc} (on {self.device})")
        empty = True
        for batch in batches:
            empty = False
            X, y = _pair(batch)
            if isinstance(X, MutableMapping) and self._batch_size_fn is None:
                raise ValueError("data has mappings for inputs: batch_size_fn must tell the size of such a batch")
            yield (X.to(self.device) if isinstance(X, Tensor) else X), y.to(self.device)
        if empty:
            raise ValueError("data is empty: there is no mini-batch to take a derivative on")

    # -- the loss and its gradient, and whether they come out the same twice ----------------------------------------

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Gradient, a list shaped as the parameters, and value of the loss over all data.

        Raises:
            ValueError: If there is no loss function.
        """
        if self._loss_func is None:
            raise ValueError("this operator has no loss function, so neither gradient nor loss")
        gradient = [torch.zeros_like(p) for p in self._params]
        loss, whole = torch.zeros((), device=self.device, dtype=self.dtype), 0.0
        for X, y in self._loop_over_data("gradient_and_loss"):
            weight = self._weight(X, y)
            if weight == 0.0:
                continue
            whole += weight
            _, batch_loss, batch_gradient = self._evaluate(X, y)
            loss += weight * batch_loss
            for total, part in zip(gradient, batch_gradient, strict=True):
                total.add_(part, alpha=weight)
        if self._averages() and whole:
            return [g.div_(whole) for g in gradient], loss.div_(whole)
        return gradient, loss

    def _evaluate(self, X: Any, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Prediction, loss and gradient on a batch; no gradient without a loss."""
        with copied_buffers(self._model_func):
            model = Linearization(as_function(self._model_func, self._params, X), self._params)
            prediction = model.value
            if self._loss_func is None:
                return prediction, prediction.new_zeros(()), []
            at = prediction.requires_grad_()
            with torch.enable_grad():
                loss = self._loss_func(at, y)
                (cotangent,) = torch.autograd.grad(loss, at)
            return at.detach(), loss.detach(), model.vjp(cotangent)

    def _check_deterministic(self) -> None:
        """Two sweeps and two products must agree; where the order of the data matters, batch by batch."""
        totals: list[list[Tensor]] = [[], []]  # of the two sweeps
        sweeps = zip_longest(self._batches("check"), self._batches("check"))
        for number, (first, second) in enumerate(sweeps):
            if first is None or second is None:
                raise RuntimeError(_CHANGED.format("the number of mini-batches"))
            if self.FIXED_DATA_ORDER:
                _require_same(f"the inputs of batch {number}", _tensors(first[0]), _tensors(second[0]))
                _require_same(f"the targets of batch {number}", [first[1]], [second[1]])
            for sweep, (X, y) in enumerate((first, second)):
                weight = self._weight(X, y)
                if weight == 0.0:
                    continue
                prediction, loss, gradient = self._evaluate(X, y)
                found = [loss, *gradient] if self._loss_func is not None else [prediction.sum()]
                found = [weight * t for t in found]
                totals[sweep] = [a + b for a, b in zip(totals[sweep], found, strict=True)] if totals[sweep] else found
                if self.FIXED_DATA_ORDER and sweep == 1:
                    _require_same(f"the prediction of batch {number}", [prediction], [self._evaluate(*first)[0]])
        _require_same("the total loss or its gradient", *totals)
        generator = torch.Generator().manual_seed(0)
        probe = torch.rand(self.shape[1], generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        _require_same("the product with a vector", [self @ probe], [self @ probe])

    def _checked_blocks(self, block_sizes: list[int] | None) -> list[int]:
        if block_sizes is None:
            return [len(self._params)]
        if not self.SUPPORTS_BLOCKS:
            raise ValueError(f"block_sizes={block_sizes}: {type(self).__name__} has no block-diagonal approximation")
        if sum(block_sizes) != len(self._params) or any(size <= 0 for size in block_sizes):
            raise ValueError(
                f"block_sizes={block_sizes} must be positive and add up to the number of params, {len(self._params)}"
            )
        return block_sizes


def _repeatable(data: Batches) -> Batches:
    if isinstance(data, Iterator):
        raise ValueError(
            f"data is a {type(data).__name__}, which can be iterated over only once, but every product does: pass a "
            "list or a DataLoader"
        )
    return data


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Tensor) or not isinstance(batch, Sequence) or len(batch) != 2:
        what = f"a tensor of shape {list(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
        what += f" of length {len(batch)}" if isinstance(batch, Sequence) else ""
        raise ValueError(f"data must be mini-batches (X, y), got {what}; one mini-batch alone is data=[(X, y)]")
    X, y = batch
    return X, y


def _check_reduction(loss_func: Any) -> None:
    reduction = getattr(loss_func, "reduction", None)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss_func {loss_func!r} has reduction={reduction!r}: how mini-batches add up to the whole is only known "
            "for an attribute `reduction` that is 'mean' or 'sum'"
        )


def _only(what: str, found: set[Any]) -> Any:
    if len(found) != 1:
        raise RuntimeError(f"params have more than one {what} ({', '.join(sorted(map(str, found)))}): move them to one")
    return found.pop()


def _tensors(X: Any) -> list[Tensor]:
    if isinstance(X, Tensor):
        return [X]
    return [v for v in X.values() if isinstance(v, Tensor)] if isinstance(X, MutableMapping) else []


def _require_same(what: str, first: list[Tensor], second: list[Tensor]) -> None:
    same = len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=5e-5, atol=1e-6, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )
    if not same:
        raise RuntimeError(_CHANGED.format(what))


def _with_progressbar(batches: Batches, desc: str) -> Batches:
    bar: Batches = required("tqdm", "operators").tqdm(batches, desc=desc)
    return bar
