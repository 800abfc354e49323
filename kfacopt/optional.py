"""Dependencies that only some functions need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def required(module: str, extra: str) -> Any:
    """A module of an optional dependency, imported now.

    Args:
        module: Its full name.
        extra: Which of kfacopt's extras brings it.

    Raises:
        ImportError: If it is not installed; it says how to get it.

    >>> required("math", "operators").floor(1.5)
    1
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # it is installed, and misses something itself
        raise ImportError(
            f'{error.name} is not installed, which this needs: pip install "kfacopt[{extra}]"', name=error.name
        ) from error
