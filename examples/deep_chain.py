"""A very deep, narrow network: the exact inverse of its Hessian, and a Newton method on top of it.

1. `(H + 0.1 I)⁻¹ g` of chains of up to a thousand layers: time and residual against depth, as a picture (needs
   matplotlib; without it only the table).
2. 64 layers of width 8, 62 of them residual, learn a fixed batch of digits: TrustRegionNewton beside AdamW and SGD with
   momentum, each with the best of three learning rates. Newton takes about a dozen steps, and no rate; but one of its
   steps costs as much as hundreds of theirs, so that where first-order steps make their way they arrive earlier.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfacopt.operators import ChainHessian, Residual
from kfacopt.optim import TrustRegionNewton

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
DEPTHS = (4, 16, 64) if SHORT else (4, 16, 64, 256, 1000)
LAYERS, GOAL, LONGEST = (16, 1e-2, 300) if SHORT else (64, 1e-3, 3000)


def chain(width: int, depth: int) -> nn.Sequential:
    """Layers of one width, orthogonal weights, tanh between."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.orthogonal_(linear.weight, gain=1.2)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers).double()


def classifier(width: int = 8, depth: int = LAYERS) -> nn.Sequential:
    """Residual blocks `z + tanh(W z + b)` between two linear layers."""
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(width, width), nn.Tanh()) for _ in range(depth - 2)]
    for block in blocks:
        block.get_parameter("0.weight").data.mul_(0.3)
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10)).double()


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


def train(make: Callable[[nn.Module], torch.optim.Optimizer], X: Tensor, y: Tensor) -> tuple[int, float, list[float]]:
    """Steps and seconds until the loss is below the goal, and all losses."""
    model, criterion = classifier(), nn.CrossEntropyLoss()
    optimizer, begin, losses = make(model), time.perf_counter(), [float("inf")]
    while losses[-1] >= GOAL and len(losses) <= LONGEST:
        optimizer.zero_grad()
        loss = criterion(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return len(losses) - 1, time.perf_counter() - begin, losses[1:]


def rivals() -> dict[str, list[Callable[[nn.Module], torch.optim.Optimizer]]]:
    """Optimizers, each with the learning rates it may choose from."""
    return {
        "TrustRegionNewton": [lambda m: TrustRegionNewton(m, nn.CrossEntropyLoss())],
        "AdamW": [partial(adamw, lr=lr) for lr in (1e-3, 1e-2, 3e-2)],
        "SGD": [partial(sgd, lr=lr) for lr in (1e-2, 3e-2, 1e-1)],
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
    if not SHORT:
        picture = Path(__file__).with_name("deep_chain.png")
        draw(rows, picture)
        print(f"drawn in {picture.name}")

    data = load_digits()
    X, y = torch.tensor(data.data[:16], dtype=torch.float64) / 16, torch.tensor(data.target[:16])
    print(f"{LAYERS} layers, 16 digits: steps and seconds to a loss of {GOAL:g}, and the loss after ten steps")
    for name, makers in rivals().items():
        steps, seconds, losses = min((train(make, X, y) for make in makers), key=lambda run: run[0])
        print(f"{name:18} {steps:5d} steps  {seconds:6.1f} s  {losses[:10][-1]:.5f}")
