"""A state dict that is damaged anywhere is refused with its place and changes nothing, or training goes on from it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfacopt
from tests.cases import BY_NAME, CASES, Case, parameters_of, train_step
from tests.optim.test_state import assert_same

Path = tuple[Any, ...]

OFTEN = {"factor_every": 1, "refresh_every": 2}
MAKERS: dict[str, Callable[..., Any]] = {
    "KFAC": partial(kfacopt.KFAC, **OFTEN),
    "EKFAC": partial(kfacopt.EKFAC, **OFTEN),
    "exact EKFAC": lambda m, loss: kfacopt.SecondOrderOptimizer(m, loss, backend=kfacopt.FullEKFACBackend(1, 2)),
    "SpectralDescent": partial(kfacopt.SpectralDescent, **OFTEN),
    "lr=auto": partial(kfacopt.EKFAC, lr="auto", **OFTEN),
    "NaturalGradient": lambda m, loss: kfacopt.NaturalGradient(m, loss, line_search=kfacopt.GridLineSearch()),
    "CG": lambda m, loss: kfacopt.NaturalGradient(m, loss, solver=kfacopt.CG(preconditioner=kfacopt.KFACBackend(1, 1))),
    "TrustRegionNewton": kfacopt.TrustRegionNewton,
}
MODELS = {"layers": "norms", "tied": "tied-language", "convolutions": "conv-groups"}


def made(name: str, kind: str, steps: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Any]:
    """An optimizer after some steps, in the middle of another."""
    # The chain's recursion is of an nn.Sequential, and of few layers.
    model, loss, x, y = BY_NAME["mlp-ce" if name == "TrustRegionNewton" else MODELS[kind]].make()
    optimizer = MAKERS[name](model, loss)
    for _ in range(steps):
        train_step(optimizer, model, loss, x, y)
    return model, loss, x, y, optimizer


@functools.cache
def whole(name: str, kind: str) -> dict[str, Any]:
    """A state dict that nothing has happened to."""
    state: dict[str, Any] = made(name, kind, 3)[-1].state_dict()
    return state


def places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in a state dict, and where."""
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, held in items:
        yield from places(held, (*path, key))


def replaced(state: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A copy of a state dict with something else at one place; what `change` gives None for is gone."""
    first, rest = path[0], path[1:]
    parts = dict(state) if isinstance(state, dict) else list(state)
    parts[first] = replaced(parts[first], rest, change) if rest else change(parts[first])
    if not rest and parts[first] is None:
        del parts[first]
    return tuple(parts) if isinstance(state, tuple) else parts


def with_nan(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.clone()
        value[(-1,) * value.ndim] = math.nan
        return value
    return math.nan


def other_dtype(value: Tensor) -> Tensor:
    return value.to(torch.int64 if value.is_floating_point() else torch.float64)


Damage = tuple[Callable[[Any], bool], Callable[[Any], Any]]
DAMAGES: dict[str, Damage] = {
    "not a number": (
        lambda v: isinstance(v, float) or (isinstance(v, Tensor) and v.is_floating_point() and v.numel() > 0),
        with_nan,
    ),
    "truncated": (lambda v: isinstance(v, Tensor) and v.ndim > 0 and v.numel() > 0, lambda v: v[:-1]),
    "another shape": (lambda v: isinstance(v, Tensor), lambda v: torch.stack([v, v])),
    "another dtype": (lambda v: isinstance(v, Tensor), other_dtype),
    "text": (lambda v: v is not None and not isinstance(v, str), lambda v: "text"),
    "missing": (lambda v: True, lambda v: None),
}
SURELY = {"not a number", "truncated", "another shape", "another dtype"}
"""Damages of numbers, which are always refused; what is missing may be what an older version did not know."""
UNCHECKED = {"usual_norms"}
"""Of which the end may be missing: of parameters that came later."""


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=10)
@given(data=st.data())
def test_a_damaged_state_is_refused_and_changes_nothing(name: str, kind: str, data: st.DataObject) -> None:
    state = whole(name, kind)
    damage = data.draw(st.sampled_from(sorted(DAMAGES)))
    wanted, change = DAMAGES[damage]
    found = [path for path, value in places(state) if wanted(value)]
    if not found:
        return
    path = data.draw(st.sampled_from(found))
    damaged = replaced(state, path, change)
    model, loss, x, y, optimizer = made(name, kind, 1)
    before, parameters = copy.deepcopy(optimizer.state_dict()), parameters_of(model)
    try:
        optimizer.load_state_dict(damaged)
    except (ValueError, KeyError) as refusal:
        said = str(refusal)
        assert type(optimizer).__name__ in said, said
        named = any(str(part) in said for part in path) or "parameter group" in said  # as torch says it
        assert named, f"{said!r} names nothing of {path}"
        assert_same(optimizer.state_dict(), before)
    else:
        assert damage not in SURELY or not set(path).isdisjoint(UNCHECKED), path
        train_step(optimizer, model, loss, x, y)
        return
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    train_step(optimizer, model, loss, x, y)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_whole_state_is_taken(name: str, kind: str) -> None:
    model, loss, x, y, optimizer = made(name, kind, 1)
    for _ in range(2):
        optimizer.load_state_dict(whole(name, kind))
    train_step(optimizer, model, loss, x, y)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["SpectralDescent", "EKFAC"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_state_of_every_layer_is_taken(case: Case, name: str) -> None:
    """What one remembers has the shape that another one expects."""
    model, loss, x, y = case.make()
    optimizer, other = MAKERS[name](model, loss), MAKERS[name](case.make()[0], loss)
    for _ in range(2):
        train_step(optimizer, model, loss, x, y)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())


def by_names(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A state dict as `torch.distributed.checkpoint` hands it over."""
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {names[number]: own for number, own in state["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("damage", ["not a number", "truncated", "another shape", "another dtype"])
def test_a_state_by_names_is_checked_as_well(damage: str) -> None:
    model, loss, x, y, optimizer = made("KFAC", "layers", 1)
    state = by_names(whole("KFAC", "layers"), [name for name, _ in model.named_parameters()])
    before = copy.deepcopy(optimizer.state_dict())
    place = next((name, "momentum_buffer") for name, own in state["state"].items() if "momentum_buffer" in own)
    with pytest.raises(ValueError, match="/".join(place)):
        optimizer.load_state_dict(replaced(state, ("state", *place), DAMAGES[damage][1]))
    with pytest.raises(ValueError, match="state/elsewhere is of none of the parameters"):
        optimizer.load_state_dict({**state, "state": {"elsewhere": {}, **state["state"]}})
    assert_same(optimizer.state_dict(), before)
    optimizer.load_state_dict(state)
    train_step(optimizer, model, loss, x, y)
