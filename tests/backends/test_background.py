"""Decompositions beside the training: when they are taken over, and that nothing depends on the clock."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfacopt
from kfacopt.backends import background as beside
from kfacopt.blocks import Block, CorrectedEigenBlock, EigenBlock, KroneckerBlock, OutputBlock, PartialEigenBlock
from kfacopt.schedules import Background, Growing, MaxOverhead
from tests.cases import BY_NAME, OPTIMIZERS, parameters_of, train_step

SPECTRAL = {"spectral": kfacopt.SpectralDescent}
kinds = pytest.mark.parametrize("optimizer", (OPTIMIZERS | SPECTRAL).values(), ids=OPTIMIZERS | SPECTRAL)
OPTIONS: dict[str, Any] = {"factor_every": 1, "refresh_every": Background(3, delay=2), "lr": 0.05}


class Run:
    """A model in training, on a batch that changes from step to step."""

    def __init__(self, optimizer: Any, case: str = "mlp-ce", **options: Any) -> None:
        self.model, self.loss, self.x, self.y = BY_NAME[case].make()
        self.optimizer = optimizer(self.model, self.loss, **OPTIONS | options)
        self.step = 0

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.step += 1
            train_step(self.optimizer, self.model, self.loss, self.x * (1 + 0.1 * self.step), self.y)
        return self

    def same_as(self, other: Run) -> bool:
        pairs = zip(parameters_of(self.model), parameters_of(other.model), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def slowly(work: Callable[..., Any], gate: threading.Event) -> Callable[..., Any]:
    def wait(*args: Any) -> Any:
        assert gate.wait(60)
        return work(*args)

    return wait


@kinds
def test_a_slow_thread_changes_nothing(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decomposition is let go only when the step that takes it over waits for it."""
    plain = Run(optimizer).go(8)
    gate, result = threading.Event(), beside.Future.result
    monkeypatch.setattr(beside, "_decomposed", slowly(beside._decomposed, gate))

    def opened(future: Any, timeout: float | None = None) -> Any:
        gate.set()
        return result(future, timeout)

    monkeypatch.setattr(beside.Future, "result", opened)
    late = Run(optimizer)
    for _ in range(8):
        late.go(1)
        gate.clear()
    gate.set()
    assert late.same_as(plain)


@kinds
def test_the_cache_is_that_of_the_statistics_at_the_launch(optimizer: Any) -> None:
    """Against a block that is refreshed at the launch, by a step of a run that decomposes at once."""
    options = {"lr": 0.0, "adamw_lr": 0.0, "weight_decay": 0.0}
    late = Run(optimizer, **options)
    now = Run(optimizer, **options, refresh_every=3)
    while not late.optimizer.backend._under_way:
        late.go(1)
        now.go(1)
    name = next(iter(late.optimizer.backend._under_way.state_dict()))
    launched_at = late.step
    before = late.optimizer.backend.blocks[name].cache()
    late.go(1)
    assert all(before[key] is value for key, value in late.optimizer.backend.blocks[name].cache().items())
    late.go(1)
    assert late.step == launched_at + 2
    caches = [run.optimizer.backend.blocks[name].cache() for run in (late, now)]
    for key, value in caches[0].items():
        if value is None:
            assert caches[1][key] is None
        else:
            torch.testing.assert_close(value.abs(), caches[1][key].abs(), rtol=1e-9, atol=1e-9)  # signs are free


BLOCKS: dict[str, Callable[[], Block]] = {
    "kronecker": KroneckerBlock,
    "kronecker, root": lambda: KroneckerBlock(0.5),
    "eigen": EigenBlock,
    "corrected": CorrectedEigenBlock,
    "partial": lambda: PartialEigenBlock(0.5),
    "outputs": lambda: OutputBlock((5, 4)),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_the_two_halves_of_a_refresh_are_a_refresh(make: Callable[[], Block]) -> None:
    """Bit for bit, and the first half writes nothing."""
    whole, halves = make(), make()
    for seed in range(2):
        for block in (whole, halves):
            block.update(_rows(seed))
            block.fold(0.5)
        whole.refresh(0.1)
        held = halves.state_dict()
        found = halves.decomposed(halves.snapshot(), 0.1)
        assert all(a is b for a, b in zip(held["cache"].values(), halves.state_dict()["cache"].values(), strict=True))
        halves.renew(found)
    for a, b in zip(whole.renewed().values(), halves.renewed().values(), strict=True):
        assert a is b is None or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [CorrectedEigenBlock, lambda: PartialEigenBlock(0.5)], ids=["whole", "partial"])
def test_what_is_corrected_meanwhile_is_brought_into_the_new_basis(make: Callable[[], Any]) -> None:
    """Dense truth: the corrected operator's diagonal in the new basis, of the averages at the hand-over."""
    block = make()
    block.update(_rows(0))
    block.fold(0.5)
    block.refresh(0.1)
    block.update(_rows(1))
    block.fold(0.5)
    found = block.decomposed({key: value.clone() for key, value in block.snapshot().items()}, 0.1)
    block.update(_rows(2))
    block.fold(0.5)
    unit = torch.eye(20, dtype=torch.float64).reshape(20, 5, 4)
    dense = block.matvec(unit).reshape(20, 20)
    block.renew(found)
    left, right = found.cache["gradient_basis"], found.cache["input_basis"]
    basis = torch.kron(left, right)
    wanted = (basis.T @ dense @ basis).diagonal().reshape(left.shape[1], right.shape[1])
    torch.testing.assert_close(block.corrected.value, wanted, rtol=1e-12, atol=1e-14)


def _rows(seed: int) -> kfacopt.Rows:
    generator = torch.Generator().manual_seed(seed)
    inputs, gradients = (
        torch.randn(*s, 7, 1, d, generator=generator, dtype=torch.float64) for s, d in (((), 4), ((2,), 5))
    )
    return kfacopt.Rows(inputs, gradients, torch.tensor(7.0, dtype=torch.float64))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@kinds
@pytest.mark.parametrize("case", ["mlp-ce", "batch-norm"])
def test_resuming_between_launch_and_hand_over_is_bit_for_bit(optimizer: Any, case: str) -> None:
    run, seen = Run(optimizer, case), 0
    for stop in range(1, 7):
        run.go(1)
        seen += bool(run.optimizer.backend._under_way)
        resumed = Run(optimizer, case)
        resumed.model.load_state_dict(run.model.state_dict())
        resumed.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
        resumed.step = stop
        further = copy.deepcopy(run)
        assert resumed.go(4).same_as(further.go(4))
    assert seen > 1
    assert run.go(4).same_as(further)


@kinds
def test_copies_and_pickles_go_on_alike(optimizer: Any) -> None:
    run = Run(optimizer)
    while not run.optimizer.backend._under_way:
        run.go(1)
    assert run.optimizer.health()["under_way"] > 0
    copied, unpickled = copy.deepcopy(run), pickle.loads(pickle.dumps(run))
    assert copied.go(5).same_as(run.go(5))
    assert unpickled.go(5).same_as(run)


def test_a_state_of_what_is_under_way_goes_to_a_backend_without_a_background() -> None:
    run = Run(kfacopt.KFAC).go(4)
    assert run.optimizer.backend._under_way
    plain = Run(kfacopt.KFAC, refresh_every=1000)
    plain.model.load_state_dict(run.model.state_dict())
    plain.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    plain.step = 4
    assert plain.go(1).same_as(run.go(1))
    plain.go(5)
    assert not plain.optimizer.backend._under_way


def test_a_damaged_launch_is_refused_and_nothing_is_changed() -> None:
    run = Run(kfacopt.EKFAC).go(4)
    state = copy.deepcopy(run.optimizer.state_dict())
    kept = next(iter(state["curvature"]["backend"]["under_way"].values()))
    kept["snapshot"]["input_factor"] = torch.zeros(2, 2)
    twin = copy.deepcopy(run)
    with pytest.raises(ValueError, match="under way of the curvature of"):
        run.optimizer.load_state_dict(state)
    assert run.go(4).same_as(twin.go(4))


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC], ids=["kfac", "ekfac"])
def test_an_error_of_the_thread_names_the_layer_and_is_tried_again(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(optimizer)
    while not run.optimizer.backend._under_way:
        run.go(1)
    name = next(iter(run.optimizer.backend._under_way.state_dict()))
    with monkeypatch.context() as patched:

        def fails(*args: Any) -> Any:
            raise MemoryError("as told")

        patched.setattr(beside, "_decomposed", fails)
        broken = copy.deepcopy(run)
        broken.go(1)
        before = parameters_of(broken.model)
        with pytest.raises(MemoryError, match="as told") as caught:
            broken.go(1)
        assert any(repr(name) in note for note in caught.value.__notes__)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(broken.model), strict=True))
    assert name in broken.optimizer.backend._under_way.state_dict()
    # The step that failed has folded its batch; the next one takes the same decomposition over.
    broken.go(1)
    assert name not in broken.optimizer.backend._under_way.state_dict()


def test_lapack_failing_in_the_thread_leaves_the_cache_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(kfacopt.KFAC)
    while not run.optimizer.backend._under_way:
        run.go(1)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("as told")

    with monkeypatch.context() as patched:
        for routine in ("eigh", "cholesky_ex", "svd"):
            patched.setattr(torch.linalg, routine, fails)
        failing = copy.deepcopy(run)
        name = next(iter(failing.optimizer.backend._under_way.state_dict()))
        cache = failing.optimizer.backend.blocks[name].cache()
        failing.go(2)
    assert failing.optimizer.health()["fallbacks"] > 0
    now = failing.optimizer.backend.blocks[name].cache()
    assert all(torch.equal(now[key], value) for key, value in cache.items())
    failing.go(6)
    assert all(p.isfinite().all() for p in failing.model.parameters())


def test_a_layer_that_is_frozen_meanwhile_loses_what_was_under_way() -> None:
    run = Run(kfacopt.EKFAC)
    while not run.optimizer.backend._under_way:
        run.go(1)
    name = next(iter(run.optimizer.backend._under_way.state_dict()))
    for parameter in run.model.get_submodule(name).parameters():
        parameter.requires_grad_(False)
    run.go(1)
    assert name not in run.optimizer.backend._under_way
    for parameter in run.model.get_submodule(name).parameters():
        parameter.requires_grad_(True)
    run.go(8)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_refinements_let_what_is_under_way_be() -> None:
    """A refined basis is not the one that the overlaps are with."""
    made: Callable[..., Any] = lambda model, loss, **options: kfacopt.SecondOrderOptimizer(  # noqa: E731
        model, loss, lr=0.05, backend=kfacopt.FullEKFACBackend(1, Background(4, delay=2), refine_every=1)
    )
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    optimizer = made(model, loss)
    still, moved = 0, 0
    for _ in range(12):
        before = {name: block.basis()[0] for name, block in optimizer.backend.blocks.items() if block.ready}
        train_step(optimizer, model, loss, x, y)
        for name, basis in before.items():
            same = optimizer.backend.blocks[name].basis()[0] is basis
            if name in optimizer.backend._under_way:
                assert same
            still, moved = still + same, moved + (not same)
    assert still > 0
    assert moved > 0


def test_torch_s_number_of_threads_is_as_it_was() -> None:
    before = torch.get_num_threads()
    run = Run(kfacopt.KFAC).go(4)
    found: list[int] = []
    fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert run.optimizer.backend._under_way.threads == 1
    assert (torch.get_num_threads(), found) == (before, [before])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, "every"),
        ((MaxOverhead(0.1),), TypeError, "MaxOverhead"),
        ((Background(3),), TypeError, "Background"),
        ((3, 0), ValueError, "delay"),
        ((3, MaxOverhead(0.1)), TypeError, "MaxOverhead"),
        ((3, 2, 0), ValueError, "threads"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Background(*arguments)


def test_a_delay_that_grows() -> None:
    schedule = Background(Growing(2, 50, burn_in=50), delay=Growing(1, 10, burn_in=50))
    assert [schedule.hand_over(step) - step for step in (0, 25, 50, 99)] == [1, 3, 10, 10]
    assert [schedule(step) for step in (0, 50)] == [2, 50]


def test_devices_that_are_not_known() -> None:
    class Elsewhere:
        device = torch.device("mps")

    layer = type("Held", (), {"name": "head", "parameters": {"weight": Elsewhere()}})()
    with pytest.raises(NotImplementedError, match=r"'head' lies on mps"):
        beside.check_devices([layer])
    beside.check_devices([type("Held", (), {"name": "head", "parameters": {"weight": nn.Parameter(torch.ones(1))}})()])
