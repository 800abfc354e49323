"""From torch's loss modules to likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from kfacopt.likelihoods.any_loss import AnyLoss, name_of
from kfacopt.likelihoods.base import Likelihood
from kfacopt.likelihoods.bernoulli import Bernoulli
from kfacopt.likelihoods.categorical import Categorical
from kfacopt.likelihoods.gaussian import Gaussian
from kfacopt.likelihoods.huber import Huber
from kfacopt.likelihoods.laplace import Laplace
from kfacopt.likelihoods.log_probabilities import KullbackLeibler, LogCategorical
from kfacopt.likelihoods.poisson import Poisson
from kfacopt.likelihoods.probability import BernoulliProbability


def _cross_entropy(loss: Any) -> Likelihood:
    return Categorical(
        class_weights=loss.weight,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        reduction=loss.reduction,
    )


def _probability(loss: Any) -> Likelihood:
    if loss.weight is not None:
        raise ValueError(
            "the argument weight of BCELoss is not supported: return logits and use nn.BCEWithLogitsLoss(weight=...), "
            "or weigh outside of the loss, with reduction='none'"
        )
    return BernoulliProbability(loss.reduction)


def _smooth_l1(loss: Any) -> Likelihood:
    if loss.beta == 0.0:
        return Laplace(reduction=loss.reduction)
    return Huber(threshold=loss.beta, bend=1.0 / loss.beta, reduction=loss.reduction)


_LIKELIHOODS: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: lambda loss: Gaussian(reduction=loss.reduction),
    nn.BCEWithLogitsLoss: lambda loss: Bernoulli(
        pos_weight=loss.pos_weight, weight=loss.weight, reduction=loss.reduction
    ),
    nn.BCELoss: _probability,
    nn.NLLLoss: lambda loss: LogCategorical(loss.weight, loss.ignore_index, loss.reduction),
    nn.KLDivLoss: lambda loss: KullbackLeibler(loss.log_target, loss.reduction),
    nn.SmoothL1Loss: _smooth_l1,
    nn.HuberLoss: lambda loss: Huber(threshold=loss.delta, reduction=loss.reduction),
    nn.L1Loss: lambda loss: Laplace(reduction=loss.reduction),
    nn.PoissonNLLLoss: lambda loss: Poisson(loss.log_input, loss.full, loss.eps, loss.reduction),
}
_SUPPORTED = ", ".join(f"nn.{kind.__name__}" for kind in _LIKELIHOODS) + " or a kfacopt Likelihood"
_INSTEAD = {
    nn.GaussianNLLLoss: "it takes two predictions: pass it alone, to an optimizer",
}
_EMPIRICAL = "Or train with curvature='empirical' (fisher_type='empirical' of operators), which any loss has"


def likelihood_from(loss_func: Any, *, empirical: bool = False) -> Likelihood:
    """The likelihood of a loss function.

    Args:
        loss_func: An instance of one of torch's losses (`CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`, `NLLLoss`,
            `BCELoss`, `KLDivLoss`, `SmoothL1Loss`, `HuberLoss`, `L1Loss`, `PoissonNLLLoss`), or a `Likelihood`, which
            is returned as it is.
        empirical: Whether only the empirical Fisher is wanted: any other module or function is an `AnyLoss` then.

    Raises:
        TypeError: If it is anything else, a subclass with a `forward` of its own included: its Hessian is not known.
        ValueError: If one of its arguments cannot be honoured; the argument is named.

    >>> likelihood_from(nn.CrossEntropyLoss(label_smoothing=0.1))
    Categorical(class_weights=None, ignore_index=-100, label_smoothing=0.1, reduction='mean')
    >>> likelihood_from(nn.CosineEmbeddingLoss(), empirical=True)
    AnyLoss(CosineEmbeddingLoss)
    >>> likelihood_from(nn.MultiMarginLoss())
    Traceback (most recent call last):
    TypeError: loss_func MultiMarginLoss is not supported: its curvature is not known. ...
    """
    if isinstance(loss_func, Likelihood):
        return loss_func
    if isinstance(loss_func, type):
        name = loss_func.__name__
        raise TypeError(f"loss_func is the class {name}, not an instance: pass {name}()")
    kind = next((kind for kind in _LIKELIHOODS if isinstance(loss_func, kind)), None)
    if kind is not None and type(loss_func).forward is kind.forward:
        return _LIKELIHOODS[kind](loss_func)
    if empirical and callable(loss_func):
        return AnyLoss(loss_func)
    raise TypeError(_refusal(loss_func, kind))


def _refusal(loss_func: Any, kind: type[nn.Module] | None) -> str:
    name = name_of(loss_func)
    if kind is not None:
        return (
            f"loss_func {name} overrides the forward of {kind.__name__}, so its Hessian is not known: pass "
            f"{_SUPPORTED}. {_EMPIRICAL}"
        )
    if not isinstance(loss_func, nn.Module):
        more = f". {_EMPIRICAL}" if callable(loss_func) else ""
        return f"loss_func {name} is not a module: pass {_SUPPORTED}{more}"
    reason = next((text for other, text in _INSTEAD.items() if isinstance(loss_func, other)), None)
    reason = reason or "its curvature is not known"
    return f"loss_func {name} is not supported: {reason}. Supported: {_SUPPORTED}. {_EMPIRICAL}"
