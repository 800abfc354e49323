"""Fishers made of gradients of the loss terms: at labels drawn from the model, or at the data's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.likelihoods import Likelihood, LossTerms, likelihood_from
from kfacopt.likelihoods.divisor import OVER_NUMBERS
from kfacopt.operators.empirical_risk import Batches, Loss
from kfacopt.operators.matrix_free.ggn import GaussNewtonLinearOperator


class FisherMCLinearOperator(GaussNewtonLinearOperator):
    """The Fisher, estimated with labels drawn from the model: its expectation is the GGN.

    B sums outer products of the gradients of every loss term (a datum, a token) at `mc_samples` drawn labels. The same
    labels are drawn in every product: data must come in the same order each time.

    Args:
        loss_func: torch's `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss`.
        seed: Seed of the generator that draws labels; the global generators are never touched.
        mc_samples: Labels drawn for every loss term.

    The other arguments are those of `CurvatureLinearOperator`.

    >>> model, loss = torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss()
    >>> data = [(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))]
    >>> fisher = FisherMCLinearOperator(model, loss, list(model.parameters()), data, mc_samples=2)
    >>> v = torch.arange(9.0)
    >>> bool(v @ (fisher @ v) >= 0)
    True
    """

    FIXED_DATA_ORDER = True

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: nn.Module,
        params: Sequence[nn.Parameter],
        data: Batches,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
        self._seed, self._mc_samples = seed, mc_samples
        self._likelihood = likelihood_from(loss_func)
        self._generator: torch.Generator | None = None
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        self._generator = torch.Generator(self.device).manual_seed(self._seed)
        return super()._matmat(M)

    def _middle(self, prediction: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        terms = self._likelihood.terms(prediction, target=y)
        samples = self._likelihood.sample(terms, self._mc_samples, self._generator)
        return outer_products(terms, samples, self._likelihood.reduction)


class EFLinearOperator(GaussNewtonLinearOperator):
    """The empirical Fisher: the uncentred second moment of the gradients at the data's own labels.

    With the loss written as `c Σ_m ℓ_m` over its terms it is `c Σ_m ∇ℓ_m ∇ℓ_mᵀ`: c is what torch's mean divides by
    (the outputs too, for `MSELoss`, `BCEWithLogitsLoss` and their like), and one for a sum; class weights belong to
    ℓ_m. It is not the GGN, and not its estimate (Kunstner et al. 2019, arXiv:1905.12558).

    Args:
        loss_func: A loss that `likelihood_from` knows; of any other one a term is a datum.

    The other arguments are those of `CurvatureLinearOperator`.

    >>> model, loss = torch.nn.Linear(1, 1, bias=False).double(), torch.nn.MSELoss(reduction="sum")
    >>> X = torch.ones(2, 1, dtype=torch.float64)
    >>> fisher = EFLinearOperator(model, loss, list(model.parameters()), [(X, model(X).detach() - 1)])
    >>> fisher @ torch.ones(1, dtype=torch.float64)
    tensor([8.], dtype=torch.float64)
    """

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: nn.Module,
        params: Sequence[nn.Parameter],
        data: Batches,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        self._likelihood = likelihood_from(loss_func, empirical=True)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )

    def _middle(self, prediction: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        terms = self._likelihood.terms(prediction, target=y)
        return outer_products(terms, empirical_gradients(self._loss_func, terms), self._likelihood.reduction)


def empirical_gradients(loss_func: Loss | Likelihood | None, terms: LossTerms) -> Tensor:
    """Gradients `[1 m c]` of the loss terms whose outer products, over `terms.count`, make the empirical Fisher.

    torch's means over outputs leave 1/c in every term's gradient; the empirical Fisher has that factor once, as the
    mean has it, not squared: the gradients are multiplied by √c.

    Raises:
        ValueError: If the terms' gradients are not known.
    """
    if terms.gradient is None:
        raise ValueError("the empirical Fisher needs each term's gradient, which this loss and target do not give")
    over_outputs = isinstance(loss_func, OVER_NUMBERS) and loss_func.reduction == "mean"
    factor = terms.parameters.shape[1] ** 0.5 if over_outputs else 1.0
    return factor * terms.gradient[None]


def outer_products(terms: LossTerms, vectors: Tensor, reduction: str) -> Callable[[Tensor], Tensor]:
    """Products with `Σ_m Σ_v g_vm g_vmᵀ`, over the terms' count for a mean, on tensors shaped as the prediction.

    Args:
        terms: The loss terms.
        vectors: g, `[v m c]`.
        reduction: That of the loss.
    """
    rows = terms.rows
    assert rows is not None
    scale = 1.0 if reduction == "sum" else 1.0 / terms.count

    def multiply(vector: Tensor) -> Tensor:
        coefficients = torch.einsum("vmc,mc->vm", vectors, rows(vector))
        return terms.restore(torch.einsum("vm,vmc->mc", coefficients * scale, vectors)[None])[0]

    return multiply
