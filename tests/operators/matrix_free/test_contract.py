"""What matrix-free operators take and return, and what they refuse."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfacopt.operators import (
    EFLinearOperator,
    FisherMCLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    JacobianLinearOperator,
    TransposedJacobianLinearOperator,
)
from tests.cases import BY_NAME, mlp
from tests.operators.harness import CLOSE, KINDS, LOSS_KINDS, build, build_and_apply, ones, problem
from tests.reference import whole_ggn, whole_hessian

# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(columns=st.integers(0, 3))
def test_lists_and_flat_tensors_vectors_and_matrices_say_the_same(kind: Any, columns: int) -> None:
    operator = build(kind, *problem(), check_deterministic=False)
    flat = torch.randn(operator.shape[1], columns, dtype=torch.float64)
    parts = flat.split(operator._in_shape_flat)
    listed = [part.reshape(*s, columns) for part, s in zip(parts, operator._in_shape, strict=True)]
    product = operator @ flat
    assert product.shape == (operator.shape[0], columns)
    as_list = operator @ listed
    assert [x.shape for x in as_list] == [(*s, columns) for s in operator._out_shape]
    torch.testing.assert_close(torch.cat([x.flatten(0, -2) for x in as_list]), product, **CLOSE)
    for k in range(columns):
        torch.testing.assert_close(operator @ flat[:, k], product[:, k], **CLOSE)
        vector = operator @ [part[..., k] for part in listed]
        assert [x.shape for x in vector] == operator._out_shape
        torch.testing.assert_close(torch.cat([x.flatten() for x in vector]), product[:, k], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_products_and_scipy_work_with_every_kind(kind: Any) -> None:
    operator = build(kind, *problem())
    vector = ones(operator)
    squared = operator.adjoint() @ operator
    torch.testing.assert_close(squared @ vector, operator.adjoint() @ (operator @ vector), **CLOSE)
    damped = squared + 0.5 * IdentityLinearOperator.like(operator)
    torch.testing.assert_close(damped @ vector, squared @ vector + 0.5 * vector, **CLOSE)
    exported = operator.to_scipy()
    torch.testing.assert_close(torch.from_numpy(exported @ vector.numpy()), operator @ vector, **CLOSE)


class TakesMapping(nn.Module):
    """A model for mappings of inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Any) -> Tensor:
        result: Tensor = self.inner(inputs["x"])
        return result


@pytest.mark.parametrize("mapping", [dict, UserDict])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_may_be_mappings(kind: Any, mapping: Callable[..., Any]) -> None:
    model, loss, data = problem()
    wrapped = [(mapping(x=x), y) for x, y in data]
    plain = build(kind, model, loss, data)
    taken = build(kind, TakesMapping(model), loss, wrapped, batch_size_fn=lambda inputs: len(inputs["x"]))
    torch.testing.assert_close(taken @ ones(taken), plain @ ones(plain), **CLOSE)
    with pytest.raises(ValueError, match="batch_size_fn"):
        build(kind, TakesMapping(model), loss, wrapped)


@pytest.mark.parametrize("kind", KINDS)
def test_progressbar_on_request(kind: Any, capfd: pytest.CaptureFixture[str]) -> None:
    quiet = build(kind, *problem())
    expected = quiet @ ones(quiet)
    assert capfd.readouterr().err == ""
    loud = build(kind, *problem(), progressbar=True, check_deterministic=False)
    torch.testing.assert_close(loud @ ones(loud), expected, **CLOSE)
    assert f"{kind.__name__}._matmat (on cpu)" in capfd.readouterr().err


def test_data_are_counted_once_and_only_if_nobody_says_how_many_there_are() -> None:
    model, _, data = problem()
    sweeps = count()

    class Counted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            next(sweeps)
            return super().__iter__()

    params = list(model.parameters())
    told = JacobianLinearOperator(model, params, Counted(data), num_data=6, check_deterministic=False)
    assert next(sweeps) == 1  # for the prediction's shape
    told @ ones(told)
    assert next(sweeps) == 3
    JacobianLinearOperator(model, params, Counted(data), check_deterministic=False)
    assert next(sweeps) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_have_the_parameters_dtype(kind: Any, dtype: torch.dtype) -> None:
    model, loss, data = problem()
    data = [(x.to(dtype), y) for x, y in data]
    exact = build(kind, model, loss, [(x.double(), y) for x, y in data]) if kind is not FisherMCLinearOperator else None
    operator = build(kind, model.to(dtype), loss, data, check_deterministic=dtype is torch.float32)
    product = operator @ ones(operator)
    assert product.dtype is dtype
    if exact is not None:
        model.double()  # the rounded parameters
        torch.testing.assert_close(
            product.double(),
            exact @ ones(exact),
            rtol=0,
            atol=(20 if kind is HessianLinearOperator else 10) * torch.finfo(dtype).eps,
        )


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_train_mode_is_noticed(kind: Any) -> None:
    _, loss, data = problem()
    model = nn.Sequential(nn.Dropout(0.5), mlp()).double()
    with pytest.raises(RuntimeError, match=r"not deterministic: .*dropout"):
        build(kind, model, loss, data)
    build(kind, model.eval(), loss, data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shuffled_loader_is_noticed_where_the_order_matters(kind: Any) -> None:
    model, loss, data = problem()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    if kind in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator):
        operator, whole = build(kind, model, loss, loader), build(kind, model, loss, [(x, y)])
        torch.testing.assert_close(operator @ ones(operator), whole @ ones(whole), **CLOSE)
    else:
        with pytest.raises(RuntimeError, match=r"not deterministic: .*shuffling"):
            build(kind, model, loss, loader)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_change_in_number_or_value_are_noticed(kind: Any) -> None:
    model, loss, data = problem()

    class Changing:
        def __init__(self, change: Callable[[Any], Any]) -> None:
            self.sweeps, self.change = count(), change

        def __iter__(self) -> Iterator[Any]:
            return iter(self.change(data) if next(self.sweeps) % 2 else data)

    for change in (lambda d: d[:1], lambda d: [(x + torch.randn(()), y) for x, y in d]):
        with pytest.raises(RuntimeError, match="not deterministic"):
            build(kind, model, loss, Changing(change), num_data=6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_treated_is_refused_by_name(kind: Any) -> None:
    model, loss, data = problem()
    params = list(model.parameters())
    for check in (True, False):
        refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
            (
                ValueError,
                r"params\[1\] of shape \[2\] is no parameter",
                {"params": [params[0], nn.Parameter(torch.ones(2))]},
            ),
            (ValueError, r"params\[2\] .* is given twice", {"params": [*params[:2], params[0]]}),
            (ValueError, "params is empty", {"params": []}),
            (ValueError, "generator, which can be iterated over only once", {"data": (batch for batch in data)}),
            (ValueError, "data is empty", {"data": []}),
            (TypeError, "must be a torch.nn.Module", {"model": lambda x: x, "params": params}),
            (TypeError, "returned a dict, not a tensor", {"model": ReturnsMapping(model, "mean"), "params": params}),
            (
                ValueError,
                r"'0' \(Embedding\) has max_norm=1.0",
                {"model": nn.Sequential(nn.Embedding(4, 3, max_norm=1.0))},
            ),
        ]
        for error, match, change in refused:
            options = {"model": model, "loss": loss, "data": data, "check_deterministic": check} | change
            with pytest.raises(error, match=match):
                build_and_apply(kind, **options)


class ReturnsMapping(nn.Module):
    """As some language models do."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.inner(x)
        return {"hidden": hidden, self.name: 1.0 * hidden}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_with_logits_are_understood(kind: Any) -> None:
    model, loss, data = problem()
    plain = build(kind, model, loss, data)
    wrapped = ReturnsMapping(model, "logits")
    other = build(kind, wrapped, loss, data)
    torch.testing.assert_close(other @ ones(other), plain @ ones(plain), **CLOSE)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_losses_that_do_not_say_how_batches_add_up_are_refused(kind: Any) -> None:
    model, _, data = problem()
    for loss in (nn.CrossEntropyLoss(reduction="none"), nn.functional.cross_entropy):
        with pytest.raises((ValueError, TypeError), match=r"reduction|not a module"):
            build(kind, model, loss, data)
    if kind is FisherMCLinearOperator:
        with pytest.raises(TypeError, match="SoftMarginLoss is not supported"):
            build(kind, model, nn.SoftMarginLoss(), data)


@pytest.mark.parametrize("block_sizes", [[4, 1], [3], [5, -1], [4, 0], []])
def test_block_sizes_that_do_not_add_up_are_refused(block_sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="positive and add up to the number of params, 4"):
        build(HessianLinearOperator, *problem(), block_sizes=block_sizes)


def test_a_jacobian_needs_the_data_along_the_first_axis_and_all_of_them() -> None:
    model, _, x, y = BY_NAME["sequence-mixed"].make()
    params, merged = list(model.parameters()), nn.Sequential(model, nn.Flatten(0, 1))
    for kind in (JacobianLinearOperator, TransposedJacobianLinearOperator):
        with pytest.raises(ValueError, match=r"shape \[18, 3\], not \[6, 3\]"):
            kind(merged, params, [(x, y)])
        operator = kind(model, params, [(x, y)], num_data=7, check_deterministic=False)
        with pytest.raises((ValueError, RuntimeError), match=r"num_data=7, but the mini-batches have 6|shape"):
            operator @ ones(operator)


def test_monte_carlo_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="mc_samples must be at least 1, got 0"):
        build(FisherMCLinearOperator, *problem(), mc_samples=0)


# -- losses beyond torch's three, for Hessian and GGN ----------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        nn.NLLLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)),
        nn.NLLLoss(ignore_index=1),
    ],
    ids=["nll-weight", "nll-ignore"],
)
def test_other_losses_of_torch_are_averaged_as_torch_does(loss: nn.Module) -> None:
    model, _, data = problem()
    model = nn.Sequential(model, nn.LogSoftmax(-1))
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    for kind, truth in ((HessianLinearOperator, whole_hessian), (GGNLinearOperator, whole_ggn)):
        operator = build(kind, model, loss, data)
        torch.testing.assert_close(operator @ ones(operator), truth(model, loss, x, y).sum(1), **CLOSE)


def test_sequences_of_different_length_count_by_their_length() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    loss = nn.HuberLoss()
    data = [(torch.randn(2, t, 4, dtype=torch.float64), torch.randn(2, t, 3, dtype=torch.float64)) for t in (2, 5)]
    x, y = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*data, strict=True))
    operator = build(HessianLinearOperator, model, loss, data)
    torch.testing.assert_close(operator @ ones(operator), whole_hessian(model, loss, x, y).sum(1), **CLOSE)
