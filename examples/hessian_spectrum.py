"""The spectrum of a network's Hessian against that of its Gauss-Newton matrix (GGN) and of its EKFAC.

Lanczos asks for products with vectors only: no matrix is ever formed. What to see: a bulk near zero and about one large
eigenvalue for each class; negative eigenvalues, which the Hessian alone has, most of them early in training; and EKFAC,
the diagonal of the GGN in a Kronecker eigenbasis, with the trace of the GGN but no eigenvalue above the GGN's largest.
"""

import os
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfacopt
from kfacopt import operators

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
STAGES = {"early": 10, "trained": 40 if SHORT else 200}  # steps
STEPS, REPEATS, PRODUCTS = (16, 1, 20) if SHORT else (128, 5, 300)  # Lanczos's, its runs, and for each norm
COLOURS = ("#d55e00", "#0072b2", "#009e73")
PICTURE = Path("runs/examples", "short" if SHORT else "", "hessian_spectrum.png")

Data = list[tuple[Tensor, Tensor]]
Densities = dict[str, tuple[Tensor, Tensor]]


def digits() -> Data:
    """1,797 handwritten digits of 8 x 8 pixels, as mini-batches; curvature is that of all of them."""
    data = load_digits()
    x, y = torch.tensor(data.data).float() / 16, torch.tensor(data.target)
    return list(zip(x.split(600), y.split(600), strict=True))


def look(model: nn.Module, criterion: nn.Module, data: Data) -> Densities:
    """Print figures of the three matrices where the model is now; returns the densities of their spectra."""
    params, densities = list(model.parameters()), {}
    matrices = {
        "Hessian": operators.HessianLinearOperator(model, criterion, params, data),
        "GGN": operators.GGNLinearOperator(model, criterion, params, data),
        # Type-2, not sampled: the exact Fisher of a softmax is its GGN.
        "EKFAC": operators.EKFACLinearOperator(model, criterion, params, data, fisher_type="type-2"),
    }
    for name, matrix in matrices.items():
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        low, high = operators.approximate_boundaries(matrix, tol=1e-3)
        if isinstance(matrix, operators.EKFACLinearOperator):
            trace, norm = matrix.trace, matrix.frobenius_norm
        else:
            trace = operators.hutchpp_trace(matrix, PRODUCTS // 3 * 3, generator=generator)
            norm = operators.hutchinson_squared_fro(matrix, PRODUCTS, generator=generator).sqrt()
        densities[name] = operators.lanczos_approximate_spectrum(
            matrix, STEPS, 2048, REPEATS, boundaries=(low, high), generator=generator
        )
        seconds = time.perf_counter() - begin
        print(f"  {name:8}{low:10.4f}{high:10.4f}{float(trace):10.3f}{float(norm):10.3f}{seconds:9.1f}")
    return densities


def draw(stages: dict[str, Densities]) -> None:
    """A column a stage, a row a matrix."""
    figure = Figure(figsize=(11.0, 6.0), layout="constrained")
    table = figure.subplots(3, len(stages), sharex="col", sharey="col")
    for column, (title, densities) in zip(table.T, stages.items(), strict=True):
        column[0].set_title(title)
        for axes, colour, (name, density) in zip(column, COLOURS, densities.items(), strict=True):
            operators.plot_spectral_density({name: density}, axes=axes, floor=1e-6)
            (curve,) = axes.lines
            curve.set(color=colour, linewidth=1.2)
            axes.legend(loc="upper right")  # in the curve's new colour
            axes.axvline(0.0, color="0.7", linewidth=0.8, zorder=0)
            if axes is not column[-1]:
                axes.set_xlabel("")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"the densities are drawn in {PICTURE}")


def main() -> None:
    torch.manual_seed(0)
    data, criterion = digits(), nn.CrossEntropyLoss()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = kfacopt.EKFAC(model, criterion, lr=0.3, damping=0.01, kl_clip=0.03)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(STAGES.values()))
    found: dict[str, Densities] = {}
    for step in range(1, max(STAGES.values()) + 1):
        batch = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
        for stage in [name for name, when in STAGES.items() if when == step]:
            with torch.no_grad():
                title = f"{stage}: {step} steps, training loss {float(criterion(model(x), y)):.4f}"
            print(f"{title}\n  {'':8}{'lowest':>10}{'highest':>10}{'trace':>10}{'norm':>10}{'seconds':>9}")
            found[title] = look(model, criterion, data)
    draw(found)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    main()
