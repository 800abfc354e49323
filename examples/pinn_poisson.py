"""Poisson's equation by a physics-informed network: E-NGD to an error that first-order methods do not reach.

    Δu + 2π² sin(πx) sin(πy) = 0 in the unit square, u = 0 on its boundary

The model is a module whose forward returns the equation's residuals, one tensor for the interior and one for the
boundary, and the loss is the sum of their mean squares. `kfacopt.NaturalGradient` needs nothing else: the network
differentiates itself, and the rows of the residuals' Jacobian come from one backward pass.

    python examples/pinn_poisson.py --seconds 30 --width 32 --optimizer natural_gradient
"""

import argparse
import math
import os
import time
from itertools import pairwise

import torch
from torch import Tensor, nn

import kfacopt

ADAM_LR = 3e-2  # the best of 1e-3, 3e-3, 1e-2, 3e-2, 1e-1
OPTIMIZERS = ("natural_gradient", "lbfgs", "adam")
# The short mode counts its own processor time: a busy machine makes no difference to it.
clock = time.thread_time if os.environ.get("KFACOPT_SHORT") else time.perf_counter


def solution(points: Tensor) -> Tensor:
    return torch.sin(math.pi * points).prod(dim=1)


class Residuals(nn.Module):
    """What the network leaves of the equation, in the interior and on the boundary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, interior: Tensor, boundary: Tensor) -> dict[str, Tensor]:
        x = interior.clone().requires_grad_()
        u = self.network(x)
        (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        laplacian = torch.zeros(len(x))
        for axis in range(2):
            (second,) = torch.autograd.grad(gradient[:, axis].sum(), x, create_graph=True)
            laplacian = laplacian + second[:, axis]
        return {
            "interior": laplacian + 2 * math.pi**2 * solution(interior),
            "boundary": self.network(boundary).squeeze(1),
        }


def network(width: int, layers: int) -> nn.Module:
    sizes = [2, *[width] * layers]
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*modules, nn.Linear(width, 1))


def points(side: int) -> tuple[Tensor, Tensor]:
    """A regular grid of side² points in the interior, and as many on each edge as on a side."""
    middle = (torch.arange(side) + 0.5) / side
    ends = torch.arange(side) / side
    zero, one = torch.zeros(side), torch.ones(side)
    edges = [(ends, zero), (one, ends), (1 - ends, one), (zero, 1 - ends)]
    return torch.cartesian_prod(middle, middle), torch.cat([torch.stack(edge, dim=1) for edge in edges])


def make_optimizer(name: str, model: nn.Module, width: int) -> torch.optim.Optimizer:
    if name == "natural_gradient":
        losses = {"interior": nn.MSELoss(), "boundary": nn.MSELoss()}
        return kfacopt.NaturalGradient(
            model,
            losses,
            solver=kfacopt.Gram(),
            damping=1e-12,
            line_search=kfacopt.GridLineSearch(),
            acceleration=kfacopt.GeodesicAcceleration(),
        )
    if name == "lbfgs":
        return torch.optim.LBFGS(model.parameters(), history_size=50, line_search_fn="strong_wolfe")
    return torch.optim.Adam(model.parameters(), lr=ADAM_LR)


def train(name: str, seconds: float, width: int, layers: int, seed: int, side: int) -> tuple[int, float, float]:
    """Steps, loss and relative L2 error after so many seconds."""
    torch.manual_seed(seed)
    model, (interior, boundary) = Residuals(network(width, layers)), points(side)
    criterion = nn.MSELoss()
    optimizer = make_optimizer(name, model, width)
    test = torch.cartesian_prod(torch.linspace(0, 1, 101), torch.linspace(0, 1, 101))
    start, steps, value = clock(), 0, math.nan

    def closure() -> float:
        optimizer.zero_grad()
        residuals = model(interior, boundary)
        loss = sum((criterion(r, torch.zeros_like(r)) for r in residuals.values()), start=torch.zeros(()))
        loss.backward()
        return loss.item()

    while (past := clock() - start) < seconds:
        if name == "adam":  # without a decay it would end in its own noise
            optimizer.param_groups[0]["lr"] = ADAM_LR * 0.5 * (1 + math.cos(math.pi * past / seconds)) + 1e-6
        value, steps = float(optimizer.step(closure)), steps + 1
    with torch.no_grad():
        wrong = model.network(test).squeeze(1) - solution(test)
    return steps, value, float(wrong.norm() / solution(test).norm())


if __name__ == "__main__":
    short = bool(os.environ.get("KFACOPT_SHORT"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0 if short else 30.0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1, help="hidden layers")
    parser.add_argument("--side", type=int, default=20, help="points on a side of the grid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=(*OPTIMIZERS, "all"), default="natural_gradient")
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1 if given.width < 64 else 2)
    names = OPTIMIZERS[::-1] if given.optimizer == "all" else (given.optimizer,)
    print(f"{'optimizer':18}{'steps':>7}{'loss':>12}{'relative L2 error':>20}")
    for each in names:
        count, loss, error = train(each, given.seconds, given.width, given.layers, given.seed, given.side)
        print(f"{each:18}{count:7d}{loss:12.2e}{error:20.2e}")
    print(f"relative L2 error: {error:.1e}")
