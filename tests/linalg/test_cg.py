"""Conjugate gradients against dense solves in float64."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfacopt.linalg.cg import RelativeProgress, conjugate_gradient

SHAPES = ((3, 4), (5,), ())


def matrix(condition: float, seed: int = 0) -> Tensor:
    """Symmetric positive definite, `[18 18]`."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(torch.Size(shape).numel() for shape in SHAPES)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return basis * torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64) @ basis.T


def split(flat: Tensor) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [part.reshape(shape) for part, shape in zip(flat.split(sizes), SHAPES, strict=True)]


def join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


@given(
    seed=st.integers(0, 1000),
    condition=st.sampled_from([1.0, 10.0, 1e3]),
    tolerance=st.sampled_from([1e-3, 1e-6, 1e-10]),
    preconditioned=st.booleans(),
    warm=st.booleans(),
)
def test_the_answer_is_the_dense_solve_to_the_tolerance(
    seed: int, condition: float, tolerance: float, preconditioned: bool, warm: bool
) -> None:
    a, generator = matrix(condition, seed), torch.Generator().manual_seed(seed)
    b = torch.randn(len(a), generator=generator, dtype=torch.float64)
    start = torch.randn(len(a), generator=generator, dtype=torch.float64)
    near = torch.linalg.inv(a + 0.1 * torch.eye(len(a), dtype=a.dtype))
    result = conjugate_gradient(
        lambda v: split(a @ join(v)),
        split(b),
        x0=split(start) if warm else None,
        preconditioner=(lambda v: split(near @ join(v))) if preconditioned else None,
        tolerance=tolerance,
        max_iterations=10 * len(a),
    )
    assert result.converged
    assert not result.negative_curvature
    x = join(result.solution)
    # The recurrence's residual drifts from the true one by rounding only: eps times condition.
    assert (b - a @ x).norm() <= 1.01 * tolerance * b.norm() + 1e-11 * condition
    assert (x - torch.linalg.solve(a, b)).norm() <= 1.01 * tolerance * b.norm() + 1e-11 * condition  # λ_min = 1
    assert result.values[-1] == pytest.approx(float(0.5 * x @ a @ x - b @ x), rel=1e-8)
    assert all(later <= earlier for earlier, later in zip(result.values, result.values[1:], strict=False))


def test_a_perfect_preconditioner_takes_one_iteration() -> None:
    a = matrix(1e6)
    inverse, b = torch.linalg.inv(a), torch.ones(len(a), dtype=a.dtype)
    multiply = lambda v: split(a @ join(v))  # noqa: E731
    plain = conjugate_gradient(multiply, split(b), tolerance=1e-6, max_iterations=1000)
    exact = conjugate_gradient(multiply, split(b), preconditioner=lambda v: split(inverse @ join(v)), tolerance=1e-6)
    assert exact.iterations <= 2 < plain.iterations


def test_negative_curvature_is_said_and_not_followed() -> None:
    a = torch.diag(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    seen: list[int] = []
    result = conjugate_gradient(
        lambda v: [a @ v[0]],
        [torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)],
        observe=lambda iteration, x: seen.append(iteration),
    )
    assert result.negative_curvature
    assert not result.converged
    assert seen == list(range(1, result.iterations + 1))
    x = result.solution[0]
    assert float(0.5 * x @ a @ x - x.sum() + 0.7 * x[2]) == pytest.approx(result.values[-1])
    first = conjugate_gradient(lambda v: [-v[0]], [torch.ones(2)])
    assert first.negative_curvature
    assert first.iterations == 0
    assert torch.equal(first.solution[0], torch.zeros(2))


def test_nothing_to_solve() -> None:
    result = conjugate_gradient(lambda v: v, [torch.zeros(3)])
    assert (result.iterations, result.residual, result.converged) == (0, 0.0, True)


def test_relative_progress_stops_where_little_is_gained() -> None:
    a = torch.diag(torch.logspace(0, 6, 200, dtype=torch.float64))
    b = [torch.ones(200, dtype=torch.float64)]
    whole = conjugate_gradient(lambda v: [a @ v[0]], b, tolerance=1e-8, max_iterations=5000)
    early = conjugate_gradient(lambda v: [a @ v[0]], b, tolerance=0.0, progress=RelativeProgress(), max_iterations=5000)
    assert early.converged
    assert early.iterations < whole.iterations
    assert early.values[-1] < 0.9 * whole.values[-1]


def test_three_vectors_are_held_beside_the_product() -> None:
    size = 1000

    def held() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() == size]
        return len({t.data_ptr() for t in found})

    a, b = torch.linspace(1, 2, size), torch.ones(size)
    before, most = held(), 0

    def multiply(v: list[Tensor]) -> list[Tensor]:
        nonlocal most
        most = max(most, held())
        return [a * v[0]]

    conjugate_gradient(multiply, [b], max_iterations=4, tolerance=0.0)
    assert most - before <= 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": [torch.ones(3)]}, ValueError, r"x0 has shapes \[\(3,\)\]"),
        ({"tolerance": -1.0}, ValueError, "tolerance must not be negative"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1"),
    ],
)
def test_refusals(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conjugate_gradient(lambda v: v, [torch.ones(2)], **options)  # type: ignore[arg-type]


def test_what_is_not_finite_is_no_answer() -> None:
    with pytest.raises(FloatingPointError, match="right-hand side"):
        conjugate_gradient(lambda v: v, [torch.tensor([float("nan")])])
    with pytest.raises(FloatingPointError, match="iteration 0"):
        conjugate_gradient(lambda v: [v[0] * float("inf")], [torch.ones(2)])
