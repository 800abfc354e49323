"""Divergences, samples and cotangents of likelihoods whatever the loss function's arguments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
import torch
from torch import Tensor

import kfacopt
from kfacopt import operators
from kfacopt.likelihoods import (
    AnyLoss,
    Bernoulli,
    BernoulliProbability,
    Categorical,
    Curvature,
    Fisher,
    FisherType,
    Gaussian,
    Huber,
    KFACType,
    KullbackLeibler,
    Laplace,
    Likelihood,
    LogCategorical,
    Poisson,
)

WEIGHTS = torch.tensor([0.3, 2.0, 1.0, 0.7], dtype=torch.float64)


def float64(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5


def test_divergence_of_counts_and_absolute_errors_is_the_kullback_leibler_divergence() -> None:
    old, new = float64(6, 5), float64(6, 5, seed=1)
    cases: list[tuple[Likelihood, Callable[[Tensor], torch.distributions.Distribution], Tensor, Tensor]] = [
        (Poisson(), lambda f: torch.distributions.Poisson(f.exp()), old, new),
        (Poisson(log_input=False, eps=0.0), torch.distributions.Poisson, old.exp(), new.exp()),
        (Laplace(), lambda f: torch.distributions.Laplace(f, torch.ones_like(f)), old, new),
        (BernoulliProbability(), torch.distributions.Bernoulli, old.sigmoid(), new.sigmoid()),
    ]
    for likelihood, distribution, before, after in cases:
        truth = torch.distributions.kl_divergence(distribution(before), distribution(after)).sum() / 5
        terms = likelihood.terms(before)
        torch.testing.assert_close(likelihood.divergence(terms, terms.at(after)), truth, rtol=1e-12, atol=0)
        assert likelihood.divergence(terms, terms).item() == 0.0


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=repr)
def test_divergence_is_the_kullback_leibler_divergence(likelihood: Likelihood) -> None:
    distribution = {
        Categorical: lambda f: torch.distributions.Categorical(logits=f),
        Bernoulli: lambda f: torch.distributions.Bernoulli(logits=f),
        Gaussian: lambda f: torch.distributions.Normal(f, 0.5**0.5),
    }[type(likelihood)]
    old, new = float64(6, 5), float64(6, 5, seed=1)
    truth = torch.distributions.kl_divergence(distribution(old), distribution(new)).sum()
    terms = likelihood.terms(old)
    torch.testing.assert_close(likelihood.divergence(terms, terms.at(new)), truth, rtol=1e-12, atol=0)
    assert likelihood.divergence(terms, terms).item() == 0.0
    # Tiny steps in float32 must not drown in rounding.
    narrow, step = likelihood.terms(old.float()), 1e-3
    small = likelihood.divergence(narrow, narrow.at(old.float() + step * new.float()))
    close = likelihood.divergence(terms, terms.at(old + step * new))
    torch.testing.assert_close(small.double(), close, rtol=1e-3, atol=0)


def test_a_masked_class_leaves_the_divergence_finite() -> None:
    old = torch.tensor([[0.0, 1.0, -torch.inf]])
    terms = Categorical().terms(old)
    assert torch.isfinite(Categorical().divergence(terms, terms.at(2 * old)))


def test_categorical_samples_have_the_hessian_as_exact_expectation() -> None:
    likelihood = Categorical(class_weights=WEIGHTS, label_smoothing=0.1)
    terms = likelihood.terms(float64(6, 4), target=torch.tensor([0, 1, 2, 3, 0, 1]))
    probabilities = terms.parameters.softmax(-1)
    expectation = torch.zeros(6, 4, 4, dtype=torch.float64)
    for label in range(4):
        out = torch.empty(1, 6, 4, dtype=torch.float64)
        vector = likelihood._sampled(terms.scale, probabilities, torch.full((1, 6), label), out)[0]
        expectation += probabilities[:, label, None, None] * vector[:, :, None] * vector[:, None]
    root = likelihood.hessian_sqrt(terms)
    truth = torch.einsum("vmi,vmj->mij", root, root)
    torch.testing.assert_close(expectation, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(), Laplace(), Poisson()], ids=repr)
def test_samples_follow_the_generator(likelihood: Likelihood) -> None:
    terms = likelihood.terms(float64(3, 4))
    generator = torch.Generator().manual_seed(3)
    state, default = generator.get_state(), torch.get_rng_state()
    (first,) = likelihood.cotangents(terms, FisherType.MC, 2, generator)
    (other,) = likelihood.cotangents(terms, FisherType.MC, 2, generator)
    (again,) = likelihood.cotangents(terms, FisherType.MC, 2, generator.set_state(state))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(default, torch.get_rng_state())
    with pytest.raises(ValueError, match="mc_samples=0"):
        likelihood.cotangents(terms, FisherType.MC, 0, generator)


def test_impossible_labels_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2000, -1)
    likelihood = Categorical()
    vectors = likelihood.sample(likelihood.terms(logits), 5, torch.Generator().manual_seed(0))
    assert (vectors[..., ::2] == 0).all()


def test_type2_keeps_positions_of_a_datum_apart_and_chunks_small() -> None:
    likelihood, prediction = Categorical(), float64(3, 7, 10)
    target = torch.zeros(3, 7, dtype=torch.long)
    chunks = list(likelihood.cotangents(likelihood.terms(prediction, target=target), "type-2", 1))
    assert all(chunk.shape[1:] == prediction.shape and len(chunk) <= 64 for chunk in chunks)
    vectors = torch.cat(chunks)
    assert len(vectors) == 7 * 9
    assert ((vectors != 0).any(-1).any(1).sum(1) == 1).all()  # one position each
    wide = float64(2, 150)
    sizes = [len(chunk) for chunk in likelihood.cotangents(likelihood.terms(wide), "type-2")]
    assert sizes == [64, 64, 21]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=repr)
def test_statistics_are_wide_and_cotangents_in_the_predictions_dtype(
    likelihood: Likelihood, dtype: torch.dtype
) -> None:
    terms = likelihood.terms(float64(3, 4).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert terms.parameters.dtype == terms.scale.dtype == terms.count.dtype == wide
    for fisher_type in (FisherType.TYPE2, FisherType.MC):
        assert next(likelihood.cotangents(terms, fisher_type)).dtype == dtype


@pytest.mark.parametrize(
    "likelihood",
    [
        *(Categorical(WEIGHTS, 3, 0.1, "sum"), Bernoulli(WEIGHTS, weight=WEIGHTS), Gaussian("mean")),
        *(Huber(0.5, 2.0, "sum"), Laplace("none"), Poisson(False, True, 1e-4, "datum"), LogCategorical(WEIGHTS, 2)),
        *(KullbackLeibler(True, "batchmean"), AnyLoss(torch.nn.MultiMarginLoss())),
        BernoulliProbability("sum"),
    ],
    ids=repr,
)
def test_likelihoods_copy_and_pickle(likelihood: Likelihood) -> None:
    assert repr(copy.deepcopy(likelihood)) == repr(likelihood)
    assert repr(pickle.loads(pickle.dumps(likelihood))) == repr(likelihood)


def test_enums_are_spelled_as_in_curvlinops() -> None:
    kfac = pytest.importorskip("curvlinops.kfac")
    assert all(kfac.FisherType(member.value).name == member.name for member in FisherType)
    assert all(kfac.KFACType(member.value).name == member.name for member in KFACType)


class Theirs(Enum):
    """An enum that is no str, as another package may have it."""

    TYPE2, MC, EMPIRICAL, FORWARD_ONLY = "type-2", "mc", "empirical", "forward-only"
    EXPAND, REDUCE = "expand", "reduce"
    OTHER, NUMBER = "other", 3


class AsCurvlinops(str, Enum):  # noqa: UP042 - whose str() is its name, unlike a StrEnum's
    """An enum that is a str."""

    TYPE2, MC, EMPIRICAL, FORWARD_ONLY = "type-2", "mc", "empirical", "forward-only"
    EXPAND, REDUCE = "expand", "reduce"


@pytest.mark.parametrize("enum", [Theirs, AsCurvlinops])
def test_enums_of_others_stand_for_ours(enum: Any) -> None:
    assert [FisherType(enum[member.name]) for member in FisherType] == list(FisherType)
    assert [KFACType(enum[member.name]) for member in KFACType] == list(KFACType)
    assert Fisher(enum.TYPE2).kind is Curvature.GGN
    model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    data = [(torch.randn(4, 3), torch.randn(4, 2))]
    for kind in (operators.KFACLinearOperator, operators.EKFACLinearOperator):
        for fisher, approx in ((enum.TYPE2, enum.REDUCE), (enum.MC, enum.EXPAND), (enum.EMPIRICAL, enum.EXPAND)):
            made = [
                kind(model, loss, list(model.parameters()), data, fisher_type=f, kfac_approx=a)
                for f, a in ((fisher, approx), (fisher.value, approx.value))
            ]
            assert torch.equal(made[0] @ torch.ones(8), made[1] @ torch.ones(8))
            assert str(made[0].state_dict()) == str(made[1].state_dict())
    forward = operators.KFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type=enum.FORWARD_ONLY)
    assert forward.state_dict()["fisher_type"] == "forward-only"
    kfacopt.KFAC(model, loss, curvature=enum.MC, kfac_approx=enum.REDUCE).close()


def test_other_enums_are_refused_as_other_words_are() -> None:
    for wrong in (Theirs.OTHER, Theirs.NUMBER, Theirs, 3, None):
        with pytest.raises(ValueError, match="is not a valid FisherType"):
            FisherType(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="curvature must be one of"):
            Fisher(wrong)  # type: ignore[arg-type]
