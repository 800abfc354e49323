"""Products with the Jacobian or the Hessian of a model on one batch (see `kfacopt.replay.double_backward`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kfacopt.capture.buffers import copied_buffers
from kfacopt.capture.recording import unnoticed
from kfacopt.capture.tensor_hooks import HooksSince
from kfacopt.likelihoods.estimator import find_prediction
from kfacopt.replay.double_backward import DoubleBackward, gradients, guard_of, twice_differentiable

Function = Callable[[Sequence[Tensor]], Tensor]
"""Parameter values to a tensor."""


class Linearization:
    """A function of the parameters near one point: its value, and products with its Jacobian.

    Args:
        function: Maps tensors shaped as `params` to a tensor, differentiably.
        params: The point; neither they nor their gradients are touched.

    >>> point = [torch.tensor([1.0, 2.0])]
    >>> at = Linearization(lambda values: values[0] ** 2, point)
    >>> at.value, at.jvp([torch.ones(2)]), at.vjp(torch.tensor([1.0, 0.0]))
    (tensor([1., 4.]), tensor([2., 4.]), [tensor([2., 0.])])
    """

    def __init__(self, function: Function, params: Sequence[Tensor]) -> None:
        self._at, since = [p.detach().requires_grad_() for p in params], HooksSince()
        with torch.enable_grad(), twice_differentiable():
            self._output = function(self._at)
        self._guard = guard_of([self._output], since)

    @property
    def value(self) -> Tensor:
        """The function's value, without its graph."""
        return self._output.detach()

    @cached_property
    def _twice(self) -> DoubleBackward:
        return DoubleBackward([self._output], self._at, None, self._guard)

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """`Jᵀ cotangent`: a list shaped as the parameters from a tensor shaped as the value."""
        return gradients([self._output], self._at, [cotangent], self._guard)

    def jvp(self, tangent: Sequence[Tensor]) -> Tensor:
        """`J tangent`: a tensor shaped as the value from a list shaped as the parameters."""
        return self._twice.jacobian(tangent)[0]


def hessian_products(function: Function, params: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Products with the Hessian of a scalar function at one point, by Pearlmutter's trick in reverse mode.

    Args:
        function: Maps tensors shaped as `params` to a tensor without axes.
        params: The point.

    Returns:
        A function of a list of tensors shaped as `params`; it may be called any number of times.

    >>> multiply = hessian_products(lambda values: (values[0] ** 3).sum(), [torch.tensor([1.0, 2.0])])
    >>> multiply([torch.ones(2)])
    [tensor([ 6., 12.])]
    """
    at, since = [p.detach().requires_grad_() for p in params], HooksSince()
    with torch.enable_grad(), twice_differentiable():
        value = function(at)
    return DoubleBackward([value], at, [torch.ones_like(value)], guard_of([value], since)).hessian


def loss_hessian_product(loss: Callable[[Tensor], Tensor], prediction: Tensor) -> Callable[[Tensor], Tensor]:
    """Products with the Hessian of a loss with respect to the prediction, tensors shaped as the prediction."""
    multiply = hessian_products(lambda values: loss(values[0]), [prediction])
    return lambda vector: multiply([vector])[0]


def as_function(model: Callable[[Any], Any], params: Sequence[Tensor], X: Any) -> Function:
    """A model's output on one batch as a function of some of its parameters; buffers are left as they are.

    Args:
        model: A module.
        params: Parameters of the module.
        X: The model's input.

    Raises:
        TypeError: If the model is no module, or its output does not say which tensor is the prediction.
        ValueError: If a tensor of `params` is no parameter of the module.
    """
    names, module = parameter_names(model, params), cast(nn.Module, model)

    def function(values: Sequence[Tensor]) -> Tensor:
        with unnoticed(), copied_buffers(module):
            result = functional_call(module, dict(zip(names, values, strict=True)), (X,))
        try:
            return find_prediction(result)
        except ValueError as error:
            raise TypeError(
                f"model_func ({type(module).__name__}) returned a {type(result).__name__}, not a tensor: wrap it in a "
                "module whose forward returns the prediction alone"
            ) from error

    return function


def parameter_names(model: Callable[[Any], Any], params: Sequence[Tensor]) -> list[str]:
    """The name under which the module holds each parameter.

    Raises:
        TypeError: If the model is no module.
        ValueError: If it does not hold one of them, or if one is given twice.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_func must be a torch.nn.Module, got {type(model).__name__}: wrap the function in one")
    names, first = {id(p): name for name, p in model.named_parameters()}, dict[int, int]()
    for number, parameter in enumerate(params):
        if first.setdefault(id(parameter), number) != number:
            raise ValueError(
                f"params[{number}] of shape {list(parameter.shape)} is given twice: pass every parameter once, a tied "
                "one too"
            )
        if id(parameter) not in names:
            raise ValueError(
                f"params[{number}] of shape {list(parameter.shape)} is no parameter of model_func "
                f"({type(model).__name__}): pass tensors of model_func.parameters()"
            )
    return [names[id(p)] for p in params]


def check_leaves_parameters(model: nn.Module) -> None:
    """Refuse a model whose forward writes to its parameters.

    Raises:
        ValueError: If it has an embedding with `max_norm`; the module is named.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(
                f"module '{name}' ({type(module).__name__}) has max_norm={module.max_norm}, with which every forward "
                "rescales its weight: no derivative is taken there; set max_norm to None"
            )
