"""Checkpoints, copies and pickles: what resumes, resumes bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from tests.cases import BY_NAME, CASES, OPTIMIZERS, Case, backward, mlp, parameters_of, train_step

INTERVALS = {"factor_every": 2, "refresh_every": 3}
kinds = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
Pair = tuple[nn.Module, Any]


def through_disk(state: Any) -> Any:
    """What `torch.load(weights_only=True)` makes of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_state_dict(case: Case, optimizer: Any, model: nn.Module, made: Any, **options: Any) -> Pair:
    """A new process: everything made anew, then loaded."""
    state = through_disk({"model": model.state_dict(), "optimizer": made.state_dict()})
    fresh, loss, _, _ = case.make(seed=1)
    restored = optimizer(fresh, loss, **options)
    fresh.load_state_dict(state["model"])
    restored.load_state_dict(state["optimizer"])
    return fresh, restored


def by_pickle(case: Case, optimizer: Any, model: nn.Module, made: Any, **options: Any) -> Pair:
    restored: Pair = pickle.loads(pickle.dumps((model, made)))
    return restored


def by_deepcopy(case: Case, optimizer: Any, model: nn.Module, made: Any, **options: Any) -> Pair:
    return copy.deepcopy((model, made))


WAYS = {"state-dict": by_state_dict, "pickle": by_pickle, "deepcopy": by_deepcopy}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def batches(case: Case, count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    return [(case.inputs(case.data), case.targets(case.data)) for _ in range(count)]


@ways
@kinds
@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_resuming_at_any_step(way: Callable[..., Pair], optimizer: Any, steps: int) -> None:
    case = BY_NAME["norms"]
    options = {**INTERVALS, "lr": 0.1, "curvature": kfacopt.Fisher("mc", samples=2, seed=3)}
    model, loss, _, _ = case.make()
    made = optimizer(model, loss, **options)
    data = batches(case, 10)
    for x, y in data[:steps]:
        train_step(made, model, loss, x, y)
    other, restored = way(case, optimizer, model, made, **options)
    for x, y in data[steps:]:
        value = train_step(made, model, loss, x, y)
        again = train_step(restored, other, loss, x, y)
        assert torch.equal(value, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for key in ("damping", "kl_scale", "condition", "staleness", "skipped_steps"):
        assert made.health()[key] == restored.health()[key]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_every_case_resumes(case: Case) -> None:
    model, loss, _, _ = case.make()
    options = {**INTERVALS, "lr": 0.1}
    made = kfacopt.EKFAC(model, loss, **options)
    data = batches(case, 8)
    for x, y in data[:5]:
        train_step(made, model, loss, x, y)
    other, restored = by_state_dict(case, kfacopt.EKFAC, model, made, **options)
    for x, y in data[5:]:
        train_step(made, model, loss, x, y)
        train_step(restored, other, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@ways
@kinds
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("steps", [0, 2, 3])
def test_resuming_in_the_middle_of_an_accumulation(
    way: Callable[..., Pair], optimizer: Any, reduction: str, steps: int
) -> None:
    """The user keeps the gradients; what waits in the statistics, and the count of a sum, is ours to keep."""
    case = BY_NAME["mlp-ce" if reduction == "mean" else "mlp-ce-sum"]
    options = {**INTERVALS, "lr": 0.1, "curvature": "ggn"}
    model, loss, _, _ = case.make()
    made = optimizer(model, loss, **options)
    data = batches(case, 7)
    for x, y in data[:steps]:
        train_step(made, model, loss, x, y)
    made.zero_grad()
    backward(model, loss, *data[steps])
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    other, restored = way(case, optimizer, model, made, **options)
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    for of, used in ((model, made), (other, restored)):
        backward(of, loss, *data[steps + 1])
        used.step()
        for x, y in data[steps + 2 :]:
            train_step(used, of, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@ways
def test_schedules_and_damping_resume(way: Callable[..., Pair]) -> None:
    case = BY_NAME["mlp-ce"]
    options = {
        "factor_every": kfacopt.schedules.Growing(1, 3, 4),
        "refresh_every": kfacopt.schedules.Growing(1, 5, 6),
        "damping_rule": kfacopt.LevenbergMarquardt(every=2),
        "lr": 0.1,
    }
    model, loss, _, _ = case.make()
    made = kfacopt.EKFAC(model, loss, **options)
    data = batches(case, 12)
    for x, y in data[:5]:
        train_step(made, model, loss, x, y)
    other, restored = way(case, kfacopt.EKFAC, model, made, **options)
    for x, y in data[5:]:
        train_step(made, model, loss, x, y)
        train_step(restored, other, loss, x, y)
    assert made.param_groups[0]["damping"] == restored.param_groups[0]["damping"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@ways
def test_refinements_resume(way: Callable[..., Pair]) -> None:
    """Warm-started QR steps between the eigendecompositions."""
    case = BY_NAME["mlp-ce"]

    def make(model: nn.Module, loss: nn.Module, **options: Any) -> Any:
        backend = kfacopt.FullEKFACBackend(1, 6, refine_every=2)
        return kfacopt.SecondOrderOptimizer(model, loss, backend=backend, lr=0.1)

    model, loss, _, _ = case.make()
    made = make(model, loss)
    data = batches(case, 12)
    for x, y in data[:5]:
        train_step(made, model, loss, x, y)
    other, restored = way(case, make, model, made)
    for x, y in data[5:]:
        train_step(made, model, loss, x, y)
        train_step(restored, other, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@kinds
def test_a_state_holds_tensors_and_plain_python_only(optimizer: Any) -> None:
    model, loss, x, y = BY_NAME["transformer"].make()
    made = optimizer(model, loss, factor_every=1, lr=torch.tensor(0.1))
    for _ in range(2):
        train_step(made, model, loss, x, y)
    backward(model, loss, x, y)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(plain(v) for v in value)
        return value is None or type(value) in (bool, int, float, str, Tensor)

    state = made.state_dict()
    assert set(state) == {"state", "param_groups", "curvature"}
    assert plain(state)
    through_disk(state)


@kinds
def test_a_loaded_curvature_is_not_shared(optimizer: Any) -> None:
    """Whereas torch itself shares the `state` section between an optimizer and those that load its state dict."""
    case = BY_NAME["mlp-ce"]
    model, loss, x, y = case.make()
    made = optimizer(model, loss, factor_every=1, refresh_every=1)
    train_step(made, model, loss, x, y)
    state = made.state_dict()
    kept = copy.deepcopy(state["curvature"])
    other, _, _, _ = case.make()
    loaded = optimizer(other, loss, factor_every=1, refresh_every=1)
    loaded.load_state_dict(state)
    for _ in range(3):
        train_step(loaded, other, loss, 2 * x, y)
    assert_same(made.state_dict()["curvature"], kept)


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert set(one) == set(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def states_of_others() -> dict[str, Callable[[], dict[str, Any]]]:
    def of(optimizer: Any, build: Callable[[], nn.Module] = mlp, **options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        model = build().double()
        made = optimizer(model, nn.CrossEntropyLoss(), factor_every=1, **options)
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
        train_step(made, model, nn.CrossEntropyLoss(), x, y)
        state: dict[str, Any] = made.state_dict()
        return state

    def wider() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))

    def deeper() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))

    def torchs() -> dict[str, Any]:
        model = mlp()
        return torch.optim.AdamW(model.parameters()).state_dict()

    return {
        "another backend": lambda: of(kfacopt.EKFAC),
        "other shapes": lambda: of(kfacopt.KFAC, wider),
        "other layers": lambda: of(kfacopt.KFAC, deeper),
        "other blocks": lambda: of(kfacopt.KFAC, separate_weight_and_bias=True),
        "another optimizer": torchs,
    }


@pytest.mark.parametrize("name", list(states_of_others()))
def test_a_state_of_something_else_is_refused_and_changes_nothing(name: str) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.KFAC(model, loss, factor_every=1)
    train_step(made, model, loss, x, y)
    before = copy.deepcopy(made.state_dict())
    foreign = states_of_others()[name]()
    with pytest.raises((ValueError, KeyError)) as caught:
        made.load_state_dict(foreign)
    assert len(str(caught.value)) > 40  # a sentence, not a bare key
    assert_same(made.state_dict(), before)
    train_step(made, model, loss, x, y)


def test_the_generator_is_its_own() -> None:
    """Sampling labels touches no global generator, and is the seed's alone."""
    case = BY_NAME["mlp-ce"]
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model, loss, x, y = case.make()
        made = kfacopt.KFAC(model, loss, factor_every=1, curvature=kfacopt.Fisher("mc", seed=seed))
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        for _ in range(2):
            train_step(made, model, loss, x, y)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(parameters_of(model))
    same = [torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True)]
    other = [torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True)]
    assert all(same)
    assert not all(other)


def test_a_copied_optimizer_trains_its_own_model() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.KFAC(model, loss, factor_every=1)
    train_step(made, model, loss, x, y)
    copied = copy.deepcopy(made)
    before = parameters_of(model)
    train_step(copied, copied.model, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train_step(made, model, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(copied.model.parameters(), model.parameters(), strict=True))
