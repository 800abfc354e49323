"""What a forward leaves behind until the backward and the step that follow it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfacopt.capture.buffers import copied_buffers
from kfacopt.capture.graph import Mark, Uses
from kfacopt.capture.scaling import LossScale
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import LossTerms


@dataclass(eq=False)
class Site:
    """One call of a covered module: what it saw, and which outputs of which nodes its gradient arrives at.

    Most calls have one output, whose gradient is that of the layer's. `uses` counts how often the call itself read the
    layer's parameters; of a module with several parts, the first site counts for all. `arrange` makes of what arrives
    at the nodes (None: nothing) the gradient of an output of the given shape.
    """

    layer: Layer
    module: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_nrs: tuple[int, ...]
    shape: torch.Size
    uses: Uses
    arrange: Callable[[Sequence[Tensor | None]], Tensor] | None = None

    def arranged(self, arrived: Sequence[Tensor | None]) -> Tensor:
        """What arrived at each node, `[v ...]`, as the gradient of the output, `[v, *shape]`."""
        if self.arrange is not None:
            return self.arrange(arrived)
        (gradient,) = arrived
        assert gradient is not None
        return gradient


Marks = tuple[weakref.ref[Mark], ...]
"""On the nodes at which a site's gradients arrive."""


@dataclass(eq=False)
class Call:
    """What is needed to run a forward again: the damping rule compares the loss before and after a step.

    `inside` is the module within it whose output is the prediction, where the forward returns the loss; `place` which
    tensor of the output is, where that was told by the loss alone.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: Tensor
    device_random_state: Tensor | None
    autocast_dtype: torch.dtype | None
    inside: nn.Module | None = None
    place: int | None = None

    @classmethod
    def now(cls, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call that begins now: with the present random states and autocast context."""
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = "cuda" if torch.cuda.is_available() and torch.is_autocast_enabled("cuda") else "cpu"
        autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        device_random_state = torch.cuda.get_rng_state() if cuda else None
        return cls(module, inputs, dict(kwargs), torch.get_rng_state(), device_random_state, autocast_dtype)

    def autocast(self) -> torch.autocast:
        """The autocast context that the forward ran in."""
        device = "cpu" if self.device_random_state is None else "cuda"
        return torch.autocast(device, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def run(self) -> Any:
        """The forward again, in the ambient gradient mode: same random numbers, buffers left as they are.

        Buffers are swapped for copies while it runs, not written back, so that a graph that saved them stays valid.
        """
        with torch.random.fork_rng(), self.autocast(), copied_buffers(self.module):
            torch.set_rng_state(self.random_state)
            if self.device_random_state is not None:
                torch.cuda.set_rng_state(self.device_random_state)
            if self.inside is None:
                return self.module(*self.inputs, **self.kwargs)
            outputs: list[Any] = []
            handle = self.inside.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            try:
                self.module(*self.inputs, **self.kwargs)
            finally:
                handle.remove()
            return outputs[-1]


@dataclass(eq=False)
class Forward:
    """One call of a root (the outermost module that was entered), as long as the graph of its prediction lives.

    Of an ambiguous output every tensor keeps one; they are no predictions unless no later root uses them, and the loss
    is taken of one alone (`kfacopt.capture.candidates`).
    """

    root: nn.Module
    sites: dict[Site, Marks]  # the calls within
    call: Call | None
    prediction: Tensor | None = None
    version: int = 0
    output_nr: int = 0
    refusal: str = ""
    name: str = ""  # of the loss term, where a model returns several predictions
    of: object = None  # the same for all predictions of one call
    rivals: object = None  # the same for those predictions of a call of which one alone is it; None: it has none
    beside: dict[str, Tensor] = field(default_factory=dict)  # all predictions of the call, by name
    may_be_several: bool = False  # whether all rivals that the loss is taken of are predictions
    leads_on: bool = False  # whether another prediction of the call is computed from this one
    targets: list[Tensor] = field(default_factory=list)  # that the optimizer's loss modules were called with

    def consume(self) -> None:
        """Its backward has come: what was kept for it is not needed any more."""
        self.sites.clear()
        self.targets.clear()
        self.beside = {}
        self.prediction = None


Alive = MutableMapping[Mark, Forward]
"""The forwards whose backward may come, by the marks on their predictions' nodes."""


@dataclass(eq=False)
class Replay:
    """A forward that took part in a step: how to run it again, its loss terms, the user's gradient there."""

    call: Call
    terms: LossTerms
    gradient: Tensor
    name: str = ""
    whole: bool = True  # False: other roots' forwards lead to the prediction, which are not run again


@dataclass
class Tally:
    """What arrived since the last step: loss terms, forwards that can be run again, curvature passes and their time.

    `verified`: whether every gradient at a prediction was found to be that of the announced loss. `scale`: the factors
    of the loss; who merges two tallies merges these.
    """

    terms: Tensor | float = 0.0
    replays: list[Replay] = field(default_factory=list)
    replayable: bool = True
    verified: bool = True
    passes: int = 0
    seconds: float = 0.0
    scale: LossScale = field(default_factory=LossScale)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python; forwards cannot be kept."""
        scale = self.scale.state_dict()
        return {"pending_terms": float(self.terms), "pending_passes": self.passes, "pending_scale": scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, or nothing."""
        self.terms, self.passes = float(state.get("pending_terms", 0.0)), int(state.get("pending_passes", 0))
        self.scale = LossScale.of_state(state.get("pending_scale", {}))

    def merge(self, other: Tally) -> None:
        """Add what another tally counted."""
        self.terms = self.terms + other.terms
        self.replays += other.replays
        self.replayable &= other.replayable
        self.verified &= other.verified
        self.passes += other.passes
        self.seconds += other.seconds
