"""Natural gradient steps against dense solves in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacopt.backends.gram import Gram
from kfacopt.backends.matrix_free import CG
from kfacopt.backends.solver import Solver
from kfacopt.optim.natural_gradient import NaturalGradient
from tests.backends import dense
from tests.cases import CASES, Case, backward

DAMPING = 0.05
ALL = [pytest.param(case, id=case.name) for case in CASES]
SOLVERS = {"gram": lambda: Gram(), "cg": lambda: CG(tolerance=1e-11, progress=None, max_iterations=2000)}


def taken(case: Case, solver: Solver, **options: Any) -> tuple[nn.Module, nn.Module, Any, Tensor, Tensor]:
    """Model, loss, batch and the step of unit length (minus the update)."""
    model, loss, x, y = case.make()
    optimizer = NaturalGradient(model, loss, solver=solver, damping=DAMPING, **options)
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
    from tests import reference

    return dense.flat(p.grad for p in model.parameters() if p.grad is not None) / (
        reference.term_count(loss, model(x), y) if loss.reduction == "sum" else 1.0
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ALL)
def test_the_step_is_the_dense_damped_gauss_newton_step(case: Case, solver: str) -> None:
    model, loss, x, y, step = taken(case, SOLVERS[solver]())
    g = mean_gradient(model, loss, x, y)
    curvature = dense.ggn(model, loss, x, y)
    want = torch.linalg.solve(curvature + DAMPING * torch.eye(len(g), dtype=g.dtype), g)
    torch.testing.assert_close(step, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
