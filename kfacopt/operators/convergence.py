"""What an iteration says when it ends before it reached what was asked for."""

from __future__ import annotations


class ConvergenceWarning(RuntimeWarning):
    """An iteration ended before it reached the accuracy that was asked for.

    To make it an error: `warnings.simplefilter("error", ConvergenceWarning)`.
    """
