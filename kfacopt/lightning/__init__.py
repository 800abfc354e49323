"""Training with PyTorch Lightning: the callbacks, and the data, models and tasks of the runs."""

from __future__ import annotations

from kfacopt.lightning.callback import CurvatureCallback as CurvatureCallback
from kfacopt.lightning.interrupt import InterruptCheckpoint as InterruptCheckpoint
