"""Which of the user's backwards are the step's: those whose gradients end up in `.grad`.

A backward brings the parameters' gradients into `.grad`; or returns them (`autograd.grad`), and whether the user puts
them into `.grad` shows later; or asks for other gradients altogether (saliency, adversarial inputs), and then it is
none of the optimizer's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfacopt.capture.graph import Mark
from kfacopt.capture.records import Tally
from kfacopt.fsdp import ShardedModel
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer
from kfacopt.sharding import shard_of


class Destination(Enum):
    """Where a backward brings the gradients of the parameters."""

    GRAD = "added to .grad"
    RETURNED = "returned by autograd.grad"
    NOWHERE = "not computed"


class Gradients:
    """The gradients of a model's parameters, and where the backward that runs brings them.

    Args:
        parameters: The model's.
        sharded: The parts of the model that an engine shards: gradients come to the whole copies then.

    >>> weight, x = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    >>> gradients, found = Gradients([weight]), []
    >>> loss = (weight * x).sum()
    >>> handle = loss.grad_fn.register_prehook(lambda _: found.append(gradients.destination().name))
    >>> _ = torch.autograd.grad(loss, x, retain_graph=True)
    >>> _ = torch.autograd.grad(loss, weight, retain_graph=True)
    >>> loss.backward()
    >>> found
    ['NOWHERE', 'RETURNED', 'GRAD']
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sharded: ShardedModel | None = None) -> None:
        self._parameters, self._sharded = parameters, sharded
        self._asked = (-1, Destination.NOWHERE)  # the last backward asked about, and the answer

    def destination(self) -> Destination:
        """Where the running backward brings them; to be asked within a backward."""
        task = torch._C._current_graph_task_id()
        if self._asked[0] != task:
            self._asked = task, self._destination()
        return self._asked[1]

    def _destination(self) -> Destination:
        found = Destination.NOWHERE
        for parameter in self._parameters:
            if parameter.requires_grad:
                try:
                    leaf = parameter if self._sharded is None else self._sharded.leaf(parameter)
                    if torch._C._will_engine_execute_node(get_gradient_edge(leaf).node):
                        return Destination.GRAD
                except RuntimeError:  # torch refuses the question for what autograd.grad returns
                    found = Destination.RETURNED
        return found

    @property
    def thrown_away(self) -> bool:
        """Whether nothing but zeros lies in `.grad`: whatever was brought there is gone."""
        held = [shard_of(p.grad) for p in self._parameters if p.grad is not None]
        # A vocabulary's rows are zero but for a few words': the others tell first.
        if any(map(_any, sorted(held, key=torch.numel))) or (self._sharded is not None and self._sharded.has_waiting):
            return False
        # A process may have no row of any parameter: it sees no gradient that is there.
        return not held or any(map(torch.numel, held))

    def held(self) -> list[Tensor | None]:
        """The tensors in `.grad`, as they are."""
        return [p.grad for p in self._parameters]


def _any(gradient: Tensor) -> bool:
    return gradient._nnz() > 0 if gradient.is_sparse else bool(gradient.any())


class Returned:
    """What the passes of backwards brought whose gradients were returned: the step's if those are put into `.grad`.

    That is seen by another tensor lying there than the last backward left; a change in place may be a clipped or
    unscaled norm. If no other backward left a gradient, what lies there at the step can only be theirs.

    Args:
        gradients: Of the model.

    Attributes:
        marks: Of the predictions that were reached.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._reset()

    def forget(self) -> None:
        """Forget everything; of most steps there is nothing."""
        if self._pending or self.tally.passes:
            self._reset()

    def _reset(self) -> None:
        self.tally = Tally()
        self.marks: weakref.WeakSet[Mark] = weakref.WeakSet()
        self._rows: list[tuple[Layer, Rows]] = []
        self._refusal: Exception | None = None
        self._pending = self._taken = False
        self._seen: list[Tensor | None] = []

    @contextmanager
    def taking_in(self, mark: Mark) -> Iterator[None]:
        """Around such a pass. An error is nobody's business unless the step takes the gradient."""
        self.look()
        kept = len(self._rows)
        try:
            yield
        except (ValueError, RuntimeError, NotImplementedError) as error:
            del self._rows[kept:]
            self._refusal = self._refusal or error
        self.marks.add(mark)
        self._pending = True
        self.remember()

    def keep(self, layer: Layer, rows: Rows) -> None:
        """Take in rows of a layer."""
        self._rows.append((layer, rows))

    def look(self) -> None:
        """Before a backward changes `.grad`: see whether the user did."""
        now = self._gradients.held() if self._pending else []
        self._taken |= any(new is not old and new is not None for new, old in zip(now, self._seen, strict=True))

    def remember(self) -> None:
        """After a backward: what lies in `.grad` now is not by the user's hand."""
        self._seen = self._gradients.held() if self._pending else []

    def settle(self, tally: Tally, deliver: Callable[[Layer, Rows], None]) -> None:
        """At the step: hand on what is the step's, and forget the rest.

        Raises:
            ValueError, RuntimeError, NotImplementedError: If a gradient that the step takes is not the loss's.
        """
        if not self._pending:
            return
        self.look()
        if self._taken or (tally.passes == 0 and not self._gradients.thrown_away):
            if (refusal := self._refusal) is not None:
                self._reset()
                raise refusal
            tally.merge(self.tally)
            adapted = tally.scale.merge(self.tally.scale)
            for layer, rows in self._rows:
                deliver(layer, adapted(rows))
        self._reset()
