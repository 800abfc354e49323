"""A Laplace approximation by EKFAC: how sure may a network be that was trained on 300 digits?

The posterior over weights is taken to be a Gaussian around the trained ones. Its precision is the EKFAC of the loss,
summed over the training data, plus that of a Gaussian prior, so that its covariance is an inverse with exact damping.
Predictions are those of the model linearised in its weights, to which the Gauss-Newton matrix belongs (Immer et al.
2021): logits are Gaussian with covariance `J Σ Jᵀ`, and the softmax is averaged over samples of them. The prior's
precision is chosen on validation data. The evidence, which EKFAC's eigenvalues give, is no guide here: weights trained
without a prior are no posterior's mode. The rival, one temperature for all logits, is chosen on the same data, and is
about as good.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import kfacopt
from kfacopt import operators

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
TEST, GRID = (200, 4) if SHORT else (1197, 13)  # test digits, precisions to choose from
SAMPLES, BINS, SHARE = 512, 10, 0.005
STYLES = {"trained": ("#d55e00", "o"), "temperature": ("#0072b2", "s"), "Laplace": ("#009e73", "^")}
PICTURE = Path("runs/examples", "short" if SHORT else "", "laplace.png")


class Split(NamedTuple):
    """Images `[n 64]` and their labels `[n]`."""

    x: Tensor
    y: Tensor


class Calibration(NamedTuple):
    """How well probabilities do: by bins of equal width, mean confidence, accuracy and share of the data."""

    nll: float
    ece: float
    accuracy: float
    bins: list[tuple[float, float, float]]


def digits() -> list[Split]:
    """Handwritten digits of 8 x 8 pixels: 300 to train on, 300 for validation, the rest to test on."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data).float()[order] / 16, torch.tensor(data.target)[order]
    parts = slice(300), slice(300, 600), slice(600, 600 + TEST)
    return [Split(x[part], y[part]) for part in parts]


def train(data: Split) -> nn.Module:
    """The usual: the most likely weights, which are too sure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(model, criterion, lr=0.3, damping=0.01, kl_clip=0.03)
    for _ in range(300):
        batch = torch.randint(len(data.x), (100,))
        optimizer.zero_grad()
        criterion(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
    optimizer.close()
    return model


@torch.no_grad()
def laplace(model: nn.Module, ekfac: operators.EKFACLinearOperator, precision: float, x: Tensor) -> Tensor:
    """Probabilities `[n classes]` of the linearised model, averaged over the posterior."""
    covariance = operators.KFACInverseLinearOperator(ekfac, precision, use_exact_damping=True)
    params = {name: p.detach() for name, p in model.named_parameters()}
    per_datum = vmap(jacrev(lambda values, one: functional_call(model, values, (one,))), in_dims=(None, 0))
    generator, found = torch.Generator().manual_seed(0), []
    for some in x.split(100):
        jacobians, logits = per_datum(params, some).values(), model(some)
        # Of each parameter [n classes *p]: for the operator, columns come last.
        spread = covariance @ [j.flatten(0, 1).movedim(0, -1) for j in jacobians]
        rows = torch.cat([j.flatten(2) for j in jacobians], dim=-1)
        columns = torch.cat([s.flatten(0, -2) for s in spread]).unflatten(-1, logits.shape)
        variance = torch.einsum("ncp,pnd->ncd", rows, columns)
        root = torch.linalg.cholesky(variance + 1e-5 * torch.eye(logits.shape[-1]))
        noise = torch.randn(SAMPLES, *logits.shape, 1, generator=generator)
        found.append((logits + (root @ noise).squeeze(-1)).softmax(-1).mean(0))
    return torch.cat(found)


def calibration(probabilities: Tensor, y: Tensor) -> Calibration:
    """Negative log-likelihood, expected calibration error (Naeini et al. 2015), accuracy and the bins."""
    nll = nn.functional.nll_loss(probabilities.log(), y)
    confidence, label = probabilities.max(dim=-1)
    right, places = (label == y).float(), (confidence * BINS).long().clamp_max(BINS - 1)
    chosen = [places == b for b in range(BINS) if (places == b).any()]
    bins = [(float(confidence[c].mean()), float(right[c].mean()), float(c.float().mean())) for c in chosen]
    ece = sum(share * abs(sure - correct) for sure, correct, share in bins)
    return Calibration(float(nll), ece, float(right.mean()), bins)


def draw(found: dict[str, Calibration], choices: dict[str, dict[float, float]]) -> None:
    """Left, which part of the predictions of a confidence is right; right, how the precision was chosen."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="calibrated")
    for name, result in found.items():
        colour, marker = STYLES[name]
        sure, correct, _ = zip(*(one for one in result.bins if one[2] >= SHARE), strict=True)
        left.plot(sure, correct, color=colour, marker=marker, label=f"{name}, ECE {result.ece:.1%}")
    left.set(xlabel="confidence", ylabel="accuracy", title=f"test digits (bins with {SHARE:.1%} of them or more)")
    left.legend(loc="upper left")
    precisions = list(choices["Laplace"])
    for name, losses in choices.items():
        if name == "Laplace":
            right.plot(precisions, list(losses.values()), color=STYLES[name][0], marker=STYLES[name][1], label=name)
        else:
            right.axhline(min(losses.values()), color=STYLES[name][0], linestyle="--", label=name)
    right.set(xlabel="prior precision", ylabel="negative log-likelihood", title="validation digits", xscale="log")
    right.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"the reliability diagram is in {PICTURE}")


def main() -> None:
    training, validation, test = digits()
    model = train(training)
    # Type-2: the Fisher itself, not a sample. Summed: the posterior counts every datum.
    criterion = nn.CrossEntropyLoss(reduction="sum")
    ekfac = operators.EKFACLinearOperator(model, criterion, list(model.parameters()), [training], fisher_type="type-2")

    def scaled(x: Tensor, temperature: float) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = (model(x) / temperature).softmax(-1)
        return probabilities

    methods: dict[str, tuple[Callable[[Tensor, float], Tensor], Tensor]] = {
        "trained": (scaled, torch.ones(1)),
        "temperature": (scaled, torch.linspace(1.0, 4.0, 31)),
        "Laplace": (lambda x, precision: laplace(model, ekfac, precision, x), torch.logspace(1.0, 4.0, GRID)),
    }
    found: dict[str, Calibration] = {}
    choices: dict[str, dict[float, float]] = {}
    print(f"{'test digits':12}{'NLL':>8}{'ECE':>8}{'accuracy':>10}   chosen on validation digits")
    for name, (predict, grid) in methods.items():
        losses = {s: calibration(predict(validation.x, s), validation.y).nll for s in grid.tolist()}
        chosen = min(losses, key=losses.__getitem__)
        choices[name], found[name] = losses, calibration(predict(test.x, chosen), test.y)
        nll, ece, accuracy, _ = found[name]
        choice = {"temperature": f"temperature {chosen:.3g}", "Laplace": f"prior precision {chosen:.3g}"}
        print(f"{name:12}{nll:8.4f}{ece:8.2%}{accuracy:10.1%}   {choice.get(name, '')}")
    draw(found, choices)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    main()
