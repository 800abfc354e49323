"""A run cut by Ctrl-C and resumed is, bit for bit, the run that was not cut."""

from __future__ import annotations

import functools
import random
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from kfacopt.experiments.learning_rates import linear_decay
from kfacopt.lightning import CurvatureCallback, InterruptCheckpoint
from tests.lightning.harness import (
    RaiseSignal,
    Toy,
    Trace,
    hooks,
    regression,
    trainer,
    weights,
)


def run(
    folder: Path,
    *callbacks: Callback,
    ckpt_path: str | None = None,
    interrupted: bool = False,
    **arguments: Any,
) -> tuple[Trainer, torch.Tensor]:
    """Train; dropout makes the loss depend on torch's global generator."""
    torch.manual_seed(5)
    task = regression(dropout=0.3, schedule=linear_decay)
    fitted = trainer(folder, InterruptCheckpoint(folder), CurvatureCallback(), *callbacks, **arguments)
    if interrupted:
        with pytest.raises(SystemExit):
            fitted.fit(task, Toy())
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        fitted.fit(task, Toy(), ckpt_path=ckpt_path, weights_only=True)
    assert hooks(task) == 0
    return fitted, weights(task)


def assert_joined(whole: Trace, *parts: Trace) -> None:
    """Losses and curvature (but for times) of the parts are those of the whole, exactly."""
    for name in ("train/loss", "val/loss", "curvature/kl", "curvature/condition"):
        assert list(chain(*(part.series(name) for part in parts))) == whole.series(name)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": 18},
    "accumulated": {"accumulate_grad_batches": 4},
    "validated within": {"val_check_interval": 2},
    "not validated": {"limit_val_batches": 0},
}


Whole = Callable[..., tuple[Trace, torch.Tensor]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The losses and the last weights of a run that is not cut; each kind is run once."""

    @functools.cache
    def uncut(kind: str = "epochs") -> tuple[Trace, torch.Tensor]:
        fitted, found = run(tmp_path_factory.mktemp("whole"), **ARGUMENTS[kind])
        return fitted.logger, found

    return uncut


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        # The first batch, one within an epoch, its last, and the first of the next.
        ("epochs", 0),
        ("epochs", 2),
        ("epochs", 5),
        ("epochs", 6),
        ("steps", 5),
        ("steps", 9),
        ("accumulated", 1),
        ("accumulated", 9),
        ("validated within", 2),
        ("validated within", 3),
        ("not validated", 5),
    ],
)
def test_an_interrupted_run_resumes_exactly(tmp_path: Path, whole: Whole, kind: str, batch: int) -> None:
    losses, expected = whole(kind)
    cut, _ = run(tmp_path, RaiseSignal(batch), interrupted=True, **ARGUMENTS[kind])
    assert 0 < cut.global_step < len(losses.series("curvature/kl"))
    resumed, found = run(tmp_path, ckpt_path=str(tmp_path / "interrupted.ckpt"), **ARGUMENTS[kind])
    assert_joined(losses, cut.logger, resumed.logger)
    assert torch.equal(found, expected)


def test_a_run_may_be_cut_twice(tmp_path: Path, whole: Whole) -> None:
    losses, expected = whole()
    path = str(tmp_path / "interrupted.ckpt")
    first, _ = run(tmp_path, RaiseSignal(3), interrupted=True)
    torch.manual_seed(7)
    task = regression(dropout=0.3, schedule=linear_decay)
    second = trainer(tmp_path, InterruptCheckpoint(tmp_path), CurvatureCallback(), RaiseSignal(7))
    with pytest.raises(SystemExit):
        second.fit(task, Toy(), ckpt_path=path, weights_only=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    third, found = run(tmp_path, ckpt_path=path)
    assert_joined(losses, first.logger, second.logger, third.logger)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("step", [2, 6])
def test_any_checkpoint_of_the_run_resumes_exactly(tmp_path: Path, whole: Whole, step: int) -> None:
    def every() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)

    losses, expected = whole()
    run(tmp_path, every())
    path = tmp_path / f"step={step}.ckpt"
    torch.load(path, weights_only=True)
    resumed, found = run(tmp_path, every(), ckpt_path=str(path))
    assert resumed.logger.series("train/loss") == losses.series("train/loss")[step:]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("after_training", [True, False])
def test_a_checkpoint_at_the_end_of_an_epoch_resumes_exactly(
    tmp_path: Path, whole: Whole, after_training: bool
) -> None:
    def every() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=after_training)

    losses, expected = whole()
    run(tmp_path, every())
    resumed, found = run(tmp_path, every(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert resumed.logger.series("train/loss") == losses.series("train/loss")[12:]
    assert torch.equal(found, expected)


def test_generators_of_a_checkpoint_that_is_only_validated_are_not_restored(
    tmp_path: Path,
) -> None:
    run(tmp_path, RaiseSignal(4), interrupted=True)
    task = regression()
    callback = InterruptCheckpoint(tmp_path)
    fitted = trainer(tmp_path, callback, max_epochs=1)
    path = tmp_path / "interrupted.ckpt"
    fitted.validate(task, Toy(), ckpt_path=path, verbose=False, weights_only=True)
    state = torch.get_rng_state()
    fitted.fit(task, Toy())
    assert torch.equal(torch.get_rng_state(), state)
    assert not callback.interrupted


def test_a_run_that_is_not_interrupted_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run(tmp_path)
    assert not (tmp_path / "interrupted.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    cut, _ = run(tmp_path, RaiseSignal(4, times=2), interrupted=True)
    assert cut.global_step == 4
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_an_interrupted_step_is_completed_which_lightnings_own_callback_does_not(
    tmp_path: Path,
) -> None:
    class Record(Callback):
        batches = 0

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.batches += 1

    record = Record()
    run(tmp_path, RaiseSignal(4), record, interrupted=True)
    assert record.batches == 5
    task = regression()
    other = trainer(tmp_path, RaiseSignal(4), OnExceptionCheckpoint(tmp_path))
    with (
        pytest.warns(UserWarning, match="was called without a model"),
        pytest.warns(UserWarning, match="no last checkpoint"),
        pytest.raises(SystemExit),
    ):
        other.fit(task, Toy())
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert (progress["started"], progress["completed"]) == (5, 4)


def test_a_signal_during_validation_waits_for_its_end(tmp_path: Path, whole: Whole) -> None:
    class InValidation(Callback):
        def on_validation_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
            if not trainer.sanity_checking:
                signal.raise_signal(signal.SIGINT)

    _, expected = whole()
    cut, _ = run(tmp_path, InValidation(), interrupted=True, limit_val_batches=1)
    assert cut.global_step == 6
    _, found = run(tmp_path, ckpt_path=str(tmp_path / "interrupted.ckpt"))
    assert torch.equal(found, expected)


class TermInValidation(Callback):
    def on_validation_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        if not trainer.sanity_checking:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("callback", "steps"),
    [
        (RaiseSignal(3, signal.SIGTERM), 4),
        # The validation after this batch is not waited for; the other is broken off.
        (RaiseSignal(5, signal.SIGTERM), 6),
        (TermInValidation(), 6),
    ],
    ids=["within an epoch", "before a validation", "in a validation"],
)
def test_sigterm_also_leaves_a_checkpoint(tmp_path: Path, whole: Whole, callback: Callback, steps: int) -> None:
    losses, expected = whole()
    torch.manual_seed(5)
    task = regression(dropout=0.3, schedule=linear_decay)
    cut = trainer(tmp_path, InterruptCheckpoint(tmp_path), callback)
    with pytest.raises(SIGTERMException):
        cut.fit(task, Toy())
    assert cut.global_step == steps
    resumed, found = run(tmp_path, ckpt_path=str(tmp_path / "interrupted.ckpt"))
    assert resumed.logger.series("train/loss") == losses.series("train/loss")[steps:]
    assert torch.equal(found, expected)


def test_checkpoints_carry_every_global_generator(tmp_path: Path) -> None:
    drawn: dict[str, list[float]] = {}

    class Draw(Callback):
        def __init__(self, key: str) -> None:
            self.values = drawn.setdefault(key, [])

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.values.extend([random.random(), numpy.random.rand(), float(torch.rand(()))])

    random.seed(1)
    numpy.random.seed(1)
    run(tmp_path, Draw("cut"), RaiseSignal(4), interrupted=True)
    after = random.random(), numpy.random.rand()
    random.seed(2)
    numpy.random.seed(2)
    run(tmp_path, Draw("resumed"), ckpt_path=str(tmp_path / "interrupted.ckpt"))
    random.seed(1)
    numpy.random.seed(1)
    run(tmp_path / "whole", Draw("whole"))
    assert drawn["cut"][:15] + drawn["resumed"] == drawn["whole"]
    assert after


def test_an_error_leaves_ctrl_c_as_it_was(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            raise ArithmeticError

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ArithmeticError):
        run(tmp_path, Fail())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignoring, _ = run(tmp_path, RaiseSignal(4))
    assert ignoring.global_step == 18
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_other_threads_can_train(tmp_path: Path) -> None:
    import threading

    errors: list[BaseException] = []

    def fit() -> None:
        try:
            run(tmp_path, max_epochs=1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert not errors
