"""What a recurrent module computes, step by step: its matrices' inputs, and the gradients of their outputs.

A fused kernel shows the sequence that went in and the one that came out. The steps between are run again, and
differentiated with respect to a shift of each product: that derivative is the gradient of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""The products with the input and with the state, `[n gates·h]` each, and the state before, to the state after.

The state is `(h,)`, or `(h, c)` of an LSTM.
"""


def lstm(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hochreiter & Schmidhuber 1997, as in `torch.nn.LSTM`."""
    enter, forget, candidate, leave = (of_input + of_state).chunk(4, -1)
    c = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * c.tanh(), c


def lstm_with_cell_apart(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same with the way from c to h cut: where what arrives at c has come through h, too."""
    _, c = lstm(of_input, of_state, state)
    leave = (of_input + of_state).chunk(4, -1)[3]
    return leave.sigmoid() * c.detach().tanh(), c


def gru(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cho et al. 2014, as in `torch.nn.GRU`: the reset gate acts on the product with the state."""
    reset_x, update_x, new_x = of_input.chunk(3, -1)
    reset_h, update_h, new_h = of_state.chunk(3, -1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + (update_x + update_h).sigmoid() * (state[0] - new),)


def elman_tanh(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Elman 1990, as in `torch.nn.RNN`."""
    return ((of_input + of_state).tanh(),)


def elman_relu(of_input: Tensor, of_state: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same with another nonlinearity."""
    return ((of_input + of_state).relu(),)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of a recurrent module in one call.

    Args:
        inputs: What it was multiplied with, `[n s i]`.
        shift: What is added to the products, zero, `[n s o]`: where the gradient is asked for.
    """

    inputs: Tensor
    shift: Tensor


class Recurrence:
    """One call of a recurrent module, run again when it is first asked for.

    Args:
        cell: One step.
        weights: Returns the module's parameters by name: `weight_ih`, `bias_hh`, ... with an ending for each run. It is
            called when rows are due.
        runs: The endings, a tuple for each layer: its runs over the sequence, there and back (`"_reverse"`).
        inputs: `[n t i]`.
        states: At the start, `[runs n h]` each.
        mask: `[n t]`, False where a sequence has ended; None: nowhere.
        arrange: Makes of the outputs `[n t o]` and the last states `[runs n h]` what the module returned, flat.
        between: What the outputs of each layer but the last are multiplied with, `[n t o]` (dropout); empty: nothing.
    """

    def __init__(
        self,
        cell: Cell,
        weights: Callable[[], Mapping[str, Tensor]],
        runs: Sequence[tuple[str, ...]],
        inputs: Tensor,
        states: Sequence[Tensor],
        mask: Tensor | None,
        arrange: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]],
        between: Sequence[Tensor] = (),
    ) -> None:
        self._between = between
        self._cell, self._weights, self._runs = cell, weights, runs
        self._inputs, self._states, self.mask, self._arrange = inputs, states, mask, arrange
        self._latest: tuple[Sequence[Tensor | None], dict[str, Tensor]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """How many data and steps there are."""
        return self._inputs.shape[0], self._inputs.shape[1]

    def inputs(self, name: str) -> Tensor:
        """What the matrix `name` (`"hh_l0"`) was multiplied with, `[n s i]`."""
        return self._run_again[0][name].inputs

    def gradients(self, name: str, arrived: Sequence[Tensor | None]) -> Tensor:
        """Of the products with the matrix `name`, `[v n s o]`, from those of the module's outputs, `[v ...]` each."""
        if self._latest is None or any(a is not b for a, b in zip(self._latest[0], arrived, strict=True)):
            self._latest = arrived, self._differentiated(arrived)
        return self._latest[1][name]

    def _differentiated(self, arrived: Sequence[Tensor | None]) -> dict[str, Tensor]:
        matrices, outputs = self._run_again
        reached = [(output, v.to(output)) for output, v in zip(outputs, arrived, strict=True) if v is not None]
        found = torch.autograd.grad(
            [output for output, _ in reached],
            [matrix.shift for matrix in matrices.values()],
            [v for _, v in reached],
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
        )
        count = len(reached[0][1])
        return {
            name: matrix.shift.new_zeros(count, *matrix.shift.shape) if gradient is None else gradient
            for (name, matrix), gradient in zip(matrices.items(), found, strict=True)
        }

    @cached_property
    def _run_again(self) -> tuple[dict[str, Matrix], Sequence[Tensor]]:
        """The matrices by name, and the module's outputs with a graph down to their shifts."""
        dtype = torch.promote_types(self._inputs.dtype, torch.float32)
        held = self._weights()
        dtype = torch.promote_types(dtype, next(iter(held.values())).dtype)
        weights = {name: w.detach().to(dtype) for name, w in held.items()}
        sequence, starts = self._inputs.to(dtype), [state.to(dtype) for state in self._states]
        matrices: dict[str, Matrix] = {}
        last: list[tuple[Tensor, ...]] = []
        with torch.enable_grad():
            for place, layer in enumerate(self._runs):
                done = []
                for ending in layer:
                    start = tuple(state[len(last)] for state in starts)
                    outputs, state = self._run(weights, ending, sequence, start, matrices)
                    done.append(outputs)
                    last.append(state)
                sequence = torch.cat(done, dim=-1)
                if place < len(self._between):
                    sequence = sequence * self._between[place].to(dtype)
            returned = self._arrange(sequence, [torch.stack(some) for some in zip(*last, strict=True)])
        return matrices, returned

    def _run(
        self,
        weights: Mapping[str, Tensor],
        ending: str,
        sequence: Tensor,
        state: tuple[Tensor, ...],
        matrices: dict[str, Matrix],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One run over the sequence: what it put out, `[n t o]`, and the last state; its matrices are added."""
        of_input, shift = _product(weights, f"ih{ending}", sequence)
        matrices[f"ih{ending}"] = Matrix(sequence.detach(), shift)
        recurrent = _Steps(weights, f"hh{ending}", sequence)
        projected = _Steps(weights, f"hr{ending}", sequence) if f"weight_hr{ending}" in weights else None
        steps, times = of_input.unbind(1), range(sequence.shape[1])
        outputs: dict[int, Tensor] = {}
        for t in reversed(times) if ending.endswith("_reverse") else times:
            after = self._cell(steps[t], recurrent(state[0], t), state)
            if projected is not None:
                after = (projected(after[0], t), *after[1:])
            if self.mask is not None:
                going = self.mask[:, t, None]
                after = tuple(torch.where(going, new, old) for new, old in zip(after, state, strict=True))
            state, outputs[t] = after, after[0]
        matrices |= {some.name: some.matrix() for some in (recurrent, projected) if some is not None}
        return torch.stack([outputs[t] for t in times], dim=1), state


class _Steps:
    """Products with one matrix, one a step."""

    def __init__(self, weights: Mapping[str, Tensor], name: str, sequence: Tensor) -> None:
        self.name = name
        self._weight, self._bias = weights[f"weight_{name}"], weights.get(f"bias_{name}")
        data, count = sequence.shape[:2]
        self._shift = sequence.new_zeros(data, count, self._weight.shape[0]).requires_grad_()
        self._shifts = self._shift.unbind(1)
        self._seen: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, t: int) -> Tensor:
        self._seen[t] = x.detach()
        return nn.functional.linear(x, self._weight, self._bias) + self._shifts[t]

    def matrix(self) -> Matrix:
        return Matrix(torch.stack([self._seen[t] for t in sorted(self._seen)], dim=1), self._shift)


def _product(weights: Mapping[str, Tensor], name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + b`, `[n t o]`, with a shift of zeros that requires gradients, and the shift."""
    product = nn.functional.linear(x, weights[f"weight_{name}"], weights.get(f"bias_{name}"))
    shift = torch.zeros_like(product).requires_grad_()
    return product + shift, shift
