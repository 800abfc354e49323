"""Likelihoods against the Hessians, gradients and divergences of torch's own losses in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfacopt.likelihoods import (
    Bernoulli,
    Categorical,
    FisherType,
    Gaussian,
    Huber,
    Laplace,
    Likelihood,
    LossTerms,
    likelihood_from,
)
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.pointwise import Pointwise

# torch warns that KLDivLoss's mean is not the one over data.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")

CLASSES = 4
WEIGHTS = torch.tensor([0.3, 2.0, 1.0, 0.7], dtype=torch.float64)
POSITIVE = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)


def float64(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5


def labels(*shape: int, ignored: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(CLASSES, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.3, -100, drawn) if ignored else drawn


def binary(*shape: int) -> Tensor:
    return (float64(*shape, seed=2) > 0).double()


def language(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target: loss(logits.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Case:
    """A loss as the user computes it, and the mean loss whose curvature it stands for."""

    name: str
    loss: nn.Module | Likelihood
    prediction: Tensor
    target: Tensor
    mean_loss: Callable[[Tensor, Tensor], Tensor]
    user_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    slope_loss: Callable[[Tensor, Tensor], Tensor] | None = None  # if its gradient is another's than its Hessian

    @property
    def likelihood(self) -> Likelihood:
        return likelihood_from(self.loss)

    def gradient(self, rescaled: float = 1.0) -> Tensor:
        prediction = self.prediction.clone().requires_grad_()
        loss = self.user_loss or self.loss
        assert callable(loss)
        value = loss(prediction, self.target).sum() * rescaled
        return torch.autograd.grad(value, prediction)[0]

    @property
    def tells(self) -> bool:
        """Whether the gradient tells the target in spite of any factor."""
        return not isinstance(self.likelihood, (Gaussian, Pointwise))

    def terms(self, source: str) -> LossTerms:
        if source == "target":
            return self.likelihood.terms(self.prediction, target=self.target)
        rescaled = {"gradient": 1.0, "scaled gradient": 65536.0, "accumulated gradient": 1 / 7}
        return self.likelihood.terms(self.prediction, gradient=self.gradient(rescaled[source]))


def cross_entropies() -> list[Case]:
    cases = []
    arguments: dict[str, dict[str, object]] = {
        "plain": {},
        "weights": {"weight": WEIGHTS},
        "smoothing": {"label_smoothing": 0.2},
        "weights+smoothing": {"weight": WEIGHTS, "label_smoothing": 0.2},
    }
    for name, given in arguments.items():
        mean = nn.CrossEntropyLoss(**given)  # type: ignore[arg-type]
        for reduction in ("mean", "sum", "none"):
            loss = nn.CrossEntropyLoss(**given, reduction=reduction)  # type: ignore[arg-type]
            row = [name, reduction]
            cases += [
                Case(" ".join([*row, "[n c]"]), loss, float64(5, CLASSES), labels(5), mean),
                Case(
                    " ".join([*row, "ignored [n c d]"]),
                    loss,
                    float64(3, CLASSES, 5),
                    labels(3, 5, ignored=True),
                    mean,
                ),
            ]
        loss = mean
        image = (float64(2, CLASSES, 2, 3), labels(2, 2, 3, ignored=True))
        sequence = (float64(2, 5, CLASSES), labels(2, 5, ignored=True))
        cases += [
            Case(f"{name} [c]", loss, float64(CLASSES), labels(), mean),
            Case(f"{name} image", loss, *image, mean),
            Case(f"{name} sequence", loss, *sequence, language(mean), language(loss)),
        ]
    return cases


def others() -> list[Case]:
    cases = []
    for shape in ((4, 3), (4,), (2, 4, 3)):
        prediction, real, hard = float64(*shape), float64(*shape, seed=3), binary(*shape)
        positive = POSITIVE if len(shape) > 1 else POSITIVE[:1]
        bce = {"pos_weight": positive, "weight": POSITIVE.flip(0)[: len(positive)]}
        for reduction in ("mean", "sum", "none"):
            per_datum = reduction == "sum"

            def mse(f: Tensor, y: Tensor, per_datum: bool = per_datum) -> Tensor:
                return F.mse_loss(f, y, reduction="sum") / len(f) if per_datum else F.mse_loss(f, y)

            def cross(
                f: Tensor,
                y: Tensor,
                per_datum: bool = per_datum,
                given: dict[str, Tensor] | None = None,
            ) -> Tensor:
                loss = F.binary_cross_entropy_with_logits(f, y, **(given or {}), reduction="none")  # type: ignore[arg-type]
                return loss.sum() / len(f) if per_datum else loss.mean()

            def weighted(
                f: Tensor,
                y: Tensor,
                cross: Callable[..., Tensor] = cross,
                given: dict[str, Tensor] = bce,
            ) -> Tensor:
                return cross(f, y, given=given)

            name = f"{reduction} {list(shape)}"
            plain = nn.BCEWithLogitsLoss(reduction=reduction)
            both = nn.BCEWithLogitsLoss(**bce, reduction=reduction)
            squared = nn.MSELoss(reduction=reduction)
            cases += [
                Case(f"mse {name}", squared, prediction, real, mse),
                Case(f"bce {name}", plain, prediction, hard, cross),
                Case(f"bce weights {name}", both, prediction, hard, weighted),
            ]

        def per_datum_mse(f: Tensor, y: Tensor) -> Tensor:
            return (f - y).square().sum() / len(f)

        def per_datum_bce(f: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(f, y, reduction="sum") / len(f)

        cases += [
            Case(
                f"Gaussian {list(shape)}",
                Gaussian(),
                prediction,
                real,
                per_datum_mse,
                per_datum_mse,
            ),
            Case(
                f"Bernoulli {list(shape)}",
                Bernoulli(),
                prediction,
                hard,
                per_datum_bce,
                per_datum_bce,
            ),
        ]
    return cases


def averaged(each: Callable[[Tensor, Tensor], Tensor], per_datum: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of losses of numbers: over the data, or over all."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        values = each(f, y)
        return values.sum() / len(f) if per_datum else values.mean()

    return loss


def pointwise() -> list[Case]:
    """Losses of each number by itself; where torch's Hessian is not what stands for it, the Fisher's is spelled out."""
    cases = []
    for shape in ((4, 3), (4,), (2, 4, 3)):
        prediction, real = float64(*shape), float64(*shape, seed=3)
        rates, counts = prediction.exp(), float64(*shape, seed=4).exp().floor()
        for reduction in ("mean", "sum", "none"):
            wide: dict[str, tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor] | None]] = {
                "smooth l1": (nn.SmoothL1Loss(reduction=reduction), prediction, real, None),
                "smooth l1 beta": (nn.SmoothL1Loss(reduction=reduction, beta=0.3), prediction, real, None),
                "huber": (nn.HuberLoss(reduction=reduction, delta=0.7), prediction, real, None),
                "l1": (nn.L1Loss(reduction=reduction), prediction, real, lambda f, y: 0.5 * f.square()),
                "l1 as smooth": (
                    nn.SmoothL1Loss(reduction=reduction, beta=0.0),
                    prediction,
                    real,
                    lambda f, y: 0.5 * f**2,
                ),
                "poisson": (nn.PoissonNLLLoss(reduction=reduction), prediction, counts, None),
                "poisson full": (nn.PoissonNLLLoss(reduction=reduction, full=True), prediction, counts, None),
                # Fisher 1/f at f, the prediction; of eps 1e-8 it sees 1e-8.
                "poisson rate": (
                    nn.PoissonNLLLoss(log_input=False, reduction=reduction, eps=0.0),
                    rates,
                    counts,
                    lambda f, y: f * f.log() - f,
                ),
                "probability": (
                    nn.BCELoss(reduction=reduction),
                    prediction.sigmoid(),
                    real.sigmoid(),
                    lambda f, y: f.xlogy(f) + (1.0 - f).xlogy(1.0 - f),
                ),
            }
            for name, (loss, f, y, bent) in wide.items():
                none = copy.copy(loss)
                none.reduction = "none"
                slope = averaged(none, reduction == "sum")
                mean = slope if bent is None else averaged(bent, reduction == "sum")
                cases.append(Case(f"{name} {reduction} {list(shape)}", loss, f, y, mean, slope_loss=slope))
    return cases


def of_log_probabilities() -> list[Case]:
    """Their Hessian is that of the cross-entropy of the same numbers as logits."""
    cases = []
    for weight in (None, WEIGHTS):
        for reduction in ("mean", "sum", "none"):
            mean, nll = nn.CrossEntropyLoss(weight), nn.NLLLoss(weight, reduction=reduction)
            for shape, of in (((5, CLASSES), (5,)), ((3, CLASSES, 5), (3, 5))):
                z, y = float64(*shape).log_softmax(1), labels(*of, ignored=len(shape) > 2)
                name = f"nll {weight is not None} {reduction} {list(shape)}"
                cases.append(Case(name, nll, z, y, mean, slope_loss=nn.NLLLoss(weight)))
    z, y = float64(2, 5, CLASSES).log_softmax(-1), labels(2, 5, ignored=True)
    loss = nn.NLLLoss()
    cases.append(
        Case("nll sequence", loss, z, y, language(nn.CrossEntropyLoss()), language(loss), slope_loss=language(loss))
    )
    for shape, axis in (((4, 3), 1), ((2, 5, 3), 2), ((2, 3, 5), 1)):
        z, t = float64(*shape).log_softmax(axis), float64(*shape, seed=5).softmax(axis)
        for reduction in ("mean", "batchmean", "sum", "none"):
            for log_target in (False, True):
                divergence = nn.KLDivLoss(reduction=reduction, log_target=log_target)
                factor = 1.0 / len(z) if reduction in ("batchmean", "sum") else 1.0 / z.numel()

                def bent(f: Tensor, y: Tensor, axis: int = axis, factor: float = factor) -> Tensor:
                    return factor * f.logsumexp(axis).sum()

                def slope(f: Tensor, y: Tensor, log: bool = log_target, factor: float = factor) -> Tensor:
                    return factor * F.kl_div(f, y, reduction="sum", log_target=log)

                name = f"kl {reduction} {log_target} {list(shape)} {axis}"
                target = t.log() if log_target else t
                cases.append(Case(name, divergence, z, target, bent, slope_loss=slope))
    return cases


def beyond(case: Case) -> bool:
    """Whether the curvature depends on which errors are beyond a threshold."""
    return isinstance(case.likelihood, Huber)


CASES = cross_entropies() + others() + pointwise() + of_log_probabilities()
SOURCES = ("target", "gradient", "scaled gradient", "accumulated gradient")


def name_of(case: Case) -> str:
    return case.name


all_cases = pytest.mark.parametrize("case", CASES, ids=name_of)


def second_moments(case: Case, chunks: list[Tensor]) -> Tensor:
    """Sum over v of v vᵀ within every datum, ``[n f f]``."""
    vectors = torch.cat(chunks)
    data = 1 if case.prediction.ndim == 1 and isinstance(case.likelihood, Categorical) else None
    flat = vectors.reshape(len(vectors), data or len(case.prediction), -1)
    return torch.einsum("vni,vnj->nij", flat, flat)


def hessian_blocks(case: Case) -> Tensor:
    """Blocks ``[n f f]`` of the mean loss' Hessian that belong to one datum."""
    size, shape = case.prediction.numel(), case.prediction.shape

    def loss(flat: Tensor) -> Tensor:
        return case.mean_loss(flat.view(shape), case.target)

    # Reverse over reverse: torch.func.hessian's forward mode warns of torch.jit.script's end.
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(case.prediction.flatten())
    data = 1 if case.prediction.ndim == 1 and isinstance(case.likelihood, Categorical) else shape[0]
    blocks = hessian.view(data, size // data, data, size // data)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


@all_cases
def test_type2_cotangents_are_the_hessian_of_torchs_mean_loss(case: Case) -> None:
    truth = hessian_blocks(case)
    # Which errors are beyond a threshold, the gradient of a rescaled loss alone does not tell.
    for source in SOURCES[:2] if beyond(case) else SOURCES:
        terms = case.terms(source)
        chunks = list(case.likelihood.cotangents(terms, FisherType.TYPE2, 1, None))
        moments = second_moments(case, chunks) / terms.count
        torch.testing.assert_close(moments, truth, rtol=0, atol=1e-10, msg=lambda m, s=source: s + m)


@all_cases
def test_gradient_of_the_terms_is_autograds(case: Case) -> None:
    prediction = case.prediction.clone().requires_grad_()
    (truth,) = torch.autograd.grad((case.slope_loss or case.mean_loss)(prediction, case.target), prediction)
    # What the squared error's gradient is, cannot be told from a rescaled loss.
    known = "scaled gradient" if case.tells else "target"
    for source in ("target", known):
        terms = case.terms(source)
        (vector,) = case.likelihood.cotangents(terms, FisherType.EMPIRICAL, 1, None)
        torch.testing.assert_close(vector[0] / terms.count, truth, rtol=0, atol=1e-10)


@all_cases
def test_terms_say_whether_their_gradient_is_free_of_the_loss_scale(case: Case) -> None:
    exact = case.terms("target")
    assert exact.reads_target
    assert not exact.at(case.prediction).reads_target
    for source in SOURCES[1:]:
        terms = case.terms(source)
        assert terms.reads_target is case.tells
        if terms.reads_target:
            torch.testing.assert_close(terms.gradient, exact.gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(soft_targets=True), Bernoulli(soft_targets=True, reduction="sum")], ids=repr
)
def test_soft_targets_are_read_only_if_given(likelihood: Likelihood) -> None:
    prediction, target = float64(6, 3), float64(6, 3, seed=3).softmax(-1)
    assert likelihood.terms(prediction, target=target).reads_target
    gradient = prediction.softmax(-1) - target if isinstance(likelihood, Categorical) else prediction.sigmoid() - target
    assert not likelihood.terms(prediction, gradient=gradient / 6).reads_target


@pytest.mark.parametrize("case", [c for c in CASES if c.likelihood.reduction != "none"], ids=name_of)
def test_gradient_scale_makes_the_users_gradient_that_of_the_mean_loss(case: Case) -> None:
    prediction = case.prediction.clone().requires_grad_()
    (truth,) = torch.autograd.grad((case.slope_loss or case.mean_loss)(prediction, case.target), prediction)
    factor = case.likelihood.gradient_scale(case.terms("gradient").count.item())
    torch.testing.assert_close(case.gradient() * factor, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c.likelihood.is_hessian and not beyond(c)], ids=name_of)
def test_divergence_is_the_bregman_divergence_of_torchs_mean_loss(case: Case) -> None:
    terms = case.terms("gradient")
    moved = case.prediction + 0.5 * float64(*case.prediction.shape, seed=7)
    prediction = case.prediction.clone().requires_grad_()
    before = case.mean_loss(prediction, case.target)
    (slope,) = torch.autograd.grad(before, prediction)
    change = case.mean_loss(moved, case.target) - before.detach()
    truth = change - (slope * (moved - case.prediction)).sum()
    divergence = case.likelihood.divergence(terms, terms.at(moved)) / terms.count
    torch.testing.assert_close(divergence, truth, rtol=0, atol=1e-10)


@all_cases
def test_the_change_of_a_loss_is_its_linear_part_and_the_remainder(case: Case) -> None:
    """Of a step that brings no error to a threshold or a kink: which would come there the gradient does not tell."""
    terms, loss = case.terms("target"), case.slope_loss or case.mean_loss
    moved = case.prediction * (1.0 + 1e-4)
    prediction = case.prediction.clone().requires_grad_()
    before = loss(prediction, case.target)
    (slope,) = torch.autograd.grad(before, prediction)
    truth = loss(moved, case.target) - before.detach() - (slope * (moved - case.prediction)).sum()
    remainder = case.likelihood.remainder(terms, terms.at(moved)) / terms.count
    # Of an absolute error, the kinks' expectation instead of none of them.
    atol = 1e-6 if isinstance(case.likelihood, Laplace) else 1e-13
    torch.testing.assert_close(remainder, truth, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    [
        *("weights+smoothing [c]", "huber mean [4, 3]", "l1 mean [4, 3]", "poisson mean [4, 3]"),
        *("poisson rate sum [4, 3]", "kl mean False [4, 3] 1", "bce weights mean [4, 3]", "mse sum [4, 3]"),
    ],
)
def test_sampled_moments_agree_with_the_hessian_within_their_standard_error(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    terms, samples = case.terms("target"), 40_000
    generator = torch.Generator().manual_seed(5)
    vectors = case.likelihood.sample(terms, samples, generator) * samples**0.5
    products = torch.einsum("vmi,vmj->vmij", vectors, vectors)
    root = case.likelihood.hessian_sqrt(terms)
    truth = torch.einsum("vmi,vmj->mij", root, root)
    error = products.std(0) / samples**0.5
    # At most 36 entries, each beyond 5 standard errors with probability 6e-7.
    assert ((products.mean(0) - truth).abs() <= 5 * error + 1e-12).all()
    assert (vectors.mean(0).abs() <= 5 * vectors.std(0) / samples**0.5 + 1e-12).all()


@pytest.mark.parametrize("spread", [0.1, 10.0, 1e3])
def test_cross_entropys_root_has_a_vector_less_than_classes(spread: float) -> None:
    logits = spread * float64(40, 7)
    logits[0, 3] = -torch.inf  # a masked class
    for dtype in (torch.float32, torch.float64):
        terms = Categorical().terms(logits.to(dtype))
        root = Categorical().hessian_sqrt(terms)
        assert root.shape == (6, 40, 7)
        p = terms.parameters.double().softmax(-1)
        truth = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        found = torch.einsum("vmi,vmj->mij", root.double(), root.double())
        # Rounding of the probabilities, which the spread of the logits multiplies.
        torch.testing.assert_close(found, truth, rtol=0, atol=10 * torch.finfo(dtype).eps * max(1.0, spread))
        parts = [Categorical().hessian_sqrt(terms, slice(i, i + 2)) for i in (0, 2, 4)]
        torch.testing.assert_close(torch.cat(parts), root)


def test_of_a_single_class_there_is_one_vector_of_nothing() -> None:
    assert Categorical().hessian_sqrt(Categorical().terms(torch.ones(3, 1))).tolist() == [[[0.0]] * 3]


def test_what_is_not_finite_stays_so_in_the_root() -> None:
    root = Categorical().hessian_sqrt(Categorical().terms(torch.tensor([[torch.nan, 0.0, 1.0], [0.0, 0.0, 0.0]])))
    assert not root[:, 0].isfinite().any(-1).all()
    assert root[:, 1].isfinite().all()


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.endswith(" [c]")], ids=name_of)
def test_a_batch_given_four_times_changes_nothing(case: Case) -> None:
    four = Case(
        case.name,
        case.loss,
        torch.cat([case.prediction] * 4),
        torch.cat([case.target] * 4),
        case.mean_loss,
        case.user_loss,
        case.slope_loss,
    )
    total = []
    for one in (case, four):
        terms = one.terms("gradient")
        chunks = list(one.likelihood.cotangents(terms, FisherType.TYPE2))
        total.append(second_moments(one, chunks).sum(0) / terms.count)
    torch.testing.assert_close(total[1], total[0], rtol=0, atol=1e-10)


class Poisson(Likelihood):
    """What a user writes: counts with the logarithm of their rate as natural parameter."""

    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        layout = RowLayout.of(prediction, prediction.ndim - 1)
        rows = layout.rows(prediction)
        ones = torch.ones_like(rows[:, 0])
        return LossTerms.of(layout, rows, scale=ones, count=ones.sum(), gradient=None)

    def sample(self, terms: LossTerms, mc_samples: int, generator: torch.Generator | None) -> Tensor:
        rate = terms.parameters.exp().expand(mc_samples, -1, -1)
        return (rate - torch.poisson(rate, generator)) / mc_samples**0.5

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        return torch.diag_embed((0.5 * terms.parameters).exp()).movedim(1, 0)[columns]

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        f, g = old.parameters, new.parameters
        return (g.exp() - f.exp() - f.exp() * (g - f)).sum()


def test_a_users_own_likelihood() -> None:
    prediction, target = float64(2, 3, 2), torch.ones(2, 3, 2, dtype=torch.float64)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.poisson_nll_loss(f, y, reduction="sum") / 6

    case = Case("poisson", Poisson(), prediction, target, loss)
    assert likelihood_from(case.likelihood) is case.loss
    terms = case.terms("target")
    chunks = list(case.likelihood.cotangents(terms, FisherType.TYPE2))
    truth = hessian_blocks(case)
    torch.testing.assert_close(second_moments(case, chunks) / terms.count, truth, rtol=0, atol=1e-10)
    with pytest.raises(RuntimeError, match="rows"):
        LossTerms(prediction, prediction, prediction, None, terms.restore).at(prediction)
