"""The heat equation in space and time by a physics-informed network, with pictures of the solution and of its error.

    ∂u/∂t = ¼ ∂²u/∂x² for 0 ≤ x, t ≤ 1, u = sin(πx) at t = 0 and u = 0 at both ends

Three loss terms, each with a weight: the equation's residual, the initial values, the ends.

    python examples/pinn_heat.py --seconds 60 --picture heat.png
"""

import argparse
import math
import os
import time

import torch
from torch import Tensor, nn

import kfacopt

ADAM_LR = 3e-2  # the best of 1e-3, 3e-3, 1e-2, 3e-2, 1e-1
CONDUCTIVITY = 0.25
WEIGHTS = {"interior": 1.0, "initial": 10.0, "ends": 10.0}
# The short mode counts its own processor time: a busy machine makes no difference to it.
clock = time.thread_time if os.environ.get("KFACOPT_SHORT") else time.perf_counter


def solution(points: Tensor) -> Tensor:
    """Of points `(x, t)`."""
    x, t = points.T
    return torch.exp(-CONDUCTIVITY * math.pi**2 * t) * torch.sin(math.pi * x)


class Residuals(nn.Module):
    """What the network leaves of the equation, of the initial values and of those at the ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.network.append(nn.Linear(width, 1))

    def forward(self, interior: Tensor, initial: Tensor, ends: Tensor) -> dict[str, Tensor]:
        points = interior.clone().requires_grad_()
        u = self.network(points)
        (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
        return {
            "interior": first[:, 1] - CONDUCTIVITY * second[:, 0],
            "initial": self.network(initial).squeeze(1) - solution(initial),
            "ends": self.network(ends).squeeze(1),
        }


def points(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regular grids in the interior, at t = 0 and at both ends."""
    middle, line = (torch.arange(side) + 0.5) / side, torch.linspace(0, 1, 2 * side)
    zero, one = torch.zeros_like(line), torch.ones_like(line)
    ends = torch.cat([torch.stack([zero, line], dim=1), torch.stack([one, line], dim=1)])
    return torch.cartesian_prod(middle, middle), torch.stack([line, zero], dim=1), ends


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "natural_gradient":
        return kfacopt.NaturalGradient(
            model,
            {term: (weight, nn.MSELoss()) for term, weight in WEIGHTS.items()},
            solver=kfacopt.Gram(),
            damping=1e-10,
            line_search=kfacopt.GridLineSearch(),
            acceleration=kfacopt.GeodesicAcceleration(),
        )
    if name == "lbfgs":
        return torch.optim.LBFGS(model.parameters(), history_size=50, line_search_fn="strong_wolfe")
    return torch.optim.Adam(model.parameters(), lr=ADAM_LR)


def train(name: str, seconds: float, width: int, side: int) -> tuple[nn.Module, int, float]:
    """The network, its steps and its loss after so many seconds."""
    torch.manual_seed(0)
    model, batch, criterion = Residuals(width), points(side), nn.MSELoss()
    optimizer = make_optimizer(name, model)
    start, steps, value = clock(), 0, math.nan

    def closure() -> float:
        optimizer.zero_grad()
        residuals = model(*batch)
        terms = [WEIGHTS[term] * criterion(r, torch.zeros_like(r)) for term, r in residuals.items()]
        loss = torch.stack(terms).sum()
        loss.backward()
        return loss.item()

    while (past := clock() - start) < seconds:
        if name == "adam":  # without a decay it would end in its own noise
            optimizer.param_groups[0]["lr"] = ADAM_LR * 0.5 * (1 + math.cos(math.pi * past / seconds)) + 1e-6
        value, steps = float(optimizer.step(closure)), steps + 1
    return model.network, steps, value


def grid() -> Tensor:
    return torch.cartesian_prod(torch.linspace(0, 1, 101), torch.linspace(0, 1, 101))


def relative_error(network: nn.Module) -> float:
    with torch.no_grad():
        wrong = network(grid()).squeeze(1) - solution(grid())
    return float(wrong.norm() / solution(grid()).norm())


def picture(network: nn.Module, path: str) -> None:
    """The network's solution, and how far it is from the true one."""
    import matplotlib.pyplot as plt

    with torch.no_grad():
        found = network(grid()).squeeze(1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, values, title in ((axes[0], found, "u"), (axes[1], (found - solution(grid())).abs(), "error")):
        image = axis.imshow(values.view(101, 101), origin="lower", extent=(0, 1, 0, 1), aspect="auto")
        axis.set(title=title, xlabel="t", ylabel="x")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    short = bool(os.environ.get("KFACOPT_SHORT"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0 if short else 30.0)
    parser.add_argument("--width", type=int, default=16 if short else 32)
    parser.add_argument("--side", type=int, default=15 if short else 20, help="points on a side of the grid")
    parser.add_argument("--picture", help="file to write the pictures to")
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the matrices are small: threads would mostly wait for each other
    print(f"{'optimizer':18}{'steps':>7}{'loss':>12}{'relative L2 error':>20}")
    for each in ("adam", "lbfgs", "natural_gradient"):
        trained, count, loss = train(each, given.seconds, given.width, given.side)
        print(f"{each:18}{count:7d}{loss:12.2e}{relative_error(trained):20.2e}")
    if given.picture:
        picture(trained, given.picture)
    print(f"relative L2 error: {relative_error(trained):.1e}")
