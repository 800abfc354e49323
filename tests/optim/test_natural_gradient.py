"""Natural gradient steps against dense solves in float64."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt import CG, GeodesicAcceleration, Gram, GridLineSearch, LevenbergMarquardt, NaturalGradient, Solver
from tests import reference
from tests.cases import BY_NAME, CASES, FISHER_CASES, Case, Squares, backward, train_step
from tests.solvers import dense

DAMPING = 0.05
ALL = [pytest.param(case, id=case.name) for case in (*CASES, *FISHER_CASES) if case.twice]
SOLVERS = {"gram": lambda: Gram(), "cg": lambda: CG(tolerance=1e-11, progress=None, max_iterations=2000)}


def taken(case: Case, solver: Solver, **options: Any) -> tuple[nn.Module, nn.Module, Any, Tensor, Tensor]:
    """Model, loss, batch and the step of unit length (minus the update)."""
    model, loss, x, y = case.make()
    optimizer = NaturalGradient(model, loss, solver=solver, **({"damping": DAMPING} | options))
    backward(model, loss, x, y)
    before = [p.detach().clone() for p in model.parameters() if p.grad is not None]
    buffers = [b.clone() for b in model.buffers()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    after = [p for p in model.parameters() if p.grad is not None]
    step = dense.flat(before) - dense.flat(after)
    with torch.no_grad():
        for p, old in zip(after, before, strict=True):
            p.copy_(old)
    return model, loss, x, y, step


def mean_gradient(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    terms = reference.term_count(loss, model(x), y) if loss.reduction == "sum" else 1.0
    return dense.flat(p.grad for p in model.parameters() if p.grad is not None) / terms


def solved(curvature: Tensor, gradient: Tensor) -> Tensor:
    return torch.linalg.solve(curvature + DAMPING * torch.eye(len(gradient), dtype=gradient.dtype), gradient)


def assert_near(step: Tensor, want: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(step, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ALL)
def test_the_step_is_the_dense_damped_gauss_newton_step(case: Case, solver: str) -> None:
    model, loss, x, y, step = taken(case, SOLVERS[solver]())
    assert_near(step, solved(dense.ggn(model, loss, x, y), mean_gradient(model, loss, x, y)))


@pytest.mark.parametrize("name", ["mlp-ce", "mlp-mse", "mlp-bce", "conv-2d", "transformer", "mlp-weighted-ce"])
def test_the_hessian_step_is_the_dense_one(name: str) -> None:
    damping = 40.0 if name == "transformer" else 2.0  # above the most negative eigenvalue
    model, loss, x, y, step = taken(BY_NAME[name], SOLVERS["cg"](), curvature="hessian", damping=damping)
    hessian, g = dense.loss_hessian(model, loss, x, y), mean_gradient(model, loss, x, y)
    assert torch.linalg.eigvalsh(hessian)[0] > -damping
    assert_near(step, torch.linalg.solve(hessian + damping * torch.eye(len(g), dtype=g.dtype), g))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["mlp-ce", "mlp-mse", "sequence-ce", "conv-2d"])
def test_the_empirical_fisher_step_is_the_dense_one(name: str, solver: str) -> None:
    model, loss, x, y, step = taken(BY_NAME[name], SOLVERS[solver](), curvature="empirical")
    prediction = model(x)
    count = reference.term_count(loss, prediction, y)
    terms = reference.term_gradients(loss, prediction, y).view(prediction.shape)
    axis = 1 if name == "sequence-ce" else prediction.ndim - 1
    jacobian = dense.jacobian(model, x).view(*prediction.shape, -1).movedim(axis, -2)
    per_term = (terms.movedim(axis, -1).unsqueeze(-1) * jacobian).sum(-2).flatten(0, -2)
    assert_near(step, solved(per_term.T @ per_term / count, mean_gradient(model, loss, x, y)))


@pytest.mark.parametrize("name", ["mlp-ce", "mlp-mse", "mlp-bce", "transformer"])
def test_sampled_curvature_is_the_same_for_both_solvers_and_near_to_the_exact_one(name: str) -> None:
    case = BY_NAME[name]
    *_, gram = taken(case, SOLVERS["gram"](), curvature=kfacopt.Fisher("mc", samples=3, seed=5))
    *_, cg = taken(case, SOLVERS["cg"](), curvature=kfacopt.Fisher("mc", samples=3, seed=5))
    assert_near(gram, cg)
    *_, many = taken(case, SOLVERS["cg"](), curvature=kfacopt.Fisher("mc", samples=20_000))
    *_, exact = taken(case, SOLVERS["cg"]())
    assert (many - exact).norm() < 0.05 * exact.norm()  # 1/sqrt(20,000), times the condition


def data(count: int, inputs: int = 3, outputs: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    x, y = torch.randn(count, inputs, dtype=torch.float64), torch.randn(count, outputs, dtype=torch.float64)
    return model, x, y


def test_parameter_space_where_that_is_smaller() -> None:
    model, x, y = data(40)
    optimizer = NaturalGradient(model, nn.MSELoss(), damping=DAMPING)
    before = dense.flat(model.parameters())
    backward(model, nn.MSELoss(), x, y)
    optimizer.step()
    assert optimizer.health()["parameter_space"] == 1.0
    with torch.no_grad():
        step = before - dense.flat(model.parameters())
        torch.nn.utils.vector_to_parameters(before, model.parameters())
    assert_near(step, solved(dense.ggn(model, nn.MSELoss(), x, y), mean_gradient(model, nn.MSELoss(), x, y)))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [4, 40])
def test_what_the_loss_has_besides_its_terms_is_solved_for_too(solver: str, count: int) -> None:
    """A penalty in the loss, scaled and clipped gradients: the step is of the gradient as it is."""
    model, x, y = data(count)
    loss = nn.MSELoss()
    optimizer = NaturalGradient(model, loss, damping=DAMPING, solver=SOLVERS[solver]())
    before = dense.flat(model.parameters())
    (loss(model(x), y) + 0.3 * sum(p.square().sum() for p in model.parameters())).backward()
    gradient = dense.flat(p.grad for p in model.parameters())
    curvature = dense.ggn(model, loss, x, y)
    optimizer.step()
    assert_near(before - dense.flat(model.parameters()), solved(curvature, gradient))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 128.0])
@pytest.mark.parametrize("likelihood", [nn.MSELoss(), Squares()], ids=["mse", "a user's"])
def test_accumulation_and_loss_scale_change_nothing(likelihood: Any, solver: str, parts: int, scale: float) -> None:
    steps = []
    for pieces, factor in ((1, 1.0), (parts, scale)):
        torch.manual_seed(0)
        model, x, y = data(12)
        optimizer = NaturalGradient(
            model, likelihood, damping=DAMPING, solver=SOLVERS[solver](), line_search=GridLineSearch()
        )
        before = dense.flat(model.parameters())
        for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (factor * nn.functional.mse_loss(model(xs), ys) / pieces).backward()
        for p in model.parameters():
            p.grad /= factor
        optimizer.step()
        steps.append(before - dense.flat(model.parameters()))
    assert_near(steps[1], steps[0])


class Residuals(nn.Module):
    """A network that is differentiated twice, with a learnt coefficient, and a boundary condition."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.coefficient = nn.Parameter(torch.tensor(0.7))
        self.double()

    def forward(self, interior: Tensor, boundary: Tensor) -> dict[str, Tensor]:
        x = interior.clone().requires_grad_()
        (first,) = torch.autograd.grad(self.network(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        inside = self.coefficient * second[:, 0] + first[:, 1] - 1.0
        return {"interior": inside, "boundary": self.network(boundary).squeeze(1)}


def dense_rows(model: nn.Module, residuals: Tensor) -> Tensor:
    """The Jacobian of residuals, row by row."""
    rows, parameters = [], list(model.parameters())
    for r in residuals:
        found = torch.autograd.grad(r, parameters, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(dense.flat(filled))
    return torch.stack(rows)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("count", [5, 60])
def test_a_model_that_differentiates_itself_with_weighted_terms(solver: str, count: int) -> None:
    model, x, b = Residuals(), torch.rand(count, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)
    losses = {"interior": nn.MSELoss(), "boundary": (10.0, nn.MSELoss())}
    optimizer = NaturalGradient(model, losses, damping=DAMPING, solver=SOLVERS[solver]())
    out = model(x, b)
    curvature = sum(
        2.0 * weight / len(out[name]) * rows.T @ rows
        for name, weight in (("interior", 1.0), ("boundary", 10.0))
        for rows in [dense_rows(model, out[name])]
    )
    (out["interior"].square().mean() + 10.0 * out["boundary"].square().mean()).backward()
    gradient, before = (
        dense.flat(p.grad for p in model.parameters() if p.grad is not None),
        dense.flat(model.parameters()),
    )
    optimizer.step()
    assert_near(before - dense.flat(model.parameters()), solved(curvature, gradient))


def test_momentum_in_sample_space_is_the_least_squares_solution_nearest_to_the_last() -> None:
    """SPRING: `argmin ‖J̃x - r‖² + damping ‖x - μ x_last‖²`, whose normal equations are dense here."""
    model, x, y = data(4)
    loss, momentum = nn.MSELoss(), 0.7
    optimizer = NaturalGradient(model, loss, damping=DAMPING, solver=Gram(momentum=momentum), lr=0.1)
    last = torch.zeros_like(dense.flat(model.parameters()))
    for _ in range(3):
        before = dense.flat(model.parameters())
        optimizer.zero_grad()
        backward(model, loss, x, y)
        g = dense.flat(p.grad for p in model.parameters())
        last = solved(dense.ggn(model, loss, x, y), g + DAMPING * momentum * last)
        optimizer.step()
        assert_near((before - dense.flat(model.parameters())) / 0.1, last, 1e-7)


def test_the_line_search_takes_the_best_of_the_grid_and_nothing_if_none_is_good() -> None:
    model, x, y = data(6)
    loss, start = nn.MSELoss(), dense.flat(model.parameters())
    values = {}
    for size in (1.0, 0.5, 0.25, 0.125):
        torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
        optimizer = NaturalGradient(model, loss, damping=1e-2, lr=2.0 * size)
        train_step(optimizer, model, loss, x, y)
        optimizer.close()
        values[size] = loss(model(x), y).item()
    torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
    optimizer = NaturalGradient(model, loss, damping=1e-2, lr=2.0, line_search=GridLineSearch(points=4))
    before = train_step(optimizer, model, loss, x, y).item()
    assert min(values.values()) < before
    assert optimizer.health()["step_size"] == min(values, key=values.__getitem__)
    assert loss(model(x), y).item() == pytest.approx(min(values.values()), rel=1e-10)
    uphill = NaturalGradient(model, loss, damping=1e-4, lr=1e6, line_search=GridLineSearch(points=1))
    uphill.zero_grad()
    backward(model, loss, x, y)
    before = dense.flat(model.parameters())
    uphill.step()
    assert uphill.health()["step_size"] == 0.0
    assert torch.equal(before, dense.flat(model.parameters()))


def test_acceleration_bends_the_step_by_the_second_derivative() -> None:
    model, x, y = data(4)
    loss, before = nn.MSELoss(), dense.flat(model.parameters())
    backward(model, loss, x, y)
    curvature, g = dense.ggn(model, loss, x, y), dense.flat(p.grad for p in model.parameters())
    v = -solved(curvature, g)

    def predicted(size: float) -> Tensor:
        torch.nn.utils.vector_to_parameters(before + size * v, model.parameters())
        with torch.no_grad():
            return model(x).flatten()

    second = (predicted(1e-3) - 2 * predicted(0.0) + predicted(-1e-3)) / 1e-6
    predicted(0.0)
    bend = -solved(curvature, dense.jacobian(model, x).T @ second * 2 / y.numel())
    for solver in SOLVERS.values():
        torch.nn.utils.vector_to_parameters(before.clone(), model.parameters())
        options = {"acceleration": GeodesicAcceleration(probe=1e-3, limit=1e9), "solver": solver()}
        optimizer = NaturalGradient(model, loss, damping=DAMPING, **options)
        optimizer.zero_grad()
        backward(model, loss, x, y)
        optimizer.step()
        optimizer.close()
        assert_near(dense.flat(model.parameters()) - before, v + 0.5 * bend, 1e-6)  # differences of 1e-3


def test_negative_curvature_ends_the_iterations_and_is_said() -> None:
    torch.manual_seed(3)
    model, x, y = data(8)
    loss = nn.MSELoss()
    optimizer = NaturalGradient(model, loss, curvature="hessian", solver=CG(), damping=1e-4)
    curvature = []
    for _ in range(10):
        optimizer.zero_grad()
        value = backward(model, loss, x, 3 * y)
        optimizer.step()
        curvature.append(optimizer.health()["negative_curvature"])
        assert torch.isfinite(value)
    assert max(curvature) == 1.0


class Saddle(nn.Module):
    """`1 - w²` near its maximum: the very first direction has negative curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 - self.w.square())


def test_damping_is_raised_where_the_first_direction_is_negative() -> None:
    model, x = Saddle(), torch.ones(3, 1, dtype=torch.float64)
    optimizer = NaturalGradient(model, nn.MSELoss(), curvature="hessian", solver=CG(), damping=1e-3)
    before = backward(model, nn.MSELoss(), x, torch.zeros_like(x))
    optimizer.step()
    assert optimizer.health()["raised"] > 0
    assert optimizer.param_groups[0]["damping"] == 1e-3
    assert nn.functional.mse_loss(model(x), torch.zeros_like(x)) < before


def test_levenberg_marquardt_by_the_reduction_on_the_same_batch() -> None:
    model, x, y = data(6)
    rule = LevenbergMarquardt(every=1, decay=0.5)
    for scale, lower in ((1.0, True), (100.0, False)):
        optimizer = NaturalGradient(model, nn.MSELoss(), damping=10.0, damping_rule=rule, lr=scale)
        optimizer.zero_grad()
        before = backward(model, nn.MSELoss(), x, y)
        g, c = dense.flat(p.grad for p in model.parameters()), dense.ggn(model, nn.MSELoss(), x, y)
        old = dense.flat(model.parameters())
        optimizer.step()
        d = dense.flat(model.parameters()) - old
        promised = g @ d + 0.5 * d @ (c @ d + 10.0 * d)
        change = nn.functional.mse_loss(model(x), y) - before
        if promised < 0:
            assert optimizer.health()["rho"] == pytest.approx((change / promised).item(), rel=1e-8)
        assert (optimizer.param_groups[0]["damping"] < 10.0) is lower
        optimizer.close()


class Mixed(nn.Module):
    """Dropout, batch normalisation with running statistics, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.dropout = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.norm(self.first(x + 0.1 * torch.randn_like(x))).tanh())
        return self.head(hidden)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_operator_sees_the_function_that_the_loss_saw(solver: str) -> None:
    """The same dropout mask, noise and batch statistics; running statistics and random state stay."""
    torch.manual_seed(1)
    model, x, y = Mixed(), torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    optimizer = NaturalGradient(model, nn.MSELoss(), damping=DAMPING, solver=SOLVERS[solver]())
    state = torch.get_rng_state()
    prediction = model(x)
    rows = dense_rows(model, prediction.flatten())
    nn.functional.mse_loss(prediction, y).backward()
    after, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    assert not torch.equal(state, after)
    before, g = dense.flat(model.parameters()), dense.flat(p.grad for p in model.parameters())
    optimizer.step()
    assert_near(before - dense.flat(model.parameters()), solved(2.0 / y.numel() * rows.T @ rows, g))
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


class Unrepeatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(3, 2).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


def test_a_forward_that_cannot_be_repeated_is_refused_and_nothing_changes() -> None:
    model, (_, x, y) = Unrepeatable(), data(4)
    optimizer = NaturalGradient(model, nn.MSELoss())
    backward(model, nn.MSELoss(), x, y)
    before = dense.flat(model.parameters())
    with pytest.raises(RuntimeError, match=r"Unrepeatable, run again .* does not return the prediction"):
        optimizer.step()
    assert torch.equal(before, dense.flat(model.parameters()))


def test_parts_called_one_after_the_other_are_refused() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 2)}).double()
    _, x, y = data(4)
    optimizer = NaturalGradient(model, nn.MSELoss())
    nn.functional.mse_loss(model["decoder"](model["encoder"](x)), y).backward()
    with pytest.raises(RuntimeError, match="several forwards of the model's parts"):
        optimizer.step()


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (nn.MSELoss(), {"curvature": "fisher"}, ValueError, "curvature must be one of 'ggn', 'mc'"),
        (nn.MSELoss(), {"curvature": "hessian"}, ValueError, "no sum of squares"),
        (nn.MSELoss(), {"damping": 0.0}, ValueError, "damping must be positive"),
        (nn.MSELoss(), {"lr": -1.0}, ValueError, "lr must lie in"),
        (nn.MSELoss(), {"curvatur": "ggn"}, TypeError, "unknown keyword argument curvatur"),
        (nn.SoftMarginLoss(), {}, TypeError, "SoftMarginLoss is not supported.*curvature='empirical'"),
        (nn.L1Loss(), {"curvature": "hessian", "solver": CG()}, ValueError, "Laplace.*Fisher information.*use 'ggn'"),
        (
            nn.SoftMarginLoss(),
            {"curvature": "empirical", "line_search": kfacopt.GridLineSearch()},
            ValueError,
            "line_search needs the curvature of the loss, but of AnyLoss.SoftMarginLoss. only the gradient",
        ),
        ({}, {}, ValueError, "empty dict"),
        ({"a": (-1.0, nn.MSELoss())}, {}, ValueError, "weight of loss term 'a' must be positive"),
        ({"a": nn.MSELoss(reduction="sum")}, {}, ValueError, "loss term 'a' has reduction='sum'"),
        ({"a": nn.MSELoss()}, {"prediction": len}, ValueError, "prediction= has no meaning"),
        ({"a": nn.MSELoss()}, {"solver": CG(preconditioner=kfacopt.KFACBackend())}, ValueError, "single loss term"),
    ],
)
def test_refusals(loss: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(error, match=message):
        NaturalGradient(model, loss, **options)
    assert not model._forward_hooks


def test_a_step_without_a_forward_is_refused() -> None:
    model, x, y = data(4)
    optimizer = NaturalGradient(model, {"a": nn.MSELoss()})
    backward(model, nn.MSELoss(), x, y)
    with pytest.raises(RuntimeError, match=r"no forward of the model with the outputs \['a'\]"):
        optimizer.step()


def test_what_is_not_finite_is_skipped() -> None:
    model, x, y = data(4)
    optimizer = NaturalGradient(model, nn.MSELoss())
    before = dense.flat(model.parameters())
    backward(model, nn.MSELoss(), x, y)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.step()
    assert optimizer.health()["skipped_steps"] == 1.0
    assert torch.equal(before, dense.flat(model.parameters()))


def test_zero_grad_forgets_what_a_preconditioner_was_fed() -> None:
    """An abandoned backward is not in its statistics."""
    found = []
    for abandoned in (False, True):
        torch.manual_seed(0)
        model, x, y = data(6)
        backend = kfacopt.KFACBackend(1, 1)
        optimizer = NaturalGradient(model, nn.MSELoss(), solver=CG(preconditioner=backend))
        if abandoned:
            backward(model, nn.MSELoss(), 5 * x, y)
        train_step(optimizer, model, nn.MSELoss(), x, y)
        found.append([block.factors()[1] for block in backend.blocks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("factor_every", [1, 3])
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_resuming_repeats_bit_for_bit(copied: str, factor_every: int) -> None:
    """With an interval of 3, four steps end in its middle."""

    def made(model: nn.Module) -> NaturalGradient:
        solver = CG(warm_start=0.9, max_iterations=3, preconditioner=kfacopt.KFACBackend(factor_every, 2))
        rule = LevenbergMarquardt(every=1)
        search = GridLineSearch(points=5, scan_every=3)
        return NaturalGradient(model, nn.MSELoss(), solver=solver, damping_rule=rule, line_search=search)

    model, x, y = data(6)
    optimizer = made(model)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
        for _ in range(steps):
            train_step(optimizer, model, nn.MSELoss(), x, y)
        return dense.flat(model.parameters())

    run(model, optimizer, 4)
    if copied == "state_dict":
        other = copy.deepcopy(model)
        second = made(other)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
    elif copied == "deepcopy":
        other, second = copy.deepcopy((model, optimizer))
    else:
        other, second = pickle.loads(pickle.dumps((model, optimizer)))
    assert torch.equal(run(model, optimizer, 4), run(other, second, 4))


def test_weight_decay_is_decoupled() -> None:
    steps = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        model, x, y = data(4)
        optimizer = NaturalGradient(model, nn.MSELoss(), lr=0.1, weight_decay=decay)
        before = dense.flat(model.parameters())
        backward(model, nn.MSELoss(), x, y)
        optimizer.step()
        steps.append(dense.flat(model.parameters()) - before)
    assert_near(steps[1] - steps[0], -0.05 * before, 1e-10)
