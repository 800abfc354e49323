"""KFAC as a torch optimizer."""

from __future__ import annotations

from kfacopt.backends.kfac import KFACBackend
from kfacopt.optim.second_order import SecondOrderOptimizer


class KFAC(SecondOrderOptimizer):
    """K-FAC (Martens & Grosse 2015): the cheapest second-order step here, about two SGD steps.

    The arguments are those of `SecondOrderOptimizer`; options of the curvature go through the backend, as in
    `KFAC(model, loss_func, backend=KFACBackend(stagger=False))`.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = KFAC(model, torch.nn.MSELoss())
    >>> torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
    >>> optimizer.step()
    """

    backend_type = KFACBackend
