"""A direction of your own: the sign of the momentum, beside EKFAC's natural gradient.

    scripts/environment python examples/custom_direction.py

A step is two decisions: where to go (`Direction`) and how far (`StepLength`). A direction reads the step (gradients,
layers, curvature) and says what to subtract at length one. This one ignores the curvature, but the trust region still
measures it: it bounds the Kullback-Leibler divergence of any direction with the backend's own products.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import kfacopt


class Sign(kfacopt.Direction):
    """The sign of the momentum (Bernstein et al. 2018), for the parameters that have curvature."""

    def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
        """What is subtracted at learning rate and length one."""
        averaged = step.averaged()
        ready = [layer for layer in step.by_layer(averaged) if step.backend is None or step.backend.ready(layer)]
        return kfacopt.Updates({p: averaged[p].sign() for layer in ready for p in layer.parameters.values()})


def train(direction: kfacopt.Direction | None, steps: int = 60) -> tuple[float, float]:
    """Loss and largest divergence of a step, on scikit-learn's digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), lr=0.3, kl_clip=0.03, direction=direction)
    loss, divergence = torch.zeros(()), 0.0
    for start in range(0, 256 * steps, 256):
        rows = torch.arange(start, start + 256) % len(x)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        divergence = max(divergence, optimizer.health()["kl"])
    return loss.item(), divergence


if __name__ == "__main__":
    for name, direction in {"natural gradient": None, "sign": Sign()}.items():
        loss, divergence = train(direction)
        print(f"{name:16} loss {loss:.3f}, largest divergence of a step {divergence:.4f}")
