"""Where SGD, Adam and the natural gradient step on the same loss, drawn over the loss itself.

A network of two weights, `y = b tanh(a x)`, so that the picture leaves nothing out: the loss is a curved valley, flat
along its floor and steep across it. SGD and Adam have the best learning rate of a grid (the lowest geometric mean of
the losses on the way); the natural gradient has its defaults and a line search.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kfacopt

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
STEPS = 15
START, TRUTH = (0.4, 3.6), (3.0, 1.0)
STYLES = {"SGD": ("#d55e00", "s"), "Adam": ("#0072b2", "^"), "natural gradient": ("#009e73", "o")}
PICTURE = Path("runs/examples", "short" if SHORT else "", "steps_on_a_slice.png")

Factory = Callable[[nn.Module], torch.optim.Optimizer]


def network(weights: tuple[float, float]) -> nn.Sequential:
    """`b tanh(a x)` with the weights (a, b)."""
    made = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for parameter, value in zip(made.parameters(), weights, strict=True):
            parameter.fill_(value)
    return made


def data() -> tuple[Tensor, Tensor]:
    """Inputs `[40 1]` and what the true weights make of them, with a little noise."""
    x = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64).unsqueeze(1)
    noise = torch.randn(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, network(TRUTH)(x) + 0.05 * noise


def path(factory: Factory, steps: int) -> tuple[Tensor, list[float]]:
    """The weights before each step and after the last, `[steps + 1, 2]`, and the losses there."""
    model, criterion, (x, y) = network(START), nn.MSELoss(), data()
    optimizer = factory(model)
    places, losses = [], []
    for step in range(steps + 1):
        loss = criterion(model(x), y)
        places.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        losses.append(loss.item())
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.stack(places), losses


def tuned(factory: Callable[[float], Factory]) -> tuple[Factory, float]:
    """The optimizer at the learning rate of the grid with the lowest losses on the way, and that rate."""
    rates = [float(rate) for rate in torch.logspace(-3, 1, 13)]
    means = {rate: sum(map(math.log, path(factory(rate), STEPS)[1])) for rate in rates}
    best = min(rates, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
    return factory(best), best


def optimizers() -> dict[str, tuple[Factory, str]]:
    """Each with how it was set."""
    sgd, sgd_rate = tuned(lambda rate: lambda model: torch.optim.SGD(model.parameters(), lr=rate))
    adam, adam_rate = tuned(lambda rate: lambda model: torch.optim.Adam(model.parameters(), lr=rate))

    def natural(model: nn.Module) -> torch.optim.Optimizer:
        return kfacopt.NaturalGradient(model, nn.MSELoss(), line_search=kfacopt.GridLineSearch())

    return {
        "SGD": (sgd, f"lr {sgd_rate:.2g}"),
        "Adam": (adam, f"lr {adam_rate:.2g}"),
        "natural gradient": (natural, "line search"),
    }


def draw(paths: dict[str, tuple[Tensor, list[float]]], settings: dict[str, str]) -> None:
    """Left the steps on the loss, right the loss by steps."""
    x, y = data()
    a, b = torch.meshgrid(torch.linspace(0.1, 4.2, 120), torch.linspace(0.1, 4.0, 120), indexing="xy")
    surface = ((b[..., None] * torch.tanh(a[..., None] * x[:, 0]) - y[:, 0]) ** 2).mean(-1)
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    levels = torch.logspace(-2.6, 0.9, 16).numpy()
    left.contour(a.numpy(), b.numpy(), surface.numpy(), levels=levels, colors="0.75", linewidths=0.8)
    for name, (places, losses) in paths.items():
        colour, marker = STYLES[name]
        label = f"{name} ({settings[name]})"
        left.plot(*places.T.numpy(), color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
        right.semilogy(losses, color=colour, marker=marker, markersize=4, label=name)
    left.plot(*TRUTH, color="black", marker="*", markersize=12, linestyle="")
    left.set(xlabel="a", ylabel="b", title="y = b tanh(a x): steps on the loss", xlim=(0.1, 4.2), ylim=(0.1, 4.0))
    left.legend(loc="upper right")
    right.set(xlabel="step", ylabel="loss")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=90)
    print(f"the picture is in {PICTURE}")


def main() -> None:
    found = optimizers()
    paths = {name: path(factory, STEPS) for name, (factory, _) in found.items()}
    for name, (_, losses) in paths.items():
        print(f"{name:18}{found[name][1]:14} loss after {STEPS} steps: {losses[-1]:.2e}")
    draw(paths, {name: setting for name, (_, setting) in found.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
