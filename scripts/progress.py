"""What a long run says where there is no terminal to draw a progress bar on: a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from torch import Tensor

Item = TypeVar("Item")

EVERY = 10.0
"""Seconds from line to line."""


@contextmanager
def told(text: Callable[[], str], console: Console, every: float = EVERY) -> Iterator[None]:
    """Within this context a thread writes `text()` every so many seconds, unless the console is a terminal.

    A bar has a terminal to itself; a log has not. A thread says the same whatever keeps the run busy.

    Args:
        text: How far the run is.
        console: Where to.
        every: Seconds.
    """
    if console.is_terminal:
        yield
        return
    over, started = threading.Event(), time.monotonic()

    def speak() -> None:
        while not over.wait(every):
            line = f"[{time.monotonic() - started:5.0f} s] {text()}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            console.file.flush()

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def counted(items: Sequence[Item], describe: Callable[[Item], str], console: Console) -> Iterator[Item]:
    """The items one after the other; how far that is, as a bar on a terminal and otherwise as a line now and then.

    Args:
        items: What there is to do.
        describe: What a line says of the item that is being done.
        console: Where to.

    >>> from io import StringIO
    >>> list(counted([1, 2], str, Console(file=StringIO())))
    [1, 2]
    """
    now = ""

    def text() -> str:
        return now

    with told(text, console):
        for number, item in enumerate(track(items, console=console, transient=True, disable=not console.is_terminal)):
            now = f"{number + 1} of {len(items)}: {describe(item)}"
            yield item


class Epochs(Callback):
    """How far a fit of Lightning is, as a text; it asks nothing of the trainer from another thread.

    >>> Epochs()()
    'no step yet'
    """

    def __init__(self) -> None:
        self._place = ""
        self._loss: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where the fit is; the loss is read only when somebody asks, as that may wait for a device."""
        of = f" of {trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        self._place = f"epoch {trainer.current_epoch + 1}{of}, step {trainer.global_step}"
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        self._loss = found.detach() if isinstance(found, Tensor) else None

    def __call__(self) -> str:
        loss = "" if self._loss is None else f", loss {float(self._loss):.4g}"
        return f"{self._place}{loss}" if self._place else "no step yet"


def output() -> Console:
    """The standard output: a terminal, or a file that wraps no line."""
    return Console() if sys.stdout.isatty() else Console(width=140)
