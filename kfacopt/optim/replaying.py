"""What optimizers share that work on the very batches of a step, read from its forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kfacopt.capture import Capture


class ReplayingOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that holds a `Capture`; a subclass makes it and takes the step."""

    _capture: Capture | None = None
    _report: dict[str, float]

    def _open_capture(self) -> Capture:
        assert self._capture is not None
        return self._capture

    def health(self) -> dict[str, float]:
        """Numbers worth logging, of the last step; `skipped_steps` in all, as gradients were not finite."""
        return dict(self._report)

    def close(self) -> None:
        """Remove every hook from the model."""
        self._open_capture().close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what backwards since the last step left is forgotten with their gradients."""
        super().zero_grad(set_to_none)
        if self._capture is not None:
            self._capture.reset_tally()


@torch.enable_grad()
def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step returns, if there is one."""
    return None if closure is None else closure()
