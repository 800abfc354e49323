"""Matrix-free operators leave model, gradients, buffers and optimizers as they were, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt.operators import (
    GGNLinearOperator,
    HessianLinearOperator,
)
from kfacopt.replay.double_backward import SkippedZeroProducts
from tests.cases import BY_NAME, OPTIMIZERS, Frozen, mlp, parameters_of, still, train_step
from tests.operators.harness import ALL, CLOSE, KINDS, LOSS_KINDS, WITH_LOSS, build, ones, problem
from tests.reference import whole_ggn, whole_hessian


class Checkpointed(nn.Module):
    """Batch normalisation whose forward runs once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


def normalised() -> nn.Module:
    """Running statistics, in train mode, and power iteration."""
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
    )


@pytest.mark.parametrize("make", [normalised, Checkpointed, mlp], ids=["norms", "checkpointed", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_model_gradients_buffers_and_flags_stay_as_they_were(kind: Any, make: Callable[[], nn.Module]) -> None:
    _, loss, data = problem()
    model = make().double()
    first, *_ = params = list(model.parameters())
    first.requires_grad_(make is Checkpointed)  # with frozen ones torch recomputes another graph
    params[1].grad = torch.full_like(params[1], 7.0)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()]
    operator = build(kind, model, loss, data)
    with torch.no_grad():
        inside = operator @ ones(operator)
    assert torch.equal(inside, operator @ ones(operator))
    if kind in WITH_LOSS:
        operator.gradient_and_loss()
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    assert objects == [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()]
    assert [p.requires_grad for p in params] == [make is Checkpointed] + [True] * (len(params) - 1)
    assert [p.grad is not None for p in params] == [p is params[1] for p in params]
    assert bool((params[1].grad == 7.0).all())
    assert model.training


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_checkpointing_changes_no_product(kind: Any) -> None:
    _, loss, data = problem()
    model = Checkpointed().double()
    plain, again = build(kind, model.inner, loss, data), build(kind, model, loss, data)
    torch.testing.assert_close(again @ ones(again), plain @ ones(plain), **CLOSE)


def test_parameters_may_be_frozen_or_some_of_them() -> None:
    torch.manual_seed(0)
    model, x, y = Frozen().double(), torch.randn(6, 3, dtype=torch.float64), torch.randint(3, (6,))
    params = list(model.parameters())
    whole, loss = whole_hessian(model, nn.CrossEntropyLoss(), x, y), nn.CrossEntropyLoss()
    sizes = [p.numel() for p in params]
    order = [2, 0]
    rows = torch.cat([torch.arange(sum(sizes[:i]), sum(sizes[: i + 1])) for i in order])
    operator = build(HessianLinearOperator, model, loss, [(x, y)], [params[i] for i in order])
    torch.testing.assert_close(operator @ ones(operator), whole[rows][:, rows].sum(1), **CLOSE)


@pytest.mark.parametrize("recurrent", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_hold_their_weights_twice(recurrent: Any) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = recurrent(3, 2, batch_first=True), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0][:, -1])

    torch.manual_seed(0)
    model, loss = Last().double(), nn.MSELoss()
    x, y = torch.randn(4, 3, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    params = list(model.parameters())
    gradients = torch.autograd.grad(loss(model(x), y), params, create_graph=True)
    expected = torch.autograd.grad(sum(g.sum() for g in gradients), params)
    operator = build(HessianLinearOperator, model, loss, [(x, y)])
    torch.testing.assert_close(operator @ ones(operator), torch.cat([p.flatten() for p in expected]), **CLOSE)
    loss(model(x), y).backward()
    torch.testing.assert_close([p.grad for p in params], [g.detach() for g in gradients], **CLOSE)


def test_sparse_gradients_of_an_embedding_are_gradients() -> None:
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)).double()
    dense = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    dense.load_state_dict(sparse.state_dict())
    data = [(torch.randint(6, (4, 2)), torch.randn(4, 2, dtype=torch.float64))]
    for kind in ALL:
        one, other = (build(kind, model, nn.MSELoss(), data) for model in (sparse, dense))
        torch.testing.assert_close(one @ ones(one), other @ ones(other), **CLOSE)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_of_the_same_model_does_not_notice(kind: Any, name: str) -> None:
    ends, blocks = [], []
    for with_operator in (False, True):
        model, loss, x, y = BY_NAME["mlp-ce"].make()
        optimizer = OPTIMIZERS[name](model, loss, **(still() | {"lr": 0.1, "refresh_every": 1}))
        other = torch.randn(3, 4, dtype=torch.float64), torch.randint(3, (3,))
        for _ in range(3):
            if with_operator:
                operator = build(kind, model, loss, [other])
                operator @ ones(operator)
            value = loss(model(x), y)
            if with_operator:
                operator @ ones(operator)  # between the user's forward and backward
            optimizer.zero_grad()
            value.backward()
            if with_operator:
                operator @ ones(operator)
            optimizer.step()
        ends.append(parameters_of(model))
        blocks.append(optimizer.state_dict())
        optimizer.close()
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_training_goes_on_and_the_operator_follows_the_parameters() -> None:
    model, loss, data = problem()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    operator = build(GGNLinearOperator, model, loss, data)
    optimizer = kfacopt.KFAC(model, loss, lr=0.1)
    for _ in range(2):
        train_step(optimizer, model, loss, x, y)
        torch.testing.assert_close(operator @ ones(operator), whole_ggn(model, loss, x, y).sum(1), **CLOSE)
    optimizer.close()


def test_targets_all_ignored_in_one_batch_do_not_count() -> None:
    model, loss, data = problem()
    (x, y), (other, ignored) = data[0], (data[1][0], torch.full((2,), -100))
    for kind in WITH_LOSS:
        alone, both = build(kind, model, loss, [(x, y)]), build(kind, model, loss, [(x, y), (other, ignored)])
        torch.testing.assert_close(both @ ones(both), alone @ ones(alone), **CLOSE)


class Sums(nn.Module):
    """Parameters whose gradients autograd returns as one tensor, expanded, or as it was given them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shift = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 2), (3, 2), (2,)))

    def forward(self, x: Tensor) -> Tensor:
        return self.first + self.second + self.shift.sum() * x


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_tensors_of_their_own(kind: Any) -> None:
    torch.manual_seed(0)
    model = Sums().double()
    data = [(torch.ones(3, 1, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)) for _ in range(3)]
    operator = build(kind, model, nn.MSELoss(reduction="sum"), data)
    kept = [p.detach().clone() for p in model.parameters()]
    vector = [torch.randn(*s, dtype=torch.float64) for s in operator._in_shape]
    given, flat = [v.clone() for v in vector], torch.cat([v.flatten() for v in vector])
    for product in (operator @ vector, operator @ [v[..., None] for v in vector]):
        torch.testing.assert_close(torch.cat([p.flatten() for p in product]), operator @ flat, **CLOSE)
        for part in product:
            part.fill_(7.0)
        assert all(torch.equal(a, b) for a, b in zip(vector, given, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_a_hessian_that_is_the_identity_does_not_write_to_its_vector() -> None:
    class Quadratic(nn.Module):
        reduction = "sum"

        def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
            return 0.5 * prediction.square().sum()

    model = Sums().double()
    data = [(torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 2))] * 3
    operator = HessianLinearOperator(model, Quadratic(), [model.first], data)
    vector = [torch.randn(3, 2, dtype=torch.float64)]
    before = vector[0].clone()
    torch.testing.assert_close(operator @ vector, [3 * before], **CLOSE)
    assert torch.equal(vector[0], before)


def test_zero_products_are_skipped_and_no_others() -> None:
    generator = torch.Generator().manual_seed(0)
    for shapes in (((2, 3), (3, 4)), ((5, 2, 3), (5, 3, 4))):
        a, b = (torch.randn(*shape, generator=generator) for shape in shapes)
        with SkippedZeroProducts():
            assert torch.equal(a @ b, torch.matmul(a, b))
            for product in ((0 * a) @ b, a @ (0 * b)):
                assert product.shape == (a @ b).shape
                assert not product.any()
    for convolution in (
        nn.Conv1d(4, 6, 3, groups=2, stride=2),
        nn.ConvTranspose1d(4, 6, 3),
        nn.Conv1d(4, 6, 3, bias=False),
    ):
        x = torch.randn(2, 4, 9, requires_grad=True)
        output, inputs = convolution(x), [x, *convolution.parameters()]
        for cotangent in (torch.zeros_like(output), torch.ones_like(output)):
            expected = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
            with SkippedZeroProducts():
                found = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
