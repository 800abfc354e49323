"""EKFAC as a torch optimizer."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor, nn

from kfacopt.backends.ekfac import EKFACBackend
from kfacopt.damping import RELATIVE_DAMPING, LevenbergMarquardt, RelativeDamping
from kfacopt.estimator import CurvatureOptions
from kfacopt.likelihoods import Likelihood
from kfacopt.optim.base import Params, SecondOrderOptimizer
from kfacopt.optim.quadratic_model import QuadraticModel
from kfacopt.schedules import EKFAC_REFRESH_EVERY, FACTOR_EVERY, Interval


class EKFAC(SecondOrderOptimizer):
    """EKFAC (George et al. 2018): K-FAC's eigenbasis with the curvature's own second moments along it.

    Args:
        factor_every: Steps between two updates of the factors and the corrected eigenvalues: an int, a callable of the
            step, or a schedule of `kfacopt.schedules`.
        refresh_every: Steps between two eigendecompositions, likewise; the layers' are spread over the interval.

    All other arguments are those of `SecondOrderOptimizer`. Options of the backend itself go through it:
    `SecondOrderOptimizer(model, loss_func, EKFACBackend(..., refine_every=10))`.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = EKFAC(model, torch.nn.MSELoss(), lr=0.1)
    >>> torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module | Likelihood,
        params: Params | None = None,
        *,
        lr: float | Tensor | QuadraticModel | Literal["auto"] = 0.3,
        damping: float | RelativeDamping = RELATIVE_DAMPING,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        ema_decay: float = 0.8,
        kl_clip: float | None = 0.03,
        relative_clip: float | None = None,
        factor_every: Interval = FACTOR_EVERY,
        refresh_every: Interval = EKFAC_REFRESH_EVERY,
        adamw_lr: float = 1e-3,
        damping_rule: LevenbergMarquardt | None = None,
        **curvature: Unpack[CurvatureOptions],
    ) -> None:
        super().__init__(
            model,
            loss_func,
            EKFACBackend(factor_every, refresh_every),
            params,
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            ema_decay=ema_decay,
            kl_clip=kl_clip,
            relative_clip=relative_clip,
            adamw_lr=adamw_lr,
            damping_rule=damping_rule,
            **curvature,
        )
