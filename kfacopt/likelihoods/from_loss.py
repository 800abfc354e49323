"""From torch's loss modules to likelihoods."""

from __future__ import annotations

from torch import nn

from kfacopt.likelihoods.base import Likelihood
from kfacopt.likelihoods.bernoulli import Bernoulli
from kfacopt.likelihoods.categorical import Categorical
from kfacopt.likelihoods.gaussian import Gaussian

_SUPPORTED = "nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss or a kfacopt Likelihood"
_INSTEAD = {
    nn.NLLLoss: "it takes log-probabilities: return logits and use nn.CrossEntropyLoss",
    nn.BCELoss: "it takes probabilities: return logits and use nn.BCEWithLogitsLoss",
}


def likelihood_from(loss_func: nn.Module | Likelihood) -> Likelihood:
    """The likelihood of a loss function.

    Args:
        loss_func: An instance of `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`, or a `Likelihood`,
            which is returned as it is.

    Raises:
        TypeError: If it is anything else, a subclass with a `forward` of its own included: its Hessian is not known.
        ValueError: If one of its arguments cannot be honoured; the argument is named.

    >>> likelihood_from(nn.CrossEntropyLoss(label_smoothing=0.1))
    Categorical(class_weights=None, ignore_index=-100, label_smoothing=0.1, reduction='mean')
    >>> likelihood_from(nn.NLLLoss())
    Traceback (most recent call last):
    TypeError: loss_func NLLLoss is not supported: it takes log-probabilities: ...
    """
    if isinstance(loss_func, Likelihood):
        return loss_func
    if isinstance(loss_func, type):
        name = loss_func.__name__
        raise TypeError(f"loss_func is the class {name}, not an instance: pass {name}()")
    name = type(loss_func).__name__
    for known in (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss):
        if isinstance(loss_func, known) and type(loss_func).forward is not known.forward:
            raise TypeError(
                f"loss_func {name} overrides the forward of {known.__name__}, so its Hessian is "
                f"not known: pass {_SUPPORTED}"
            )
    if isinstance(loss_func, nn.CrossEntropyLoss):
        return Categorical(
            class_weights=loss_func.weight,
            ignore_index=loss_func.ignore_index,
            label_smoothing=loss_func.label_smoothing,
            reduction=loss_func.reduction,
        )
    if isinstance(loss_func, nn.MSELoss):
        return Gaussian(reduction=loss_func.reduction)
    if isinstance(loss_func, nn.BCEWithLogitsLoss):
        return Bernoulli(pos_weight=loss_func.pos_weight, weight=loss_func.weight, reduction=loss_func.reduction)
    if not isinstance(loss_func, nn.Module):
        name = getattr(loss_func, "__name__", name)
        raise TypeError(f"loss_func {name} is not a module: pass {_SUPPORTED}")
    reason = next((text for kind, text in _INSTEAD.items() if isinstance(loss_func, kind)), None)
    reason = reason or "its curvature is not known"
    raise TypeError(f"loss_func {name} is not supported: {reason}. Supported: {_SUPPORTED}")
