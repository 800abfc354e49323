"""SOAP as a rival: Adam in the eigenbasis of Shampoo's statistics (Vyas et al. 2024, arXiv:2409.11321)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from kfacopt.linalg.symmetric import eigh


class SOAP(Optimizer):
    r"""Adam in a slowly turning eigenbasis (Vyas et al. 2024, algorithm 3).

    With `G` the gradient as a matrix `[o i]` (a convolution's kernel flattened from its second axis on):

        L ← β₃ L + (1 - β₃) G Gᵀ,  R ← β₃ R + (1 - β₃) Gᵀ G
        Q_L, Q_R ← eigenvectors of L and R: exact at first, then every `frequency` steps QR(L Q_L), QR(R Q_R)
        U ← Q_L · Adam(Q_Lᵀ G Q_R) · Q_Rᵀ

    The first average is kept in the parameter's own basis and turned at each step; the second lives in the eigenbasis.
    As in the authors' code the first gradient only sets the basis up, a side that is longer than `largest` keeps its
    own basis, and vectors are updated by Adam.

    Args:
        params: Parameters or param groups.
        lr: Learning rate.
        betas: Decay of Adam's running averages.
        shampoo_beta: β₃; None: Adam's second.
        eps: Added to the root of Adam's second average.
        weight_decay: Decoupled.
        frequency: Steps from one turn of the basis to the next.
        largest: The longest side that gets a basis.

    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = SOAP([weight], lr=0.1)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> [round(float(x), 3) for x in weight.detach().diagonal()]
    [0.9, 0.9]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        frequency: int = 10,
        largest: int = 10_000,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": betas[1] if shampoo_beta is None else shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "frequency": frequency,
            "largest": largest,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Reevaluates the network and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = _as_matrix(parameter.grad), self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            matrix = parameter.ndim > 1
            state["statistics"] = [
                gradient.new_zeros(size, size) if matrix and size <= group["largest"] else None
                for size in gradient.shape
            ]
            self._observe(state, gradient, group)
            state["bases"] = [None if s is None else eigh(s)[1].flip(-1) for s in state["statistics"]]
            if matrix:
                return
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        turned = _turn(gradient, state["bases"])
        state["exp_avg_sq"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        mean = _turn(state["exp_avg"], state["bases"]) / (1 - beta1 ** state["step"])
        deviation = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = _turn_back(mean / deviation, state["bases"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-float(group["lr"]))
        self._observe(state, gradient, group)
        if state["step"] % group["frequency"] == 0:
            self._turn_basis(state)

    @staticmethod
    def _observe(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
        for statistic, product in zip(state["statistics"], (gradient, gradient.mT), strict=True):
            if statistic is not None:
                statistic.lerp_(product @ product.mT, 1 - group["shampoo_beta"])

    @staticmethod
    def _turn_basis(state: dict[str, Any]) -> None:
        """One step of orthogonal iteration; the second average follows the order of the eigenvalues."""
        for side, (statistic, basis) in enumerate(zip(state["statistics"], state["bases"], strict=True)):
            if statistic is None:
                continue
            order = (basis * (statistic @ basis)).sum(0).argsort(descending=True)
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)
            state["bases"][side] = torch.linalg.qr(statistic @ basis[:, order])[0]


def _as_matrix(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1)


def _turn(matrix: Tensor, bases: list[Tensor | None]) -> Tensor:
    left, right = bases
    turned = matrix if left is None else left.mT @ matrix
    return turned if right is None else turned @ right


def _turn_back(matrix: Tensor, bases: list[Tensor | None]) -> Tensor:
    left, right = bases
    turned = matrix if left is None else left @ matrix
    return turned if right is None else turned @ right.mT
