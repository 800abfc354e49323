"""An embedding that is the output layer, too (GPT-2): one block for both uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.backends import CurvatureBackend
from kfacopt.blocks import CorrectedEigenBlock, sides
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.linalg.polar import exact_polar
from kfacopt.optim.step import Spectral
from tests import reference
from tests.cases import OPTIMIZERS, Case, TiedEmbedding, TiedLanguage, backward, classes, still, train_step
from tests.explicit import untied

CE = nn.CrossEntropyLoss()
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def block_of(made: Any, name: str = "embedding") -> Any:
    block = made.backend.blocks[name]
    assert isinstance(block, FactoredBlock)
    return block


def dense(block: Any) -> Tensor:
    left, right = block.factors()
    return torch.kron(left.contiguous(), right if right.ndim == 2 else right.diag())


def seen(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any = kfacopt.KFAC, times: int = 1, **options: Any) -> Any:
    """An optimizer that has seen a batch some times and moved nothing."""
    made = optimizer(model, CE, **still(**options))
    for _ in range(times):
        made.zero_grad()
        backward(model, CE, x, y)
        made.step()
    return made


def ggn_of_uses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The sum of both uses' blocks of the dense GGN, as though each had a weight of its own; words by width."""
    (layer,) = (layer for layer in kfacopt.KFAC(model, CE)._layers if layer.handler.structure == "tied")
    apart, words, head = untied(model, layer)
    looked_up = reference.ggn(apart, CE, words, x, y)[0]
    width, count = layer.pack(layer.values()).shape
    multiplied = reference.ggn(apart, CE, head, x, y)[0].reshape(count, width, count, width)
    return looked_up + multiplied.permute(1, 0, 3, 2).reshape(count * width, -1)


def test_it_is_the_ggn_of_both_uses_where_that_is_a_kronecker_product() -> None:
    """One datum, width one: KFAC is exact for either use then, and so is their sum."""
    torch.manual_seed(0)
    model = TiedLanguage(width=1).double()
    x, y = torch.tensor([[3]]), torch.tensor([[1]])
    made = seen(model, x, y)
    torch.testing.assert_close(dense(block_of(made)), ggn_of_uses(model, x, y), **CLOSE)


def test_partial_traces_are_those_of_the_ggn_of_both_uses() -> None:
    """One datum, any width: over either side the curvature of both uses is added up exactly."""
    torch.manual_seed(0)
    model = TiedLanguage(width=3).double()
    x, y = torch.tensor([[3]]), torch.tensor([[1]])
    ours = dense(block_of(seen(model, x, y))).reshape(3, 5, 3, 5)
    truth = ggn_of_uses(model, x, y).reshape(3, 5, 3, 5)
    for traced in ("oioj->ij", "oipi->op"):
        torch.testing.assert_close(torch.einsum(traced, ours), torch.einsum(traced, truth), **CLOSE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_many_words_have_a_diagonal(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case = Case("", lambda: TiedLanguage(1), nn.CrossEntropyLoss, classes(5, 3), classes(5, 3))
    model, _, x, y = case.make()
    left, right = block_of(seen(model, x, y)).factors()
    monkeypatch.setattr(sides, "DENSE_WORDS", 4)
    made = seen(model, x, y, optimizer, times=2)
    block = block_of(made)
    diagonal = block.factors()[1]
    assert diagonal.ndim == 1
    torch.testing.assert_close(block.factors()[0], left, **CLOSE)
    torch.testing.assert_close(diagonal, right.diagonal(), **CLOSE)
    if isinstance(block, CorrectedEigenBlock):
        (layer,) = (layer for layer in made._layers if layer.name == "embedding")
        basis = torch.kron(block.basis()[0].contiguous(), torch.eye(5, dtype=torch.float64))
        truth = basis.mT @ reference.ggn(model, CE, layer, x, y)[0] @ basis
        torch.testing.assert_close(block.corrected.value.flatten(), truth.diagonal(), **CLOSE)
    assert train_step(made, model, CE, x, y).isfinite()


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_micro_batches_are_one_batch(optimizer: Any) -> None:
    torch.manual_seed(0)
    model, x, y = TiedLanguage(1).double(), torch.randint(5, (6, 3)), torch.randint(5, (6, 3))
    whole = seen(model, x, y, optimizer, times=2)
    made = optimizer(model, CE, **still())
    for _ in range(2):
        made.zero_grad()
        for part in (slice(0, 2), slice(2, 6)):
            (CE(model(x[part]), y[part]) * len(x[part]) / len(x)).backward()
        made.step()
    for ours, theirs in zip(block_of(made).averages().values(), block_of(whole).averages().values(), strict=True):
        torch.testing.assert_close(ours.value, theirs.value, **CLOSE)


class OneUse(TiedEmbedding):
    """Of the tied weight only one use has to do with the prediction."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.other = use, nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.use == "embedding":
            return self.other(self.embedding(x))
        one_hot = nn.functional.one_hot(x, 5)[:, :4].double()
        return self.head(self.inner(one_hot).tanh())


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("use", ["embedding", "head"])
def test_one_use_alone(use: str, optimizer: Any) -> None:
    """The curvature is then that of the layer on its own."""
    torch.manual_seed(0)
    model, x, y = OneUse(use).double(), torch.randint(5, (6,)), torch.randint(5, (6,))
    made = seen(model, x, y, optimizer, times=2)
    (layer,) = (layer for layer in made._layers if layer.name == "embedding")
    apart, *_ = untied(model, layer)
    other = seen(apart, x, y, optimizer, times=2)
    left, right = block_of(other, use).factors()
    expected = torch.kron(left, right if right.ndim == 2 else right.diag())
    if use == "head":
        expected = expected.reshape(5, 4, 5, 4).permute(1, 0, 3, 2).reshape(20, 20)
    torch.testing.assert_close(dense(block_of(made)), expected, **CLOSE)
    assert made.health()["unseen_layers"] == 0.0
    assert train_step(made, model, CE, x, y).isfinite()


class Flattened(TiedLanguage):
    """The head is applied to `[(n t) o]`, so that its data are not the embedding's."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.embedding(x)).tanh()
        return self.head(h.flatten(0, 1)).unflatten(0, x.shape).transpose(1, 2)


def test_a_head_on_flattened_positions() -> None:
    """KFAC-expand does not tell data from places; EKFAC's eigenvalues have no cross terms between the uses then."""
    torch.manual_seed(0)
    model, x, y = Flattened(1).double(), torch.randint(5, (6, 3)), torch.randint(5, (6, 3))
    same = TiedLanguage(1).double()
    same.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense(block_of(seen(model, x, y))), dense(block_of(seen(same, x, y))), **CLOSE)
    block = block_of(seen(model, x, y, OPTIMIZERS["exact-ekfac"], times=2))
    basis = torch.kron(*(side.contiguous() for side in block.basis()))
    single = TiedLanguage(1).double()
    single.load_state_dict(model.state_dict())
    truth = (basis.mT @ ggn_of_uses(single, x, y) @ basis).diagonal()
    # The head's positions are data of their own; an embedding's datum has three, whose sum is squared.
    torch.testing.assert_close(block.corrected.value.flatten(), truth, **CLOSE)


class Stream(nn.Module):
    """A small GPT-2: token and position embeddings, a transformer layer, the tied head."""

    def __init__(self, words: int = 11) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(words, 8), nn.Embedding(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, words, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        logits: Tensor = self.head(self.norm(self.layer(h, src_mask=mask, is_causal=True)))
        return logits.transpose(1, 2)


def both_sided(model: nn.Module, loss: nn.Module, factor_every: int, refresh_every: int) -> Any:
    backend = kfacopt.KFACBackend(factor_every, refresh_every, exponent=0.5)
    return kfacopt.SpectralDescent(model, loss, lr=0.05, backend=backend)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, both_sided])
def test_a_language_model_trains(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = Stream()
    bounded = {} if optimizer is both_sided else {"kl_clip": 0.03}
    made = optimizer(model, CE, factor_every=1, refresh_every=2, **bounded)
    x = (torch.arange(7)[None] * 3 + torch.arange(16)[:, None]) % 11
    losses = [float(train_step(made, model, CE, x[:, :-1], x[:, 1:])) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    left = {row.module: row.why for row in made.coverage().rows if row.treatment == "AdamW"}
    assert all("elementwise" in why or "dense_layers" in why for why in left.values())
    rows = {row.module: row for row in made.coverage().rows}
    assert "Embedding and Linear, one block for the sum of both uses" in rows["tokens"].why
    assert model.head.weight is model.tokens.weight
    assert made.health()["skipped_steps"] == made.health()["unseen_layers"] == 0.0


def test_one_factor_has_no_place_for_both_uses() -> None:
    """G is of the embedding's outputs in one use, of the words in the other: AdamW trains the weight, as is said."""
    torch.manual_seed(0)
    model = Stream()
    made = kfacopt.SpectralDescent(model, CE, lr=0.05)
    rows = {row.module: row for row in made.coverage().rows}
    assert rows["tokens"].treatment == "AdamW"
    assert rows["tokens"].why == "tied, and OneSidedKFACBackend takes no transposed rows"
    assert rows["layer.self_attn.q_proj"].treatment == "K-FAC's G"
    assert model.head.weight not in made._plain
    x = (torch.arange(7)[None] * 3 + torch.arange(16)[:, None]) % 11
    before = model.tokens.weight.detach().clone()
    losses = [float(train_step(made, model, CE, x[:, :-1], x[:, 1:])) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert not torch.equal(before, model.tokens.weight)


@pytest.mark.parametrize("row_decay", [None, 0.95])
def test_a_spectral_step_is_as_long_as_the_heads(row_decay: float | None) -> None:
    """It moves each output of the head by one, on average, evened one by one; an embedding's own would be longer."""
    torch.manual_seed(0)
    model = TiedLanguage(1)
    x, y = torch.randint(5, (6, 3)), torch.randint(5, (6, 3))
    before = model.embedding.weight.detach().clone()
    backend = kfacopt.KFACBackend(1, 1, exponent=0.5)
    direction = Spectral(0.0, exact_polar, row_decay=row_decay, margin=None)
    made = kfacopt.SpectralDescent(model, CE, lr=1.0, backend=backend, direction=direction)
    train_step(made, model, CE, x, y)
    step = model.embedding.weight.detach() - before
    torch.testing.assert_close(step.norm(), torch.tensor(5.0).sqrt())
    if row_decay is not None:
        torch.testing.assert_close(step.norm(dim=1), torch.ones(5))


class Plain(CurvatureBackend):
    """A backend of the user's, from before there were transposed rows."""

    def solve(self, gradients: Any, settings: Any) -> Any:
        return {layer: dict(parts) for layer, parts in gradients.items()}

    def mean_eigenvalues(self) -> Any:
        return {}


def test_a_backend_that_knows_no_transposed_rows_gets_none() -> None:
    made = kfacopt.SecondOrderOptimizer(TiedEmbedding(), CE, backend=Plain())
    rows = {row.module: row for row in made.coverage().rows}
    assert rows["embedding"].treatment == "AdamW"
    assert "tied, and Plain takes no transposed rows" in rows["embedding"].why


def test_other_ties_are_refused_by_name() -> None:
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 5)])
    for module in model:
        module.weight = model[0].weight
    rows = kfacopt.KFAC(model, CE).coverage().rows
    assert [(row.module, row.treatment) for row in rows if "weight" in row.parameters] == [("0", "AdamW")]
    assert any("tied to 1.weight, 2.weight" in row.why for row in rows)
