"""By what factors the user's loss differs from the plain one, over the backwards of one step.

The user's loss is `Σ_b Σ_m w_m share_b l_m` over the backwards b (micro-batches): what it counts a term is read at each
prediction (`kfacopt.likelihoods.weights`), and the statistics are sums over all of them. So that they keep the size of
a mean loss' whatever the loss is multiplied with (a loss scaler's factor would leave half precision's range), rows are
delivered relative to the step's first backward, and `rescaling` says at the end what they lack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfacopt.capture.loss_graph import LossGraph, LossValue
from kfacopt.layers.base import Rows
from kfacopt.likelihoods import Likelihood, LossTerms
from kfacopt.likelihoods.precision import Precision
from kfacopt.likelihoods.weights import mean_weight, times, weighed
from kfacopt.linalg.tensors import real_views
from kfacopt.sharding import shard_of

OTHER_LAYERS = (
    "Where other layers lie between, as a discriminator behind a generator, give the optimizer a model that contains "
    "them: nn.Sequential(generator, discriminator), with params=list(generator.parameters()). Or pass "
    "curvature='empirical' with the loss as a function, of which only gradients are read (similarities of embeddings). "
    "A forward and backward that only another optimizer's step follows (an actor's, through its critic) goes within "
    "optimizer.paused()"
)
"""What to do where the loss is taken of something that is computed from the prediction."""


@dataclass(eq=False)
class Seen:
    """One prediction that a backward reached: its terms, the user's gradient as rows `[m c]`, the loss above it.

    The loss is None where it could not be seen; `precision` is that of the user's numbers.
    """

    name: str
    likelihood: Likelihood
    terms: LossTerms
    gradient: Tensor
    loss: LossValue | None
    precision: Precision

    def value(self, share: float, factor: float) -> Tensor | None:
        """Its part of a loss that is `factor` times the user's; `share` is what that counts a term untold."""
        if self.terms.weights is not None:
            share = factor * self.likelihood.term_share(float(self.terms.count))
        return self.likelihood.loss_value(self.terms, factor * self.gradient, share)


class Reference(NamedTuple):
    """The prediction that rows are delivered relative to.

    Its mean weight over the one that was announced (one of several losses may have one), its number of terms, whether
    the loss is a mean over them, and whether the weight was told (if not, it is one).
    """

    weight: float
    terms: float
    averaged: bool
    told: bool = True

    def over(self, other: Reference) -> tuple[float, float]:
        """Factor of another prediction's terms, and what sums over its rows are to be divided by.

        Means of any number of terms are so added as means; sums as sums.
        """
        if self.averaged:
            return self.terms / (other.terms * self.weight), self.terms
        return 1.0 / self.weight, other.terms


@dataclass(eq=False)
class LossScale:
    """What the backwards since the last step showed of the loss' factors.

    Attributes:
        told: By name of the loss term, `(mean weight, number of terms)` of every prediction that told its weights.
        first: The first of all; None: none has told.
        seen: Predictions whose weights are not known, and all where several may share a loss with such.
        arrived: How many predictions came, by name of the loss term.
        left: Norms of the parameters' gradients as the last backward left them, if the step may have to know; or None.
    """

    told: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    first: Reference | None = None
    seen: list[Seen] = field(default_factory=list)
    arrived: Counter[str] = field(default_factory=Counter)
    left: Tensor | None = None

    def weighed(
        self,
        name: str,
        likelihoods: Mapping[str, Likelihood],
        terms: LossTerms,
        gradient: Tensor,
        node: Node,
        graph_of: Callable[[], LossGraph | None],
    ) -> LossTerms:
        """The terms with their weights in the user's loss where these can be told; what cannot is noted.

        Args:
            name: Of the loss term.
            likelihoods: Of all loss terms.
            terms: As the likelihood read them.
            gradient: The user's, at the prediction.
            node: The prediction's.
            graph_of: The graph above the predictions, if it can be seen; asked for only if it is needed.
        """
        likelihood = likelihoods[name]
        terms = weighed(likelihood, terms, gradient)
        if (terms.weights is not None and len(likelihoods) == 1) or terms.rows is None:
            return terms
        graph, rows = graph_of(), terms.rows(gradient).to(terms.parameters.dtype)
        if terms.weights is None and graph is not None:
            terms = told_by_value(likelihood, terms, rows, Precision.of(gradient), graph, node)
        if terms.weights is None or len(likelihoods) > 1:
            loss = None if graph is None else graph.loss
            self.seen.append(Seen(name, likelihood, terms, rows, loss, Precision.of(gradient)))
        return terms

    def relative(
        self, name: str, likelihood: Likelihood, terms: LossTerms, announced: float = 1.0
    ) -> tuple[LossTerms, Tensor]:
        """The terms as rows are made of them, and what sums over those rows are to be divided by.

        Args:
            name: Of the loss term; of several losses one that does not tell its weight has the announced one, times
                the factor that the others have over theirs.
            likelihood, terms: Of the prediction.
            announced: The loss term's weight in the whole loss.
        """
        self.arrived[name] += 1
        if terms.weights is None and not name:
            return terms, terms.count
        found = Reference(1.0, float(terms.count), likelihood.reduction != "sum", told=False)
        if terms.weights is not None:
            weight = mean_weight(terms)
            found = found._replace(weight=weight / announced, told=True)
            self.told.setdefault(name, []).append((weight, found.terms))
        else:
            # The user's gradient has the weight already.
            weights = torch.full_like(terms.scale, announced)
            terms = replace(terms, scale=terms.scale * announced, weights=weights)
        self.first = self.first or found
        if found.told and not self.first.told:
            self.first = self.first._replace(weight=found.weight, told=True)
        factor, count = (self.first if found.told else self.first._replace(weight=1.0)).over(found)
        return (terms if factor == 1.0 else times(terms, factor)), torch.full_like(terms.count, count)

    def merge(self, other: LossScale) -> Callable[[Rows], Rows]:
        """Take in what other backwards told.

        Returns:
            What brings their rows, delivered relative to their own first, to what ours are relative to.
        """
        for name, told in other.told.items():
            self.told.setdefault(name, []).extend(told)
        self.seen += other.seen
        self.arrived += other.arrived
        if self.first is None or other.first is None:
            self.first = self.first or other.first
            return lambda rows: rows
        first, theirs = self.first, other.first
        if not (first.told and theirs.told):  # rows of either are in units of the weights that were announced
            self.first = first if first.told else first._replace(weight=theirs.weight, told=theirs.told)
            first, theirs = first._replace(weight=1.0), theirs._replace(weight=1.0)

        def adapted(rows: Rows) -> Rows:
            factor, count = first.over(theirs._replace(weight=1.0))
            gradients = rows.gradients * (factor * theirs.weight) ** 0.5
            return rows.but(gradients=gradients, terms=torch.full_like(rows.terms, count))

        return adapted if first != theirs else lambda rows: rows

    def rescaling(self, backwards: int, undone: float, empirical: bool) -> float:
        """What a layer's rows lack, averaged as they were delivered in `backwards` of the backwards.

        Args:
            backwards: How many reached the layer.
            undone: What the user multiplied the gradients with to undo a scale of the loss.
            empirical: Whether they are the user's own gradients where nothing tells their factor.
        """
        if self.first is not None and not self.first.told:
            # Sums over the losses, means over the backwards.
            each = max(self.arrived.values(), default=1)
            averaged = each if self.first.averaged else 1.0
            return backwards / each * ((undone * averaged) ** 2 if empirical else 1.0)
        if self.first is None:
            averaged = self.is_open and self.seen[0].likelihood.reduction != "sum"
            return (undone * (backwards if averaged else 1.0)) ** 2 if empirical else 1.0
        return undone * self.first.weight * (backwards if self.first.averaged else 1.0)

    def factor(self, likelihoods: Mapping[str, Likelihood], weights: Mapping[str, float]) -> float:
        """What the whole loss is, over the plain one; 1 where nothing tells.

        Args:
            likelihoods, weights: Of the loss terms by name, as they were announced.
        """
        found = []
        for name, told in self.told.items():
            whole = sum(w for w, _ in told)
            if likelihoods[name].reduction == "sum":
                whole = sum(w * n for w, n in told) / sum(n for _, n in told)
            found.append(whole / weights[name])
        return sum(found) / len(found) if found else 1.0

    @property
    def is_open(self) -> bool:
        """Whether there are predictions whose weights are not known."""
        return any(one.terms.weights is None for one in self.seen)

    @property
    def has_value(self) -> bool:
        """Whether the loss' value verifies what the gradients do not tell."""
        return self.is_open and all(one.value(1.0, 1.0) is not None for one in self.seen)

    @property
    def wants_norms(self) -> bool:
        """Whether it matters what becomes of the gradients between backward and step: the loss may be scaled."""
        told = [weight for pairs in self.told.values() for weight, _ in pairs]
        return self.is_open or len(told) > 1 or any(weight != 1.0 for weight in told)

    def note_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Note what a backward has left in `.grad`."""
        self.left = norms_of(gradients) if self.wants_norms else None

    def state_dict(self) -> dict[str, Any]:
        """Plain Python; what only the step's own batches tell is left out, as they are."""
        left = None if self.left is None else self.left.tolist()
        return {"told": self.told, "first": self.first and list(self.first), "left": left} | {
            "arrived": dict(self.arrived)
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LossScale:
        """From what `state_dict` returned, or nothing."""
        told = {name: [(float(w), float(n)) for w, n in pairs] for name, pairs in state.get("told", {}).items()}
        first, left = state.get("first"), state.get("left")
        return cls(
            told,
            None if first is None else Reference(*first),
            arrived=Counter(state.get("arrived", {})),
            left=None if left is None else torch.tensor(left, dtype=torch.float64),
        )


def norms_of(gradients: Sequence[Tensor | None]) -> Tensor:
    """Of dense gradients, in float32 at least, `[p]` in float64; 0 where there is none. Of sharded ones this process's.

    >>> norms_of([None, torch.tensor([3.0, 4.0])])
    tensor([0., 5.], dtype=torch.float64)
    """
    dense = real_views([shard_of(g) for g in gradients if g is not None and not g.is_sparse])
    norms = iter(torch._foreach_norm(dense, 2, torch.float64 if _any_double(dense) else torch.float32) if dense else ())
    device = dense[0].device if dense else None
    zero = torch.zeros((), dtype=torch.float64, device=device)
    found = [zero if g is None or g.is_sparse else next(norms).to(device, torch.float64) for g in gradients]
    return torch.stack(found) if found else zero[None][:0]


def terms_of(likelihood: Likelihood, prediction: Tensor, gradient: Tensor, targets: Sequence[Tensor]) -> LossTerms:
    """The loss terms of a prediction, from the user's gradient there, or from the target if there is but one.

    A target counts where the gradient is that of weighted terms with this target: the user's loss may be another than
    the one that was called.

    Raises:
        ValueError: If the gradient is not that of the likelihood.
    """
    if len(targets) == 1:
        try:
            terms = likelihood.terms(prediction, target=targets[0])
        except ValueError:  # a target that torch would broadcast, say: the gradient tells more
            return likelihood.terms(prediction, gradient=gradient)
        found = weighed(likelihood, terms, gradient) if bool(terms.count > 0) else terms
        if found.weights is not None:
            return found
    return likelihood.terms(prediction, gradient=gradient)


def own_terms(likelihood: Likelihood, prediction: Tensor, gradient: Tensor, targets: Sequence[Tensor]) -> LossTerms:
    """The loss terms of a prediction whose gradient is not the loss' alone: nothing but its being there is read of it.

    Raises:
        ValueError: If they depend on the target, and none was seen.
    """
    if len(targets) == 1:
        return likelihood.terms(prediction, target=targets[0])
    if not likelihood.is_known:
        return likelihood.terms(prediction, gradient=gradient)
    try:
        return likelihood.terms(prediction)
    except ValueError as error:
        raise ValueError(
            f"{error}. (The gradient is not read with extra_terms=True, or where another output is computed from this "
            f"one: let the loop call the very loss module that the optimizer was given, once for each prediction, so "
            f"that its target is seen)"
        ) from error


def told_by_value(
    likelihood: Likelihood, terms: LossTerms, gradient: Tensor, precision: Precision, graph: LossGraph, node: Node
) -> LossTerms:
    """Terms whose gradients tell no target, with the factor that the value of the loss tells, where it does.

    Gradient u and value L give the constant that the loss is multiplied with (`Likelihood.factor_of_value`; of squared
    errors `Σ u² / L` grows with it). That L has nothing else in it, and the constant is one for all terms, is seen in
    the graph; or that torch's loss is added to the whole as it is.

    Args:
        likelihood, terms: What is known without.
        gradient: The user's, as rows `[m c]`.
        precision: Of the user's numbers.
        graph, node: The graph above the predictions, and the prediction.

    Raises:
        ValueError: If the graph shows another loss of torch's, or another layer before it.
    """
    if likelihood.is_known and (layer := graph.layer_above(node)) is not None:
        raise ValueError(
            f"the loss that was differentiated is of what another layer (torch's {layer}) makes of the prediction, not "
            f"of the prediction itself, as {likelihood!r} has it. {OTHER_LAYERS}"
        )
    share, kind = likelihood.term_share(float(terms.count)), likelihood.loss_nodes
    if not kind:
        return terms
    if (other := graph.other_loss(node, kind)) is not None:
        raise ValueError(
            f"the loss that was differentiated is torch's {other}, not that of {likelihood!r}: pass the loss_func that "
            f"the training loop uses (or a kfacopt.Likelihood of it)"
        )
    factor: Tensor | float | None = None
    if graph.is_uniform(node, kind):
        factor = likelihood.factor_of_value(terms, gradient, share, graph.loss.value, precision)
        factor = 1.0 if factor is not None and abs(factor - 1.0) <= precision.factor else factor
    elif (reduction := graph.added(node, kind)) is not None:
        factor = (1.0 if reduction == "sum" else 1.0 / gradient.numel()) / (share * terms.scale)
    if factor is not None:
        terms = likelihood.at_share(terms, gradient, share * factor)
        return replace(times(terms, factor), gradient=gradient / share)
    return terms


def _any_double(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype == torch.float64 for t in tensors)
