"""The polar factor: the best polynomials, every shape and scale, batches of equal shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfacopt.linalg import polar
from kfacopt.linalg.polar import NewtonSchulz, exact_polar, minimax_quintics

SHAPES = [(1, 1), (3, 3), (2, 7), (7, 2), (4, 2, 5), (3, 6, 2), (2, 3, 4, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def conditioned(shape: tuple[int, ...], smallest: float) -> Tensor:
    """A float64 matrix whose singular values lie between `smallest` and one."""
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0.0, torch.tensor(smallest).log10().item(), min(shape[-2:]), dtype=torch.float64)
    return (left * values) @ right


def composed(x: Tensor, polynomials: tuple[polar.Quintic, ...]) -> Tensor:
    for a, b, c in polynomials:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize(("smallest", "iterations"), [(0.5, 1), (1e-2, 3), (1e-2, 4), (1e-3, 6), (1e-2, 9)])
def test_the_composition_is_near_one_and_equally_so_at_both_ends(smallest: float, iterations: int) -> None:
    x = torch.linspace(smallest, 1.0, 100_001, dtype=torch.float64)
    off = composed(x, minimax_quintics(smallest, iterations)) - 1.0
    torch.testing.assert_close(off.max(), -off.min(), rtol=1e-3, atol=1e-9)
    below = torch.linspace(0.0, smallest, 1001, dtype=torch.float64)
    assert (composed(below, minimax_quintics(smallest, iterations)).diff() >= -1e-12).all()


def test_no_other_quintic_is_nearer_to_one() -> None:
    """The best that least maximum squares of random neighbours finds is not better."""
    (best,) = minimax_quintics(0.1, 1)
    x = torch.linspace(0.1, 1.0, 2001, dtype=torch.float64)
    error = (composed(x, (best,)) - 1.0).abs().max()
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(300):
            a, b, c = (torch.tensor(best, dtype=torch.float64) + scale * torch.randn(3, dtype=torch.float64)).tolist()
            assert (composed(x, ((a, b, c),)) - 1.0).abs().max() >= error


@shapes
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_against_the_singular_value_decomposition(shape: tuple[int, ...], scale: float) -> None:
    matrix = conditioned(shape, 0.1)
    truth = exact_polar(matrix)
    torch.testing.assert_close(NewtonSchulz(iterations=8)(scale * matrix), truth, rtol=0, atol=1e-7)
    torch.testing.assert_close(NewtonSchulz()((scale * matrix).float()), truth.float(), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_root_of_zero_is_finite(dtype: torch.dtype) -> None:
    """So that its product with what is zero is."""
    root = NewtonSchulz().inverse_root(torch.stack([torch.zeros(3, 3, dtype=dtype), torch.eye(3, dtype=dtype)]))
    assert root.isfinite().all()
    torch.testing.assert_close(root[1], torch.eye(3, dtype=dtype), rtol=0, atol=0.02)


@pytest.mark.parametrize("ratio", [1.0, 1e9], ids=["gram", "direct"])
def test_both_forms_are_the_same_polynomial(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polar, "_GRAM_RATIO", ratio)
    matrix = conditioned((3, 8, 20), 1e-3)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    divisor = values.pow(4).sum(-1, keepdim=True).pow(0.25)
    expected = (left * composed(values / divisor, minimax_quintics(1e-2, 4)).unsqueeze(-2)) @ right
    torch.testing.assert_close(NewtonSchulz()(matrix), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(NewtonSchulz()(matrix.float()), expected.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("function", [NewtonSchulz(), exact_polar])
def test_zero_stays_zero_and_what_is_not_there_stays_out(function: polar.PolarFactor) -> None:
    assert torch.equal(function(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    row = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(function(row), row / 5.0, rtol=0, atol=0.02)


def test_rank_one_of_a_deficient_matrix() -> None:
    matrix = torch.outer(torch.randn(5, dtype=torch.float64), torch.randn(9, dtype=torch.float64))
    assert torch.linalg.matrix_norm(exact_polar(matrix)) == pytest.approx(1.0)


def test_bfloat16_products_and_half_inputs() -> None:
    matrix = conditioned((6, 9), 0.1).float()
    truth = exact_polar(matrix)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.03)):
        for function in (NewtonSchulz(), exact_polar):
            coarse = function((1e-3 * matrix).to(dtype))
            assert coarse.dtype == dtype
            torch.testing.assert_close(coarse.float(), truth, rtol=0, atol=tolerance)


def test_no_singular_value_runs_away_in_bfloat16() -> None:
    """Rounding lifts the largest beyond the interval of the next polynomial."""
    for seed in range(100):
        torch.manual_seed(seed)
        matrix = conditioned((6, 9), 0.1) + (seed % 2) * torch.outer(torch.randn(6), torch.randn(9))
        found = NewtonSchulz()(matrix.bfloat16()).float()
        assert torch.linalg.matrix_norm(found, ord=2) < 1.05


@pytest.mark.parametrize("options", [{"iterations": 0}, {"smallest": 0.0}, {"smallest": 1.0}])
def test_refusals(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        NewtonSchulz(**options)  # type: ignore[arg-type]
