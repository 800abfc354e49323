"""Spellings of 0.1 that still work for one release, with a DeprecationWarning each."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from kfacopt.backends.base import CurvatureBackend
from kfacopt.likelihoods.fisher import Curvature, Fisher

_RENAMED = {"ExactKFACBackend": "EigenKFACBackend", "ExactEKFACBackend": "FullEKFACBackend"}
_FISHER = {"fisher_type": "type", "mc_samples": "samples", "seed": "seed"}


def new_name(name: str) -> str:
    """What `kfacopt.name` of 0.1 is called now.

    Raises:
        AttributeError: If there was no such name.
    """
    if name not in _RENAMED:
        raise AttributeError(f"module 'kfacopt' has no attribute {name!r}")
    warnings.warn(f"kfacopt.{name} is now kfacopt.{_RENAMED[name]}", DeprecationWarning, stacklevel=3)
    return _RENAMED[name]


def fisher_of(owner: type, curvature: Fisher | Curvature | str, old: dict[str, Any]) -> Fisher:
    """The argument `curvature=` of an optimizer, with `fisher_type=`, `mc_samples=` and `seed=` of old worked in.

    Raises:
        TypeError: If `old` has any other keyword.
    """
    unknown = sorted(set(old) - set(_FISHER))
    if unknown:
        raise TypeError(
            f"{owner.__name__} got an unknown keyword argument {', '.join(unknown)}: see help({owner.__name__})"
        )
    fisher = Fisher.of(curvature)
    if not old:
        return fisher
    made = replace(fisher, **{_FISHER[name]: value for name, value in old.items()})
    warnings.warn(
        f"{' and '.join(sorted(old))} of {owner.__name__} are now one argument: pass curvature=kfacopt.{made!r}",
        DeprecationWarning,
        stacklevel=3,
    )
    return made


def backend_by_position(
    owner: type, params: Any, backend: CurvatureBackend | None
) -> tuple[Any, CurvatureBackend | None]:
    """`params` and `backend`, where the third positional argument used to be the backend."""
    if not isinstance(params, CurvatureBackend):
        return params, backend
    warnings.warn(f"the backend of {owner.__name__} is now a keyword: pass backend=", DeprecationWarning, stacklevel=3)
    return None, params
