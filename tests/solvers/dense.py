"""Dense curvature over all parameters of a model, in float64, from torch.func alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import reference


def flat(tensors: Any) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a backward has reached, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.grad is not None}


@sdpa_kernel(SDPBackend.MATH)
def jacobian(model: nn.Module, x: Any) -> Tensor:
    """`[prediction, parameters]`."""
    own = trained(model)
    found = jacrev(lambda p: functional_call(model, p, (x,)).flatten())(own)
    return torch.cat([found[name].flatten(1) for name in own], dim=1)


def ggn(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """`Jᵀ H J` of the mean loss."""
    j = jacobian(model, x)
    return j.T @ reference.loss_hessian(loss, model(x), y) @ j


@sdpa_kernel(SDPBackend.MATH)
def loss_hessian(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """The Hessian of the mean loss with respect to the parameters.

    Row by row: torch 2.13 batches the second derivative of layer normalisation's weight wrongly (jacrev of jacrev is
    off by 0.4 there, against differences of gradients).
    """
    own = [p for p in model.parameters() if p.grad is not None]
    first = torch.autograd.grad(reference.mean_loss(loss, model(x), y), own, create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in first]):
        found = torch.autograd.grad(entry, own, retain_graph=True, allow_unused=True)
        rows.append(flat(torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)))
    return torch.stack(rows)
