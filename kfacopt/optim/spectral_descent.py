"""Steepest descent under a spectral norm in the curvature's metric, as a torch optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from kfacopt.backends.base import CurvatureBackend
from kfacopt.backends.kfac import OneSidedKFACBackend
from kfacopt.damping import RelativeDamping
from kfacopt.likelihoods.estimator import LossFunction
from kfacopt.optim.capturing import Params
from kfacopt.optim.second_order import SecondOrderOptimizer
from kfacopt.optim.step import ClippedGradients, Direction, Spectral
from kfacopt.optim.step.chosen import GRAFTED_RATE, SPECTRAL, of_spectral_step


class SpectralDescent(SecondOrderOptimizer):
    """Muon in the metric of the outputs' Fisher: `lr · L polar(Lᵀ M)` of fixed length a layer (see `Spectral`).

    Preconditioned spectral descent (Carlson et al. 2015) with the root L of K-FAC's damped inverse factor of the
    gradients. Where K-FAC's step is as long as the curvature says, and its noise with it, all directions of a layer's
    step are of one size here, and so are the layers' steps: there is nothing to clip, and `lr` means the same for every
    task. Let it go to zero over the run (any of torch's schedulers; `kfacopt.schedules.to_zero`); where it is to stay,
    0.02 is better than the default (on seven of eight tasks, by a sixth on average).

    K-FAC's other factor, A, is left out on purpose: its small eigenvalues are inputs that hardly ever vary, where a
    step in its metric goes furthest and tells least (`backend=KFACBackend(exponent=0.5)` has both).

    The arguments are those of `SecondOrderOptimizer`; these have other defaults than there.

    Args:
        model: The model whose parameters are trained.
        loss_func: The loss, as torch's module or a `Likelihood`.
        params: torch's params or param groups; default: all of the model's.
        lr: By how much each of the first 100 steps moves each output of a layer, for inputs of size one, and by
            eight times that for any of more than eight; then less and less, as one over the root of the number of steps
            (`full_steps` of `Spectral`). Steps that their curvature says are far too long go less far (`margin`).
        momentum: Of the gradients, none of which is much longer than those before it (`ClippedGradients`).
        damping: Half of the factor's mean eigenvalue; the length of a step is not the damping's to bound.
        kl_clip: See there; a bound costs the curvature's product with the step.
        adamw_lr: AdamW's learning rate, of normalisations and all else without a matrix; embeddings take four times it
            (a param group's `embedding_factor`).
        backend: The curvature; default: `OneSidedKFACBackend(exponent=0.5)`, Shampoo's power of it.
        direction: Default: `ClippedGradients(Spectral(momentum))`.
        options: More of `SecondOrderOptimizer`'s arguments.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = SpectralDescent(model, torch.nn.MSELoss())
    >>> torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
    >>> optimizer.step()
    """

    backend_type = of_spectral_step(OneSidedKFACBackend)

    def __init__(
        self,
        model: nn.Module,
        loss_func: LossFunction,
        params: Params | None = None,
        *,
        lr: float = GRAFTED_RATE,
        momentum: float = SPECTRAL.momentum,
        damping: float | RelativeDamping = SPECTRAL.damping,
        kl_clip: float | None = None,
        adamw_lr: float = SPECTRAL.adamw_lr,
        backend: CurvatureBackend | None = None,
        direction: Direction | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            loss_func,
            params,
            lr=lr,
            momentum=momentum,
            damping=damping,
            kl_clip=kl_clip,
            adamw_lr=adamw_lr,
            backend=backend,
            direction=ClippedGradients(Spectral(momentum)) if direction is None else direction,
            **options,
        )
