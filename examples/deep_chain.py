"""A very deep, narrow network: the exact inverse of its Hessian, and a Newton method on top of it.

1. `(H + 0.1 I)⁻¹ g` of chains of up to a thousand layers: time and residual against depth, as a picture (needs
   matplotlib; without it only the table).
2. 64 layers of width 10 learn a fixed batch of digits: TrustRegionNewton beside AdamW and SGD with momentum, each with
   the better of two learning rates, for the same time.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfacopt.operators import ChainHessian
from kfacopt.optim import TrustRegionNewton

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
DEPTHS = (4, 16, 64) if SHORT else (4, 16, 64, 256, 1000)
SECONDS = 6.0 if SHORT else 60.0
GOAL = 1e-3


def chain(width: int, depth: int, *ends: nn.Module) -> nn.Sequential:
    """Layers of one width, orthogonal weights, tanh between; `ends` are the first and the last layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [*ends[:1], nn.Tanh()] if ends else []
    for _ in range(depth - len(ends)):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, *ends[1:]).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=1.2)
            nn.init.zeros_(layer.bias)
    return model


def against_depth() -> list[tuple[int, float, float]]:
    """Depth, seconds and residual."""
    rows = []
    for depth in (2, *DEPTHS):  # the first warms up
        model = chain(8, depth)
        X, y = torch.randn(2, 8, 8, dtype=torch.float64)
        begin = time.perf_counter()
        H = ChainHessian(model, nn.MSELoss(), X, y)
        H.solve(H.gradient, damping=0.1)
        assert H.stats is not None
        rows.append((depth, time.perf_counter() - begin, H.stats.residual))
    return rows[1:]


def draw(rows: list[tuple[int, float, float]], path: Path) -> None:
    """Time and residual against depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths, seconds, residuals = zip(*rows, strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.loglog(depths, seconds, "o-")
    left.set(xlabel="layers", ylabel="seconds", title="(H + 0.1 I)⁻¹ g: time")
    right.loglog(depths, residuals, "o-")
    right.set(xlabel="layers", title="relative residual")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def train(make: Callable[[nn.Module], torch.optim.Optimizer], X: Tensor, y: Tensor) -> tuple[float, int]:
    """The loss on the batch when the time is over or the goal is reached, and the steps taken."""
    model, criterion = chain(10, 64, nn.Linear(64, 10), nn.Linear(10, 10)), nn.CrossEntropyLoss()
    optimizer, begin, steps, least = make(model), time.perf_counter(), 0, float("inf")
    while time.perf_counter() - begin < SECONDS and least >= GOAL:
        optimizer.zero_grad()
        loss = criterion(model(X), y)
        loss.backward()
        optimizer.step()
        least, steps = min(least, loss.item()), steps + 1
    return least, steps


def rivals() -> dict[str, list[Callable[[nn.Module], torch.optim.Optimizer]]]:
    """Optimizers, each with the learning rates it may choose from."""
    return {
        "TrustRegionNewton": [lambda m: TrustRegionNewton(m, nn.CrossEntropyLoss())],
        "AdamW": [partial(adamw, lr=1e-3), partial(adamw, lr=1e-2)],
        "SGD": [partial(sgd, lr=1e-2), partial(sgd, lr=1e-1)],
    }


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with a learning rate."""
    return torch.optim.AdamW(model.parameters(), lr=lr)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum and a learning rate."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
    rows = against_depth()
    print("layers  seconds  residual")
    for depth, seconds, residual in rows:
        print(f"{depth:6d}  {seconds:7.3f}  {residual:8.0e}")
    picture = Path(__file__).with_name("deep_chain.png")
    if not SHORT:
        draw(rows, picture)
        print(f"drawn in {picture.name}")

    data = load_digits()
    X, y = torch.tensor(data.data[:32], dtype=torch.float64) / 16, torch.tensor(data.target[:32])
    print(f"64 layers of width 10, 32 digits, {SECONDS:.0f} s each")
    for name, makers in rivals().items():
        loss, steps = min(train(make, X, y) for make in makers)
        print(f"{name:18} loss {loss:.5f} after {steps} steps")
