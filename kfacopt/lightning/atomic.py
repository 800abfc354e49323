"""Checkpoints of Lightning that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO

from kfacopt.checkpoints import save_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own reading and writing of checkpoints, but a file is only ever replaced by a whole one.

    Lightning writes to the folder for temporary files and moves the file from there, which is a copy where that folder
    is on another disk (`/tmp` in memory, say): a process killed meanwhile leaves half a checkpoint where a whole one
    was. Here files are written by `kfacopt.checkpoints.save_checkpoint`; remote ones (`s3://...`) as ever.

    >>> from pytorch_lightning import Trainer
    >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    >>> type(trainer.strategy.checkpoint_io).__name__
    'AtomicCheckpointIO'
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Lightning's.
            path: Of the file; its folder is made if need be.
            storage_options: Of remote file systems, which Lightning's plugin takes none of.

        Raises:
            OSError: The disk is full, say; the error names `path`, and what was there stays.
            TypeError: If there are `storage_options`.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint, path)
