"""Rows that are formed only if somebody reads them: what is asked of a convolution's patches can be had for less."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class UnformedRows(ABC):
    """A layer's inputs `[n s i]` before they are rows; formed when they are first read, once for all who share them."""

    shape: torch.Size
    """Of the rows, `[n s i]`."""
    dtype: torch.dtype
    """Of the rows."""

    def __init__(self) -> None:
        self._formed: Tensor | None = None

    def formed(self) -> Tensor:
        """The rows, `[n s i]`."""
        if self._formed is None:
            self._formed = self._form()
        return self._formed

    @abstractmethod
    def _form(self) -> Tensor: ...

    @abstractmethod
    def to(self, dtype: torch.dtype) -> UnformedRows:
        """In another dtype."""

    @abstractmethod
    def some(self, data: slice) -> UnformedRows:
        """The rows of some of the data."""

    @abstractmethod
    def averaged(self) -> Tensor:
        """Averaged over the places, `[n 1 i]`."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """`Σ_ns a aᵀ`, `[i i]`."""

    @abstractmethod
    def per_datum(self, gradients: Tensor) -> Tensor:
        """`Σ_s g aᵀ` of gradients `[n s o]`, `[n o i]`."""


class InputsField:
    """`Rows.inputs`: a tensor or one-hot to all who read it, formed at the first time where it was not."""

    def __get__(self, rows: Any, owner: type | None = None) -> Any:
        if rows is None:
            raise AttributeError("inputs have no default")  # which is how a dataclass asks for one
        held = rows.__dict__["inputs"]
        return held.formed() if isinstance(held, UnformedRows) else held

    def __set__(self, rows: Any, value: Any) -> None:
        rows.__dict__["inputs"] = value
