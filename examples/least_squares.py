"""Least squares with natural gradient, AdamW and L-BFGS: a network on patients' data, and the fit of a curve.

`diabetes` is scikit-learn's regression problem with a small network on full batches.
`enzyme` fits four coefficients of a rational function to measurements (Kowalik & Osborne 1968), a classic of nonlinear
least squares: the model is a module with four numbers and no layer at all.
"""

import os
import time

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import kfacopt

SECONDS = 0.3 if os.environ.get("KFACOPT_SHORT") else 5.0
ADAM_LR = 1e-2  # of 1e-3, 3e-3, 1e-2, 3e-2: the highest that is good for both
NAMES = ("AdamW", "L-BFGS", "natural gradient")
# The short mode counts its own processor time: a busy machine makes no difference to it.
clock = time.thread_time if os.environ.get("KFACOPT_SHORT") else time.perf_counter


class Enzyme(nn.Module):
    """`a (x² + b x) / (x² + c x + d)`."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([0.25, 0.39, 0.415, 0.39]))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.coefficients
        curve: Tensor = a * (x.square() + b * x) / (x.square() + c * x + d)
        return curve


def enzyme() -> tuple[nn.Module, Tensor, Tensor]:
    x = 1 / torch.tensor([0.25, 0.5, 1, 2, 4, 6, 8, 10, 12, 14, 16])
    y = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
    return Enzyme(), x[:, None], torch.tensor(y)[:, None]


def diabetes() -> tuple[nn.Module, Tensor, Tensor]:
    data = load_diabetes()
    x, y = torch.tensor(data.data), torch.tensor(data.target)[:, None]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1)), x, y


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "natural gradient":
        return kfacopt.NaturalGradient(
            model,
            nn.MSELoss(),
            solver=kfacopt.Gram(),
            damping=1e-3,
            line_search=kfacopt.GridLineSearch(),
            acceleration=kfacopt.GeodesicAcceleration(),
        )
    if name == "L-BFGS":
        return torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    return torch.optim.AdamW(model.parameters(), lr=ADAM_LR, weight_decay=0.0)


def train(problem: str, name: str) -> tuple[int, float, float]:
    """Steps, the loss at the end, and the length of its gradient there."""
    torch.manual_seed(0)
    model, x, y = enzyme() if problem == "enzyme" else diabetes()
    criterion, optimizer = nn.MSELoss(), make_optimizer(name, model)

    def closure() -> float:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return float(loss.detach())

    start, steps = clock(), 0
    while clock() - start < SECONDS:
        optimizer.step(closure)
        steps += 1
    value = closure()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return steps, value, torch.stack(gradients).norm().item()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    for problem in ("diabetes", "enzyme"):
        print(f"{problem:18}{'steps':>7}{'loss':>20}{'gradient':>12}")
        for name in NAMES:
            steps, loss, gradient = train(problem, name)
            print(f"  {name:16}{steps:7d}{loss:20.12f}{gradient:12.1e}")
