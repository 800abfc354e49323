"""What a likelihood reads from the gradient of the user's loss alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt.likelihoods import (
    Bernoulli,
    Categorical,
    FisherType,
    LossTerms,
    likelihood_from,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)


def gradient_of(loss: Tensor, prediction: Tensor) -> Tensor:
    return torch.autograd.grad(loss, prediction)[0]


def assert_same(found: LossTerms, exact: LossTerms, tolerance: float = 1e-6) -> None:
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found.scale, exact.scale, **close)
    torch.testing.assert_close(found.count, exact.count, **close)
    assert found.gradient is not None
    assert exact.gradient is not None
    torch.testing.assert_close(found.gradient, exact.gradient, **close)
    if exact.output_scale is not None or found.output_scale is not None:
        ones = torch.ones_like(exact.parameters)
        left = ones if found.output_scale is None else found.output_scale
        right = ones if exact.output_scale is None else exact.output_scale
        torch.testing.assert_close(left * found.scale[:, None], right * exact.scale[:, None], **close)


@quick
@given(
    rows=st.integers(2, 24),
    classes=st.integers(2, 12),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    rescaled=st.sampled_from([1.0, 65536.0, 1 / 3, 2.0**-10]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 10_000),
)
def test_labels_are_read_from_any_cross_entropy(
    rows: int,
    classes: int,
    spread: float,
    smoothing: float,
    weighted: bool,
    dtype: torch.dtype,
    rescaled: float,
    reduction: str,
    seed: int,
) -> None:
    if dtype == torch.float16:
        # Beyond, gradients overflow or vanish, and an ignored row is as good as a fitted one.
        rescaled, spread = 64.0, min(spread, 2.0)
    if smoothing > 0:
        classes = max(classes, 3)  # see below for two
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    target[1:] = torch.where(torch.rand(rows - 1, generator=generator) < 0.2, -100, target[1:])
    weights = 0.2 + torch.rand(classes, generator=generator) if weighted else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loss_func = nn.CrossEntropyLoss(
        None if weights is None else weights.to(wide),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    gradient = gradient_of(rescaled * loss_func(logits.to(wide), target), logits)
    likelihood = likelihood_from(loss_func)
    found = likelihood.terms(logits, gradient=gradient)
    assert_same(found, likelihood.terms(logits, target=target))


@quick
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    rescaled=st.sampled_from([1.0, 65536.0, 1 / 3, 2.0**-10]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 10_000),
)
def test_binary_targets_are_read_from_any_binary_cross_entropy(
    shape: list[int],
    spread: float,
    weighted: bool,
    dtype: torch.dtype,
    rescaled: float,
    reduction: str,
    seed: int,
) -> None:
    if dtype == torch.float16:
        rescaled = 64.0
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(2, shape, generator=generator)
    features = 1 if len(shape) == 1 else shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positive = 0.2 + 4 * torch.rand(features, generator=generator).to(wide)
    loss_func = nn.BCEWithLogitsLoss(
        weight=0.5 + torch.rand(features, generator=generator).to(wide) if weighted else None,
        pos_weight=positive if weighted else None,
        reduction=reduction,
    )
    gradient = gradient_of(rescaled * loss_func(logits.to(wide), target.to(wide)), logits)
    likelihood = likelihood_from(loss_func)
    found = likelihood.terms(logits, gradient=gradient)
    assert_same(found, likelihood.terms(logits, target=target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_computed_in_half_precision_are_recognised(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(64, 10)).to(dtype).requires_grad_()
    target = torch.randint(10, (64,))
    gradient = gradient_of(F.cross_entropy(logits, target), logits)
    assert_same(Categorical().terms(logits, gradient=gradient), Categorical().terms(logits, target=target))
    hard = torch.randint(2, (64, 10)).to(dtype)
    gradient = gradient_of(F.binary_cross_entropy_with_logits(logits, hard), logits)
    likelihood = Bernoulli(reduction="mean")
    assert_same(likelihood.terms(logits, gradient=gradient), likelihood.terms(logits, target=hard))


def test_float16_gradients_that_vanish_do_not_make_a_row_ignored() -> None:
    logits = torch.tensor([[9.0, 0.0], [0.0, 1.0]]).half().requires_grad_()
    target = torch.tensor([0, 0])
    gradient = gradient_of(F.cross_entropy(logits.float(), target) / 2**12, logits)
    assert gradient[0].abs().max() == 0
    assert Categorical().terms(logits, gradient=gradient).count == 2
    gradient = gradient_of(
        F.binary_cross_entropy_with_logits(logits.float(), torch.tensor([[1.0, 1], [1, 1]])) / 2**12,
        logits,
    )
    assert gradient[0, 0] == 0
    assert Bernoulli().terms(logits, gradient=gradient).output_scale is not None
    assert (Bernoulli().terms(logits, gradient=gradient).output_scale == 1).all()


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_sliced_logits_of_a_language_model_do_not_count(spread: float) -> None:
    torch.manual_seed(0)
    logits = (spread * torch.randn(3, 6, 5)).requires_grad_()
    tokens = torch.randint(5, (3, 6))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    terms = Categorical().terms(logits, gradient=gradient_of(loss, logits))
    target = torch.cat([tokens[:, 1:], torch.full((3, 1), -100)], 1)
    assert_same(terms, Categorical().terms(logits, target=target))
    assert terms.count == 15
    assert terms.terms_per_datum == 6
    (cotangent,) = Categorical().cotangents(terms, FisherType.MC, 3)
    assert (cotangent[:, :, -1] == 0).all()


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        *[((4, 6, 6), 1), ((4, 2, 7), 1), ((4, 7, 2), 1), ((4, 7, 1), 1), ((1, 6, 6), 1)],
        *[((4, 6, 6), 2), ((4, 2, 7), 2), ((4, 7, 2), 2), ((4, 1, 7), 2), ((1, 6, 6), 2)],
        *[((2, 3, 4, 5), 1), ((2, 3, 4, 5), 3)],
    ],
)
def test_the_class_axis_is_found(shape: tuple[int, ...], axis: int) -> None:
    torch.manual_seed(1)
    logits = torch.randn(shape, requires_grad=True)
    classes_last = logits.movedim(axis, -1)
    target = torch.randint(shape[axis], classes_last.shape[:-1])
    loss = F.cross_entropy(classes_last.flatten(0, -2), target.flatten())
    terms = Categorical().terms(logits, gradient=gradient_of(loss, logits))
    torch.testing.assert_close(terms.parameters, classes_last.detach().flatten(0, -2))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 1, 3)])
def test_a_batch_that_is_ignored_altogether_has_no_count(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    gradient, target = torch.zeros(shape), torch.full(shape[:1] + shape[2:], -100)
    for terms in (
        Categorical().terms(logits, gradient=gradient),
        Categorical().terms(logits, target=target),
    ):
        assert terms.count == 0
        assert (terms.scale == 0).all()
    assert Categorical(reduction="sum").gradient_scale(0.0) == 1.0


def test_saturated_rows_count_although_their_gradient_is_zero() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 2])
    gradient = gradient_of(F.cross_entropy(logits, target), logits)
    assert (gradient[0] == 0).all()
    assert_same(Categorical().terms(logits, gradient=gradient), Categorical().terms(logits, target=target))


def test_smoothed_labels_of_two_classes_are_told_by_length_where_direction_is_the_same() -> None:
    # Both labels of [4, -4] under smoothing give a gradient along (1, -1).
    logits = torch.tensor([[4.0, -4.0], [4.0, -4.0], [0.1, 0.3]], requires_grad=True)
    target = torch.tensor([0, 1, 0])
    likelihood = Categorical(torch.tensor([1.0, 5.0]), label_smoothing=0.2)
    loss = F.cross_entropy(logits, target, likelihood.class_weights, label_smoothing=0.2)
    found = likelihood.terms(logits, gradient=gradient_of(loss, logits))
    assert_same(found, likelihood.terms(logits, target=target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probability_targets(smoothing: float) -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    logits = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, 2, dtype=torch.float64).softmax(1)
    for used in (None, weights):
        likelihood = Categorical(used, label_smoothing=smoothing)

        def loss(f: Tensor, w: Tensor | None = used) -> Tensor:
            return F.cross_entropy(f.view(4, 3, 2), target, w, label_smoothing=smoothing)

        exact = likelihood.terms(logits, target=target)
        chunks = likelihood.cotangents(exact, FisherType.TYPE2)
        vectors = torch.cat([chunk.flatten(2) for chunk in chunks])
        moments = torch.einsum("vni,vnj->nij", vectors, vectors) / exact.count
        truth = torch.func.jacrev(torch.func.jacrev(loss))(logits.detach().flatten())
        truth = truth.view(4, 6, 4, 6).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        torch.testing.assert_close(moments, truth, rtol=0, atol=1e-10)

        gradient = gradient_of(loss(logits), logits)
        assert exact.gradient is not None
        restored = exact.restore(exact.gradient[None])[0] / exact.count
        torch.testing.assert_close(restored, gradient, rtol=0, atol=1e-10)
        if used is not None:
            with pytest.raises(ValueError, match="probability targets"):
                likelihood.terms(logits, gradient=gradient)
            continue
        found = likelihood.terms(logits, gradient=gradient)
        torch.testing.assert_close(found.scale, exact.scale, rtol=0, atol=1e-12)
        assert found.count == exact.count
        assert found.gradient is None
        with pytest.raises(ValueError, match=r"empirical.*Categorical.*pass the target"):
            likelihood.cotangents(found, FisherType.EMPIRICAL)


def test_soft_binary_targets() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)
    for reduction in ("mean", "sum"):
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)
        gradient = gradient_of(loss, logits)
        with pytest.raises(ValueError, match=r"non-binary BCE target.*call the loss_func itself"):
            Bernoulli(torch.tensor(2.0), reduction=reduction).terms(logits, gradient=gradient)
        for soft in (
            Bernoulli(soft_targets=True, reduction=reduction),
            Bernoulli(reduction=reduction),
            Bernoulli(torch.ones(5), reduction=reduction),
        ):
            exact = soft.terms(logits, target=target)
            assert_same(soft.terms(logits, gradient=gradient), exact)
            rescaled = soft.terms(logits, gradient=65536 * gradient)
            assert rescaled.gradient is None
            torch.testing.assert_close(rescaled.scale, exact.scale)
    with pytest.raises(ValueError, match="pos_weight"):
        Bernoulli(torch.tensor(2.0), soft_targets=True).terms(logits, gradient=gradient)
    Bernoulli(torch.tensor(2.0), soft_targets=True).terms(logits, target=target)
    assert_same(Bernoulli().terms(logits, target=target), Bernoulli(soft_targets=True).terms(logits, target=target))
    with pytest.raises(ValueError, match="outside"):
        Bernoulli(soft_targets=True).terms(logits, target=target + 1)


def test_one_soft_target_among_many_is_refused_where_it_matters() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(64, 100, requires_grad=True), torch.randint(2, (64, 100)).float()
    target[3, 4] = 0.9 * target[3, 4] + 0.05
    weight = torch.tensor(2.0)
    gradient = gradient_of(F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight), logits)
    with pytest.raises(ValueError, match="1 of 6400 targets"):
        Bernoulli(weight).terms(logits, gradient=gradient)
    plain = Bernoulli(reduction="mean")
    gradient = gradient_of(F.binary_cross_entropy_with_logits(logits, target), logits)
    assert_same(plain.terms(logits, gradient=gradient), plain.terms(logits, target=target))


def test_class_weights_of_one_leave_probability_targets_alone() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, 3, requires_grad=True), torch.rand(6, 3).softmax(1)
    likelihood = Categorical(torch.ones(3))
    found = likelihood.terms(logits, gradient=gradient_of(F.cross_entropy(logits, target), logits))
    torch.testing.assert_close(found.scale, likelihood.terms(logits, target=target).scale)


def test_numbers_left_out_of_a_binary_loss_have_no_curvature() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, requires_grad=True)
    target, kept = torch.randint(2, (4, 3, 5)).float(), torch.rand(4, 3, 5) < 0.7
    kept[1], kept[2, 0] = False, False
    loss = F.binary_cross_entropy_with_logits(logits[kept], target[kept], reduction="sum")
    likelihood = Bernoulli()
    terms = likelihood.terms(logits, gradient=gradient_of(loss / 3, logits))
    assert terms.count == 3  # data
    vectors = torch.cat(list(likelihood.cotangents(terms, FisherType.TYPE2)))
    moments = vectors.square().sum(0)
    probabilities = logits.detach().sigmoid()
    torch.testing.assert_close(moments, kept * probabilities * (1 - probabilities))
    by_row = Bernoulli(reduction="mean").terms(
        logits,
        gradient=gradient_of(F.binary_cross_entropy_with_logits(logits[kept], target[kept]), logits),
    )
    assert by_row.count == kept.any(-1).sum()


def test_signs_that_rounding_decides_are_not_taken_for_labels() -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(64, 50)).requires_grad_()
    target = (torch.rand(64, 50) < logits.detach().sigmoid()).float()
    positive = 0.2 + 4 * torch.rand(50)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive)
    gradient = gradient_of(loss, logits)
    assert ((gradient > 0) & (target == 1)).any()
    likelihood = Bernoulli(positive, reduction="mean")
    found = likelihood.terms(logits, gradient=gradient)
    assert_same(found, likelihood.terms(logits, target=target))


@quick
@given(
    margins=st.lists(st.sampled_from([8.0, 16.5, 25.0, 60.0]), min_size=1, max_size=6),
    classes=st.integers(2, 6),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_labels_are_read_where_rounding_leaves_no_gradient_at_them(
    margins: list[float], classes: int, smoothing: float, seed: int
) -> None:
    """All but certain rows: p - 1 is zero at the label, and far-off classes have underflowed to zero as well."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (len(margins),), generator=generator)
    logits = -120.0 * torch.rand(len(margins), classes, generator=generator)
    logits[torch.arange(len(margins)), labels] = torch.tensor(margins)
    logits.requires_grad_()
    gradient = gradient_of(F.cross_entropy(logits, labels, label_smoothing=smoothing), logits)
    likelihood = Categorical(label_smoothing=smoothing)
    found = likelihood.terms(logits, gradient=gradient)
    assert_same(found, likelihood.terms(logits, target=labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_labels_of_an_exact_fit_with_weights_and_smoothing(dtype: torch.dtype, seed: int) -> None:
    """The gradient is rounding, of any direction, and sums to anything: the labels make the least of it."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(4, generator=generator) + 0.5).to(dtype)
    labels = torch.randint(4, (12,), generator=generator)
    weighted = (0.9 * nn.functional.one_hot(labels, 4) + 0.1 / 4) * weights.float()
    scale = weighted.sum(-1)
    shift = torch.randn(12, 1, generator=generator)
    logits = ((weighted / scale[:, None]).log() + shift).to(dtype).requires_grad_()
    loss = nn.functional.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    terms = Categorical(class_weights=weights.float(), label_smoothing=0.1).terms(logits, gradient=gradient)
    live = (gradient != 0).any(-1)
    torch.testing.assert_close(terms.scale[live].float(), scale[live], rtol=1e-2, atol=0.0)
