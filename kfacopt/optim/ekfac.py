"""EKFAC as a torch optimizer."""

from __future__ import annotations

from kfacopt.backends.ekfac import EKFACBackend
from kfacopt.optim.second_order import SecondOrderOptimizer
from kfacopt.optim.step.chosen import of_spectral_step


class EKFAC(SecondOrderOptimizer):
    """EKFAC (George et al. 2018): K-FAC's eigenbasis with the curvature's own second moments along it.

    The arguments are those of `SecondOrderOptimizer`; options of the curvature go through the backend, as in
    `EKFAC(model, loss_func, backend=EKFACBackend(tail=0.1))`.

    Where nothing is said of the step it is the spectral one, steepest in the metric of the curvature's half power (see
    `Spectral`): noise of small batches has no say in its length, and transformers and deep networks train, where the
    natural gradient lags. Embeddings and normalisations take AdamW's step then. The natural gradient comes with any of
    `kl_clip`, `direction`, `step_length`, `backend`, `damping_rule`, `lr="auto"`, as does its cheaper step.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = EKFAC(model, torch.nn.MSELoss())
    >>> torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
    >>> optimizer.step()
    """

    backend_type = EKFACBackend
    untuned_backend = of_spectral_step(EKFACBackend)
