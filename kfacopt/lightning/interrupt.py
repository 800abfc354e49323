"""Stopping a run with Ctrl-C so that it can be continued bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException


class InterruptCheckpoint(Checkpoint):
    """On Ctrl-C, finish the step, write a checkpoint and stop; and make checkpoints exact.

    A signal can come in the middle of anything: of a forward pass, or of an optimizer step that has updated half of the
    parameters. A checkpoint of that moment (Lightning's `OnExceptionCheckpoint` and
    `ModelCheckpoint(save_on_exception=True)` write one) cannot be continued as if nothing had happened. Here the first
    Ctrl-C is only noted; the checkpoint is written once the optimizer step is complete (with gradient accumulation: the
    whole accumulated step) and, where one is due, the validation after it. Then training stops by `KeyboardInterrupt`,
    which Lightning turns into its own orderly shutdown. A second Ctrl-C stops at once, without a checkpoint.

    A SIGTERM leaves a checkpoint too, but sooner, because Lightning stops right after the batch: without the
    validation, and in the middle of gradient accumulation without what has been accumulated (only then is the resumed
    run another one).

    So long as this callback is among the trainer's, **every** checkpoint also carries the state of Python's, NumPy's
    and torch's global random generators, and resuming from one restores them: dropout goes on with the very next mask.
    (In a run of several processes they are left alone.)

    Args:
        dirpath: Folder of the checkpoint.
        filename: Its name, without `.ckpt`; an older one is overwritten.

    >>> InterruptCheckpoint("run").ckpt_path
    'run/interrupted.ckpt'
    """

    ckpt_path: str
    """Where the checkpoint is written."""

    interrupted: bool
    """Whether a signal has come since training started."""

    def __init__(self, dirpath: str | Path, filename: str = "interrupted") -> None:
        super().__init__()
        self.ckpt_path = os.path.join(dirpath, f"{filename}.ckpt")
        self.interrupted = False
        self._saved = False
        self._previous: Any = None
        self._installed = False
        self._step = 0
        self._step_complete = False
        self._generators: dict[str, Any] | None = None

    # --- the signal ---------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the generators of a checkpoint that was loaded for anything but this run."""
        self._generators = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for Ctrl-C, and put the random generators where the checkpoint has them."""
        self.interrupted = self._saved = self._step_complete = False
        self._step = trainer.global_step
        # Only here: between loading the checkpoint and the first batch, others draw numbers.
        if self._generators is not None and trainer.world_size == 1:
            restore_generators(self._generators)
        self._generators = None
        # Only the main thread may set handlers. A signal that is ignored (nohup) stays so.
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._note)
            self._installed = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            self._release()
            raise KeyboardInterrupt
        self.interrupted = True
        rank_zero_info(
            f"Interrupted: a checkpoint follows this step, {self.ckpt_path}. Interrupt again to stop at once without "
            "one."
        )

    def _release(self) -> None:
        # Not if someone has set a handler since: Lightning ignores further Ctrl-C's on its way out.
        if self._installed and signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self._previous)
        self._installed = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening; write the checkpoint if a SIGTERM has broken off a validation."""
        self._release()
        if isinstance(exception, SIGTERMException) and self._step_complete:
            self._save_if(trainer, True)

    # --- the checkpoint -----------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint if a signal has come and the optimizer has stepped."""
        self._step_complete = trainer.global_step != self._step
        self._step = trainer.global_step
        # Lightning stops for a SIGTERM right after this batch: there may be seconds until a SIGKILL.
        self._save_if(trainer, trainer.received_sigterm)
        fetcher = trainer.fit_loop._data_fetcher
        # A run that resumes from here would leave out a validation that is due.
        validates = fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
        if self._step_complete and not validates:
            self._save_if(trainer, self.interrupted)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop, now that Lightning has also logged the last step."""
        # After a SIGTERM Lightning itself stops the run, as it would without us.
        if self._saved and not trainer.received_sigterm:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint if Ctrl-C has come before or during this validation."""
        if self._step_complete and (trainer.training or trainer.validating):
            self._save_if(trainer, self.interrupted)

    def _save_if(self, trainer: Trainer, signaled: bool) -> None:
        # Signals reach processes at different times, but all must stop after the same step.
        if not self._saved and trainer.strategy.reduce_boolean_decision(signaled, all=False):
            self._saved = self.interrupted = True
            trainer.save_checkpoint(self.ckpt_path)

    def state_dict(self) -> dict[str, Any]:
        """The global random generators, for every checkpoint."""
        return {"generators": collect_generators()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the random generators' state for when training starts."""
        self._generators = state_dict["generators"]


def collect_generators() -> dict[str, Any]:
    """The states of the global random generators, as tensors and plain Python.

    Returns:
        Python's, NumPy's, torch's on the CPU and torch's on every GPU.
    """
    numpy_state: Any = numpy.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy_state,
            "state": {
                "key": torch.from_numpy(numpy_state["state"]["key"].astype("int64")),
                "pos": int(numpy_state["state"]["pos"]),
            },
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Put the global random generators back.

    Args:
        state: From `collect_generators`; GPUs that are not there now are passed over.

    >>> state = collect_generators()
    >>> first = random.random(), numpy.random.rand(), torch.rand(())
    >>> restore_generators(state)
    >>> first == (random.random(), numpy.random.rand(), torch.rand(()))
    True
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype("uint32")
    numpy.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)
