"""What EKFAC's corrected eigenvalues change: the curvature along KFAC's eigenvectors, as it is and as each has it.

KFAC takes a layer's Fisher for a Kronecker product, whose eigenvalues are products of the factors'. Along the same
eigenvectors the Fisher has other second moments; EKFAC (George et al. 2018) keeps the eigenvectors and takes those. The
layer is small enough for its whole Fisher (the exact Gauss-Newton matrix, in float64) to be formed.
"""

import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfacopt
from kfacopt import operators

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
STEPS = 40 if SHORT else 200
PICTURE = Path("runs/examples", "short" if SHORT else "", "corrected_eigenvalues.png")


def trained() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A classifier of scikit-learn's digits, and all of them."""
    digits = load_digits()
    x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    optimizer = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), lr=0.3, kl_clip=0.03)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (200,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    optimizer.close()
    return model, [(x, y)]


def dense(operator: operators.LinearOperator) -> Tensor:
    """The operator's matrix."""
    matrix: Tensor = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    return (matrix + matrix.T) / 2


def main() -> None:
    model, data = trained()
    criterion, weight = nn.CrossEntropyLoss(), [model.get_parameter("2.weight")]  # 10 x 12
    fisher = dense(operators.GGNLinearOperator(model, criterion, weight, data))
    kfac, ekfac = (
        dense(kind(model, criterion, weight, data, fisher_type="type-2"))
        for kind in (operators.KFACLinearOperator, operators.EKFACLinearOperator)
    )
    _, directions = torch.linalg.eigh(kfac)
    truth, *found = ((directions.T @ matrix @ directions).diagonal() for matrix in (fisher, kfac, ekfac))
    figure = Figure(figsize=(6.0, 4.8), layout="constrained")
    axes = figure.subplots()
    inside = truth > 1e-6 * truth.max()
    ends = [float(truth[inside].min()), float(truth.max())]
    axes.loglog(ends, ends, color="0.6", linestyle="--", label="the Fisher itself")
    print(f"{'':8}{'error of the matrix':>21}{'median factor':>15}{'largest factor':>16}   along an eigenvector")
    approximations = {"KFAC": (kfac, "#d55e00"), "EKFAC": (ekfac, "#009e73")}
    for (name, (matrix, colour)), values in zip(approximations.items(), found, strict=True):
        error = float((matrix - fisher).norm() / fisher.norm())
        factors = (values[inside] / truth[inside]).log().abs().exp()
        print(f"{name:8}{error:21.3f}{float(factors.median()):15.3f}{float(factors.max()):16.2f}")
        label = f"{name}, error {error:.2f}"
        axes.loglog(truth[inside].numpy(), values[inside].numpy(), ".", color=colour, label=label)
    axes.set(xlabel="curvature along an eigenvector of KFAC", ylabel="what the approximation says it is")
    axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    print(f"the picture is in {PICTURE}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
