"""In which dtype long matrix products are fastest: measured once, not guessed."""

from __future__ import annotations

import time
from functools import cache

import torch

# Side of the square products that are timed; long enough to run at a processor's full speed, 5 ms of it in all.
_SIZE = 256
# How much faster bfloat16 has to be: below, what is gained is not worth the digits.
_GAIN = 1.5


@cache
def fast_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where products of it are at least 1.5 times as fast as float32's, else float32.

    A processor with instructions for it (AMX, AVX512-BF16) takes a half to a fifth of the time; one without, many times
    as long. An accelerator is taken at its word. The measurement is kept for the life of the process.

    Args:
        device_type: As in `torch.device.type`.

    >>> fast_dtype("cpu") in (torch.bfloat16, torch.float32)
    True
    """
    if device_type != "cpu":
        supported = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.full((_SIZE, _SIZE), 1.0 / _SIZE, dtype=dtype)
        times = []
        for _ in range(6):  # the first sets torch up; the least of the others is the one that nothing disturbed
            begin = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times[1:])
    return torch.bfloat16 if _GAIN * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32
