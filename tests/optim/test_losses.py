"""Losses beside the three classical ones, in a training loop: whatever way they are written, multiplied or added to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests import reference
from tests.cases import FISHER_CASES, Case, mlp
from tests.reports.reports import exact_or_named, still

DATA = 10
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(DATA, 4, generator=GENERATOR, dtype=torch.float64)
Y = 2.0 * torch.randn(DATA, 3, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(3, (DATA,), generator=GENERATOR)
WEIGHTS = torch.linspace(0.1, 3.0, DATA, dtype=torch.float64)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def factor(announced: Any, of: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    """G of a model of one layer after one backward: the sum over the data of the loss' Hessian blocks."""
    model = linear()
    optimizer = kfacopt.KFAC(model, announced, **still(damping=0.1) | options)
    of(model(X)).backward()
    optimizer.step()
    found: Tensor = optimizer.backend.blocks[""].factors()[0]
    return found


def hessian(of: Callable[[Tensor], Tensor]) -> Tensor:
    f = linear()(X).detach()
    blocks = torch.func.jacrev(torch.func.grad(lambda flat: of(flat.view(DATA, 3))))(f.flatten())
    return torch.einsum("ncnd->cd", blocks.view(DATA, 3, DATA, 3))


HUBER, SMOOTH = nn.HuberLoss(delta=0.7), nn.SmoothL1Loss()


def huber(f: Tensor, **options: Any) -> Tensor:
    return F.huber_loss(f, Y, delta=0.7, **options)


LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "huber": (HUBER, huber),
    "huber, times a constant": (HUBER, lambda f: 5.0 * huber(f)),
    "huber, scaled up": (HUBER, lambda f: 65536.0 * huber(f)),
    "huber, summed by hand": (HUBER, lambda f: huber(f, reduction="none").sum(1).mean()),
    "huber, the module": (HUBER, lambda f: 0.5 * HUBER(f, Y)),
    "huber, the module with weights": (
        nn.HuberLoss(delta=0.7, reduction="none"),
        lambda f: (nn.HuberLoss(delta=0.7, reduction="none")(f, Y) * WEIGHTS[:, None]).mean(),
    ),
    "huber, weights": (HUBER, lambda f: (huber(f, reduction="none") * WEIGHTS[:, None]).mean()),
    "huber, beside another loss": (HUBER, lambda f: huber(f) + X.square().mean()),
    "smooth": (SMOOTH, lambda f: F.smooth_l1_loss(f, Y)),
    "smooth, all within": (SMOOTH, lambda f: 0.1 * F.smooth_l1_loss(f, f.detach() + 0.1 * Y)),
    "smooth, all beyond": (SMOOTH, lambda f: F.smooth_l1_loss(f, f.detach() + 10.0)),
    "smooth, announced as squares": (nn.MSELoss(), lambda f: F.smooth_l1_loss(f, Y)),
    "squares, announced as smooth": (SMOOTH, lambda f: F.mse_loss(f, Y)),
    "counts": (nn.PoissonNLLLoss(), lambda f: F.poisson_nll_loss(f, Y.abs().floor())),
    "counts, written out": (nn.PoissonNLLLoss(), lambda f: (f.exp() - Y.abs() * f).mean()),
    "counts, weights": (nn.PoissonNLLLoss(), lambda f: ((f.exp() - Y.abs() * f) * WEIGHTS[:, None]).mean()),
}
SAID = {"huber, weights", "smooth, announced as squares", "squares, announced as smooth", "counts, weights"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_factor_is_that_of_the_loss_or_said(name: str) -> None:
    announced, of = LOSSES[name]
    if name == "huber, the module with weights":
        loss = announced
        of = lambda f: (loss(f, Y) * WEIGHTS[:, None]).mean()  # noqa: E731 - the very module
    want = hessian(of)
    if name in SAID:
        exact_or_named(lambda: factor(announced, of), lambda g: torch.testing.assert_close(g, want), "weight", "Loss")
    else:
        torch.testing.assert_close(factor(announced, of), want)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("constant", [1.0, 7.0])
def test_log_probabilities_tell_the_weights_of_the_data(weighted: bool, constant: float) -> None:
    w = WEIGHTS if weighted else torch.ones_like(WEIGHTS)

    def nll(f: Tensor) -> Tensor:
        return constant * (F.nll_loss(f, LABELS, reduction="none") * w).mean()

    def divergence(f: Tensor) -> Tensor:
        each = F.kl_div(f, Y.softmax(1), reduction="none").sum(1)
        return constant * (each * w).mean()

    def want(f: Tensor) -> Tensor:
        return constant * (F.cross_entropy(f, LABELS, reduction="none") * w).mean()

    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).log_softmax(1)

    for announced, of in ((nn.NLLLoss(), nll), (nn.KLDivLoss(reduction="batchmean"), divergence)):
        model = Log()
        optimizer = kfacopt.KFAC(model, announced, **still(damping=0.1))
        of(model(X)).backward()
        optimizer.step()
        torch.testing.assert_close(optimizer.backend.blocks["linear"].factors()[0], hessian(want))


@pytest.mark.parametrize("curvature", ["ggn", "mc", "empirical"])
@pytest.mark.parametrize("way", ["the module", "functional", "weights"])
def test_probabilities_behind_a_sigmoid_have_the_curvature_of_their_logits(way: str, curvature: str) -> None:
    target, made = (Y > 0).double(), []
    for behind in (True, False):
        model = nn.Sequential(linear(), nn.Sigmoid()) if behind else nn.Sequential(linear())
        announced = nn.BCELoss() if behind else nn.BCEWithLogitsLoss()
        call: Any = announced if way == "the module" else F.binary_cross_entropy
        if way != "the module" and not behind:
            call = F.binary_cross_entropy_with_logits
        if way == "weights":
            announced.reduction = "none"
            call = lambda f, y, each=announced: (each(f, y) * WEIGHTS[:, None]).mean()  # noqa: E731
        optimizer = kfacopt.KFAC(model, announced, **still(damping=0.1, curvature=curvature))
        call(model(X), target).backward()
        optimizer.step()
        made.append(optimizer.backend.blocks["0"].factors()[0])
    if curvature == "mc":  # other labels are drawn
        assert float(made[0].trace()) == pytest.approx(float(made[1].trace()), rel=0.5)
    else:
        torch.testing.assert_close(*made, rtol=1e-9, atol=1e-12)


def test_saturated_probabilities_have_finite_curvature() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
    optimizer = kfacopt.KFAC(model, nn.BCELoss(), **still(damping=0.1))
    x = torch.tensor([[1e3, 0.0], [-1e3, 0.0], [0.0, 1.0]])
    nn.BCELoss()(model(x), torch.ones(3, 2)).backward()
    optimizer.step()
    assert optimizer.health()["skipped_steps"] == 0.0
    assert all(bool(factor.isfinite().all()) for factor in optimizer.backend.blocks["0"].factors())


@pytest.mark.parametrize("case", FISHER_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent, kfacopt.NaturalGradient])
def test_they_train(optimizer: Any, case: Case) -> None:
    model, loss, x, y = case.make()
    extra = {"damping_rule": kfacopt.LevenbergMarquardt(every=1)} if optimizer is kfacopt.EKFAC else {}
    short = {"lr": 0.5, "damping": 0.1} if optimizer is kfacopt.NaturalGradient else {}
    made = optimizer(model, loss, **short, **extra)
    values = []
    for _ in range(20):
        made.zero_grad()
        value = loss(model(x), y)
        value.backward()
        made.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0]


# -- any loss ----------------------------------------------------------------------------------------------------------


def soft_margin(f: Tensor) -> Tensor:
    return F.soft_margin_loss(f, Y.sign())


class Towers(nn.Module):
    """One network for both members of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, pair: Tensor) -> Tensor:
        return self.linear(pair)


@pytest.mark.parametrize("loss", [nn.SoftMarginLoss(), soft_margin])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.NaturalGradient])
def test_an_unknown_loss_trains_with_the_empirical_fisher(optimizer: Any, loss: Any) -> None:
    torch.manual_seed(0)
    model = mlp().double()
    with pytest.raises(TypeError, match="curvature='empirical'"):
        optimizer(model, loss)
    short = {"lr": 0.1, "damping": 0.1} if optimizer is kfacopt.NaturalGradient else {}
    made = optimizer(model, loss, curvature="empirical", **short)
    before = float(soft_margin(model(X)).detach())
    for _ in range(10):
        made.zero_grad()
        soft_margin(model(X)).backward()
        made.step()
    assert float(soft_margin(model(X)).detach()) < before


def test_its_factor_is_the_second_moment_of_the_gradients_of_the_data() -> None:
    found = factor(nn.SoftMarginLoss(), soft_margin, curvature="empirical")
    f = linear()(X).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_margin(f), f)
    each = DATA * gradient  # of the mean over a datum's outputs
    torch.testing.assert_close(found, each.T @ each / DATA)


@pytest.mark.parametrize("solver", [kfacopt.Gram, lambda: kfacopt.CG(tolerance=1e-11, progress=None)])
def test_a_term_of_an_unknown_loss_is_a_datum_with_all_its_places(solver: Any) -> None:
    torch.manual_seed(0)
    model, damping = nn.Linear(4, 2).double(), 0.1
    x, signs = X.view(5, 2, 4), Y[:, :2].sign().view(5, 2, 2)

    def each(f: Tensor) -> Tensor:
        return F.softplus(-signs * f).mean((1, 2))  # soft margins, which jacrev cannot batch as torch has them

    made = kfacopt.NaturalGradient(model, each, curvature="empirical", damping=damping, solver=solver())
    jacobian = reference.whole_jacobian(model, x, each)
    each(model(x)).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    made.step()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    curvature = jacobian.T @ jacobian / 5 + damping * torch.eye(len(step))
    torch.testing.assert_close(step, torch.linalg.solve(curvature, gradient), rtol=1e-7, atol=1e-9)


def test_the_operator_of_the_empirical_fisher_takes_any_loss() -> None:
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.SoftMarginLoss()
    signs = Y.sign()
    operator = kfacopt.operators.EFLinearOperator(model, loss, list(model.parameters()), [(X, signs)])
    jacobian = reference.whole_jacobian(model, X, lambda f: F.softplus(-signs * f).mean(1))
    vector = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64)
    torch.testing.assert_close(operator @ vector, jacobian.T @ jacobian @ vector / DATA)


def test_an_embedding_loss_of_pairs() -> None:
    torch.manual_seed(0)
    model, loss = Towers().double(), nn.CosineEmbeddingLoss()
    made = kfacopt.KFAC(model, loss, curvature="empirical", lr=0.1)
    signs = Y[:, 0].sign()
    values = []
    for _ in range(20):
        made.zero_grad()
        value = loss(model(X), model(X.flip(1)), signs)
        value.backward()
        made.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0]


def test_what_needs_more_than_a_gradient_is_refused_when_it_is_made() -> None:
    loss = nn.SoftMarginLoss()
    for name, options in (
        ("damping_rule", {"damping_rule": kfacopt.LevenbergMarquardt()}),
        ("step_length", {"lr": "auto"}),
    ):
        with pytest.raises(ValueError, match=f"{name}.* needs the curvature of the loss, but of AnyLoss"):
            kfacopt.KFAC(linear(), loss, curvature="empirical", **options)


# -- more than the loss ------------------------------------------------------------------------------------------------


def z_loss(f: Tensor) -> Tensor:
    return 1e-2 * f.logsumexp(1).square().mean()


CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
IGNORED = torch.where(torch.arange(DATA) < 3, -100, LABELS)
BESIDE: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), lambda loss, f: F.cross_entropy(f, LABELS)),
    "the module": (nn.CrossEntropyLoss(), lambda loss, f: loss(f, LABELS)),
    "ignored targets": (nn.CrossEntropyLoss(), lambda loss, f: loss(f, IGNORED)),
    "class weights": (nn.CrossEntropyLoss(CLASS_WEIGHTS), lambda loss, f: loss(f, LABELS)),
    "squares": (nn.MSELoss(), lambda loss, f: F.mse_loss(f, Y)),
    "binary": (nn.BCEWithLogitsLoss(), lambda loss, f: F.binary_cross_entropy_with_logits(f, Y.sigmoid())),
}


@pytest.mark.parametrize("curvature", ["ggn", "mc"])
@pytest.mark.parametrize("scaled", [1.0, 65536.0])
@pytest.mark.parametrize("name", BESIDE)
def test_a_term_beside_the_loss_leaves_its_own_curvature(name: str, scaled: float, curvature: str) -> None:
    loss, of = BESIDE[name]

    def whole(f: Tensor) -> Tensor:
        return scaled * (of(loss, f) + z_loss(f))

    options = {"curvature": kfacopt.Fisher("mc", samples=20_000) if curvature == "mc" else "ggn"}
    found, want = factor(loss, whole, extra_terms=True, **options), hessian(lambda f: of(loss, f))
    tolerance = {"rtol": 0.0, "atol": 0.05 * float(want.diagonal().max())} if curvature == "mc" else {}
    torch.testing.assert_close(found, want, **tolerance)


def test_without_being_told_it_is_refused_and_the_argument_named() -> None:
    with pytest.raises(ValueError, match=r"z-loss.*extra_terms=True"):
        factor(nn.CrossEntropyLoss(), lambda f: F.cross_entropy(f, LABELS) + z_loss(f))


def test_a_curvature_that_depends_on_the_target_asks_for_it() -> None:
    loss = nn.CrossEntropyLoss(CLASS_WEIGHTS)
    with pytest.raises(ValueError, match=r"beyond the threshold.*call the very loss module"):
        factor(HUBER, lambda f: huber(f) + z_loss(f), extra_terms=True)
    torch.testing.assert_close(factor(HUBER, lambda f: HUBER(f, Y) + z_loss(f), extra_terms=True), hessian(huber))
    with pytest.raises(ValueError, match=r"call the very loss module"):
        factor(loss, lambda f: F.cross_entropy(f, LABELS, CLASS_WEIGHTS) + z_loss(f), extra_terms=True)


@pytest.mark.parametrize("solver", [kfacopt.Gram, lambda: kfacopt.CG(tolerance=1e-11, progress=None)])
def test_natural_gradient_beside_a_z_loss(solver: Any) -> None:
    torch.manual_seed(0)
    model, damping = mlp().double(), 0.1
    optimizer = kfacopt.NaturalGradient(
        model, nn.CrossEntropyLoss(), solver=solver(), damping=damping, extra_terms=True
    )
    f = model(X)
    (F.cross_entropy(f, LABELS) + z_loss(f)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    curvature = reference.whole_ggn(model, nn.CrossEntropyLoss(), X, LABELS)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.step()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    want = torch.linalg.solve(curvature + damping * torch.eye(len(step)), gradient)
    torch.testing.assert_close(step, want, rtol=1e-7, atol=1e-9)
