"""The seam between a loss and its curvature.

A mean loss is `(1/M) sum_m l_m(f_m)`: `M` independent terms, each a function of one row `f_m` of the prediction. When
every term is a negative log-likelihood of an exponential family with natural parameters `f_m`, its Hessian does not
depend on the label but for a factor, and equals the Fisher information (Martens 2020, sections 8 and 9.2). A
`Likelihood` says what the rows are, and gives vectors `v` whose outer products sum to those Hessians. Back-propagated,
they become the output-gradient covariances of K-FAC (Martens & Grosse 2015; Eschenhagen et al. 2023).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, Self

import torch
from einops import rearrange
from torch import Generator, Tensor

from kfacopt.likelihoods.deferred import DeferredRows, GradientField
from kfacopt.likelihoods.layout import RowLayout
from kfacopt.likelihoods.precision import Precision

MANY_VECTORS = 1000
"""Vectors of the type-2 Fisher, a backward pass each, from which on one is warned: there are as many as words."""


class Spelled(StrEnum):
    """Members are found by their spelling, or by another enum's member whose value is that (curvlinops')."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        own = getattr(value, "value", None)
        return cls(own) if isinstance(own, str) else None


class FisherType(Spelled):
    """Which second moment of output gradients stands for the loss' Hessian, as curvlinops names it.

    Anything whose `value` is one of these is one, as an enum of curvlinops'.

    >>> FisherType("type-2") is FisherType.TYPE2
    True
    """

    TYPE2 = "type-2"
    """The exact Hessian with respect to the prediction: one vector per output."""
    MC = "mc"
    """Gradients at labels drawn from the model's own distribution, unbiased for type-2."""
    EMPIRICAL = "empirical"
    """Gradients at the data's labels."""
    FORWARD_ONLY = "forward-only"
    """No gradients: the identity stands for their covariance (Benzing 2022, arXiv:2201.12250). For operators only."""


class KFACType(Spelled):
    """How weight sharing is read (Eschenhagen et al. 2023), as curvlinops names it.

    >>> KFACType("expand") is KFACType.EXPAND
    True
    """

    EXPAND = "expand"
    """Shared positions are independent data."""
    REDUCE = "reduce"
    """Inputs are averaged and gradients summed over shared positions."""


@dataclass(frozen=True)
class LossTerms:
    """A prediction read as independent loss terms: row m is one term (a datum, a token).

    Attributes:
        parameters: Natural parameters (logits, means) `[m c]`, float32 or float64.
        scale: Hessian multiplier of every row `[m]`: class weights, 1/c of a mean over features, 0 for ignored rows.
        count: What the mean loss divides by, a 0-dim float tensor; 0 when every row is ignored (leave the batch out).
        gradient: Gradient of each term, dl_m/df_m `[m c]`, not divided by `count`; `None` if it cannot be known. It may
            be given as `DeferredRows`, and is made then when it is first read.
        reads_target: Whether `gradient` was computed from targets, given or read, so that it is free of the user's
            scaling of the loss (`GradScaler`, accumulation). False: it is only the user's gradient times a count, or
            unknown, and that scaling cannot be told.
        restore: Brings vectors `[v m c]` to `[v, *prediction.shape]`, in the prediction's data type.
        output_scale: Further Hessian multiplier of every output `[m c]` (`pos_weight`); `None` for one.
        terms_per_datum: Rows that belong to one datum (positions of a sequence); they are contiguous.
        rows: Reads a tensor of the prediction's shape as rows `[m c]`.
        weights: What every term counts in the user's loss, over what the plain mean (or sum) would count it `[m]`; a
            factor of `scale` and `gradient` (`kfacopt.likelihoods.weights`). None: not asked for, or not to be told.
    """

    parameters: Tensor
    scale: Tensor
    count: Tensor
    gradient: GradientField = GradientField()  # noqa: RUF009 - a descriptor, of all instances
    restore: Callable[[Tensor], Tensor]  # type: ignore[misc]  # the descriptor is no default
    output_scale: Tensor | None = None
    terms_per_datum: int = 1
    rows: Callable[[Tensor], Tensor] | None = None
    reads_target: bool = False
    weights: Tensor | None = None

    @property
    def held_gradient(self) -> Tensor | DeferredRows | None:
        """The gradient as it is held, of which some rows may be had without the others."""
        held: Tensor | DeferredRows | None = self.__dict__["gradient"]
        return held

    @property
    def scores(self) -> Tensor | None:
        """Vectors whose outer products are the terms' empirical Fisher `[m c]`, as large as their weights; or None."""
        if self.gradient is None or self.weights is None:
            return self.gradient
        return self.gradient * torch.where(self.weights > 0, self.weights.rsqrt(), 0.0)[:, None]

    @classmethod
    def of(
        cls,
        layout: RowLayout,
        parameters: Tensor,
        *,
        scale: Tensor,
        count: Tensor,
        gradient: Tensor | DeferredRows | None,
        reads_target: bool = False,
        output_scale: Tensor | None = None,
    ) -> LossTerms:
        """Terms whose rows lie in the prediction as `layout` says."""
        return cls(
            parameters=parameters,
            scale=scale,
            count=count,
            gradient=gradient,
            restore=layout.restore,
            output_scale=output_scale,
            terms_per_datum=layout.terms_per_datum,
            rows=layout.rows,
            reads_target=reads_target,
        )

    def with_output_scale(self, output_scale: Tensor) -> LossTerms:
        """The same terms with another multiplier of every output's Hessian `[m c]`."""
        return replace(self, output_scale=output_scale)

    def with_gradient(self, gradient: Tensor) -> LossTerms:
        """The same terms with other gradients `[m c]`."""
        return replace(self, gradient=gradient)

    def at(self, prediction: Tensor) -> LossTerms:
        """The same terms at another prediction (after a step, say), for `Likelihood.divergence`.

        The gradient belongs to the old prediction and is dropped.

        Raises:
            RuntimeError: If the likelihood that made the terms left `rows` out.
        """
        if self.rows is None:
            raise RuntimeError(
                "these LossTerms cannot read another prediction, because their `rows` is None: "
                "let the likelihood's `terms` pass rows=... (or build them with LossTerms.of)"
            )
        return replace(self, parameters=self.rows(prediction.detach()), gradient=None, reads_target=False)


class Likelihood(ABC):
    """A loss function read as a negative log-likelihood with natural parameters f, the prediction.

    Subclass it for a loss of your own: four methods, all on rows. Statistics are those of the *mean* loss.
    """

    vectors_per_chunk: ClassVar[int] = 64
    """At most this many type-2 vectors are back-propagated at once.

    Memory grows with it (as many copies of the backward's cotangents), time falls little beyond a few. Ten classes fit
    in one pass, a vocabulary takes many. The statistics do not depend on it.
    """

    is_known: ClassVar[bool] = True
    """Whether curvature, samples and divergence are known; False of a loss of which only the gradient is."""

    is_level: ClassVar[bool] = False
    """Whether many numbers may have the same gradient, as errors of one sign have where the loss is straight."""

    is_separable: ClassVar[bool] = False
    """Whether the loss falls for ever as predictions grow, where classes are told apart: no finite weights are best."""

    is_hessian: bool = True
    """Whether what stands for the Hessian is the loss' own; False where the Fisher information does."""

    loss_nodes: tuple[str, ...] = ()
    """What torch calls the autograd nodes of the loss function; empty: it has none of its own."""

    reduction: str = "mean"
    """How the loss function sums up its terms; `"sum"` makes `gradient_scale` 1/M."""

    @abstractmethod
    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        """Read a prediction as loss terms.

        Args:
            prediction: What the loss function was given.
            gradient: The user's dL/dprediction, known up to a positive factor (loss scaling, accumulation). The target
                is read from it where the Hessian needs it.
            target: What the loss function was given, exact; it wins over `gradient`.

        Raises:
            TypeError: If the prediction is complex or of integers.
            ValueError: If the batch is empty, or the gradient is not that of this loss function. Never because of
                non-finite numbers, for which the caller leaves the batch out.
        """

    def beside(self, predictions: Mapping[str, Tensor]) -> Likelihood:
        """The likelihood where its curvature depends on other predictions of the same forward; here itself.

        Args:
            predictions: All of one forward, by the loss term's name.
        """
        return self

    @abstractmethod
    def sample(self, terms: LossTerms, mc_samples: int, generator: Generator | None) -> Tensor:
        """Gradients at labels drawn from the model, `[v m c]` with v = mc_samples.

        `sum_v v_m v_mᵀ` has the expectation `scale_m` times the Hessian of term m.
        """

    def square_root_columns(self, outputs: int) -> int:
        """How many vectors `hessian_sqrt` has for terms of `outputs` outputs: as many, or the Hessian's rank."""
        return outputs

    @abstractmethod
    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        """A square root of every term's Hessian `[v m c]`: sum_v v_m v_mᵀ = scale_m Hessian_m.

        Args:
            terms: The loss terms.
            columns: Only these of the `square_root_columns` vectors, to bound memory.
        """

    def hessian_product(self, terms: LossTerms, vectors: Tensor) -> Tensor:
        """Every term's `scale_m Hessian_m` times its row of `vectors` `[m c]`; rows again.

        Here from `hessian_sqrt`, in chunks of its columns; a subclass that knows a formula overrides it.
        """
        result, count = torch.zeros_like(vectors), self.square_root_columns(terms.parameters.shape[1])
        for start in range(0, count, self.vectors_per_chunk):
            columns = self.hessian_sqrt(terms, slice(start, min(start + self.vectors_per_chunk, count)))
            result += torch.einsum("vmc,vm->mc", columns, torch.einsum("vmc,mc->vm", columns, vectors))
        return result

    @abstractmethod
    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        """Sum over the terms of scale · KL(p_old ‖ p_new), 0-dim; `old.count` makes it a mean.

        It is the Bregman divergence of the loss: with b its part that does not depend on the label,
        `b(f_new) - b(f_old) - ∇b(f_old)·(f_new - f_old)`. Scales are those of `old`.
        """

    def remainder(self, old: LossTerms, new: LossTerms) -> Tensor:
        """What the sum over the terms of scale · loss changes by, less its linear part u·(f_new - f_old); 0-dim.

        The divergence, as here, where the prediction is the natural parameter; a subclass overrides it where not.
        """
        return self.divergence(old, new)

    def at_share(self, terms: LossTerms, gradient: Tensor, share: Tensor | float) -> LossTerms:
        """The terms, once it is known what they count in the user's loss; the same, as here, if nothing follows.

        Args:
            terms: The loss terms, without weights.
            gradient: Of the user's loss, as rows `[m c]`.
            share: What a term of scale one counts in that loss; a number, or `[m]`.
        """
        return terms

    def terms_of_softmax(self, prediction: Tensor, gradient: Tensor) -> LossTerms | None:
        """The plain loss' terms where the user's is seen to be of the softmax of a prediction, scaled or shifted first.

        Of a softmax surer than that of the prediction as it is, the gradient may be nothing but rounding: which rows
        have one is all that is read. None, as here: it is to be judged as any other.

        Args:
            prediction: What the model returned.
            gradient: The user's, in its shape.
        """
        return None

    def gradient_scale(self, terms_count: float) -> float:
        """Factor to make the user's gradient that of the mean loss: 1/terms_count after a sum."""
        return 1.0 / terms_count if self.reduction == "sum" and terms_count > 0 else 1.0

    def term_share(self, terms_count: float) -> float:
        """What one term counts in the loss function: 1/terms_count of a mean, 1 of a sum."""
        return 1.0 if self.reduction == "sum" else 1.0 / terms_count

    def loss_value(self, terms: LossTerms, gradient: Tensor, share: float) -> Tensor | None:
        """The loss whose gradient at the prediction is `gradient`, if each term counts `share`; 0-dim.

        It serves to verify that a loss whose target cannot be read from its gradient is the plain one: its value is at
        hand then. None, as here: not known, and such a loss is taken for the plain one.

        Args:
            terms: The loss terms.
            gradient: Of the user's loss, as rows `[m c]`.
            share: What a term of scale one counts in that loss.
        """
        return None

    def factor_of_value(
        self, terms: LossTerms, gradient: Tensor, share: float, value: float, precision: Precision
    ) -> float | None:
        """By what constant the user's loss is multiplied, from its value, where its gradient does not tell.

        Args:
            terms: The loss terms, without weights.
            gradient: Of the user's loss, as rows `[m c]`.
            share: What a term of scale one counts in the plain loss.
            value: Of the user's loss, which is nothing but a constant times the plain one.
            precision: Of the user's numbers.

        Returns:
            None, as here: the value does not tell it either.
        """
        return None

    def cotangents(
        self,
        terms: LossTerms,
        fisher_type: FisherType,
        mc_samples: int = 1,
        generator: Generator | None = None,
    ) -> Iterator[Tensor]:
        """Vectors to back-propagate, in chunks `[v, *prediction.shape]`.

        Their outer products sum (type-2) or sum in expectation (mc) to the Hessian of the *sum* over the terms; divide
        by `terms.count` for the mean loss. The type-2 vectors of one datum's terms are kept apart, since the terms
        share the graph below (a sequence of t positions has t times as many); different data share none, so that one
        vector serves all of them.

        Raises:
            ValueError: If `mc_samples` is not positive, or the empirical Fisher is asked of terms whose gradient cannot
                be known.
        """
        fisher_type = FisherType(fisher_type)
        if fisher_type is FisherType.TYPE2:
            return self._type2(terms)
        if fisher_type is FisherType.MC:
            if mc_samples < 1:
                raise ValueError(f"mc_samples={mc_samples}: the Monte-Carlo Fisher needs at least 1 sample")
            return iter((terms.restore(self.sample(terms, mc_samples, generator)),))
        if fisher_type is FisherType.FORWARD_ONLY:
            raise ValueError("fisher_type='forward-only' uses no gradients, so there are no vectors to back-propagate")
        if (scores := terms.scores) is None:
            raise ValueError(
                f"fisher_type='empirical': the gradient of each term of {self!r} cannot be read "
                "from the gradient of the whole loss (soft targets, or a loss that was rescaled); "
                "pass the target, or use 'mc' or 'type-2'"
            )
        return iter((terms.restore(scores[None]),))

    def _type2(self, terms: LossTerms) -> Iterator[Tensor]:
        chunk, positions = self.vectors_per_chunk, terms.terms_per_datum
        outputs = terms.parameters.shape[1]
        count = self.square_root_columns(outputs)
        if count * positions > MANY_VECTORS:
            warnings.warn(
                f"the type-2 Fisher ('ggn') takes a backward pass for each class or output of a datum, and there are "
                f"{count * positions}: sampling, curvature='mc' (fisher_type='mc' of operators), takes one",
                stacklevel=2,
            )
        for start in range(0, count, chunk):
            columns = self.hessian_sqrt(terms, slice(start, min(start + chunk, count)))
            if positions == 1:
                yield terms.restore(columns)
                continue
            per_position = rearrange(columns, "v (n t) c -> t v n c", t=positions)
            together = max(1, chunk // columns.shape[0])
            for first in range(0, positions, together):
                some = per_position[first : first + together]
                here = torch.arange(some.shape[0], device=some.device)
                apart = some.new_zeros(*some.shape[:3], positions, outputs)
                apart[here, :, :, first + here] = some
                yield terms.restore(rearrange(apart, "g v n t c -> (g v) (n t) c"))


def independent_columns(deviation: Tensor, columns: slice) -> Tensor:
    """Columns `[v m c]` of the diagonal matrices with diagonals `deviation` `[m c]`."""
    rows, outputs = deviation.shape
    chosen = torch.arange(outputs, device=deviation.device)[columns]
    vectors = deviation.new_zeros(len(chosen), rows, outputs)
    vectors[torch.arange(len(chosen), device=chosen.device), :, chosen] = deviation.T[columns]
    return vectors
