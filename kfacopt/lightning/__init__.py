"""Training with PyTorch Lightning: curvature in the logs, a swap of optimizers, interruptions that resume."""

from __future__ import annotations

from kfacopt.lightning.atomic import AtomicCheckpointIO as AtomicCheckpointIO
from kfacopt.lightning.callback import CurvatureCallback as CurvatureCallback
from kfacopt.lightning.interrupt import InterruptCheckpoint as InterruptCheckpoint
