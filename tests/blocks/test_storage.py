"""Kronecker factors kept by halves and in few digits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import kfacopt
from kfacopt.blocks import Storage
from kfacopt.blocks.statistics import RunningAverage
from tests.backends.test_background import Run, through_a_file
from tests.cases import parameters_of

DECAY = 0.9
STORAGES = {
    "halves": Storage(),
    "bf16": Storage(packed=False, dtype=torch.bfloat16),
    "both": Storage(dtype=torch.bfloat16),
}
BACKENDS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "kfac": (kfacopt.KFAC, kfacopt.KFACBackend),
    "kfac, exact damping": (kfacopt.KFAC, kfacopt.EigenKFACBackend),
    "ekfac": (kfacopt.EKFAC, kfacopt.EKFACBackend),
    "ekfac, whole": (kfacopt.EKFAC, kfacopt.FullEKFACBackend),
    "spectral": (kfacopt.SpectralDescent, kfacopt.OneSidedKFACBackend),
}
backends = pytest.mark.parametrize(("optimizer", "backend"), BACKENDS.values(), ids=BACKENDS)


def covariance(seed: int, size: int = 7, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*leading, 20, size, generator=generator, dtype=torch.float64)
    product = rows.mT @ rows
    return (product + product.mT) / 40


def run(optimizer: Any, backend: Callable[..., Any], storage: Storage | None, case: str = "mlp-ce") -> Run:
    # One object a run; lr as in `Run`.
    return Run(optimizer, case, backend=backend(1, 2, storage=storage), factor_every=None, refresh_every=None)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("leading", [(), (2,)])
def test_a_running_average_is_that_of_float64_to_the_digits_kept(storage: Storage, leading: tuple[int, ...]) -> None:
    kept, truth = RunningAverage(), RunningAverage()
    kept.storage = storage
    largest = torch.zeros(*leading, 7, 7, dtype=torch.float64)
    for seed in range(30):
        for average in (kept, truth):
            average.add(3.0 * covariance(seed, 7, *leading), 3.0)
            average.fold(DECAY)
        assert kept.value is not None
        assert truth.value is not None
        assert kept.known
        largest = torch.maximum(largest, torch.maximum(truth.value.abs(), kept.value.abs()))
        # Each update rounds the whole by half a unit in the last of eight binary digits; the decay sums them up.
        rounding = 2.0**-9 / (1 - DECAY) if storage.dtype == torch.bfloat16 else 1e-15
        assert ((kept.value - truth.value).abs() <= rounding * largest).all()
        assert torch.equal(kept.value, kept.value.mT)
        assert kept.value.dtype == torch.float64
    assert kept._kept is not None
    entries = 4 * 8 if storage.packed else 7 * 7
    assert kept._kept.numel() == entries * truth.value[..., 0, 0].numel()
    assert kept._kept.dtype == (storage.dtype or torch.float64)


def test_a_diagonal_is_no_triangle() -> None:
    average = RunningAverage()
    average.storage = Storage()
    average.add(torch.tensor([2.0, 4.0]), 2.0)
    average.fold(DECAY)
    assert average.value is not None
    assert average.value.tolist() == [1.0, 2.0]


@backends
@pytest.mark.parametrize("case", ["mlp-ce", "batch-norm"])
def test_halves_change_a_run_by_rounding(optimizer: Any, backend: Callable[..., Any], case: str) -> None:
    plain, halves = (run(optimizer, backend, storage, case).go(6) for storage in (None, Storage()))
    for a, b in zip(parameters_of(plain.model), parameters_of(halves.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@backends
def test_few_digits_change_a_run_little(optimizer: Any, backend: Callable[..., Any]) -> None:
    start = run(optimizer, backend, None)
    plain, few = (run(optimizer, backend, storage).go(3) for storage in (None, STORAGES["both"]))
    first, last, other = (torch.cat([p.flatten() for p in parameters_of(r.model)]) for r in (start, plain, few))
    # Factors are off by 2⁻⁹; where damping and eigenvalues are alike a direction is by a few times that.
    assert 0 < float((other - last).norm() / (last - first).norm()) < 0.05


@backends
@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_runs_resume_bit_for_bit(optimizer: Any, backend: Callable[..., Any], storage: Storage) -> None:
    going = run(optimizer, backend, storage).go(3)
    resumed = run(optimizer, backend, storage)
    resumed.model.load_state_dict(going.model.state_dict())
    resumed.optimizer.load_state_dict(through_a_file(going.optimizer.state_dict()))
    resumed.step = 3
    assert resumed.go(4).same_as(going.go(4))


def test_a_state_goes_from_a_storage_to_another() -> None:
    make = partial(run, kfacopt.KFAC, kfacopt.KFACBackend)
    whole = make(None).go(3)
    halves = make(Storage())
    halves.model.load_state_dict(whole.model.state_dict())
    halves.optimizer.load_state_dict(through_a_file(whole.optimizer.state_dict()))
    halves.step = 3
    for a, b in zip(parameters_of(whole.go(3).model), parameters_of(halves.go(3).model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float64])
def test_other_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"dtype={dtype} of Storage: .* torch.bfloat16 or torch.float32"):
        Storage(dtype=dtype)
