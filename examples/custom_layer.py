"""Curvature for a layer of your own: a handler of four methods, checked against autograd.

A handler says how what went into the layer and what came back at its output become *rows* whose outer products sum to
the parameter gradient. Every backend (KFAC, EKFAC, yours) then treats it. (A layer that is made of known ones, such as
LoRA's two `nn.Linear`s, needs no handler at all.)
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfacopt

STEPS = 40 if os.environ.get("KFACOPT_SHORT") else 200


class Bilinear(nn.Module):
    """Two inputs that gate each other: `y_o = xᵀ W_o z + b_o` (torch's own has no handler)."""

    def __init__(self, x_size: int, z_size: int, outputs: int) -> None:
        super().__init__()
        scale = (x_size * z_size) ** -0.5
        self.weight = nn.Parameter(scale * torch.randn(outputs, x_size, z_size))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("ni,oij,nj->no", x, self.weight, z) + self.bias


class BilinearHandler(kfacopt.LayerHandler):
    """`xᵀ W_o z` is linear in W_o: a linear layer whose input is the outer product of x and z."""

    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: kfacopt.KFACType,
    ) -> Tensor:
        x, z = inputs
        products = rearrange(torch.einsum("ni,nj->nij", x, z), "n i j -> n 1 (i j)")
        # The bias is the weight of a constant input; axis s has length 1: no weight sharing here.
        columns = {"weight": products, "bias": products.new_ones(len(x), 1, 1)}
        return torch.cat([columns[role] for role in roles], dim=-1)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: kfacopt.KFACType) -> Tensor:
        return rearrange(gradient, "v n o -> v n 1 o")

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        present = [parts[name] for name in self.parameter_names if name in parts]
        return torch.cat([part.reshape(len(part), -1) for part in present], dim=1)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        parts = {}
        if "bias" in roles:
            matrix, parts["bias"] = matrix[:, :-1], matrix[:, -1]
        if "weight" in roles:
            parts["weight"] = matrix.reshape(module.get_parameter("weight").shape)
        return parts


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 12), nn.Linear(64, 12)
        self.gate = Bilinear(12, 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.gate(self.left(x).tanh(), self.right(x).tanh())
        return output


def train(label: str) -> float:
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model, criterion = Network(), nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(
        model, loss_func=criterion, lr=0.3, damping=0.01, kl_clip=0.03, factor_every=5, refresh_every=20
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=STEPS)
    print(f"{label}\n{optimizer.coverage()}")
    for _ in range(STEPS):
        batch = torch.randint(len(x), (200,))
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
    optimizer.close()
    loss: Tensor = criterion(model(x), y)
    print(f"training loss after {STEPS} steps: {loss.item():.5f}\n")
    return loss.item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    kfacopt.layers.check_handler(BilinearHandler(), Bilinear(3, 4, 2), torch.randn(5, 3), torch.randn(5, 4))
    print("the handler's rows give autograd's gradients\n")
    train("without the handler")
    # Register before the optimizer is made; `with` undoes it, a plain call lasts.
    with kfacopt.register_handler(Bilinear, BilinearHandler()):
        train("with it")
