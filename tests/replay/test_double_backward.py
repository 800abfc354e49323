"""Derivatives of a graph and of its gradient, against dense ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kfacopt.replay.double_backward import DoubleBackward, gradients, twice_differentiable


def outputs_of(a: Tensor, b: Tensor, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two that depend on the inputs (one is linear in b), and one without a graph."""
    return (a @ b).tanh(), 2.0 * b.sum().unsqueeze(0), torch.ones(2, dtype=a.dtype)


def leaves() -> list[Tensor]:
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (3, 2), (4,))]


def test_products_with_several_outputs_and_inputs_are_the_dense_ones() -> None:
    inputs = leaves()
    outputs = outputs_of(*inputs)
    w = [torch.randn_like(output) for output in outputs]
    v: list[Tensor] = [torch.randn_like(x) for x in inputs]
    jacobians = jacrev(outputs_of, argnums=(0, 1, 2))(*inputs)
    along = [
        sum((j.flatten(o.ndim) @ t.flatten() for j, t in zip(row, v, strict=True)), torch.zeros_like(o))
        for row, o in zip(jacobians, outputs, strict=True)
    ]
    back = [
        sum(torch.tensordot(c, row[i], c.ndim) for c, row in zip(w, jacobians, strict=True)) for i in range(len(inputs))
    ]
    torch.testing.assert_close(gradients(outputs, inputs, w), back)
    straight, curved = DoubleBackward(outputs, inputs), DoubleBackward(outputs, inputs, w)
    torch.testing.assert_close(straight.jacobian(v), along)
    torch.testing.assert_close(curved.both(v)[0], along)
    one = straight.jacobian([None, v[1], None])
    torch.testing.assert_close(one, straight.jacobian([torch.zeros_like(v[0]), v[1], torch.zeros_like(v[2])]))

    def slope(*at: Tensor) -> tuple[Tensor, ...]:
        first = jacrev(lambda *x: sum((c * o).sum() for c, o in zip(w, outputs_of(*x), strict=True)), argnums=(0, 1, 2))
        return first(*at)

    second = jacrev(slope, argnums=(0, 1, 2))(*inputs)
    bent = [
        sum((h.flatten(x.ndim) @ t.flatten() for h, t in zip(row, v, strict=True)), torch.zeros_like(x))
        for row, x in zip(second, inputs, strict=True)
    ]
    torch.testing.assert_close(curved.hessian(v), bent)
    torch.testing.assert_close(curved.both(v)[1], bent)


def test_products_may_be_written_to() -> None:
    """autograd hands one tensor out twice, and the cotangent itself."""
    inputs = [torch.randn(3, requires_grad=True) for _ in range(2)]
    cotangent = torch.ones(3)
    first, second = gradients([inputs[0] + inputs[1]], inputs, [cotangent])
    first.zero_()
    assert torch.equal(second, torch.ones(3))
    assert torch.equal(cotangent, torch.ones(3))


def test_a_zero_cotangent_multiplies_nothing() -> None:
    x, weight = torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)
    output = (x @ weight).tanh()
    with FlopCounterMode(display=False) as counter:
        DoubleBackward([output], [weight])
    assert counter.get_total_flops() == 0
    with FlopCounterMode(display=False) as counter:
        DoubleBackward([output], [weight], [torch.ones(5, 3)])
    assert counter.get_total_flops() == 2 * 5 * 4 * 3


def test_attention_that_is_run_again_in_the_backward() -> None:
    x = torch.randn(1, 2, 3, 4, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, q.tanh(), q)

    v = torch.randn_like(x)
    with twice_differentiable():
        plain, again = attend(x), checkpoint(attend, x, use_reentrant=False)
    torch.testing.assert_close(DoubleBackward([again], [x]).jacobian([v]), DoubleBackward([plain], [x]).jacobian([v]))
