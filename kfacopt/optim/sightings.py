"""Which covered layers no backward shows, so that what is said of a layer is what happens to it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend
from kfacopt.layers.coverage import Coverage
from kfacopt.layers.layer import Layer
from kfacopt.optim.together import Agreement

DERIVATIVE = (
    "the loss is of a derivative of the model that the training loop takes, as a residual or a gradient penalty"
)
OF_ANOTHER_GRADIENT = (
    f"{DERIVATIVE}: the gradient of the forward that would be run again is not the one in .grad. Write a module whose "
    f"forward takes the derivatives and returns the residual, and give the optimizer that as its model; take "
    f"derivatives that are only looked at without create_graph=True"
)

_PATIENCE = 3
"""A layer that had curvature may be left out of so many updates before it is said; one that never had, of none.

An expert that a batch does not use has no gradient then and is not counted, but a few updates prove nothing.
"""


class Sightings:
    """Counts, for each covered layer, the updates of the statistics in a row that had its gradient but not its rows.

    Attributes:
        missed: By layer name.
        unseen: Names of the layers that `coverage()` and `health()` are to speak of.
    """

    def __init__(self) -> None:
        self.missed: dict[str, int] = {}
        self.unseen: set[str] = set()
        self._said: set[str] = set()

    def note(
        self,
        layers: Sequence[Layer],
        reached: Collection[str],
        gradients: Mapping[nn.Parameter, Tensor],
        backend: CurvatureBackend,
    ) -> None:
        """Take in a step on which rows were wanted; a warning names the layers that turn out unseen, once.

        Args:
            layers: The covered ones whose rows were wanted.
            reached: Names of those whose rows were delivered.
            gradients: Of the step.
            backend: Knows which layers have curvature.
        """
        for layer in layers:
            if layer.name in reached:
                self.missed[layer.name] = 0
            elif not reached and backend.ready(layer):
                continue  # no backward at all: gradients set by hand use the last curvature again, as is promised
            elif any(
                bool(layer.own_rows(r, gradients[p]).any()) for r, p in layer.parameters.items() if p in gradients
            ):
                self.missed[layer.name] = self.missed.get(layer.name, 0) + 1
            limit = _PATIENCE if backend.ready(layer) else 0
            (self.unseen.add if self.missed.get(layer.name, 0) > limit else self.unseen.discard)(layer.name)
        sought = {layer.name for layer in layers if layer.part is not None and layer.part.sought}
        new = sorted(self.unseen - self._said - sought)
        if new:
            self._said |= set(new)
            nothing = "" if reached else " (no curvature has been captured at all)"
            warnings.warn(
                f"no backward shows the curvature of {', '.join(map(repr, new))}{nothing}: they get gradients, but no "
                f"call of the modules in the model that the optimizer was given leads to a prediction. They train "
                f"without curvature, or by the one they had. Call the module itself (not its forward, not a copy, not "
                f"one that was compiled and run before, which torch._dynamo.reset() forgets), with gradients enabled "
                f"(by torch.utils.checkpoint: use_reentrant=False)",
                stacklevel=6,
            )


def warn_of_none(coverage: Coverage, wanted: Sequence[nn.Parameter]) -> None:
    """Warn that no parameter at all has curvature, or a step of its own, if some that train were to have it.

    >>> import kfacopt
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = kfacopt.KFAC(nn.PReLU(), nn.MSELoss())
    >>> print(caught[0].message)
    no parameter gets curvature, all train by AdamW (no handler for PReLU): print(optimizer.coverage())
    """
    if not any(p.requires_grad for p in wanted):
        return
    whys = dict.fromkeys(row.why for row in coverage.rows if row.treatment == "AdamW")
    named = "; ".join(list(whys)[:3]) + ("; ..." if len(whys) > 3 else "")
    warnings.warn(
        f"no parameter gets curvature, all train by AdamW ({named}): print(optimizer.coverage())", stacklevel=4
    )


def uses_out_of_sight(
    layers: Sequence[Layer], seen: Agreement, known: Collection[nn.Parameter]
) -> dict[nn.Parameter, str]:
    """Parameters of layers that act on the loss in a way that their calls do not show, and which; they get a warning.

    Args:
        layers: The covered ones.
        seen: What arrived since the last step, in all processes.
        known: Parameters of which that is known.
    """
    if not (seen.used_elsewhere or seen.in_the_loss):
        return {}
    found = {layer: how for layer in layers if (how := seen.used_elsewhere.get(layer.name)) is not None}
    if seen.in_the_loss and not seen.verified:
        found |= dict.fromkeys((layer for layer in layers if layer.name in seen.rows), DERIVATIVE)
    new = {layer: why for layer, why in found.items() if not any(p in known for p in layer.parameters.values())}
    for why in dict.fromkeys(new.values()):
        names = ", ".join(repr(layer.name) for layer in new if new[layer] == why)
        warnings.warn(f"{names}: {why}. That is not in the curvature: trained without from now on", stacklevel=4)
    return {p: why for layer, why in new.items() for p in layer.parameters.values()}
