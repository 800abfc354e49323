"""KFAC and EKFAC over a data set against dense float64 truth, and what they refuse."""

from __future__ import annotations

import io
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacopt.blocks import DiagonalBlock
from kfacopt.blocks.data_set import DataSetEigenBlock
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.operators import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator
from tests import reference
from tests.cases import BOTH, BY_NAME, CASES, Case, Residual, mlp

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
KINDS = (KFACLinearOperator, EKFACLinearOperator)
# What per-datum statistics are defined for; parameters that no handler covers come below.
DENSE = [
    pytest.param(case, id=case.name)
    for case in CASES
    if not case.mixes_data and case.name not in ("tied-embedding", "tied-language", "frozen", "unused")
]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def split(x: Any, y: Tensor, first: int) -> list[tuple[Any, Tensor]]:
    """Two mini-batches of unequal length, or one."""
    return [(x[:first], y[:first]), (x[first:], y[first:])] if 0 < first < len(x) else [(x, y)]


def operator(kind: Any, case: Case, first: int = 0, **options: Any) -> Any:
    model, loss, x, y = case.make()
    options = {"fisher_type": "type-2", "check_deterministic": False} | options
    return kind(model, loss, trained(model), split(x, y, first), **options)


def dense(linear: Any) -> Tensor:
    return linear @ torch.eye(linear.shape[1], dtype=linear.dtype)


def layer_matrix(linear: Any, layer: Any) -> Tensor:
    """The operator restricted to a layer's matrix, `[(k o i) (k o i)]`."""
    shape, vectors = layer.pack(layer.values()).shape, []
    for unit in torch.eye(shape.numel(), dtype=linear.dtype):
        parts = layer.unpack(unit.reshape(shape))
        vector = [torch.zeros_like(p) for p in linear._params]
        of = dict(zip(linear._params, vector, strict=True))
        for role, share in layer.share(of).items():
            share.copy_(parts[role])
        vectors.append(vector)
    products = linear @ [torch.stack(units, dim=-1) for units in zip(*vectors, strict=True)]
    columns = zip(*(product.unbind(-1) for product in products), strict=True)
    shares = [layer.share(dict(zip(linear._params, column, strict=True))) for column in columns]
    return torch.stack([layer.pack(share).flatten() for share in shares], dim=1)


def scale_of(loss: nn.Module, x: Any) -> float:
    """The references are of the mean loss; the operators of the loss as it is."""
    return float(len(x)) if loss.reduction == "sum" else 1.0


def block_diagonal(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks) if blocks.ndim == 3 else blocks


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("approx", BOTH)
@pytest.mark.parametrize("case", DENSE)
def test_kfac_is_the_product_of_dense_factors(case: Case, approx: str, separate: bool) -> None:
    linear = operator(KFACLinearOperator, case, kfac_approx=approx, separate_weight_and_bias=separate)
    model, loss, x, y = case.make()
    linear.compute()
    hessian = reference.loss_hessian(loss, model(x), y)
    for layer in linear._layers:
        if not isinstance(linear.blocks[layer.name], FactoredBlock):
            continue
        mine = layer_matrix(linear, layer)
        rows = reference.dense_rows(linear._model_func, layer, x, approx)
        a, g = reference.input_factor(rows), reference.gradient_factor(rows, hessian)
        truth = block_diagonal(
            torch.stack([torch.kron(left.contiguous(), right.contiguous()) for left, right in zip(g, a, strict=True)])
        )
        torch.testing.assert_close(mine, scale_of(loss, x) * truth, **CLOSE)


@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("approx", BOTH)
@pytest.mark.parametrize("case", DENSE)
def test_ekfac_is_the_ggn_along_its_basis(case: Case, approx: str, budget: int) -> None:
    """Whatever the basis: its quadratic forms along the basis are those of the dense GGN, in every layout."""
    linear = operator(EKFACLinearOperator, case, kfac_approx=approx, byte_budget=budget)
    _, loss, x, y = case.make()
    linear.compute()
    for layer in linear._layers:
        block = linear.blocks[layer.name]
        truth = scale_of(loss, x) * reference.ggn(linear._model_func, loss, layer, x, y)
        if isinstance(block, DiagonalBlock):
            torch.testing.assert_close(layer_matrix(linear, layer), torch.diag(truth[0].diagonal()), **CLOSE)
            continue
        left, right = block.basis()
        groups = left if left.ndim == 3 else left.unsqueeze(0)
        size = truth.shape[-1] // left.shape[-1]
        columns = torch.eye(size, dtype=left.dtype) if right is None else right
        columns = columns if columns.ndim == 3 else columns.unsqueeze(0)
        forms = []
        for q_left, q_right, block_truth in zip(groups, columns.expand(len(groups), -1, -1), truth, strict=True):
            basis = torch.kron(q_left.contiguous(), q_right.contiguous())
            forms.append((basis * (block_truth @ basis)).sum(0).reshape(q_left.shape[1], q_right.shape[1]))
        corrected = block.corrected.value * linear._scale
        torch.testing.assert_close(corrected.reshape(torch.stack(forms).shape), torch.stack(forms), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("case", [case for case in DENSE if case.id != "bags-cut"])  # padded to each batch's longest
def test_mini_batches_make_no_difference(case: Case, kind: Any, fisher_type: str) -> None:
    whole = operator(kind, case, fisher_type=fisher_type)
    parts = operator(kind, case, first=max(1, case.data // 3), fisher_type=fisher_type, byte_budget=1)
    if kind is EKFACLinearOperator:  # in the other's basis: a degenerate one is not unique
        whole.compute(), parts.compute()
        torch.testing.assert_close(whole.trace, parts.trace, **CLOSE)
        return
    torch.testing.assert_close(dense(whole), dense(parts), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp-ce", "mlp-bce-sum", "conv-groups", "words", "norms"])
def test_scalars_are_those_of_the_matrix(name: str, kind: Any) -> None:
    linear = operator(kind, BY_NAME[name], separate_weight_and_bias=False)
    matrix = dense(linear)
    torch.testing.assert_close(matrix, matrix.mT, **CLOSE)
    torch.testing.assert_close(linear.trace, matrix.trace(), **CLOSE)
    torch.testing.assert_close(linear.frobenius_norm, matrix.norm(), **CLOSE)
    assert linear.logdet == linear.det.log() or linear.det == 0


@pytest.mark.parametrize("kind", KINDS)
def test_determinants_of_a_regular_operator(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
    linear = kind(model, nn.MSELoss(reduction="sum"), trained(model), [(x, y)], fisher_type="type-2")
    sign, logdet = torch.linalg.slogdet(dense(linear))
    assert sign == 1
    torch.testing.assert_close(linear.logdet, logdet, **CLOSE)
    torch.testing.assert_close(linear.det, logdet.exp(), **CLOSE)


def test_monte_carlo_converges_to_type_2() -> None:
    case = BY_NAME["mlp-weighted-ce"]
    exact = dense(operator(KFACLinearOperator, case))
    sampled = dense(operator(KFACLinearOperator, case, fisher_type="mc", mc_samples=40_000))
    # Relative standard error of a second moment of bounded vectors: a few over sqrt(40,000 * 6 data).
    assert float((sampled - exact).norm() / exact.norm()) < 0.02
    again = dense(operator(KFACLinearOperator, case, fisher_type="mc", mc_samples=3))
    torch.testing.assert_close(again, dense(operator(KFACLinearOperator, case, fisher_type="mc", mc_samples=3)))
    other = dense(operator(KFACLinearOperator, case, fisher_type="mc", mc_samples=3, seed=1))
    assert not torch.allclose(again, other)


def test_few_rows_of_wide_inputs_stand_for_their_covariance() -> None:
    """Fewer rows than inputs: no A is formed, and nothing is lost; float32 inverts as float64 does."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    x, y = torch.rand(7, 40), torch.randint(3, (7,))
    options = {"fisher_type": "type-2", "check_deterministic": False}
    vector = torch.randn(sum(p.numel() for p in model.parameters()))
    narrow = EKFACLinearOperator(model, loss, trained(model), [(x, y)], **options)
    product = narrow @ vector
    solved = KFACInverseLinearOperator(narrow, damping=1e-3, use_exact_damping=True) @ vector
    assert narrow.blocks["0.weight"].input_factor.value is None
    assert narrow.blocks["0.weight"].basis()[1].shape == (40, 7)

    model, x, vector = model.double(), x.double(), vector.double()
    wide = EKFACLinearOperator(model, loss, trained(model), [(x, y)], byte_budget=1, **options)
    torch.testing.assert_close(product.double(), wide @ vector, rtol=1e-4, atol=1e-5)
    exact = KFACInverseLinearOperator(wide, damping=1e-3, use_exact_damping=True) @ vector
    assert float((solved.double() - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("budget", [1, 2**28])
def test_inputs_of_low_rank_among_more_data(budget: int) -> None:
    """Directions of A that are its rounding are left out, whatever they are: products and inverses are those of all."""
    torch.manual_seed(0)
    model, loss = nn.Linear(130, 4).double(), nn.CrossEntropyLoss()
    x = torch.zeros(150, 130, dtype=torch.float64)
    x[:, 7:20], x[:, 20:23] = torch.rand(150, 13).double(), 1e-9 * torch.rand(150, 3).double()  # squares: 1e-18
    y = torch.randint(4, (150,))
    options = {"fisher_type": "type-2", "check_deterministic": False, "byte_budget": budget}
    cut = EKFACLinearOperator(model, loss, trained(model), [(x, y)], **options)
    probabilities = model(x).softmax(-1).detach()
    of_hessian = (probabilities * (1 - probabilities)).sum(-1)
    torch.testing.assert_close(cut.trace, (of_hessian * (x.square().sum(-1) + 1)).mean(), rtol=1e-12, atol=0)
    assert cut.blocks["weight"].basis()[1].shape == (130, 13)
    vector = torch.randn(cut.shape[1], 2, dtype=torch.float64)
    solved = KFACInverseLinearOperator(cut, damping=1e-3, use_exact_damping=True) @ vector
    torch.testing.assert_close(cut @ solved + 1e-3 * solved, vector, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("data", "rank"), [(400, 20), (250, None)])  # more than inputs, with A; fewer, without
def test_small_directions_of_the_inputs_are_not_left_out(data: int, rank: int | None) -> None:
    """A rounding for each dimension is none any more: after a ReLU the mean makes one eigenvalue far the largest."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(300, 256), nn.ReLU(), nn.Linear(256, 10)), nn.CrossEntropyLoss()
    x, y = torch.rand(data, 20) @ torch.randn(20, 300), torch.randint(10, (data,))
    x = x if rank else x.relu()
    single = EKFACLinearOperator(model, loss, trained(model), [(x, y)], fisher_type="type-2")
    trace, vector = float(single.trace), torch.randn(single.shape[1])
    product, inverse = single @ vector, KFACInverseLinearOperator(single, damping=1e-3, use_exact_damping=True)
    solved = inverse @ vector
    assert rank is None or single.blocks["0.weight"].basis()[1].shape == (300, rank)
    exact = EKFACLinearOperator(model.double(), loss, trained(model), [(x.double(), y)], fisher_type="type-2")
    assert trace == pytest.approx(float(exact.trace), rel=1e-5)
    truth = exact @ vector.double()
    assert float((product - truth).norm() / truth.norm()) < 2e-5
    truth = KFACInverseLinearOperator(exact, damping=1e-3, use_exact_damping=True) @ vector.double()
    assert float((solved - truth).norm() / truth.norm()) < 3e-3


@pytest.mark.parametrize(("spare", "forwards"), [(0, 1), (-1, 2)], ids=["fits", "a-byte-short"])
def test_the_gradients_of_weight_and_bias_are_kept_once(spare: int, forwards: int) -> None:
    model, loss, calls = nn.Linear(4, 3), nn.CrossEntropyLoss(), list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(5, 4), torch.randint(3, (5,))
    # Gradients [2 5 1 3] of both; inputs [5 1 4] of the weight, [5 1 1] of the bias.
    budget = 4 * (2 * 5 * 3 + 5 * 4 + 5) + spare
    options = {"fisher_type": "type-2", "check_deterministic": False, "byte_budget": budget}
    EKFACLinearOperator(model, loss, trained(model), [(x, y)], num_data=5, **options).compute()
    assert len(calls) == forwards


# -- inverses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp-ce", "mlp-bce-sum", "conv-groups", "words-padded", "norms", "unused"])
def test_exact_damping_inverts_the_damped_matrix(name: str, kind: Any) -> None:
    linear = operator(kind, BY_NAME[name])
    identity = torch.eye(linear.shape[0], dtype=torch.float64)
    inverse = KFACInverseLinearOperator(linear, damping=1e-2, use_exact_damping=True)
    torch.testing.assert_close(dense(inverse) @ (dense(linear) + 1e-2 * identity), identity, rtol=1e-8, atol=1e-8)
    assert inverse.adjoint() is inverse


def test_an_inverse_follows_its_operator() -> None:
    case = BY_NAME["mlp-ce"]
    linear = operator(KFACLinearOperator, case)
    inverse = KFACInverseLinearOperator(linear, damping=0.1)
    before = dense(inverse)
    _, _, x, y = case.make()
    linear.update([(2 * x, y)])
    fresh = KFACInverseLinearOperator(linear, damping=0.1)
    assert not torch.allclose(before, dense(inverse))
    torch.testing.assert_close(dense(inverse), dense(fresh), **CLOSE)


@pytest.mark.parametrize("damping", [{"damping": 0.0}, {"damping": 0.0, "use_exact_damping": True}])
def test_singular_factors_are_named(damping: dict[str, Any]) -> None:
    linear = operator(KFACLinearOperator, BY_NAME["mlp-ce-datum"])
    with pytest.raises(RuntimeError, match=r"0\.weight.*damping"):
        KFACInverseLinearOperator(linear, **damping) @ torch.ones(linear.shape[0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KFACLinearOperator, {"use_heuristic_damping": True, "use_exact_damping": True}, "exclude"),
        (KFACLinearOperator, {"damping": (1.0, 2.0), "use_exact_damping": True}, "one number"),
        (EKFACLinearOperator, {"damping": 1.0}, "use_exact_damping"),
    ],
)
def test_damping_options_that_exclude_each_other(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFACInverseLinearOperator(operator(kind, BY_NAME["mlp-ce"]), **options)


# -- more data, other shards, state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp-ce-sum", "mlp-weighted-ce", "conv-groups", "words", "norms"])
def test_streaming_equals_all_at_once(name: str, kind: Any) -> None:
    case = BY_NAME[name]
    model, loss, x, y = case.make()
    first, second = split(x, y, 2)
    options = {"fisher_type": "type-2", "check_deterministic": False}
    whole = kind(model, loss, trained(model), [first, second], **options)

    later = kind(model, loss, trained(model), [first], **options)
    later.compute()
    later.update([second])
    shard = kind(model, loss, trained(model), [first], **options)
    shard.merge(kind(model, loss, trained(model), [second], **options))
    for other in (later, shard):
        torch.testing.assert_close(other.trace, whole.trace, **CLOSE)
        for block, same in zip(other.blocks.values(), whole.blocks.values(), strict=True):
            if isinstance(block, FactoredBlock):
                torch.testing.assert_close(block.factors(), same.factors(), **CLOSE)
    if kind is KFACLinearOperator:
        torch.testing.assert_close(dense(later), dense(whole), **CLOSE)
        torch.testing.assert_close(dense(shard), dense(whole), **CLOSE)


def test_shards_in_one_basis_merge_without_another_sweep() -> None:
    case = BY_NAME["mlp-ce"]
    model, loss, x, y = case.make()
    options = {"fisher_type": "type-2", "check_deterministic": False}
    first, second = (EKFACLinearOperator(model, loss, trained(model), [(x, y)], **options) for _ in range(2))
    first.compute()
    second.load_state_dict(first.state_dict())
    first.merge(second)
    torch.testing.assert_close(dense(first), dense(second), **CLOSE)  # the same data twice: the same mean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
def test_state_makes_the_operator_again(kind: Any, fisher_type: str) -> None:
    case = BY_NAME["mlp-weighted-ce"]
    linear = operator(kind, case, fisher_type=fisher_type)
    vector = torch.ones(linear.shape[0], dtype=torch.float64)
    expected = linear @ vector
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)

    model, _, x, y = case.make()
    again = kind.from_state_dict(stored, model, trained(model), [(x, y)])
    assert torch.equal(again @ vector, expected)
    assert again._loss_func.label_smoothing == 0.1
    inverse = KFACInverseLinearOperator(linear, damping=0.1, use_exact_damping=True)
    copy = KFACInverseLinearOperator.from_state_dict(inverse.state_dict(), again)
    torch.testing.assert_close(copy @ vector, inverse @ vector, **CLOSE)

    other, _, _, _ = case.make(seed=1)
    with pytest.warns(UserWarning, match="overwrites"):
        moved = kind.from_state_dict(stored, other, trained(other), [(x, y)], check_deterministic=False)
    assert torch.equal(moved @ vector, expected)


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    linear = operator(KFACLinearOperator, BY_NAME["mlp-ce"])
    expected = dense(linear)
    for other, message in [
        (operator(EKFACLinearOperator, BY_NAME["mlp-ce"]), "kind"),
        (operator(KFACLinearOperator, BY_NAME["mlp-ce"], kfac_approx="reduce"), "kfac_approx"),
        (operator(KFACLinearOperator, BY_NAME["mlp-weighted-ce"]), "loss"),
        (operator(KFACLinearOperator, BY_NAME["linear-ce"]), "layers|shape"),
    ]:
        other.compute()
        with pytest.raises(ValueError, match=message):
            linear.load_state_dict(other.state_dict())
    torch.testing.assert_close(dense(linear), expected, rtol=0, atol=0)


def test_operators_of_different_things_do_not_merge() -> None:
    linear = operator(KFACLinearOperator, BY_NAME["mlp-ce"])
    with pytest.raises(ValueError, match="cannot merge"):
        linear.merge(operator(KFACLinearOperator, BY_NAME["mlp-ce"], kfac_approx="reduce"))
    model, loss, x, y = BY_NAME["mlp-ce"].make(seed=3)
    with pytest.raises(ValueError, match="differ in value"):
        linear.merge(KFACLinearOperator(model, loss, trained(model), [(x, y)], fisher_type="type-2"))


# -- refusals, and parameters that no handler covers -------------------------------------------------------------------


class Scaled(nn.Module):
    """A parameter of its own beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() * self.scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 2**28])
def test_uncovered_parameters_get_the_diagonal_or_an_error(kind: Any, budget: int) -> None:
    torch.manual_seed(0)
    model, loss = Scaled().double(), nn.CrossEntropyLoss(weight=torch.rand(3).double())
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    with pytest.raises(NotImplementedError, match=r"scale.*uncovered='diagonal'"):
        kind(model, loss, trained(model), [(x, y)])
    linear = kind(
        model,
        loss,
        trained(model),
        split(x, y, 2),
        fisher_type="type-2",
        uncovered="diagonal",
        byte_budget=budget,
        separate_weight_and_bias=False,
    )
    jacobian = torch.func.jacrev(lambda s: (model.inner(x).tanh() * s).flatten())(model.scale.detach())
    hessian = reference.loss_hessian(loss, model(x), y)
    truth = torch.einsum("pa,pq,qa->a", jacobian, hessian, jacobian)
    position = [p is model.scale for p in model.parameters()].index(True)
    vector = [torch.ones_like(p) for p in model.parameters()]
    torch.testing.assert_close((linear @ vector)[position], truth, **CLOSE)
    solved = KFACInverseLinearOperator(linear, damping=0.1, use_exact_damping=True) @ vector
    torch.testing.assert_close(solved[position], 1 / (truth + 0.1), **CLOSE)
    torch.testing.assert_close(linear.trace, dense(linear).trace(), **CLOSE)
    state = kind.from_state_dict(linear.state_dict(), model, trained(model), [(x, y)])
    torch.testing.assert_close(state @ vector, linear @ vector, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_by_their_diagonal(kind: Any) -> None:
    model, loss, x, y = BY_NAME["tied-embedding"].make()
    with pytest.raises(NotImplementedError, match=r"tied"):
        kind(model, loss, trained(model), [(x, y)])
    linear = kind(model, loss, trained(model), [(x, y)], fisher_type="type-2", uncovered="diagonal")
    assert float(linear.trace) > 0


def test_batch_normalisation_in_train_mode_has_no_per_datum_gradients() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.scaled = nn.BatchNorm1d(4), Scaled()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.scaled(self.norm(x))
            return result

    model = Mixed().double()
    data = [(torch.randn(6, 4).double(), torch.randint(3, (6,)))]
    linear = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), trained(model), data, uncovered="diagonal", check_deterministic=False
    )
    with pytest.raises((ValueError, RuntimeError), match=r"batch"):
        linear.compute()
    assert int(model.norm.num_batches_tracked) == 0
    model.eval()
    assert float(KFACLinearOperator(model, nn.CrossEntropyLoss(), trained(model), data, uncovered="diagonal").trace) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", ["step", "data"])
def test_changed_parameters_are_reported(kind: Any, write: str) -> None:
    linear = operator(kind, BY_NAME["mlp-ce"])
    vector = torch.ones(linear.shape[0], dtype=torch.float64)
    linear @ vector
    with torch.no_grad():
        if write == "step":
            linear._params[0].add_(1e-3)
        else:
            linear._params[0].data.mul_(1.001)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        linear @ vector


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fisher_type": "forward-only"}, ValueError, "fisher_type"),
        ({"fisher_type": "exact"}, ValueError, "fisher_type"),
        ({"kfac_approx": "flatten"}, ValueError, "kfac_approx"),
        ({"mc_samples": 2}, ValueError, "mc_samples"),
        ({"uncovered": "zero"}, ValueError, "uncovered"),
        ({"byte_budget": 0}, ValueError, "byte_budget"),
        ({"num_per_example_loss_terms": 3}, ValueError, "num_per_example_loss_terms"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operator(EKFACLinearOperator, BY_NAME["mlp-ce"], **options).compute()


def test_other_losses_and_foreign_or_frozen_parameters_are_refused() -> None:
    model, _, x, y = BY_NAME["mlp-ce"].make()
    with pytest.raises(TypeError, match="SoftMarginLoss"):
        KFACLinearOperator(model, nn.SoftMarginLoss(), trained(model), [(x, y)])
    with pytest.raises(ValueError, match=r"params\[0\].*no parameter"):
        KFACLinearOperator(model, nn.CrossEntropyLoss(), trained(mlp()), [(x, y)])
    first = next(model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight.*frozen"):
        KFACLinearOperator(model, nn.CrossEntropyLoss(), [first], [(x, y)])


@pytest.mark.parametrize("kind", KINDS)
def test_dict_inputs_some_parameters_and_a_model_left_alone(kind: Any) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual()

        def forward(self, batch: Any) -> Tensor:
            result: Tensor = self.inner(batch["x"])
            return result

    torch.manual_seed(0)
    model, loss = Named().double(), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
    loss(model({"x": x}), y).backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    params = [model.inner.head.bias, model.inner.first.weight]
    options = {"fisher_type": "type-2"}
    named = kind(model, loss, params, [(UserDict(x=x), y)], batch_size_fn=lambda X: len(X["x"]), **options)
    plain = kind(model.inner, loss, params, [(x, y)], **options)
    torch.testing.assert_close(dense(named), dense(plain), **CLOSE)
    for p, (value, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_is_not_used_has_no_curvature() -> None:
    linear = operator(EKFACLinearOperator, BY_NAME["unused"])
    vector = [torch.ones_like(p) for p in linear._params]
    names = [name for name, _ in linear._model_func.named_parameters()]
    for name, product in zip(names, linear @ vector, strict=True):
        assert bool((product == 0).all()) == name.startswith("unused")
    assert isinstance(linear.blocks["unused.weight"], DataSetEigenBlock)


@pytest.mark.parametrize("label", ["factors", "anything"])
def test_a_progress_bars_label_steers_nothing(label: str) -> None:
    """Whether rows are new is the caller's to say, not the label's."""
    linear = operator(EKFACLinearOperator, BY_NAME["mlp-ce"])
    assert [chunk.first for _, chunk in linear._rows(label)] == [True]
    assert linear._terms == 0.0
    list(linear._new_rows())
    assert linear._terms == BY_NAME["mlp-ce"].data
