"""What is remembered of a parameter, against a loop over parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacopt.linalg.tensors import tensor_of_parts, tensor_of_rows
from kfacopt.optim import memory
from kfacopt.optim.memory import Key

DECAY = 0.75


SHAPES = [torch.Size([4]), torch.Size([2, 3]), torch.Size([1])]


def one_by_one(state: Any, squares: Tensor) -> Tensor:
    """The same averages, of each parameter by itself; `state` holds (average, weight) by place of the key."""
    found = []
    for place, now in enumerate(squares.split([shape.numel() for shape in SHAPES])):
        average, weight = state.get(place, (torch.zeros_like(now), 0.0))
        state[place] = average + (1.0 - DECAY) * (now - average), DECAY * weight + 1.0 - DECAY
        found.append(state[place][0] / state[place][1])
    return torch.cat(found)


def loaded(state: Any, first: nn.Parameter) -> None:
    """One parameter holds a tensor of its own, as after a state dict was loaded."""
    state[first]["row_squares"] = state[first]["row_squares"].clone()


def replaced(state: Any, first: nn.Parameter) -> None:
    state[first]["row_squares"].copy_(2.0 * state[first]["row_squares"].clone())


@pytest.mark.parametrize("between", [None, loaded, replaced])
def test_running_averages_of_rows_are_held_together(between: Any) -> None:
    parameters = [nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)) for _ in range(3)]
    keys: list[Key] = [(parameters[0], None), (parameters[1], slice(0, 6)), (parameters[2], None)]
    state: Any = defaultdict(dict)
    expected: dict[int, Any] = {}
    torch.manual_seed(0)
    for _ in range(4):
        squares = torch.rand(11, dtype=torch.float64)
        found = memory.row_squares(state, keys, SHAPES, squares, DECAY)
        torch.testing.assert_close(found, one_by_one(expected, squares), rtol=1e-14, atol=0.0)
        held = [state[p]["row_squares" if rows is None else "row_squares[0:6]"] for p, rows in keys]
        assert tensor_of_parts(held) is not None  # nothing was copied but what was not held together
        for place, one in enumerate(held):
            torch.testing.assert_close(one, expected[place][0].view(SHAPES[place]), rtol=1e-14, atol=0.0)
        if between is not None:
            between(state, parameters[0])
            expected[0] = state[parameters[0]]["row_squares"].clone(), expected[0][1]


def test_a_parameter_that_comes_later_has_a_weight_of_its_own() -> None:
    old, new = (nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    state: Any = defaultdict(dict)
    ones, shapes = torch.ones(5), [torch.Size([2]), torch.Size([3])]
    memory.row_squares(state, [(old, None)], shapes[:1], ones[:2], DECAY)
    # Bias-corrected, the average of ones is one, however many there were.
    found = memory.row_squares(state, [(old, None), (new, None)], shapes, ones, DECAY)
    torch.testing.assert_close(found, ones)
    assert state[old]["row_weight"] == 1.0 - DECAY**2
    assert state[new]["row_weight"] == 1.0 - DECAY


def test_only_all_rows_in_their_order_are_a_whole() -> None:
    whole = torch.rand(3, 2, 2)
    rows = list(whole.unbind())
    assert tensor_of_rows(rows) is whole
    for others in (rows[:2], rows[::-1], [rows[0], rows[1], rows[2].clone()], [row[0] for row in rows]):
        assert tensor_of_rows(others) is None


def test_only_all_parts_in_their_order_are_a_whole() -> None:
    whole = torch.rand(11)
    parts = [part.view(shape) for part, shape in zip(whole.split([4, 6, 1]), SHAPES, strict=True)]
    assert tensor_of_parts(parts) is whole
    for others in (parts[:2], parts[::-1], [*parts[:2], parts[2].clone()]):
        assert tensor_of_parts(others) is None
