"""Iterations on several columns at once: each column as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfacopt.linalg.cg import conjugate_gradient
from kfacopt.linalg.column_cg import conjugate_gradient_columns
from kfacopt.linalg.lsmr import lsmr
from tests.operators.matrices import randn, spd


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("limit", [4, 100])
def test_conjugate_gradients_are_those_of_each_column(preconditioned: bool, warm: bool, limit: int) -> None:
    a, b, start = spd(15), randn(15, 4), randn(15, 4, seed=3)
    b[:, 1] = 0.0
    b[:, 2] = a[:, :3].sum(1)
    near = torch.diag(1.0 / a.diagonal())
    widths: list[int] = []

    def multiply(v: Tensor) -> Tensor:
        widths.append(v.shape[1])
        return a @ v

    options: dict[str, Any] = {"max_iterations": limit, "tolerance": 1e-8}
    x, found = conjugate_gradient_columns(
        multiply,
        b,
        x0=start if warm else None,
        preconditioner=(lambda v: near @ v) if preconditioned else None,
        **options,
    )
    for k in range(4):
        alone = conjugate_gradient(
            lambda v: [a @ v[0]],
            [b[:, k]],
            x0=[start[:, k]] if warm and k != 1 else None,
            preconditioner=(lambda v: [near @ v[0]]) if preconditioned else None,
            **options,
        )
        if warm and k == 1:
            continue  # nothing is within a share of the length of zero but zero
        torch.testing.assert_close(x[:, k], alone.solution[0], rtol=1e-7, atol=1e-9)
        assert abs(found[k].iterations - alone.iterations) <= 1  # rounding decides who is just within
        assert found[k][1:] == (alone.converged, alone.negative_curvature)
    assert sum(widths) == sum(f.iterations for f in found) + 4 * warm


def test_a_column_of_negative_curvature_leaves_the_others_alone() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.1, 1.0]], dtype=torch.float64).T
    x, found = conjugate_gradient_columns(lambda v: a @ v, b)
    torch.testing.assert_close(x[:, 0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert [f.negative_curvature for f in found] == [False, True]
    assert [f.converged for f in found] == [True, False]


def test_lsmr_solves_each_column_as_if_alone() -> None:
    a, b = randn(9, 6), randn(9, 4, seed=2)
    b[:, 1] = a[:, 0]
    together = lsmr(lambda v: a @ v, lambda v: a.T @ v, b, damp=0.1)
    for k in range(4):
        alone = lsmr(lambda v: a @ v, lambda v: a.T @ v, b[:, [k]], damp=0.1)
        torch.testing.assert_close(together.solution[:, [k]], alone.solution, rtol=1e-9, atol=1e-10)
        assert together.info[k][:2] == alone.info[0][:2]
