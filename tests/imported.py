"""What takes seconds to import, and is set aside then: processes that are forked afterwards need not look at it again.

A full collection in each of them would touch, and so copy, half a million objects.
"""

from __future__ import annotations

import gc

import einops  # noqa: F401
import matplotlib.figure  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import kfacopt  # noqa: F401

gc.collect()
gc.freeze()
