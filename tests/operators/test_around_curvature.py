"""Inverses, estimators and spectra of the curvature operators themselves, against the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kfacopt.operators import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    LSMRInverseLinearOperator,
    SubmatrixLinearOperator,
    hutchinson_diag,
    lanczos_approximate_spectrum,
    xtrace,
)
from tests.operators.matrices import randn


@pytest.fixture(name="setting")
def make_setting() -> Any:
    """Model, loss, parameters, data; 179 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].weight.mul_(3.0)  # directions of very different curvature
    inputs = randn(60, 20) * torch.logspace(0, -1.5, 20, dtype=torch.float64)
    data = [(x, torch.randint(0, 3, (20,))) for x in inputs.split(20)]
    return model, nn.CrossEntropyLoss(), list(model.parameters()), data


def dense(operator: Any) -> torch.Tensor:
    matrix: torch.Tensor = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    return matrix


@pytest.mark.parametrize("approximation", [EKFACLinearOperator, KFACLinearOperator])
def test_conjugate_gradients_with_a_kronecker_preconditioner(approximation: Any) -> None:
    """Of logistic regression with badly scaled inputs both are near to the curvature."""
    torch.manual_seed(0)
    model, damping = nn.Linear(20, 3).double(), 1e-4
    data = [(randn(100, 20) * torch.logspace(0.5, -1.5, 20, dtype=torch.float64), torch.randint(0, 3, (100,)))]
    setting = (model, nn.CrossEntropyLoss(), list(model.parameters()), data)
    ggn = GGNLinearOperator(*setting)
    damped = ggn + damping * IdentityLinearOperator.like(ggn)
    near = KFACInverseLinearOperator(approximation(*setting, fisher_type="type-2"), damping, use_exact_damping=True)
    plain = CGInverseLinearOperator(damped, tolerance=1e-8)
    quick = CGInverseLinearOperator(damped, tolerance=1e-8, preconditioner=near)
    b = randn(ggn.shape[0], 2)
    truth = torch.linalg.solve(dense(damped), b)
    torch.testing.assert_close(plain @ b, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quick @ b, truth, rtol=1e-5, atol=1e-5)
    # 117 and 15 iterations where this was measured.
    assert 4 * max(s.iterations for s in quick.stats) < max(s.iterations for s in plain.stats)
    parts = [p.detach() for p in setting[2]]
    assert [x.shape for x in quick @ parts] == [p.shape for p in parts]


def test_an_indefinite_hessian_by_lsmr(setting: Any) -> None:
    hessian = HessianLinearOperator(*setting)
    shifted = hessian + 0.02 * IdentityLinearOperator.like(hessian)
    b = randn(hessian.shape[0])
    inverse = LSMRInverseLinearOperator(shifted, atol=1e-10, btol=1e-10, maxiter=1000)
    torch.testing.assert_close(inverse @ b, torch.linalg.solve(dense(shifted), b), rtol=1e-5, atol=1e-5)


def test_trace_diagonal_block_and_spectrum(setting: Any) -> None:
    ggn = GGNLinearOperator(*setting)
    matrix = dense(ggn)
    rank = int(torch.linalg.matrix_rank(matrix, rtol=1e-9))
    assert rank <= 120  # 60 data, two free logits each
    generator = torch.Generator().manual_seed(0)
    assert float(xtrace(ggn, 80, generator=generator)) == pytest.approx(float(matrix.trace()), rel=1e-2)
    found = hutchinson_diag(ggn, 100, generator=generator)
    deviation = ((matrix.square().sum(1) - matrix.diagonal().square()) / 100).sqrt()
    assert ((found - matrix.diagonal()).abs() <= 5 * deviation).all()
    rows = [0, 3, 150]
    sub = SubmatrixLinearOperator(ggn, rows, rows)
    torch.testing.assert_close(dense(sub), matrix[rows][:, rows], rtol=1e-9, atol=1e-12)
    grid, density = lanczos_approximate_spectrum(ggn, 40, num_repeats=3, margin=0.3, num_points=2000)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=0.02)
