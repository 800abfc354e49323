"""Two curvature backends of your own in the same optimizer: one written here, one borrowed.

`DiagonalFisher` turns the rows that kfacopt captures into statistics. `Curvlinops` ignores them: it holds a linear
operator of another package, which runs passes of its own over a loader's batches. The optimizer's part (momentum,
weight decay, KL clip, schedules, AdamW for the rest) is the same.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfacopt
from kfacopt import Layer, LayerTensors, Rows, Settings

try:
    import curvlinops
except ImportError:
    curvlinops = None

EPOCHS = 4 if os.environ.get("KFACOPT_SHORT") else 12
Batch = Sequence[Tensor]
LayerSettings = Mapping[Layer, Settings]


class DiagonalFisher(kfacopt.CurvatureBackend):
    """The diagonal of the Fisher, entry by entry the mean square of a per-datum gradient."""

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.terms: dict[str, float | Tensor] = {}

    def update(self, layer: Layer, rows: Rows) -> None:
        g, a = rows.gradients, rows.inputs
        a = a if isinstance(a, Tensor) else a.dense(g.dtype)  # an embedding's rows are one-hot
        outer = layer.handler.structure == "outer"  # else a normalization's scale and shift
        per_datum = torch.einsum("v...nso,...nsi->v...noi" if outer else "vnsc,nsci->vnci", g, a)
        square = per_datum.square().sum(dim=(0, -3))
        # Micro-batches and chunks of cotangents add up until the step.
        self.sums[layer.name] = self.sums.get(layer.name, 0) + square
        self.terms[layer.name] = self.terms.get(layer.name, 0) + rows.new_terms

    def fold(self, step: int, settings: LayerSettings) -> None:
        decays = {layer.name: setting.ema_decay for layer, setting in settings.items()}
        for name, total in self.sums.items():
            batch = total / self.terms[name]
            self.averages[name] = torch.lerp(batch, self.averages.get(name, batch), decays[name])
        self.discard()

    def discard(self) -> None:
        self.sums, self.terms = {}, {}

    def solve(self, gradients: LayerTensors, settings: LayerSettings) -> dict[Layer, dict[str, Tensor]]:
        return {
            layer: layer.unpack(layer.pack(parts) / (self.averages[layer.name] + settings[layer].damping))
            for layer, parts in gradients.items()
            if layer.name in self.averages  # the rest, no batch has reached yet: AdamW for now
        }

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averages = dict(state["averages"])


class Curvlinops(kfacopt.CurvatureBackend):
    """K-FAC as curvlinops computes it, anew on all batches of a loader every few steps."""

    def __init__(self, model: nn.Module, loss_func: nn.Module, loader: Iterable[Batch], refresh_every: int) -> None:
        self.model, self.loss_func, self.loader = model, loss_func, loader
        self.refresh_every = refresh_every

    def attach(self, layers: Sequence[Layer]) -> None:
        # Layers that are left out of `solve`, here those that curvlinops lacks, train by AdamW.
        known = (nn.Linear, nn.Conv2d)
        self.layers = [layer for layer in layers if isinstance(layer.modules[0], known)]

    def wants_rows(self, step: int) -> bool:
        return False  # so that our own curvature pass does not run for nothing

    def refresh(self, step: int, settings: LayerSettings) -> None:
        if step % self.refresh_every == 0:
            kfac = curvlinops.KFACLinearOperator(
                self.model,
                self.loss_func,
                [p for layer in self.layers for p in layer.parameters.values()],
                self.loader,
                seed=step,
                check_deterministic=False,
                separate_weight_and_bias=False,
            )
            self.inverse = curvlinops.KFACInverseLinearOperator(
                kfac, damping=settings[self.layers[0]].damping, use_exact_damping=True
            )

    def solve(self, gradients: LayerTensors, settings: LayerSettings) -> dict[Layer, dict[str, Tensor]]:
        natural = iter(self.inverse @ [g for k in self.layers for g in gradients[k].values()])
        return {layer: {role: next(natural) for role in layer.roles} for layer in self.layers}


def make_optimizer(name: str, model: nn.Module, criterion: nn.Module, loader: Iterable[Batch]) -> torch.optim.Optimizer:
    match name:
        case "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=3e-2)
        case "KFAC":
            backend: kfacopt.CurvatureBackend = kfacopt.KFACBackend(factor_every=5, refresh_every=5)
        case "diagonal Fisher":
            backend = DiagonalFisher()
        case _:
            backend = Curvlinops(model, criterion, loader, refresh_every=10)
    return kfacopt.SecondOrderOptimizer(model, criterion, backend=backend, lr=0.3, damping=0.01, kl_clip=0.03)


def train(name: str) -> tuple[list[float], float]:
    """Train a classifier of digits; returns the training loss after each epoch, and the seconds."""
    data = load_digits()
    x_all, y_all = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(x_all, y_all), batch_size=100, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = make_optimizer(name, model, criterion, loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    losses, start = [], time.perf_counter()
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            losses.append(criterion(model(x_all), y_all).item())
    return losses, time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    names = ["AdamW", "KFAC", "diagonal Fisher"]
    if curvlinops is None:
        print("curvlinops is not installed (scripts/environment does it): leaving it out")
    else:
        names.append("curvlinops KFAC")
    shown = sorted({1, 2, EPOCHS // 2, EPOCHS})
    print(f"{'training loss after epoch':26}" + "".join(f"{e:10d}" for e in shown) + "   seconds")
    for name in names:
        losses, seconds = train(name)
        columns = "".join(f"{losses[epoch - 1]:10.5f}" for epoch in shown)
        print(f"{name:26}{columns}{seconds:10.2f}")
