"""Options that several backends have, if they are ones."""

from __future__ import annotations


def check_exponent(exponent: float) -> float:
    """A power of the curvature to divide by, if it is one.

    Raises:
        ValueError: If it is not above 0 and at most 1.
    """
    if not 0.0 < exponent <= 1.0:
        raise ValueError(f"exponent must lie above 0 and be at most 1, got {exponent}")
    return exponent


def check_widest(widest: int) -> int:
    """A width up to which factors are whole matrices, if it is one.

    Raises:
        ValueError: If it is not a positive int.
    """
    if not isinstance(widest, int) or widest < 1:
        raise ValueError(f"widest must be a positive int (inputs or outputs), got {widest!r}")
    return widest
