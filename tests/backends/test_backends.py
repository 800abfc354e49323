"""The seam: what an optimizer asks of a backend, in which order, and what a layer-wise one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt import CurvatureBackend, LayerHandler, LayerTensors, Rows, Settings
from kfacopt.layers.layer import Layer
from kfacopt.linalg import symmetric
from tests.cases import BY_NAME, OPTIMIZERS, mlp, parameters_of, train_step

kinds = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Recorder(CurvatureBackend):
    """Gradient descent that writes down what it is asked."""

    def __init__(self, every: int = 1) -> None:
        self.calls: list[str] = []
        self.every = every
        self.layers: list[Layer] = []
        self.paused_passes: list[int] = []

    def attach(self, layers: Sequence[Layer]) -> None:
        self.calls.append("attach")
        self.layers = list(layers)

    def wants_rows(self, step: int) -> bool:
        return step % self.every == 0

    def update(self, layer: Layer, rows: Rows) -> None:
        self.calls.append(f"update {layer.name}")

    def fold(self, step: int, settings: Mapping[Layer, Settings]) -> None:
        self.calls.append(f"fold {step}")

    def refresh(self, step: int, settings: Mapping[Layer, Settings]) -> None:
        self.calls.append(f"refresh {step}")
        assert torch.is_grad_enabled()

    def discard(self) -> None:
        self.calls.append("discard")

    def solve(self, gradients: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        self.calls.append("solve")
        return {layer: {role: g.clone() for role, g in parts.items()} for layer, parts in gradients.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}


def made_with(backend: CurvatureBackend, **options: Any) -> tuple[nn.Module, nn.Module, Tensor, Tensor, Any]:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    fixed = {"lr": 0.1, "momentum": 0.0, "kl_clip": None, "damping": 0.1}
    return model, loss, x, y, kfacopt.SecondOrderOptimizer(model, loss, backend=backend, **fixed | options)


def test_the_order_of_calls() -> None:
    backend = Recorder(every=2)
    model, loss, x, y, made = made_with(backend)
    train_step(made, model, loss, x, y)
    backend.calls = [call for call in backend.calls if call != "discard"]
    assert backend.calls[0] == "attach"
    assert sorted(backend.calls[1:3]) == ["update 0", "update 2"]
    assert backend.calls[3:] == ["fold 0", "refresh 0", "solve"]
    backend.calls.clear()
    train_step(made, model, loss, x, y)
    assert [call for call in backend.calls if call != "discard"] == ["fold 1", "refresh 1", "solve"]


def test_a_backend_that_returns_the_gradient_is_gradient_descent() -> None:
    model, loss, x, y, made = made_with(Recorder())
    twin = BY_NAME["mlp-ce"].make()[0]
    torchs = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        train_step(made, model, loss, x, y)
        train_step(torchs, twin, loss, x, y)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_backend_without_multiply_says_so_where_it_is_needed() -> None:
    model, loss, x, y, made = made_with(Recorder(), damping_rule=kfacopt.LevenbergMarquardt(every=1))
    with pytest.raises(NotImplementedError, match=r"Recorder.*multiply"):
        train_step(made, model, loss, x, y)


def test_a_backend_without_mean_eigenvalues_says_so_where_it_is_needed() -> None:
    with pytest.raises(NotImplementedError, match=r"Recorder.*damping"):
        made_with(Recorder(), damping=kfacopt.RelativeDamping(1.0))


def test_layers_that_a_backend_leaves_out_train_by_adamw() -> None:
    class Half(Recorder):
        def solve(self, gradients: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
            return {layer: parts for layer, parts in super().solve(gradients, settings).items() if layer.name == "0"}

    model, loss, x, y, made = made_with(Half(), adamw_lr=0.01)
    twin = [nn.Parameter(p.detach().clone()) for p in model[2].parameters()]
    torchs = torch.optim.AdamW(twin, lr=0.01, weight_decay=0.0)
    for _ in range(3):
        made.zero_grad()
        loss(model(x), y).backward()
        for parameter, source in zip(twin, model[2].parameters(), strict=True):
            parameter.grad = source.grad.clone()
        made.step()
        torchs.step()
    for a, b in zip(model[2].parameters(), twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_backend_may_call_the_model() -> None:
    """Within refresh and solve capture is paused: neither its forwards nor its backwards are the user's."""

    class Curious(Recorder):
        model: nn.Module
        batch: tuple[Tensor, Tensor]

        def refresh(self, step: int, settings: Mapping[Layer, Settings]) -> None:
            super().refresh(step, settings)
            x, y = self.batch
            value = nn.functional.cross_entropy(self.model(x), y)
            torch.autograd.grad(value, list(self.model.parameters()))

    backend = Curious()
    model, loss, x, y, made = made_with(backend)
    backend.model, backend.batch = model, (x, y)
    train_step(made, model, loss, x, y)
    assert sum(call.startswith("update") for call in backend.calls) == 2
    train_step(made, model, loss, x, y)


@kinds
def test_rows_are_wanted_only_when_due(optimizer: Any) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = optimizer(model, loss, factor_every=3, refresh_every=5)
    wanted = []
    for _ in range(7):
        wanted.append(made.backend.wants_rows(len(wanted)))
        train_step(made, model, loss, x, y)
    assert wanted == [True, False, False, True, False, False, True]


@kinds
@pytest.mark.parametrize("refreshes", [0, 1])
def test_lapack_failures_in_training_are_never_fatal(
    optimizer: Any, refreshes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every routine fails in one step: at worst the caches stay as they were; retried the next time; counted."""
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = optimizer(model, loss, factor_every=1, refresh_every=1, lr=0.1)
    for _ in range(refreshes):
        train_step(made, model, loss, x, y)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("as told")

    with monkeypatch.context() as patched:
        for routine in ("eigh", "cholesky_ex", "svd"):
            patched.setattr(torch.linalg, routine, fails)
        for _ in range(2):
            train_step(made, model, loss, x, y)
    assert made.health()["fallbacks"] > 0
    before = parameters_of(model)
    train_step(made, model, loss, x, y)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(block.ready for block in made.backend.blocks.values())


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_damping_is_refused_or_harmless(optimizer: Any, dtype: torch.dtype) -> None:
    """Words never seen, dead units, fewer data than dimensions: with damping 0 everything is singular."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(30, 6), nn.LayerNorm(6)
            self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.head(self.inner(self.norm(self.table(x).mean(1))).relu())
            return h

    torch.manual_seed(0)
    model, x, y = Words().to(dtype), torch.randint(30, (4, 3)), torch.randint(3, (4,))
    options = {"damping": 0.0, "factor_every": 1, "refresh_every": 1}
    if refused(lambda: optimizer(model, nn.CrossEntropyLoss(), **options), "damping"):
        return
    made = optimizer(model, nn.CrossEntropyLoss(), **options)
    for _ in range(5):
        train_step(made, model, nn.CrossEntropyLoss(), x, y)
    assert all(p.isfinite().all() for p in model.parameters())


def refused(make: Callable[[], Any], name: str) -> bool:
    """Whether it is refused with a ValueError that names what is wrong."""
    try:
        make().close()
    except ValueError as error:
        return name in str(error)
    return False


@kinds
def test_a_tiny_damping_in_float32(optimizer: Any) -> None:
    """Singular factors to rounding, for many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    x, y = torch.randn(8, 20) @ torch.randn(20, 20), torch.randint(3, (8,))
    made = optimizer(model, nn.CrossEntropyLoss(), damping=1e-12, factor_every=1, refresh_every=2, lr=0.05)
    for _ in range(30):
        value = train_step(made, model, nn.CrossEntropyLoss(), x, y)
    assert value.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_optimizer_s_retries_are_those_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.EKFAC(model, loss, factor_every=1, refresh_every=1)
    inner, calls = symmetric._finite_eigh, []

    def first_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("as told")
        return inner(*args)

    monkeypatch.setattr(symmetric, "_finite_eigh", first_fails)
    train_step(made, model, loss, x, y)
    assert made.health()["fallbacks"] == 1.0


class Scaled(nn.Linear):
    """A user's layer: a linear one whose output is doubled."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ScaledHandler(LayerHandler):
    """Its rows are those of a linear layer on doubled inputs."""

    def __init__(self) -> None:
        linear = kfacopt.layers.handler_for(nn.Linear(1, 1))
        assert linear is not None
        self.linear = linear

    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: Any) -> Any:
        return 2 * self.linear.input_rows(module, inputs, kwargs, roles, approx)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: Any) -> Tensor:
        return self.linear.gradient_rows(module, gradient, approx)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return self.linear.pack(module, parts)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: Any) -> dict[str, Tensor]:
        return self.linear.unpack(module, matrix, roles)


@kinds
def test_a_registered_handler(optimizer: Any) -> None:
    """A subclass with a forward of its own has a layer for each parameter until somebody says what its rows are."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    _, loss, x, y = BY_NAME["mlp-ce"].make()
    unknown = optimizer(build(), loss)
    assert "FoundMatrixHandler on Scaled" in str(unknown.coverage())
    options = {"factor_every": 1, "refresh_every": 2, "curvature": "ggn", "damping": 1e-3}
    with kfacopt.register_handler(Scaled, ScaledHandler()):
        model = build()
        made = optimizer(model, loss, **options)
    assert list(made.backend.blocks) == ["0", "2"]
    plain = mlp().double()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain[0].weight *= 2
        plain[0].bias *= 2
    train_step(made, model, loss, x, y)
    other = kfacopt.KFAC(plain, loss, factor_every=1, curvature="ggn")
    train_step(other, plain, loss, x, y)
    torch.testing.assert_close(
        made.backend.blocks["0"].averages()["input_factor"].value,
        4 * other.backend.blocks["0"].factors()[1],
        rtol=1e-10,
        atol=1e-12,
    )
    for _ in range(3):
        assert train_step(made, model, loss, x, y).isfinite()
