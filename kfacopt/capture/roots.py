"""Which call's output holds the prediction, and signs that it is none.

The outermost call of a module that is watched is a root; but a number without axes is a loss, not a prediction. A root
that returns no more than that hands on to the outermost call within it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kfacopt.likelihoods import LossTerms
from kfacopt.likelihoods.estimator import may_be_prediction, tensors_of

Found = tuple[nn.Module, Any]
"""A call whose output may hold a prediction: the module, and the output."""


@dataclass(eq=False)
class OpenCall:
    """A call that is under way, and the calls of modules with parameters that have ended right within it.

    Outputs may be large: beyond the first they are kept within a root alone, and not of an `nn.Sequential`, which hands
    one on to the next and returns no loss.
    """

    calls: int = 0
    outputs: list[Found] = field(default_factory=list)

    def note(self, found: Found | None, keep: bool = False) -> None:
        """Take in a call that has ended within this one; None: it returned losses alone."""
        if found is not None and next(found[0].parameters(), None) is not None:
            self.calls += 1
            if keep or not self.outputs:
                self.outputs.append(found)

    @property
    def sole(self) -> Found | None:
        """What the only call within it returned; None: there was another number of them."""
        return self.outputs[0] if self.calls == 1 else None

    def found(self, module: nn.Module, output: Any) -> Found | None:
        """Where the prediction is, now that this call of `module` has returned `output`.

        >>> import torch
        >>> net, loss = nn.Linear(2, 1), torch.ones((), requires_grad=True)
        >>> root = OpenCall()
        >>> root.note((net, net(torch.ones(3, 2))))
        >>> root.found(nn.Identity(), {"loss": loss})[0] is net
        True
        """
        return self.sole if returns_losses(output) else (module, output)

    def refusal(self) -> str:
        """Why there is no prediction in this call."""
        return (
            f"it holds only numbers without axes (losses), and {self.calls} calls of modules with parameters within it "
            f"could have made the prediction: return that beside the loss, and pass prediction=lambda output: ..."
        )


def returns_losses(output: Any) -> bool:
    """Whether an output has differentiable numbers, and they have no axes."""
    tensors = tensors_of(output)
    return any(t.requires_grad for t in tensors) and not any(map(may_be_prediction, tensors))


def refuse_reduced(terms: LossTerms, prediction: Tensor, gradient: Tensor, name: str) -> None:
    """Refuse a gradient that is the same along an axis on which the prediction varies: a sum or a mean was taken of it.

    A squared error has such a gradient if the targets vary exactly as the prediction does, which no data do. Of other
    losses the gradients are equal where each is wrong and certain, but then one weight explains them all.

    Raises:
        ValueError: If so.
    """
    if prediction.ndim == 0 or (terms.reads_target and _explained(terms)):
        return
    lone = tuple(prediction.shape) == (1,) and bool(gradient == 1.0)
    for axis in range(prediction.ndim):
        first = gradient.select(axis, 0).unsqueeze(axis) if prediction.shape[axis] > 1 else gradient
        same = bool((gradient == first).all()) and bool(gradient.any())
        varying = (prediction != prediction.select(axis, 0).unsqueeze(axis)) & (gradient != 0.0)
        lone |= same and int(varying.sum()) >= _PAIRS
    if lone:
        raise ValueError(
            f"the gradient at the output of {name} is that of a sum or mean of it, not that of the announced loss: the "
            f"output may be the losses themselves. The loss must be taken of the prediction as it is: return that "
            f"from a module, and pass prediction=lambda output: ... where it is one output of several. A forward and "
            f"backward that only another optimizer's step follows (an actor's, through its critic) goes within "
            f"optimizer.paused()"
        )


_PAIRS = 4
"""So many numbers that vary with equal gradients: fewer may be rounding in half precision."""


def _explained(terms: LossTerms) -> bool:
    """Whether the terms are the announced loss's, times one number; of a sole term any number could be."""
    if terms.weights is None:
        return False
    counted = terms.weights[terms.scale > 0]
    return bool((counted == (1.0 if len(counted) == 1 else counted[:1])).all())
