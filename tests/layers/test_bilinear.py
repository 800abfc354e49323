"""Bilinear layers: linear ones on products."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from kfacopt.layers import handler_for
from kfacopt.likelihoods import KFACType


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 3, 2), ()])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_rows(shape: tuple[int, ...], bias: bool, named: bool) -> None:
    """They sum to the gradient, for every subset of the parameters; reduce averages and sums over the places."""
    layer = nn.Bilinear(3, 2, 4, bias=bias).double()
    handler = handler_for(layer)
    assert handler is not None
    first, second = (torch.randn(*shape, size, dtype=torch.float64) for size in (3, 2))
    call = ((first,), {"input2": second}) if named else ((first, second), {})
    output = layer(*call[0], **call[1])
    cotangent = torch.randn_like(output)
    every = handler.roles(layer)
    for roles in (c for size in range(1, len(every) + 1) for c in combinations(every, size)):
        inputs = handler.input_rows(layer, *call, roles, KFACType.EXPAND)
        gradients = handler.gradient_rows(layer, cotangent.unsqueeze(0), KFACType.EXPAND)
        assert isinstance(inputs, Tensor)
        truth = dict(
            zip(
                roles,
                torch.autograd.grad(output, [layer.get_parameter(r) for r in roles], cotangent, retain_graph=True),
                strict=True,
            )
        )
        matrix = torch.einsum("nso,nsi->oi", gradients[0], inputs)
        torch.testing.assert_close(matrix, handler.pack(layer, truth), rtol=1e-10, atol=1e-12)
        for name, part in handler.unpack(layer, matrix, roles).items():
            torch.testing.assert_close(part, truth[name], rtol=1e-10, atol=1e-12)
        reduced = handler.input_rows(layer, *call, roles, KFACType.REDUCE)
        torch.testing.assert_close(reduced, inputs.mean(1, keepdim=True), rtol=1e-10, atol=1e-12)


def test_a_missing_input_is_named() -> None:
    layer = nn.Bilinear(3, 2, 4)
    handler = handler_for(layer)
    assert handler is not None
    with pytest.raises(TypeError, match="a layer's input2 to be a tensor"):
        handler.input_rows(layer, (torch.zeros(1, 3),), {}, ("weight",), KFACType.EXPAND)
