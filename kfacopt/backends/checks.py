"""Options that several backends have, if they are ones."""

from __future__ import annotations

from collections.abc import Mapping

from kfacopt.blocks.base import Block


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


def check_apart(backend: str, blocks: Mapping[str, Block]) -> None:
    """Refuse blocks whose cache every process needs, where some are not to have it.

    Raises:
        NotImplementedError: If there are such, with the layer.
    """
    for name, block in blocks.items():
        if block.rows_need_cache:
            raise NotImplementedError(
                f"{name!r} has {block.title} ({backend}): every process needs the layer's eigenbasis, to which it "
                f"brings rows of its own, so that Sharding(replicas=...) would spare nothing. Leave replicas out, or "
                f"take KFAC or SpectralDescent"
            )
