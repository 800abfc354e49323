"""What a likelihood refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt.likelihoods import (
    AnyLoss,
    Bernoulli,
    Categorical,
    FisherType,
    Gaussian,
    Huber,
    KullbackLeibler,
    Laplace,
    Likelihood,
    LogCategorical,
    Poisson,
    likelihood_from,
)
from kfacopt.likelihoods.precision import Precision


def gradient_of(loss: Tensor, prediction: Tensor) -> Tensor:
    return torch.autograd.grad(loss, prediction)[0]


def wrong_gradients() -> list[tuple[str, Likelihood, Tensor, Tensor]]:
    torch.manual_seed(0)
    logits = torch.randn(8, 5, requires_grad=True)
    classes, real = torch.randint(5, (8,)), torch.randn(8, 5)
    weights = torch.tensor([0.1, 1.0, 2.0, 0.5, 1.0])
    mse = gradient_of(F.mse_loss(logits, real), logits)
    softmax = gradient_of(F.cross_entropy(logits, classes), logits)
    likelihood = gradient_of(F.nll_loss(logits, classes), logits)
    soft = gradient_of(F.cross_entropy(logits, real.softmax(1)), logits)
    return [
        ("mse as cross-entropy", Categorical(), logits, mse),
        ("nll as cross-entropy", Categorical(), logits, likelihood),
        ("mse as weighted cross-entropy", Categorical(weights), logits, mse),
        ("soft as weighted cross-entropy", Categorical(weights), logits, soft),
        ("smoothed and weighted", Categorical(weights, label_smoothing=0.3), logits, softmax),
        ("mse as binary with pos_weight", Bernoulli(torch.tensor(2.0)), logits, mse),
        ("cross-entropy as binary with pos_weight", Bernoulli(torch.tensor(2.0)), logits, softmax),
        ("unweighted as pos_weight", Bernoulli(torch.tensor(4.0)), logits, gradient_of(
            F.binary_cross_entropy_with_logits(logits, (real > 0).float()), logits)),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", wrong_gradients(), ids=lambda wrong: wrong[0])
@pytest.mark.parametrize("rescaled", [1.0, 65536.0])
def test_the_gradient_of_another_loss_is_refused(
    wrong: tuple[str, Likelihood, Tensor, Tensor], rescaled: float
) -> None:
    _, likelihood, logits, gradient = wrong
    with pytest.raises(ValueError, match=r"is not that of (CrossEntropy|BCEWithLogits)Loss"):
        likelihood.terms(logits, gradient=rescaled * gradient)


@pytest.mark.parametrize(
    "likelihood",
    [
        Categorical(),
        Categorical(torch.ones(4), label_smoothing=0.1),
        Bernoulli(),
        Bernoulli(torch.ones(4)),
        Bernoulli(soft_targets=True),
        Gaussian(),
        Huber(),
        Laplace(),
        Poisson(),
        Poisson(log_input=False),
        LogCategorical(),
        KullbackLeibler(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_raise_nothing(likelihood: Likelihood, bad: float) -> None:
    torch.manual_seed(0)
    for shape in ((3, 4), (3, 4, 4)):
        prediction, gradient = torch.randn(shape), torch.randn(shape)
        if isinstance(likelihood, (LogCategorical, KullbackLeibler)):
            prediction = prediction.log_softmax(1)
            gradient = -F.one_hot(torch.zeros(3, 1).long(), 4).view(3, 4, *[1] * (len(shape) - 2)).float()
            gradient = gradient.expand(shape)
        elif isinstance(likelihood, Categorical):
            gradient = prediction.softmax(1) - F.one_hot(torch.zeros(3, 1).long(), 4).view(
                3, 4, *[1] * (len(shape) - 2)
            )
        elif isinstance(likelihood, Bernoulli):
            gradient = prediction.sigmoid() - 1.0
        broken_gradient, broken = gradient.clone(), prediction.clone()
        broken_gradient.view(-1)[5] = broken.view(-1)[5] = bad
        for f, u in (
            (prediction, broken_gradient),
            (broken, broken_gradient),
            (broken, torch.full_like(gradient, bad)),
        ):
            terms = likelihood.terms(f, gradient=u)
            list(likelihood.cotangents(terms, FisherType.TYPE2))
            list(likelihood.cotangents(terms, FisherType.MC))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=repr)
def test_predictions_without_rows_are_refused_by_name(likelihood: Likelihood) -> None:
    with pytest.raises(ValueError, match=r"\[0, 3\] is an empty batch"):
        likelihood.terms(torch.zeros(0, 3))
    with pytest.raises(TypeError, match=r"prediction has dtype torch\.complex64"):
        likelihood.terms(torch.zeros(2, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"prediction has dtype torch\.int64"):
        likelihood.terms(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"gradient has shape \[2, 4\]"):
        likelihood.terms(torch.zeros(2, 3), gradient=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="target"):
        likelihood.terms(torch.zeros(2, 3), target=torch.zeros(3, 2))


def test_arguments_are_honoured_or_refused_by_name() -> None:
    logits = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"class_weights has shape \[2\]"):
        Categorical(torch.ones(2)).terms(logits, target=torch.zeros(4).long())
    with pytest.raises(ValueError, match="class_weights"):
        Categorical(2.0 * torch.ones(3)).terms(logits)
    with pytest.raises(ValueError, match="class axis"):
        Categorical().terms(torch.zeros(4, 3, 3))
    with pytest.raises(ValueError, match="single number"):
        Categorical().terms(torch.tensor(0.0))
    with pytest.raises(ValueError, match="labels outside"):
        Categorical().terms(logits, target=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="class_weights has negative"):
        Categorical(-torch.ones(3))
    with pytest.raises(ValueError, match="label_smoothing=2"):
        Categorical(label_smoothing=2.0)
    for likelihood in (Categorical, Bernoulli, Gaussian):
        with pytest.raises(ValueError, match="reduction='average'"):
            likelihood(reduction="average")
    with pytest.raises(ValueError, match="pos_weight has negative"):
        Bernoulli(torch.tensor(-1.0))
    with pytest.raises(ValueError, match="pos_weight scales"):
        Bernoulli(torch.tensor(2.0)).terms(logits)
    for name in ("weight", "pos_weight"):
        for shape in ((4, 3), (2,), (4, 1), (1, 1, 3)):
            with pytest.raises(ValueError, match=f"^{name} of shape"):
                Bernoulli(**{name: torch.ones(shape)}).terms(logits, target=logits)
        for shape in ((3,), (1,), (), (1, 3)):
            Bernoulli(**{name: torch.ones(shape)}).terms(logits, target=logits)


def test_a_single_number_is_a_batch_of_one() -> None:
    for likelihood in (Gaussian(), Bernoulli()):
        terms = likelihood.terms(torch.tensor(0.0), target=torch.tensor(1.0))
        assert terms.count == 1
        assert next(likelihood.cotangents(terms, FisherType.TYPE2)).shape == (1,)


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


@pytest.mark.parametrize(
    ("loss_func", "message"),
    [
        (nn.SoftMarginLoss(), r"SoftMarginLoss is not supported.*nn\.MSELoss.*Likelihood.*curvature='empirical'"),
        (nn.CosineEmbeddingLoss(), r"CosineEmbeddingLoss is not supported.*curvature='empirical'"),
        (nn.CrossEntropyLoss, r"class CrossEntropyLoss, not an instance"),
        (F.cross_entropy, r"cross_entropy is not a module.*curvature='empirical'"),
        ("mse", r"str is not a module"),
        (Focal(), r"Focal overrides the forward of CrossEntropyLoss.*curvature='empirical'"),
    ],
)
def test_unknown_losses_are_refused_by_name(loss_func: object, message: str) -> None:
    with pytest.raises(TypeError, match=f"loss_func (the )?.*{message}"):
        likelihood_from(loss_func)


def test_weights_of_probabilities_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"weight of BCELoss.*BCEWithLogitsLoss\(weight"):
        likelihood_from(nn.BCELoss(weight=torch.ones(2)))


def test_any_loss_has_an_empirical_fisher_and_nothing_else() -> None:
    for loss_func in (nn.SoftMarginLoss(), F.cross_entropy, Focal(), nn.MultiMarginLoss()):
        likelihood = likelihood_from(loss_func, empirical=True)
        assert isinstance(likelihood, AnyLoss)
        terms = likelihood.terms(torch.zeros(3, 2), gradient=torch.ones(3, 2))
        (scores,) = likelihood.cotangents(terms, FisherType.EMPIRICAL)
        assert torch.equal(scores, torch.full((1, 3, 2), 3.0))
        for other in (FisherType.MC, FisherType.TYPE2):
            with pytest.raises(ValueError, match="curvature is not known; use curvature='empirical'"):
                list(likelihood.cotangents(terms, other))
    for loss_func in ("mse", nn.MSELoss):
        with pytest.raises(TypeError, match="loss_func"):
            likelihood_from(loss_func, empirical=True)
    assert isinstance(likelihood_from(nn.MSELoss(), empirical=True), Gaussian)


@pytest.mark.parametrize("likelihood", [LogCategorical(), KullbackLeibler()], ids=repr)
def test_logits_are_no_log_probabilities(likelihood: Likelihood) -> None:
    with pytest.raises(ValueError, match=r"no log-probabilities.*log_softmax.*CrossEntropyLoss"):
        likelihood.terms(torch.randn(4, 3))
    with pytest.raises(ValueError, match="axis of classes"):
        likelihood.terms(torch.tensor(0.0))
    z = torch.randn(4, 3).log_softmax(1)
    with pytest.raises(ValueError, match=r"is not that of (NLL|KLDiv)Loss.*loss_func"):
        likelihood.terms(z, gradient=torch.randn(4, 3))
    for dtype in (torch.bfloat16, torch.float16):
        likelihood.terms((3.0 * torch.randn(64, 100)).log_softmax(1).to(dtype))


def test_a_threshold_is_found_whatever_the_loss_is_multiplied_with() -> None:
    """By the value of the loss, where nothing but a constant lies between it and torch's loss."""
    torch.manual_seed(0)
    f, y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    for scale in (0.1, 3.0):  # all within the threshold; most beyond
        for loss in (nn.HuberLoss(delta=1.5), nn.SmoothL1Loss(beta=1.5), nn.HuberLoss()):
            likelihood, exact = likelihood_from(loss), likelihood_from(loss).terms(f, target=f.detach() - scale * y)
            for factor in (1.0, 0.03, 65536.0):
                value = factor * loss(f, f.detach() - scale * y)
                (gradient,) = torch.autograd.grad(value, f)
                plain, precision = likelihood.terms(f, gradient=gradient), Precision.of(f)
                found = likelihood.factor_of_value(plain, gradient, 1.0 / 6.0, float(value.detach()), precision)
                assert found == pytest.approx(factor)
                terms = likelihood.at_share(plain, gradient, found / 6.0)
                torch.testing.assert_close(terms.output_scale, exact.output_scale)


@pytest.mark.parametrize("name", ["threshold", "bend"])
def test_a_huber_of_no_width_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Huber(**{name: 0.0})


def test_torchs_losses_keep_their_arguments() -> None:
    weights = torch.tensor([1.0, 2.0])
    categorical = likelihood_from(nn.CrossEntropyLoss(weights, None, 7, None, "sum", 0.3))
    assert repr(categorical) == repr(Categorical(weights, 7, 0.3, "sum"))
    binary = likelihood_from(nn.BCEWithLogitsLoss(weights, pos_weight=2 * weights))
    assert repr(binary) == repr(Bernoulli(2 * weights, False, "mean", weights))
    assert repr(likelihood_from(nn.MSELoss(reduction="none"))) == repr(Gaussian("none"))
    assert likelihood_from(binary) is binary
