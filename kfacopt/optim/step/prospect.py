"""What a step of fixed length promises: a step is not to go far past the lowest point of its own quadratic model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import FisherType
from kfacopt.linalg.tensors import inner_products
from kfacopt.optim.step.base import Prospect, Step
from kfacopt.optim.step.stacks import Stack, key_of

MARGIN = 3.0
"""Default margin: the slope along a step is to be at least so many times what the step's curvature takes off it.

Of thirty-four tasks it matters to one, an image learned through sines of thirty times their inputs (SIREN), where no
step helped: slope over curvature had a minimum of 0.008 there, of 2 to 3 on two tables and a contrastive loss, below 3
in one step of twenty, and of 3.5 to 900 on the others.
"""


def prospect_of(
    step: Step, stacks: Sequence[Stack], moved: Sequence[Tensor], length: float, margin: float
) -> Prospect | None:
    """What a step promises of the layers with curvature, at the groups' learning rates; None: there are none.

    Along the step `-lr U` the model of the loss is `-t lr ⟨M, U⟩ + ½ t² lr² ⟨U, C U⟩`. U has rows of one length, which
    point everywhere: for `⟨U, C U⟩` its squared norm is taken times C's mean eigenvalue, which is known anyway. So all
    that a step pays for is the slope.

    Args:
        step: In whose momentum M the slope is.
        stacks: With M, `[b *k o i]` each.
        moved: U, shaped as they are.
        length: Of each holder's U, in units of the stack's.
        margin: How many times what the curvature takes off a step its slope is to be.
    """
    means = _mean_curvatures(step)
    curved = [(s, u) for s, u in zip(stacks, moved, strict=True) if s.curved and all(la in means for la in s.layers)]
    if not curved:
        return None
    rates = {id(p): float(group["lr"]) for group in step.groups for p in group["params"]}
    slopes, weights, cost = list[tuple[Tensor, Tensor]](), list[float](), 0.0
    for stack, updates in curved:
        own = [rates[id(key_of(layer)[0])] for layer in stack.layers]
        for rate, layer in zip(own, stack.layers, strict=True):
            # A layer that takes turns goes `stride` times as far, once in so many steps.
            cost += rate**2 * means[layer] * (length * stack.length) ** 2 / stack.stride
        same = len(set(own)) == 1
        slopes += [(stack.matrices, updates)] if same else zip(stack.matrices, updates, strict=True)
        weights += own[:1] if same else own
    dots = inner_products([m for m, _ in slopes], [u for _, u in slopes])
    slope = dots.sum() * weights[0] if len(set(weights)) == 1 else dots @ dots.new_tensor(weights)
    return Prospect(slope, margin * cost)


def _mean_curvatures(step: Step) -> dict[Layer, float]:
    """Mean eigenvalues of the layers' curvature, in the scale of gradients, as far as they are known.

    Layers with large inputs are left out: their steps have units of their own (`kfacopt.optim.step.inputs`). None are
    where curvature is not a loss' expected one but gradients' squares: it has another unit than the loss.
    """
    estimator, backend = step.estimator, step.backend
    known = all(likelihood.is_known for likelihood in estimator.likelihoods.values())
    if backend is None or not known or estimator.fisher_type is FisherType.EMPIRICAL:
        return {}
    try:
        means = backend.mean_eigenvalues()
    except NotImplementedError:
        return {}
    # Where inputs are taken for white, they have the size of one in the curvature.
    sizes: Mapping[str, float] = {} if backend.needs_inputs else step.input_sizes
    return {la: mean * sizes.get(la.name, 1.0) for la, mean in means.items() if la.name not in step.large}
