"""Sample space: rows that recorded products give, the kernel, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfacopt
from kfacopt import Gram, NaturalGradient, Problem, Solved, Solver
from kfacopt.linalg.least_squares import DampedKernel, DampedLeastSquares
from kfacopt.solvers.samples import SampleSpace
from tests.cases import BY_NAME, backward
from tests.solvers import dense
from tests.solvers.memory import LiveBytes


class Spy(Solver):
    """Hands the sample space to a function and takes no step."""

    records = True

    def __init__(self, look: Callable[[SampleSpace, Problem], None], max_bytes: int = 2**30) -> None:
        self.look, self.max_bytes = look, max_bytes

    def solve(self, problem: Problem) -> Solved:
        space = SampleSpace(problem.metric, self.max_bytes)
        space.prepare()
        self.look(space, problem)
        return Solved([torch.zeros_like(g) for g in problem.gradient])


def seen(name: str, look: Callable[[SampleSpace, Problem], None], max_bytes: int = 2**30) -> None:
    model, loss, x, y = BY_NAME[name].make()
    optimizer = NaturalGradient(model, loss, solver=Spy(look, max_bytes))
    backward(model, loss, x, y)
    optimizer.step()


# What recorded products cover of each; the rest is had column by column or row by row.
COVERED = {
    "mlp-ce": 1.0,
    "mlp-bce": 1.0,
    "conv-2d": 1.0,
    "shared-twice": 1.0,
    "tied": 1.0,
    "sequence-mixed": 1.0,
    "batch-norm": 0.0,
    "conv-groups": 0.1,
    "tied-embedding": 0.1,
    "transformer": 0.1,
}


@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize("max_bytes", [2**30, 2**13])
def test_kernel_and_rows_are_those_of_the_jacobian_whatever_the_budget(name: str, max_bytes: int) -> None:
    def look(space: SampleSpace, problem: Problem) -> None:
        basis = torch.eye(space.size, dtype=space.dtype)
        want = torch.stack([dense.flat(space.transposed(e)) for e in basis])
        torch.testing.assert_close(space.kernel(), want @ want.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(space.rows(), want, rtol=1e-10, atol=1e-12)
        v = [torch.randn_like(g) for g in problem.gradient]
        torch.testing.assert_close(space.jacobian(v), want @ dense.flat(v), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            dense.flat(space.transposed(space.residual())), dense.flat(problem.gradient), rtol=1e-9, atol=1e-11
        )
        parameters = problem.linearization.parameters
        covered = sum(parameters[i].numel() for group in space._groups for i in group)
        share = covered / sum(p.numel() for p in parameters)
        assert share == 1.0 if COVERED[name] == 1.0 else share >= COVERED[name]

    seen(name, look, max_bytes)


@pytest.mark.parametrize(("inputs", "width", "count"), [(20, 60, 60), (4, 10, 300)])
def test_the_byte_budget_is_kept(inputs: int, width: int, count: int) -> None:
    """In sample space and in parameter space; the forward's own graph is not counted, being the model's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1)).double()
    x, y = torch.randn(count, inputs, dtype=torch.float64), torch.randn(count, 1, dtype=torch.float64)
    dimension = sum(p.numel() for p in model.parameters())
    smaller = min(dimension, count)
    budget = 8 * 6 * (count**2 if smaller == count else dimension * (count + dimension))
    optimizer = NaturalGradient(model, nn.MSELoss(), solver=Gram(max_bytes=budget))
    backward(model, nn.MSELoss(), x, y)
    with LiveBytes() as mode:
        optimizer.step()
    graph = 8 * count * (inputs + 4 * width)
    assert mode.most <= budget + graph


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    optimizer = NaturalGradient(model, loss, solver=Gram(max_bytes=1000))
    backward(model, loss, x, y)
    before = dense.flat(model.parameters())
    with pytest.raises(MemoryError, match=r"kernel of 12 samples .* need 3,456 bytes, more than max_bytes=1,000"):
        optimizer.step()
    assert torch.equal(before, dense.flat(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [3, 8])
def test_damped_systems_are_solved_though_singular(dtype: torch.dtype, rank: int) -> None:
    a = torch.randn(8, rank, dtype=torch.float64) @ torch.randn(rank, 8, dtype=torch.float64)
    right, damping = torch.randn(8, dtype=torch.float64), 0.1
    eye, tolerance = torch.eye(8, dtype=torch.float64), 1e4 * torch.finfo(dtype).eps
    want = torch.linalg.solve(a @ a.T + damping * eye, right)
    found = DampedKernel((a @ a.T).to(dtype), damping).solve(right.to(dtype))
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)
    outside = torch.randn(8, dtype=torch.float64)
    want = torch.linalg.solve(a.T @ a + damping * eye, a.T @ right + outside)
    found = DampedLeastSquares(a.to(dtype), damping).solve(right.to(dtype), outside.to(dtype))
    torch.testing.assert_close(found.double(), want, rtol=10 * tolerance, atol=10 * tolerance)


def test_a_kernel_that_is_indefinite_by_rounding_is_still_solved() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    kernel = basis * torch.tensor([-1e-9, 1e-9, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64) @ basis.T
    solver = DampedKernel(kernel.clone(), 1e-12)
    assert solver.retries > 0
    assert solver.solve(torch.ones(6, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gram(momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: Gram(max_bytes=0), "max_bytes must be positive"),
        (lambda: kfacopt.GridLineSearch(points=0), "points must be at least 1"),
        (lambda: kfacopt.GridLineSearch(ratio=1.0), "ratio must lie between"),
        (lambda: kfacopt.GeodesicAcceleration(probe=0.0), "probe must be positive"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
