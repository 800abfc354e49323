"""`torch.nn.RNN`, `LSTM`, `GRU` and their cells: linear layers of a step's input and of the state before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from kfacopt.fsdp import whole_copy
from kfacopt.layers import recurrence
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part, PartCall, saves_elsewhere
from kfacopt.layers.linear import LinearHandler
from kfacopt.layers.recurrence import Cell, Recurrence
from kfacopt.likelihoods import KFACType
from kfacopt.likelihoods.estimator import tensors_of

RecurrentCell = nn.LSTMCell | nn.GRUCell | nn.RNNCell

_WHATS = {
    "ih": "what is multiplied with the input",
    "hh": "what is multiplied with the state",
    "hr": "projection of the state",
}


class RecurrentHandler(CompoundHandler):
    """A recurrent module's matrices as linear layers, of which the steps are places that share the weights.

    A layer's run has two: `weight_ih` with `bias_ih`, whose inputs are the steps' inputs, and `weight_hh` with
    `bias_hh`, whose inputs are the states before them (Martens, Ba & Johnson 2018, "Kronecker-factored curvature
    approximations for recurrent neural networks", have the same inputs); a projection of an LSTM is a third. The rows
    are those of the same module written with a `torch.nn.Linear` for each. The steps are run again for them, only where
    rows are due.

    Handled exactly: several layers, both directions, `proj_size`, `batch_first` or not, unbatched inputs, packed
    sequences, states given and returned, and dropout between layers, whose masks are read off the graph. On a GPU they
    are drawn inside the kernel and never seen: refused, by name.

    >>> handler, module = RecurrentHandler(), nn.LSTM(3, 4, 2, dropout=0.5)
    >>> handler.refusal(module) is None
    True
    >>> handler.refusal(module.to("meta"))
    'dropout between its layers is drawn within it on meta: use one module for each layer, and nn.Dropout'
    """

    reads_parameters = True

    def __init__(self) -> None:
        super().__init__("treated as its matrices", ())
        self._matrix = RecurrentMatrixHandler()

    def roles(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, p in module._parameters.items() if p is not None)

    def refusal(self, module: nn.Module) -> str | None:
        device = next(module.parameters()).device.type
        if _drops(module) and device != "cpu":
            remedy = "use one module for each layer, and nn.Dropout"
            return f"dropout between its layers is drawn within it on {device}: {remedy}"
        for name in _names(module):
            if not isinstance(module._parameters.get(name), nn.Parameter):
                return f"{name} is computed from other parameters (weight norm, pruning, ...)"
        return None

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        if self.refusal(module) is not None:
            return ()
        weights = [name.removeprefix("weight_") for name in _names(module) if name.startswith("weight_")]
        parts = []
        for name in weights:
            roles = {"weight": f"weight_{name}", "bias": f"bias_{name}"}
            paths = {role: path for role, path in roles.items() if module._parameters.get(path) is not None}
            parts.append(Part(name, _WHATS[name[:2]], self, self._matrix, paths))
        return tuple(parts)

    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        outputs = [tensor for tensor in tensors_of(call.output) if tensor.is_floating_point()]
        if any(output.grad_fn is None for output in outputs):
            return {}
        nested = _nested(outputs, call.above)
        cell_apart = isinstance(module, nn.LSTMCell) and nested == {(0, 1)}
        if nested and not cell_apart:
            return {}
        between: list[Tensor] = []
        if _drops(module) and module.training:
            assert isinstance(module, nn.RNNBase)
            if saves_elsewhere():
                return {}
            between = _masks(module, call, outputs)
            if len(between) != module.num_layers - 1:
                return {}
        if isinstance(module, RecurrentCell):
            again = _of_cell(module, call, cell_apart)
        else:
            again = _of_module(module, call, between)
        edges = tuple(get_gradient_edge(output) for output in outputs)
        data, steps = again.size
        return {
            part.name: PartCall(
                (again, part.name),
                torch.Size((data, steps, module.get_parameter(part.paths["weight"]).shape[0])),
                edges,
                partial(again.gradients, part.name),
            )
            for part in self.parts(module)
        }


class RecurrentMatrixHandler(LinearHandler):
    """Rows of one matrix of a recurrent module: the inputs of a call are the recurrence, and the matrix's name in it.

    Places at which a sequence has ended already are zero.
    """

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        again, name = inputs
        assert isinstance(again, Recurrence)
        rows = super().input_rows(module, (again.inputs(name),), {}, roles, KFACType.EXPAND)
        if again.mask is not None:
            rows = rows * again.mask.unsqueeze(-1)
        return rows.mean(1, keepdim=True) if approx == KFACType.REDUCE else rows


def _names(module: nn.Module) -> list[str]:
    """Of all weights and biases that the module's forward uses."""
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names]
    assert isinstance(module, nn.RNNCellBase)
    return ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ())]


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole_copy(module.get_parameter(name)) for name in _names(module)}


def _nested(outputs: Sequence[Tensor], above: Collection[Node]) -> set[tuple[int, int]]:
    """Which outputs were computed from which others: what arrives at those has come through these, too."""
    nodes = {output.grad_fn: number for number, output in enumerate(outputs)}
    found = set()
    for number, output in enumerate(outputs):
        queue, seen = [output.grad_fn], {output.grad_fn, *above}
        while queue:
            node = queue.pop()
            assert node is not None
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    queue.append(following)
                    if following in nodes:
                        found.add((number, nodes[following]))
    return found


def _drops(module: nn.Module) -> bool:
    """Whether there is dropout between the layers of a module that trains."""
    return isinstance(module, nn.RNNBase) and module.dropout > 0.0 and module.num_layers > 1


def _masks(module: nn.RNNBase, call: ModuleCall, outputs: Sequence[Tensor]) -> list[Tensor]:
    """What dropout multiplied the outputs of the layers with, the first layer's first, as the kernel has them."""
    queue: list[Any] = [output.grad_fn for output in outputs]
    seen, found = {*queue, *call.above}, dict[int, Tensor]()
    given = call.inputs[0] if call.inputs else call.kwargs["input"]
    is_packed = isinstance(given, PackedSequence)
    rows, axes = (given.data if is_packed else given).shape[:-1].numel(), 2 if is_packed else 3
    width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    while queue:
        node = queue.pop()
        if node.name() == "MulBackward0" and node.next_functions[1][0] is None:
            factor = node._saved_other
            fits = factor.ndim == axes and factor.shape[-1] == width and factor.shape[:-1].numel() == rows
            kept = (factor - 1.0 / (1.0 - module.dropout)).abs() <= 0.01
            if fits and bool((kept | (factor == 0.0)).all()):
                found[node._sequence_nr()] = factor.detach()
        following = [one for one, _ in node.next_functions if one is not None and one not in seen]
        seen.update(following)
        queue += following
    return [found[number] for number in sorted(found)]


def _cell_of(module: nn.Module) -> Cell:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return recurrence.lstm
    if isinstance(module, nn.GRU | nn.GRUCell):
        return recurrence.gru
    assert isinstance(module, nn.RNN | nn.RNNCell)
    return {"tanh": recurrence.elman_tanh, "relu": recurrence.elman_relu}[module.nonlinearity]


def _state_of(call: ModuleCall) -> tuple[Tensor, ...] | None:
    given = call.inputs[1] if len(call.inputs) > 1 else call.kwargs.get("hx")
    if given is None:
        return None
    return tuple(state.detach() for state in (given if isinstance(given, tuple | list) else (given,)))


def _of_cell(module: RecurrentCell, call: ModuleCall, cell_apart: bool) -> Recurrence:
    """A cell's call as a recurrence of one step."""
    x = (call.inputs[0] if call.inputs else call.kwargs["input"]).detach()
    unbatched, size = x.ndim == 1, module.hidden_size
    x = x.reshape(-1, 1, x.shape[-1])
    count = 2 if isinstance(module, nn.LSTMCell) else 1
    states = _state_of(call) or (x.new_zeros(len(x), size),) * count

    def arranged(outputs: Tensor, last: Sequence[Tensor]) -> list[Tensor]:
        return [state[0, 0] if unbatched else state[0] for state in last]

    cell = recurrence.lstm_with_cell_apart if cell_apart else _cell_of(module)
    starts = [state.reshape(1, -1, size) for state in states]
    return Recurrence(cell, partial(_weights, module), [("",)], x, starts, None, arranged)


def _of_module(module: nn.Module, call: ModuleCall, between: Sequence[Tensor] = ()) -> Recurrence:
    assert isinstance(module, nn.RNNBase)
    given = call.inputs[0] if call.inputs else call.kwargs["input"]
    unbatched = isinstance(given, Tensor) and given.ndim == 2
    mask = packing = None
    if isinstance(given, PackedSequence):
        numbers = torch.arange(len(given.data), device=given.data.device)
        places = PackedSequence(numbers, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
        index, lengths = pad_packed_sequence(places, batch_first=True)
        mask = (torch.arange(index.shape[1])[None] < lengths[:, None]).to(index.device)
        packing = mask.flatten().nonzero().squeeze(1)[index[mask].argsort()]
        x = given.data.detach()[index] * mask.unsqueeze(-1)
        between = [factor[index] for factor in between]
    else:
        x = given.detach().unsqueeze(0) if unbatched else given.detach()
        x = x if module.batch_first or unbatched else x.transpose(0, 1)
        between = [factor.transpose(0, 1) for factor in between]  # kernels have the steps first
    directions = ("", "_reverse") if module.bidirectional else ("",)
    runs = [tuple(f"_l{layer}{direction}" for direction in directions) for layer in range(module.num_layers)]

    def arranged(outputs: Tensor, last: Sequence[Tensor]) -> list[Tensor]:
        if packing is not None:
            whole = outputs.flatten(0, 1).index_select(0, packing)
        elif unbatched:
            whole, last = outputs[0], [state[:, 0] for state in last]
        else:
            whole = outputs if module.batch_first else outputs.transpose(0, 1)
        return [whole, *last]

    states = _state_of(call)
    if states is None:
        sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 2 if isinstance(module, nn.LSTM) else 1]
        states = tuple(x.new_zeros(len(runs) * len(directions), len(x), size) for size in sizes)
    starts = [state.reshape(-1, len(x), state.shape[-1]) for state in states]
    return Recurrence(_cell_of(module), partial(_weights, module), runs, x, starts, mask, arranged, between)
