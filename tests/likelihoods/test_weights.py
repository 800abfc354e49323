"""What the user's gradient tells of the weights of the loss terms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, LossTerms, likelihood_from
from kfacopt.likelihoods.weights import mean_weight, times, weighed

DATA = 12
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def logits(outputs: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(DATA, outputs, generator=generator(), dtype=torch.float64).to(dtype).requires_grad_()


def targets(outputs: int = 3) -> Tensor:
    return torch.randn(DATA, outputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(classes: int = 3) -> Tensor:
    return torch.randint(classes, (DATA,), generator=generator())


def bits() -> Tensor:
    return F.one_hot(labels(), 3)


def weights() -> Tensor:
    return 0.2 + 3.0 * torch.rand(DATA, generator=generator(), dtype=torch.float64)


def read(
    likelihood: Likelihood, each: Callable[[Tensor], Tensor], f: Tensor, target: Tensor | None = None
) -> LossTerms:
    (gradient,) = torch.autograd.grad(each(f), f)
    terms = likelihood.terms(f, gradient=gradient) if target is None else likelihood.terms(f, target=target)
    return weighed(likelihood, terms, gradient)


def cross_entropies(f: Tensor, **options: object) -> Tensor:
    wide = f if f.dtype == torch.float64 else f.float()
    return F.cross_entropy(wide, labels(), reduction="none", **options)  # type: ignore[arg-type]


def binary(f: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, bits().to(f.dtype), reduction="none").mean(1)


Case = tuple[Likelihood, Callable[[Tensor], Tensor]]
# The loss of each datum, and the mean of all of them at weight one is the likelihood's.
EACH: dict[str, Case] = {
    "cross-entropy": (Categorical(), cross_entropies),
    "smoothed": (Categorical(label_smoothing=0.2), lambda f: cross_entropies(f, label_smoothing=0.2)),
    "binary": (Bernoulli(reduction="mean"), binary),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EACH)
def test_weights_of_the_data_are_read(name: str, dtype: torch.dtype) -> None:
    likelihood, each = EACH[name]
    w = weights().to(dtype)
    found = read(likelihood, lambda f: (each(f) * w).mean(), logits(dtype=dtype))
    plain = read(likelihood, lambda f: each(f).mean(), logits(dtype=dtype))
    assert found.weights is not None
    close = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    assert plain.gradient is not None
    # The rest has hardly any curvature: in half precision its weights are not to be told, and are those of the others.
    telling = plain.gradient.norm(dim=1) > (0.3 * plain.scale if dtype == torch.bfloat16 else 0.0)
    assert int(telling.sum()) > DATA / 2
    torch.testing.assert_close(found.weights[telling].double(), w[telling].double(), **close)
    torch.testing.assert_close(found.scale, plain.scale * found.weights)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient, plain.gradient * found.weights[:, None])
    assert mean_weight(found) == pytest.approx(
        float(w.double().mean()), rel=max(0.1 * (dtype == torch.bfloat16), DTYPES[dtype])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0, 1e-3])
@pytest.mark.parametrize("name", EACH)
def test_a_factor_is_one_number_and_one_is_exactly_one(name: str, factor: float, dtype: torch.dtype) -> None:
    likelihood, each = EACH[name]
    found = read(likelihood, lambda f: factor * each(f).mean(), logits(dtype=dtype))
    assert found.weights is not None
    assert len(found.weights.unique()) == 1
    if factor == 1.0:
        assert bool((found.weights == 1.0).all())
    assert float(found.weights[0]) == pytest.approx(factor, rel=DTYPES[dtype])


def test_class_weights_and_ignored_rows_are_no_weights() -> None:
    loss = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    y = torch.where(torch.arange(DATA) < 4, -100, labels())
    found = read(likelihood_from(loss), lambda f: loss(f, y), logits())
    assert found.weights is not None
    assert bool((found.weights == 1.0).all())
    assert mean_weight(found) == 1.0


def test_after_a_sum_one_is_what_a_sum_counts() -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    for factor in (1.0, 3.0):
        found = read(likelihood_from(loss), lambda f, c=factor: c * loss(f, labels()), logits())  # type: ignore[misc]
        assert mean_weight(found) == pytest.approx(factor)


def test_a_row_of_weight_zero_has_no_curvature() -> None:
    w = weights()
    w[:5] = 0.0
    for name in ("cross-entropy", "binary"):
        likelihood, each = EACH[name]
        found = read(likelihood, lambda f, each=each: (each(f) * w).mean(), logits())  # type: ignore[misc]
        assert bool((found.scale[:5] == 0.0).all())
        # The rows that are left count what they do in the mean over all.
        assert found.weights is not None
        torch.testing.assert_close(found.weights[5:] / found.count, w[5:] / DATA)


def test_given_the_target_squared_errors_tell_theirs() -> None:
    y, w = targets(1), weights()
    w[:3] = 0.0

    def squares(f: Tensor) -> Tensor:
        return ((f - y).square().squeeze(1) * w).mean()

    found = read(Gaussian(reduction="mean"), squares, logits(1), target=y)
    assert found.weights is not None
    torch.testing.assert_close(found.weights, w)
    assert read(Gaussian(reduction="mean"), squares, logits(1)).weights is None


def test_another_loss_than_the_targets_is_not_taken_for_weights() -> None:
    y = targets()
    for other in (
        lambda f: F.l1_loss(f, y),
        lambda f: F.mse_loss(f, y.flip(0)),
        lambda f: -F.mse_loss(f, y) + 1e-3 * f.square().sum(),
        lambda f: ((f - y).square() * torch.tensor([1.0, 5.0, 0.2])).mean(),
    ):
        assert read(Gaussian(reduction="mean"), other, logits(), target=y).weights is None


def test_two_classes_tell_a_factor_but_no_weights_from_soft_labels() -> None:
    def each(f: Tensor) -> Tensor:
        return F.cross_entropy(f, labels(2), reduction="none")

    assert mean_weight(read(Categorical(), lambda f: 5.0 * each(f).mean(), logits(2))) == pytest.approx(5.0)
    assert read(Categorical(), lambda f: (each(f) * weights()).mean(), logits(2)).weights is None
    soft = 0.8 * F.one_hot(labels(2), 2).double() + 0.1
    found = read(Categorical(), lambda f: F.cross_entropy(f, soft), logits(2))
    assert found.weights is None
    assert found.count == DATA


def test_a_single_binary_output_does_not_either() -> None:
    y = labels(2)[:, None].double()

    def loss(f: Tensor) -> Tensor:
        return (F.binary_cross_entropy_with_logits(f, y, reduction="none") * weights()[:, None]).mean()

    assert read(Bernoulli(reduction="mean"), loss, logits(1)).weights is None
    found = read(Bernoulli(reduction="mean"), loss, logits(1), target=y)
    assert found.weights is not None
    torch.testing.assert_close(found.weights, weights())


@pytest.mark.parametrize("of", [Categorical(), Categorical(label_smoothing=0.1)], ids=["hard", "smoothed"])
def test_outputs_that_are_no_classes_of_the_loss_have_no_curvature(of: Categorical) -> None:
    f = torch.cat([logits(), logits(2)], 1).detach().requires_grad_()
    y = labels()
    value = 3.0 * F.cross_entropy(f[:, :3], y, label_smoothing=of.label_smoothing)
    (gradient,) = torch.autograd.grad(value, f)
    terms = weighed(of, of.terms(f, gradient=gradient), gradient)
    alone = of.terms(f[:, :3].detach(), target=y)
    assert terms.weights is not None
    torch.testing.assert_close(terms.weights, torch.full_like(terms.weights, 3.0))
    torch.testing.assert_close(terms.gradient, 3.0 * alone.gradient)
    wanted = torch.nn.functional.pad(of.hessian_sqrt(alone), (0, 2)) * 3.0**0.5
    torch.testing.assert_close(terms.restore(of.hessian_sqrt(terms)), wanted)
    assert terms.rows is not None
    torch.testing.assert_close(of.loss_value(terms, terms.rows(gradient), 1.0 / DATA), value.detach())
    torch.testing.assert_close(terms.at(f.detach() + 1.0).parameters, f[:, :3].detach() + 1.0)


def test_outputs_without_gradient_of_another_loss_are_named() -> None:
    f = torch.cat([logits(), logits(2)], 1).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(2.0 * f[:, :3], labels()), f)
    with pytest.raises(ValueError, match=r"does not depend on the outputs \[3, 4\].*CrossEntropyLoss"):
        Categorical().terms(f, gradient=gradient)


def test_the_empirical_fisher_is_as_large_as_the_weights() -> None:
    likelihood, each = EACH["cross-entropy"]
    plain = read(likelihood, lambda f: each(f).mean(), logits())
    found = times(plain, weights())
    assert plain.scores is plain.gradient or torch.equal(plain.scores, plain.gradient)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores.square(), plain.gradient.square() * weights()[:, None])  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_raise_nothing(bad: float) -> None:
    for likelihood, each in EACH.values():
        f = logits()
        (gradient,) = torch.autograd.grad(each(f).mean(), f)
        gradient[0, 0] = bad
        weighed(likelihood, likelihood.terms(f, gradient=gradient), gradient)


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_values_are_those_of_the_loss(factor: float) -> None:
    """From the gradient alone; of weighted terms too."""
    y, soft = targets(), logits().detach().flip(0).softmax(1)
    losses: list[tuple[Likelihood, Callable[[Tensor], Tensor]]] = [
        (Gaussian(reduction="mean"), lambda f: F.mse_loss(f, y)),
        (Categorical(), lambda f: F.cross_entropy(f, soft)),
        (Categorical(), lambda f: F.cross_entropy(f, labels())),
        (Bernoulli(soft_targets=True, reduction="mean"), lambda f: F.binary_cross_entropy_with_logits(f, soft)),
    ]
    for likelihood, loss in losses:
        f = logits()
        value = factor * loss(f)
        (gradient,) = torch.autograd.grad(value, f)
        terms = likelihood.terms(f, gradient=gradient)
        found = likelihood.loss_value(terms, gradient, factor * likelihood.term_share(float(terms.count)))
        torch.testing.assert_close(found, value.detach())
