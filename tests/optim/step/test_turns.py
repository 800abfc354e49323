"""Layers that take turns: who moves when, how far, and that nothing of it is lost in a state."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import handler_for
from kfacopt.layers.layer import Layer
from kfacopt.optim.step import turns
from kfacopt.optim.step.lengths import FULL_STEPS, shrunk
from kfacopt.optim.step.turns import CALLS, EARLY, FIRST, LATE, LONG, SHORT, Turns, cost, products
from tests.cases import train_step

ROWS = 4


def layer(name: str, module: nn.Module) -> Layer:
    return Layer(name, (module,), handler_for(module), dict(module.named_parameters()))


SIZES = st.tuples(st.integers(1, 128), st.integers(1, 128), st.integers(0, 200))


@given(st.lists(SIZES, max_size=8), st.sampled_from([1, 2, 3, 6]), st.sampled_from([FIRST, EARLY, LATE, SHORT, LONG]))
def test_everybody_moves_as_far_in_six_steps_as_without_turns(
    sizes: list[tuple[int, int, int]], longest: int, first: int
) -> None:
    layers = [layer(str(n), nn.Linear(i, o, bias=False)) for n, (i, o, _) in enumerate(sizes)]
    rows = {str(n): float(count) for n, (_, _, count) in enumerate(sizes) if count}
    taken = Turns(longest)
    with pytest.MonkeyPatch.context() as patch:
        if first == FIRST:  # less than six steps before others have their turns
            patch.setattr(turns, "EARLY", LATE)
        found = [taken.strides(first + step, layers, rows) for step in range(6)]
    for one in layers:
        strides = {strides[one] for strides in found} - {0}
        assert sum(strides[one] for strides in found) == 6
        assert len(strides) == 1
        assert max(strides) <= (longest if first >= EARLY else min(3, longest))
        if one.name not in rows or (first <= EARLY and cost(one.shape, rows[one.name]) < 1.0):
            assert strides == {1}


@pytest.mark.parametrize(
    ("first", "rows", "counts"), [(FIRST, 8.0, [2, 2, 3]), (LATE, 500.0, [2, 2, 3]), (LATE, 8.0, [1, 1, 1, 1, 1, 2])]
)
def test_the_work_is_spread_over_the_steps(first: int, rows: float, counts: list[int]) -> None:
    layers = [layer(str(n), nn.Linear(128, 128 + n, bias=False)) for n in range(7)]
    taken = Turns(6)
    found = [taken.strides(first + step, layers, dict.fromkeys("0123456", rows)) for step in range(len(counts))]
    assert sorted(sum(stride > 0 for stride in strides.values()) for strides in found) == counts


def test_layers_of_one_shape_move_together() -> None:
    layers = [layer(str(n), nn.Linear(128, 128 + n % 3, bias=False)) for n in range(7)]
    found = [Turns(3).strides(LATE + step, layers, dict.fromkeys("0123456", 500.0)) for step in range(3)]
    moving = [{one.name for one, stride in strides.items() if stride} for strides in found]
    assert sorted(map(sorted, moving)) == [["0", "3", "6"], ["1", "4"], ["2", "5"]]


def test_small_layers_move_together_and_late() -> None:
    layers = [layer(str(n), nn.Linear(24, 24)) for n in range(7)]
    assert sum(products(one.shape) for one in layers) < CALLS
    for first in (FIRST, LATE, SHORT - 6):
        assert Turns(6).strides(first, layers, dict.fromkeys("0123456", 1.0)) == dict.fromkeys(layers, 1)
    for first, longest, stride in ((SHORT, 6, 3), (LONG, 6, 6), (LONG, 3, 3), (LONG, 2, 2)):
        taken = Turns(longest)
        found = [taken.strides(first + step, layers, dict.fromkeys("0123456", 100.0)) for step in range(6)]
        assert sorted({stride for strides in found for stride in strides.values()}) == [0, stride]
        assert sorted(len(set(strides.values())) for strides in found) == [1] * 6


def test_all_move_in_each_step_where_gradients_are_the_time() -> None:
    layers = [layer("a", nn.Conv2d(16, 32, 3)), layer("b", nn.Linear(32, 10))]
    for step in (FIRST, LATE, LATE + 1, LATE + 2):
        assert Turns(6).strides(step, layers, {"a": 5e5, "b": 64.0}) == dict.fromkeys(layers, 1)


def test_dear_layers_move_every_sixth_time_before_others_do() -> None:
    layers = [layer("dear", nn.Linear(400, 400)), layer("cheap", nn.Linear(100, 400))]
    rows = {"dear": 64.0, "cheap": 64.0}
    dear, cheap = (cost(one.shape, rows[one.name]) for one in layers)
    assert dear > 15.0 > cheap > 3.0
    for first, longest, strides in ((FIRST, 6, [{0, 3}] * 2), (EARLY, 6, [{0, 6}, {0, 3}]), (EARLY, 3, [{0, 3}] * 2)):
        taken = Turns(longest)
        found = [taken.strides(first + step, layers, rows) for step in range(5 if first == FIRST else 6)]
        assert [{each[one] for each in found} for one in layers] == strides


def test_a_weight_of_two_layers_moves_in_each_step() -> None:
    shared, own = nn.Linear(256, 256), nn.Linear(256, 256)
    layers = [layer("a", shared), layer("b", shared), layer("c", own)]
    taken = Turns(3)
    found = [taken.strides(FIRST + step, layers, {"a": 1.0, "b": 1.0, "c": 1.0}) for step in range(3)]
    assert [sorted(strides[one] for strides in found) for one in layers] == [[1, 1, 1], [1, 1, 1], [0, 0, 3]]


def test_a_dear_layer_moves_in_each_step_where_gradients_take_longer_anyway() -> None:
    layers = [layer("a", nn.Linear(256, 256)), layer("b", nn.Linear(256, 256))]
    for many, strides in ((1.0, {0, 3}), (1e4, {1})):
        taken = Turns(3)
        found = [taken.strides(FIRST + step, layers, {"a": 1.0, "b": many})[layers[0]] for step in range(3)]
        assert set(found) == strides


def test_a_metric_of_the_inputs_counts_as_work() -> None:
    """As the hidden layer of a small convolutional network, whose sides are 64 and 785."""
    layers = [layer("a", nn.Conv2d(8, 16, 5)), layer("b", nn.Linear(784, 64))]
    rows = {"a": 25_088.0, "b": 128.0}
    for of_inputs, strides in ((False, {1}), (True, {0, 3, 6})):
        taken = Turns(6)
        found = [taken.strides(LATE + step, layers, rows, of_inputs) for step in range(6)]
        assert {stride for each in found for stride in each.values()} == strides
    own = products(torch.Size([64, 785]), of_inputs=True) - products(torch.Size([64, 785]))
    assert own == 64 * 785 * 785


@pytest.mark.parametrize(
    ("kind", "told"), [(kfacopt.SpectralDescent, False), (kfacopt.KFAC, True), (kfacopt.EKFAC, True)]
)
def test_whose_metric_is_of_the_inputs(
    kind: type[torch.optim.Optimizer], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()
    original = Turns.strides

    def strides(self: Turns, step: int, layers: list[Layer], rows: dict[str, float], of_inputs: bool) -> object:
        seen.append(of_inputs)
        return original(self, step, layers, rows, of_inputs)

    monkeypatch.setattr(Turns, "strides", strides)
    model = nn.Linear(3, 2)
    optimizer = kind(model, nn.MSELoss())  # type: ignore[arg-type]
    train_step(optimizer, model, nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2))
    assert seen == [told]


@pytest.mark.parametrize("longest", [0, 4])
def test_what_cannot_be_is_refused(longest: int) -> None:
    with pytest.raises(ValueError, match="turns must be 1, 2, 3 or 6"):
        kfacopt.Spectral(turns=longest)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "FIRST", 3)
    monkeypatch.setattr(turns, "CALLS", 0.0)


def made(**options: float) -> tuple[kfacopt.SpectralDescent, nn.Module, Iterator[tuple[Tensor, Tensor]]]:
    """Three wide layers and a narrow head, in float64; batches of a few rows."""
    torch.manual_seed(0)
    hidden = nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh()
    model = nn.Sequential(*hidden, nn.Linear(40, 1)).double()
    generator = torch.Generator().manual_seed(1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x = torch.randn(ROWS, 9, generator=generator, dtype=torch.float64)
            yield x, x[:, :1].sin()

    direction = kfacopt.ClippedGradients(kfacopt.Spectral(decay=0.0, **options))  # type: ignore[arg-type]
    return kfacopt.SpectralDescent(model, nn.MSELoss(), direction=direction, lr=1e-3), model, batches()


@pytest.mark.usefixtures("soon")
def test_a_layer_rests_or_moves_as_many_times_as_far() -> None:
    optimizer, model, batches = made()
    lengths: dict[str, list[float]] = {}
    for step in range(12):
        before = copy.deepcopy(dict(model.named_children()))
        train_step(optimizer, model, nn.MSELoss(), *next(batches))
        for name, module in model.named_children():
            if isinstance(module, nn.Linear):
                pairs = zip(module.parameters(), before[name].parameters(), strict=True)
                moved = torch.cat([(p - old).detach().flatten() for p, old in pairs]).norm()
                whole = 1e-3 * shrunk(step, FULL_STEPS) * len(module.weight) ** 0.5
                lengths.setdefault(name, []).append(float(moved) / whole)
    for name, found in lengths.items():
        outputs, inputs = model.get_submodule(name).weight.shape
        every = max(1, min(3, round(cost(torch.Size([outputs, inputs + 1]), ROWS))))
        own = [float(every), *[0.0] * (every - 1)]
        assert [round(length, 6) for length in found[:3]] == [1.0] * 3
        assert sorted(round(length, 6) for length in found[3:]) == sorted(9 // every * own)
    assert sum(found[3] > 0.0 for found in lengths.values()) < 4


@pytest.mark.usefixtures("soon")
def test_layers_that_rest_decay_as_others_do() -> None:
    def decayed(decay: float, steps: int) -> list[Tensor]:
        optimizer, model, batches = made()
        optimizer.param_groups[0]["cautious_decay"] = 0.0
        for step in range(steps):
            optimizer.param_groups[0]["cautious_decay"] = decay if step >= 7 else 0.0
            train_step(optimizer, model, nn.MSELoss(), *next(batches))
        return [p.detach().clone() for p in model.parameters() if p.ndim > 1]

    # By step 10 whoever rests in step 7, as decay is due, has moved again; the next is due in step 15.
    for one, other in zip(decayed(0.0, 10), decayed(50.0, 10), strict=True):
        assert not torch.equal(one, other)


@pytest.mark.usefixtures("soon")
def test_resuming_bit_for_bit_between_turns() -> None:
    optimizer, model, batches = made()
    for _ in range(7):
        train_step(optimizer, model, nn.MSELoss(), *next(batches))
    other, twin, _ = made()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        x, y = next(batches)
        train_step(optimizer, model, nn.MSELoss(), x, y)
        train_step(other, twin, nn.MSELoss(), x, y)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("soon")
def test_without_turns_all_move_in_each_step() -> None:
    optimizer, model, batches = made(turns=1)
    for _ in range(6):
        before = [p.detach().clone() for p in model.parameters()]
        train_step(optimizer, model, nn.MSELoss(), *next(batches))
        assert not any(torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True))
