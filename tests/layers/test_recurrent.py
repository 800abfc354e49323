"""Recurrent modules and cells: their matrices as linear layers, in every form that torch runs them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt.layers import Rows, handler_for
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part
from kfacopt.likelihoods import KFACType
from kfacopt.likelihoods.estimator import tensors_of
from tests.cases import exact_ekfac, natural_direction, train_step
from tests.explicit import explicit_model

MSE = nn.MSELoss()
DATA, STEPS, INPUTS, HIDDEN = 3, 4, 3, 2


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def states(runs: int, hidden: int = HIDDEN, data: tuple[int, ...] = (DATA,)) -> Tensor:
    return reals(runs, *data, hidden)


FORMS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
    "rnn": (nn.RNN, {}, lambda: (reals(STEPS, DATA, INPUTS),)),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu"}, lambda: (reals(STEPS, DATA, INPUTS),)),
    "gru": (nn.GRU, {}, lambda: (reals(STEPS, DATA, INPUTS), states(1))),
    "gru, unbatched": (nn.GRU, {"num_layers": 2}, lambda: (reals(STEPS, INPUTS), states(2, data=()))),
    "lstm": (nn.LSTM, {}, lambda: (reals(STEPS, DATA, INPUTS),)),
    "lstm, no bias": (nn.LSTM, {"bias": False, "batch_first": True}, lambda: (reals(DATA, STEPS, INPUTS),)),
    "lstm, states": (nn.LSTM, {}, lambda: (reals(STEPS, DATA, INPUTS), (states(1), states(1)))),
    "lstm, unbatched": (nn.LSTM, {"batch_first": True, "bidirectional": True}, lambda: (reals(STEPS, INPUTS),)),
    "lstm, one step": (nn.LSTM, {}, lambda: (reals(1, DATA, INPUTS),)),
    "lstm, projected": (
        nn.LSTM,
        {"num_layers": 2, "proj_size": 1, "bidirectional": True},
        lambda: (reals(STEPS, DATA, INPUTS), (states(4, 1), states(4))),
    ),
    "lstm, three layers": (nn.LSTM, {"num_layers": 3, "bidirectional": True}, lambda: (reals(STEPS, DATA, INPUTS),)),
    "gru, packed": (nn.GRU, {}, lambda: (pack_padded_sequence(reals(STEPS, DATA, INPUTS), torch.tensor([4, 2, 1])),)),
    "lstm, packed out of order": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True},
        lambda: (
            pack_sequence([reals(t, INPUTS) for t in (2, 4, 1)], enforce_sorted=False),
            (states(4), states(4)),
        ),
    ),
    "rnn cell": (nn.RNNCell, {"nonlinearity": "relu"}, lambda: (reals(DATA, INPUTS),)),
    "gru cell": (nn.GRUCell, {"bias": False}, lambda: (reals(DATA, INPUTS), reals(DATA, HIDDEN))),
    "lstm cell": (nn.LSTMCell, {}, lambda: (reals(DATA, INPUTS), (reals(DATA, HIDDEN), reals(DATA, HIDDEN)))),
    "lstm cell, unbatched": (nn.LSTMCell, {}, lambda: (reals(INPUTS),)),
}


# Dropout between layers: the masks are in the graph.
DROPPED: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], Callable[[], tuple[Any, ...]]]] = {
    "gru, dropout": (nn.GRU, {"num_layers": 2, "dropout": 0.5}, lambda: (reals(STEPS, DATA, INPUTS),)),
    "rnn, dropout": (nn.RNN, {"num_layers": 3, "dropout": 0.3}, lambda: (reals(STEPS, DATA, INPUTS), states(3))),
    "lstm, dropout": (
        nn.LSTM,
        {"num_layers": 3, "dropout": 0.5, "bidirectional": True, "batch_first": True},
        lambda: (reals(DATA, STEPS, INPUTS),),
    ),
    "lstm, dropout, projected": (
        nn.LSTM,
        {"num_layers": 2, "dropout": 0.5, "proj_size": 1},
        lambda: (reals(STEPS, DATA, INPUTS),),
    ),
    "gru, dropout, unbatched": (nn.GRU, {"num_layers": 2, "dropout": 0.5}, lambda: (reals(STEPS, INPUTS),)),
    "lstm, dropout, packed": (
        nn.LSTM,
        {"num_layers": 2, "dropout": 0.5, "bidirectional": True},
        lambda: (pack_sequence([reals(t, INPUTS) for t in (2, 4, 1)], enforce_sorted=False),),
    ),
}


def compound(module: nn.Module) -> CompoundHandler:
    handler = handler_for(module)
    assert isinstance(handler, CompoundHandler)
    assert handler.refusal(module) is None
    return handler


def rows_of(module: nn.Module, part: Part, call: Any, arrived: Sequence[Tensor | None], approx: KFACType) -> Rows:
    """Rows as a curvature pass would get them."""
    inputs = part.handler.input_rows(module, call.inputs, {}, tuple(part.paths), approx)
    gradients = part.handler.gradient_rows(module, call.arrange(arrived), approx)
    return Rows(inputs, gradients, torch.tensor(1.0))


def float_outputs(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


@pytest.mark.parametrize("form", [*FORMS, *DROPPED])
def test_rows_sum_to_the_gradient(form: str) -> None:
    """Of each weight and bias, whichever outputs a gradient arrives at; all parts together hold every parameter."""
    kind, options, inputs = (FORMS | DROPPED)[form]
    module, given = kind(INPUTS, HIDDEN, **options).double(), inputs()
    handler = compound(module)
    output = module(*given)
    calls = handler.calls(module, ModuleCall(given, {}, output))
    outputs = float_outputs(output)
    edges = next(iter(calls.values())).edges
    covered = set()
    for reached in ([True] * len(outputs), *([i == j for j in range(len(outputs))] for i in range(len(outputs)))):
        chosen = [(out, reals(2, *out.shape)) for out, r in zip(outputs, reached, strict=True) if r]
        # What a curvature pass brings to the nodes: of an LSTM's cell, what has come through the state, too.
        arrived = _arrived(chosen, edges)
        for part in handler.parts(module):
            rows = rows_of(module, part, calls[part.name], arrived, KFACType.EXPAND)
            assert rows.gradients.shape == (2, *calls[part.name].shape)
            assert isinstance(rows.inputs, Tensor)
            matrices = torch.einsum("vnso,nsi->voi", rows.gradients, rows.inputs)
            parameters = [module.get_parameter(path) for path in part.paths.values()]
            covered |= set(parameters)
            for v, matrix in enumerate(matrices):
                truth = torch.autograd.grad(
                    [out for out, _ in chosen],
                    parameters,
                    [some[v] for _, some in chosen],
                    retain_graph=True,
                    materialize_grads=True,
                )
                packed = part.handler.pack(module, dict(zip(part.paths, truth, strict=True)))
                torch.testing.assert_close(matrix, packed, rtol=1e-10, atol=1e-12)
    assert covered == set(module.parameters())


def _arrived(chosen: Sequence[tuple[Tensor, Tensor]], edges: Sequence[Any]) -> list[Tensor | None]:
    found: list[list[Tensor | None]] = [
        list(
            torch.autograd.grad(
                [out for out, _ in chosen], edges, [some[v] for _, some in chosen], retain_graph=True, allow_unused=True
            )
        )
        for v in range(2)
    ]
    return [None if some[0] is None else torch.stack(some) for some in zip(*found, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["gru, packed", "lstm, packed out of order"])
def test_a_packed_sequence_has_each_sequences_rows(form: str) -> None:
    """The rows of a datum give the gradient of its sequence alone; reduce averages and sums over the places."""
    kind, options, inputs = FORMS[form]
    module, given = kind(INPUTS, HIDDEN, **options).double(), inputs()
    handler, packed = compound(module), given[0]
    assert isinstance(packed, PackedSequence)
    output = module(*given)
    calls = handler.calls(module, ModuleCall(given, {}, output))
    last = output[1] if isinstance(output[1], tuple) else (output[1],)
    sequences, lengths = pad_packed_sequence(packed, batch_first=True)
    cotangents = [torch.randn(1, *state.shape, dtype=torch.float64) for state in last]
    for part in handler.parts(module):
        rows = rows_of(module, part, calls[part.name], [None, *cotangents], KFACType.EXPAND)
        assert isinstance(rows.inputs, Tensor)
        for n, length in enumerate(lengths.tolist()):
            start = [state[:, n] for state in given[1]] if len(given) > 1 else None
            alone = module(sequences[n, :length], *([] if start is None else [tuple(start)]))[1]
            alone = alone if isinstance(alone, tuple) else (alone,)
            parameters = [module.get_parameter(path) for path in part.paths.values()]
            truth = torch.autograd.grad(alone, parameters, [v[0][:, n] for v in cotangents])
            matrix = torch.einsum("so,si->oi", rows.gradients[0, n], rows.inputs[n])
            packed_truth = part.handler.pack(module, dict(zip(part.paths, truth, strict=True)))
            torch.testing.assert_close(matrix, packed_truth, rtol=1e-10, atol=1e-12)
            assert not rows.inputs[n, length:].any()
        reduced = rows_of(module, part, calls[part.name], [None, *cotangents], KFACType.REDUCE)
        assert isinstance(reduced.inputs, Tensor)
        torch.testing.assert_close(reduced.inputs, rows.inputs.mean(1, keepdim=True))
        torch.testing.assert_close(reduced.gradients, rows.gradients.sum(2, keepdim=True))


class Tagger(nn.Module):
    """A recurrent module between an embedding and a head, whose states the loss sees, too."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.words, self.recurrent = nn.Embedding(5, 3), kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.recurrent(self.words(x))
        last = state[-1] if isinstance(state, tuple) else state
        return self.head(output.mean(1)).tanh() + last.sum((0, 2))[:, None]


class Twice(Tagger):
    """Called twice in a forward, at other lengths; the second call starts at the first one's states."""

    def forward(self, x: Tensor) -> Tensor:
        first, state = self.recurrent(self.words(x))
        second, _ = self.recurrent(self.words(x[:, 1:]), state)
        return self.head(second[:, -1] * first.mean(1)).tanh()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: Tagger(nn.RNN),
    "lstm": lambda: Tagger(nn.LSTM, num_layers=2),
    "gru": lambda: Tagger(nn.GRU, bidirectional=True),
    "lstm, twice": lambda: Twice(nn.LSTM),
    "gru, twice": lambda: Twice(nn.GRU),
}


def trained(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = 3) -> Any:
    made = optimizer(model, MSE, curvature="ggn", factor_every=1, refresh_every=1)
    for _ in range(steps):
        made.zero_grad()
        MSE(model(x), y).backward()
        made.step()
    return made


def natural_kfac(*args: Any, **options: Any) -> kfacopt.KFAC:
    return kfacopt.KFAC(*args, direction=natural_direction(), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", [natural_kfac, exact_ekfac])
def test_steps_are_those_of_linear_layers(kind: str, optimizer: Any) -> None:
    """Three steps in float64: momentum, grafting and the second step's curvature included."""
    model = KINDS[kind]().double()
    written = explicit_model(model)
    x, y = torch.randint(5, (16, 3)), reals(16, 2)  # no inputs are left out, whose eigenvectors are anybody's choice
    torch.testing.assert_close(model(x), written(x), rtol=1e-12, atol=1e-12)
    made, other = (trained(m, optimizer, x, y) for m in (model, written))
    assert made.backend.blocks.keys() == other.backend.blocks.keys()
    for name, block in other.backend.blocks.items():
        for ours, theirs in zip(made.backend.blocks[name].averages().values(), block.averages().values(), strict=True):
            torch.testing.assert_close(ours.value, theirs.value, rtol=1e-8, atol=1e-10)
    found = explicit_model(model).state_dict()
    for name, value in written.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    assert made.health()["unseen_layers"] == 0.0
    assert all(row.treatment != "AdamW" for row in made.coverage().rows)


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "packed"])
@pytest.mark.parametrize("optimizer", [kfacopt.EKFAC, kfacopt.SpectralDescent])
def test_single_precision_kernels_train(kind: str, optimizer: Any) -> None:
    """oneDNN's kernel shows nothing but its inputs and outputs."""
    model = Packed(nn.LSTM) if kind == "packed" else KINDS[kind]()
    x = torch.randint(5, (32, 6))
    y = torch.stack([(x == 1).float().mean(1), (x[:, -1] > 2).float()], 1)
    made = optimizer(model, MSE, factor_every=1, refresh_every=5)
    losses = [train_step(made, model, MSE, x, y).item() for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    assert made.health()["unseen_layers"] == 0.0
    treated = {row.treatment for row in made.coverage().rows if row.module.startswith("recurrent")}
    assert "AdamW" not in treated


def test_coverage_names_the_matrices() -> None:
    made = kfacopt.KFAC(nn.LSTM(2, 3, proj_size=1), MSE, kl_clip=0.03)
    rows = {row.module: row for row in made.coverage().rows}
    assert rows["ih_l0"].parameters == ("weight_ih_l0", "bias_ih_l0")
    assert rows["hr_l0"].parameters == ("weight_hr_l0",)
    assert "LSTM, what is multiplied with the state" in rows["hh_l0"].why


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.GRU(3, 4, 2, dropout=0.1, device="meta"), "dropout between its layers"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"), "weight_hh_l0 is computed"),
    "weight norm of a cell": (lambda: parametrizations.weight_norm(nn.LSTMCell(3, 4), "weight_ih"), "weight_ih is"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_said_and_train_by_adamw(make: Callable[[], nn.Module], words: str) -> None:
    module = make()
    handler = handler_for(module)
    assert handler is not None
    assert words in str(handler.refusal(module))
    with pytest.warns(UserWarning, match=rf"no parameter gets curvature.*{words}"):
        made = kfacopt.KFAC(module, MSE, kl_clip=0.03)
    rows = made.coverage().rows
    assert {row.treatment for row in rows} == {"AdamW"}
    assert any(words in row.why for row in rows)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_ekfac])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_between_layers_is_that_of_modules_with_dropout_between(optimizer: Any, training: bool) -> None:
    """The same numbers are drawn: three steps of a module of two layers are those of two modules of one."""

    class Apart(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.LSTM(3, 4), nn.LSTM(4, 4), nn.Dropout(0.5)
            for layer, one in enumerate((self.first, self.second)):
                for name, p in one.named_parameters():
                    p.data.copy_(whole.get_parameter(name.replace("l0", f"l{layer}")))

        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            return self.second(self.drop(self.first(x)[0]))

    class Head(nn.Module):
        def __init__(self, recurrent: nn.Module) -> None:
            super().__init__()
            self.recurrent, self.head = recurrent, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(x)[0].transpose(0, 1)).tanh()

    torch.manual_seed(0)
    whole = nn.LSTM(3, 4, 2, dropout=0.5)
    model, twin = Head(whole).double().train(training), Head(Apart(whole)).double().train(training)
    twin.head.load_state_dict(model.head.state_dict())
    x, y = reals(6, 5, 3), reals(5, 6, 2)
    values: list[float] = []
    for one in (model, twin):
        torch.manual_seed(1)
        made = optimizer(one, MSE, curvature="ggn", factor_every=1, refresh_every=1)
        values += [train_step(made, one, MSE, x, y).item() for _ in range(3)]
        assert made.health()["unseen_layers"] == 0.0
    assert values[:3] == pytest.approx(values[3:], rel=1e-9)


def test_dropout_of_one_layer_acts_on_nothing() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        module = nn.GRU(3, 4, dropout=0.1)
    assert compound(module).parts(module)


def test_frozen_matrices_and_a_param_group_without_curvature() -> None:
    model = Tagger(nn.LSTM).double()
    model.recurrent.weight_ih_l0.requires_grad_(False)
    x, y = torch.randint(5, (4, 3)), reals(4, 2)
    made = trained(model, kfacopt.EKFAC, x, y, steps=2)
    treated = {name: row.treatment for row in made.coverage().rows for name in row.parameters}
    assert treated["weight_hh_l0"].startswith("EKFAC")
    assert (treated["weight_ih_l0"], treated["bias_ih_l0"]) == ("frozen", "AdamW")
    assert made.health()["unseen_layers"] == 0.0


def test_no_graph_no_rows() -> None:
    """All is frozen, or the call is within no_grad."""
    module, x = nn.GRU(3, 4), torch.randn(2, 1, 3)
    with torch.no_grad():
        output = module(x)
    assert compound(module).calls(module, ModuleCall((x,), {}, output)) == {}


class Packed(Tagger):
    """Sequences of several lengths: a tagger reads up to the first of a datum's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = 6 - x[:, 0].cpu()
        packed = pack_padded_sequence(self.words(x), lengths, batch_first=True, enforce_sorted=False)
        output, (last, _) = self.recurrent(packed)
        padded, _ = pad_packed_sequence(output, batch_first=True)
        return self.head(padded.mean(1) + last[-1])


class Checkpointed(Tagger):
    """Only the output is used, and the steps are run again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        output, _ = checkpoint(self.recurrent, self.words(x), use_reentrant=False)
        return self.head(output[:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "checkpoint"])
def test_other_precisions_and_checkpoints_are_seen(kind: Any, how: str) -> None:
    model = (Checkpointed if how == "checkpoint" else Tagger)(kind)
    model = model.bfloat16() if how == "bfloat16" else model
    x, y = torch.randint(5, (8, 6)), torch.rand(8, 2)
    made, losses = kfacopt.KFAC(model, MSE, factor_every=1, refresh_every=1, kl_clip=0.03), []
    for _ in range(8):
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            output = model(x)
        loss = MSE(output.float(), y)
        loss.backward()
        made.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert made.health()["unseen_layers"] == made.health()["skipped_steps"] == 0.0
    assert {row.treatment for row in made.coverage().rows} == {"KFAC"}
    for name, block in made.backend.blocks.items():
        assert all(factor.isfinite().all() for factor in block.factors()), name
