"""What a handler promises, checked against autograd for any layer and any input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kfacopt.layers import LayerHandler, OneHot, Rows, handler_for
from kfacopt.likelihoods import KFACType

SAMPLES = 2


def assert_equal(ours: Tensor, truth: Tensor) -> None:
    """To float64 rounding."""
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def rows_of(
    module: nn.Module, x: Tensor, cotangents: Tensor, roles: tuple[str, ...], approx: KFACType
) -> tuple[Tensor, Tensor]:
    """Rows as a curvature pass would get them, one-hot ones written out."""
    handler = found(module)
    rows = Rows(
        handler.input_rows(module, (x,), {}, roles, approx),
        handler.gradient_rows(module, cotangents, approx),
        torch.tensor(1.0),  # not read here
    )
    inputs = rows.inputs
    return inputs.dense(cotangents.dtype) if isinstance(inputs, OneHot) else inputs, rows.gradients


def found(module: nn.Module) -> LayerHandler:
    handler = handler_for(module)
    assert handler is not None
    assert handler.refusal(module) is None
    return handler


def per_example(handler: LayerHandler, inputs: Tensor, gradients: Tensor) -> Tensor:
    """``[v n ...]`` matrices: the sum over places only."""
    if handler.structure == "elementwise":
        return torch.einsum("vnsc,nsci->vnci", gradients, inputs)
    if inputs.ndim == 4:
        return torch.einsum("vknso,knsi->vnkoi", gradients, inputs)
    return torch.einsum("vnso,nsi->vnoi", gradients, inputs)


def check_rows_sum_to_gradient(module: nn.Module, x: Tensor) -> None:
    """For every subset of the parameters, and the matrix goes there and back."""
    torch.manual_seed(0)
    handler, output = found(module), module(x)
    cotangents = torch.randn(SAMPLES, *output.shape, dtype=output.dtype)
    every = handler.roles(module)
    subsets = [c for size in range(1, len(every) + 1) for c in combinations(every, size)]
    for roles in subsets:
        parameters = [getattr(module, name) for name in roles]
        inputs, gradients = rows_of(module, x, cotangents, roles, KFACType.EXPAND)
        if (squares := handler.input_squares(module, (x,), {}, roles)) is not None:
            assert_equal(squares, inputs.square().mean((-3, -2)))
        matrices = per_example(handler, inputs, gradients).sum(1)
        for cotangent, matrix in zip(cotangents, matrices, strict=True):
            truth = torch.autograd.grad(output, parameters, cotangent, retain_graph=True)
            parts = dict(zip(roles, truth, strict=True))
            assert_equal(matrix, handler.pack(module, parts))
            unpacked = handler.unpack(module, matrix, roles)
            assert tuple(unpacked) == roles
            for name in roles:
                assert_equal(unpacked[name], parts[name])


def check_per_example_gradients(module: nn.Module, x: Tensor) -> None:
    """For layers that do not mix data: the rows of datum n give the gradient of datum n."""
    torch.manual_seed(0)
    handler, output = found(module), module(x)
    cotangents = torch.randn(SAMPLES, *output.shape, dtype=output.dtype)
    roles = handler.roles(module)
    parameters = {name: getattr(module, name).detach() for name in roles}

    def contracted(parameters: dict[str, Tensor], datum: Tensor, cotangent: Tensor) -> Tensor:
        prediction: Tensor = functional_call(module, parameters, (datum.unsqueeze(0),))
        return (prediction.squeeze(0) * cotangent).sum()

    inputs, gradients = rows_of(module, x, cotangents, roles, KFACType.EXPAND)
    matrices = per_example(handler, inputs, gradients)
    for cotangent, ours in zip(cotangents, matrices, strict=True):
        truth = vmap(grad(contracted), in_dims=(None, 0, 0))(parameters, x, cotangent)
        packed = torch.stack([handler.pack(module, {k: v[n] for k, v in truth.items()}) for n in range(len(x))])
        assert_equal(ours, packed)


def check_reduce_is_mean_and_sum(module: nn.Module, x: Tensor) -> None:
    """Averaged inputs, summed gradients, for every subset of the parameters."""
    torch.manual_seed(0)
    handler = found(module)
    cotangents = torch.randn(SAMPLES, *module(x).shape, dtype=x.dtype)
    every = handler.roles(module)
    for roles in (c for size in range(1, len(every) + 1) for c in combinations(every, size)):
        inputs, gradients = rows_of(module, x, cotangents, roles, KFACType.EXPAND)
        averaged, summed = rows_of(module, x, cotangents, roles, KFACType.REDUCE)
        places = -3 if handler.structure == "elementwise" else -2
        assert_equal(averaged, inputs.mean(places, keepdim=True))
        assert_equal(summed, gradients.sum(-2, keepdim=True))


def check_rows(module: nn.Module, x: Tensor, *, examples_mix: bool = False) -> None:
    """All of the above, in float64."""
    assert all(p.dtype == torch.float64 for p in module.parameters())
    check_rows_sum_to_gradient(module, x)
    check_reduce_is_mean_and_sum(module, x)
    if not examples_mix:
        check_per_example_gradients(module, x)


@pytest.fixture(scope="session", name="check_rows")
def _check_rows() -> Callable[..., None]:
    return check_rows


@pytest.fixture(scope="session", name="check_rows_sum_to_gradient")
def _check_rows_sum_to_gradient() -> Callable[..., None]:
    return check_rows_sum_to_gradient


@pytest.fixture(scope="session", name="check_reduce_is_mean_and_sum")
def _check_reduce_is_mean_and_sum() -> Callable[..., None]:
    return check_reduce_is_mean_and_sum


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
