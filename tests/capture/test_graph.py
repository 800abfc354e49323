"""The walk through the graph: what it costs, and what it counts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F

import kfacopt
from kfacopt.capture import graph
from kfacopt.capture.listener import Capture
from kfacopt.layers.coverage import find_layers
from kfacopt.likelihoods.estimator import TermsEstimator
from tests.capture.harness import attached, fresh


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes that were looked at, one entry a look."""
    nodes: list[Node] = []
    original = graph.marks_on

    def counting(node: Node) -> Iterator[graph.Mark]:
        nodes.append(node)
        yield from original(node)

    monkeypatch.setattr(graph, "marks_on", counting)
    return nodes


class Cell(nn.Module):
    """One step of a recurrent network that the user's loop calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inner(x) + self.state(h))
        return self.head(h), h


def unrolled(model: nn.Module, steps: int) -> Tensor:
    h, loss = torch.zeros(2, 5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        prediction, h = model(torch.ones(2, 4, dtype=torch.float64), h)
        loss = loss + F.cross_entropy(prediction, torch.zeros(2, dtype=torch.long))
    return loss / steps


@pytest.mark.parametrize("rule", [None, kfacopt.LevenbergMarquardt(every=1)], ids=["", "damping-rule"])
def test_a_module_called_often_costs_as_much_each_time(rule: kfacopt.LevenbergMarquardt, visited: list[Node]) -> None:
    """Nothing is walked through in the forward, and no node twice in the backward."""
    model = fresh(Cell)
    held = attached(model, prediction=lambda output: output[0], damping_rule=rule)
    looks = []
    for steps in (10, 20, 40):
        loss = unrolled(model, steps)
        assert visited == []
        held.zero_grad()
        loss.backward()
        assert held._capture.tally.passes == steps
        looks.append(len(visited))
        visited.clear()
        held._capture.reset()
    assert looks[2] - looks[1] == 2 * (looks[1] - looks[0])
    # In each step: logits and their transposed weight, twice a linear layer, its sum and the tanh.
    assert looks[0] <= 10 * 10


def test_nothing_is_walked_through_where_no_rows_are_wanted(visited: list[Node]) -> None:
    model = fresh(Cell)
    held = attached(model, prediction=lambda output: output[0])
    held._capture.wants_rows, held._capture.wants_terms = False, True
    unrolled(model, 1).backward()
    assert held._capture.tally.passes == 1
    assert visited == []


class Tied(nn.Module):
    """A weight that is used by its module, and once more beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.inner(x)) @ self.inner.weight
        return self.head(h)


def test_a_walk_counts_calls_and_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[graph.Walk] = []
    original = graph.Walk.onwards

    def keeping(self: graph.Walk, start: Node) -> list[graph.Mark]:
        walks.append(self)
        return original(self, start)

    monkeypatch.setattr(graph.Walk, "onwards", keeping)
    model = fresh(Tied)
    held = attached(model)
    F.cross_entropy(model(torch.ones(2, 4, dtype=torch.float64)), torch.tensor([0, 1])).backward()
    (walk,) = walks
    found = {name: (walk.explained[id(p)], walk.uses[id(p)]) for name, p in model.named_parameters()}
    assert found == {"inner.weight": (2, 3), "inner.bias": (2, 2), "head.weight": (1, 1), "head.bias": (1, 1)}
    held.close()


def test_calls_that_did_not_lead_to_the_prediction_are_left_alone() -> None:
    """A walk that an earlier prediction began tells nothing of what led to a later one: autograd does."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x).tanh()
            return {"first": self.first(h), "second": self.second(h)}

    model = fresh(Heads)
    layers, _ = find_layers(model, list(model.parameters()), {}, False)
    estimator = TermsEstimator({"first": nn.CrossEntropyLoss(), "second": nn.CrossEntropyLoss()})
    delivered: list[str] = []
    capture = Capture(model, layers, estimator, lambda layer, rows: delivered.append(layer.name), lambda: None)
    output = model(torch.ones(2, 4, dtype=torch.float64))
    loss = sum(F.cross_entropy(output[name], torch.tensor([0, 1])) for name in ("first", "second"))
    loss.backward()
    assert sorted(delivered[:2]) == ["body", "second"]
    assert sorted(delivered[2:]) == ["body", "first"]
    capture.close()


def test_a_backward_that_fails_keeps_no_graph_beyond_the_next_forward() -> None:
    model = fresh(Cell)
    held = attached(model, prediction=lambda output: output[0])

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("as told")

    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    x.register_hook(fail)
    prediction, _ = model(x, torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="as told"):
        F.cross_entropy(prediction, torch.tensor([0, 1])).backward()
    assert held._capture._backward is not None
    with torch.no_grad():
        model(x, torch.zeros(2, 5, dtype=torch.float64))
    assert held._capture._backward is None
