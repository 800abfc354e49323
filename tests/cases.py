"""One table of tiny models, losses and batches in float64, which most tests run over.

A new layer type or loss is one row here; what must hold for it is said once, in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.likelihoods import Likelihood, LossTerms
from kfacopt.likelihoods.base import independent_columns
from kfacopt.likelihoods.layout import RowLayout

Optimizer = kfacopt.SecondOrderOptimizer

BOTH = ("expand", "reduce")


@dataclass(frozen=True)
class Case:
    """A model with a loss and a batch.

    Attributes:
        name: What pytest shows.
        model: Makes the model; in float64 after `make`.
        loss: Makes the loss.
        inputs: Makes the batch's inputs, the number of data first.
        targets: Makes the batch's targets.
        kfac_exact: The approximations for which the Kronecker product is the layer's GGN itself.
        curvlinops: Whether curvlinops 3.0.1 can do it (Linear and Conv2d without groups).
        mixes_data: Whether one datum's prediction depends on the others (batch normalisation): there
            per-datum quantities do not exist.
        mixes_terms: Whether a datum's loss terms share the graph (positions that see each other).
        twice: Whether torch can differentiate the model twice (`EmbeddingBag` has no second derivative).
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    data: int = 6
    kfac_exact: tuple[str, ...] = ()
    curvlinops: bool = True
    mixes_data: bool = False
    mixes_terms: bool = False
    twice: bool = True

    def make(self, seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
        """Model, loss, inputs and targets, the same for the same seed."""
        torch.default_generator.manual_seed(seed)  # the CPU's alone, which is a hundred times faster
        model, loss = self.model().double(), self.loss().double()
        inputs, targets = self.inputs(self.data), self.targets(self.data)
        return model, loss, inputs, targets


class Shared(nn.Module):
    """One linear layer called twice, as a recurrent network does."""

    def __init__(self, linear_only: bool = False) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.linear_only = linear_only

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.inner(x).tanh())
        return self.head(h)


class Tied(nn.Module):
    """Two linear layers that hold the same weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class TiedEmbedding(nn.Module):
    """A language model whose output layer holds the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(x)).tanh())


class TiedLanguage(nn.Module):
    """A language model of positions `[n t]` that are each on their own, logits `[n c t]`; the embedding is the head."""

    def __init__(self, padding_idx: int | None = None, width: int = 4) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(5, width, padding_idx), nn.Linear(width, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.embedding(x)).tanh())
        return logits.transpose(1, 2)


class WithUnused(nn.Module):
    """A module in the tree that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Residual(nn.Module):
    """In-place activation and in-place addition around linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        z = self.second(h)
        z += h
        return self.head(self.act(z))


class MixedPositions(nn.Module):
    """A sequence model whose positions see each other, with logits `[n t c]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        return self.head(h + h.cumsum(1))


class Pooled(nn.Module):
    """A layer with weight sharing, pooled over the places, then a head: KFAC-reduce's own setting."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.inner, self.activation, self.head = nn.Linear(3, 4), activation, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.inner(x)).mean(1))


class Words(nn.Module):
    """An embedding with padding, pooled, and a head."""

    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, padding_idx=padding_idx), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh().mean(1))


class Bag(nn.Module):
    """Bags of words, all of one length or cut by offsets after a word was left out, and a head on what they sum to."""

    def __init__(self, left_out: int | None = None, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 3, **options), nn.Linear(3, 3)
        self.left_out, self.weighted = left_out, weighted

    def forward(self, x: Tensor) -> Tensor:
        weights = (0.5 + 0.1 * x).to(self.head.weight) if self.weighted else None
        if self.left_out is None:
            return self.head(self.bag(x, per_sample_weights=weights).tanh())
        kept = x != self.left_out
        offsets = kept.sum(1).cumsum(0) - kept.sum(1)
        return self.head(self.bag(x[kept], offsets, None if weights is None else weights[kept]).tanh())


class Recurrent(nn.Module):
    """A recurrent module between linear layers; the head sees all that it returns: every output and the last states."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.below, self.recurrent = nn.Linear(2, 3), kind(3, 2, **options)
        self.swap = not options.get("batch_first", False)
        self.head = nn.Linear(self.double().seen(torch.zeros(1, 2, 2, dtype=torch.float64)).shape[1], 3)

    def seen(self, x: Tensor) -> Tensor:
        h = self.below(x).tanh()
        output, state = self.recurrent(h.transpose(0, 1) if self.swap else h)
        states = state if isinstance(state, tuple) else (state,)
        every = output.square().mean(0 if self.swap else 1)
        return torch.cat([every, *(some.transpose(0, 1).flatten(1) for some in states)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.seen(x))


class Cells(nn.Module):
    """Each of the cells, stepped by hand; the last state of one is where the next starts."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(2, 3), nn.GRUCell(3, 2, bias=False)
        self.rnn = nn.RNNCell(2, 2, nonlinearity="relu")
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
        h = self.gru(state[0], self.gru(state[1]))
        return self.head(torch.cat([self.rnn(h, h), state[1]], -1))


class Adapted(nn.Module):
    """LoRA: a frozen linear layer, and the product of two small ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 5), nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.base.requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.base(x) + 0.5 * self.up(self.down(x))).tanh())


class TwoSided(nn.Module):
    """Products of two linear layers' outputs, at several places, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 3)
        self.products, self.head = nn.Bilinear(2, 3, 4), nn.Bilinear(4, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).tanh(), self.right(x)
        return self.head(self.products(left, right).tanh(), right).mean(1)


class Encoder(nn.Module):
    """A transformer layer without dropout, pooled, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


class CrossAttention(nn.Module):
    """Queries, keys and values of different widths and lengths, tokens before data, masked; a head on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_zero_attn=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(0, 1)
        mask = torch.ones(2, 3, dtype=torch.bool, device=x.device).triu(2)
        attended, _ = self.attention(tokens[:2], tokens[1:, :, :3], tokens[1:, :, 2:], attn_mask=mask)
        return self.head(attended.tanh().mean(0))


class ClassesFirst(nn.Module):
    """Logits in torch's layout `[n c t]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(x).tanh())
        return logits.transpose(1, 2)


class Frozen(nn.Module):
    """A linear layer with a frozen weight, one with a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.first.weight.requires_grad_(False)
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Squares(Likelihood):
    """What a user writes for squared errors: it knows the terms' gradients only as the user's times their number."""

    def terms(self, prediction: Tensor, *, gradient: Tensor | None = None, target: Tensor | None = None) -> LossTerms:
        layout = RowLayout.of(prediction.detach(), prediction.ndim - 1)
        means = layout.rows(prediction.detach())
        count = means.new_tensor(float(len(means)))
        rows = None if gradient is None else layout.rows(gradient) * count
        return LossTerms.of(layout, means, scale=torch.ones_like(means[:, 0]), count=count, gradient=rows)

    def sample(self, terms: LossTerms, mc_samples: int, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(mc_samples, *terms.parameters.shape, generator=generator, dtype=terms.parameters.dtype)
        return noise * self._deviation(terms) / mc_samples**0.5

    def hessian_sqrt(self, terms: LossTerms, columns: slice = slice(None)) -> Tensor:
        return independent_columns(terms.parameters.new_full(terms.parameters.shape, self._deviation(terms)), columns)

    def divergence(self, old: LossTerms, new: LossTerms) -> Tensor:
        return 0.5 * self._deviation(old) ** 2 * (new.parameters - old.parameters).square().sum()

    @staticmethod
    def _deviation(terms: LossTerms) -> float:
        return (2.0 / terms.parameters.shape[1]) ** 0.5  # of a mean over the outputs, as `MSELoss` has it


def soft(targets: Tensor) -> Tensor:
    """Probabilities from class indices of three."""
    return nn.functional.one_hot(targets, 3).double() * 0.7 + 0.1


def mlp(outputs: int = 3) -> nn.Module:
    """Two linear layers with a tanh between."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def deep_linear() -> nn.Module:
    """No activation: every layer's backpropagated Hessian is the same for all data under MSE."""
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2))


def weighted() -> nn.Module:
    """Class weights and label smoothing in one."""
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)


def mlp_to(last: nn.Module, outputs: int = 3) -> Callable[[], nn.Module]:
    """Two linear layers with a tanh between, and an activation of the output."""
    return lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs), last)


def reals(*shape: int) -> Callable[[int], Tensor]:
    """Normal numbers `[n *shape]`."""
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def classes(count: int, *shape: int) -> Callable[[int], Tensor]:
    """Class indices `[n *shape]`."""
    return lambda n: torch.randint(count, (n, *shape))


def bits(*shape: int) -> Callable[[int], Tensor]:
    """Zeros and ones `[n *shape]`, as floats."""
    return lambda n: torch.randint(2, (n, *shape)).double()


def counts(*shape: int) -> Callable[[int], Tensor]:
    """Small whole numbers `[n *shape]`, as floats."""
    return lambda n: torch.randint(5, (n, *shape)).double()


def chances(*shape: int) -> Callable[[int], Tensor]:
    """Probabilities over the last axis `[n *shape]`."""
    return lambda n: torch.randn(n, *shape, dtype=torch.float64).softmax(-1)


def partly_ignored(n: int) -> Tensor:
    """Class indices of three classes, every third ignored."""
    return torch.where(torch.arange(n) % 3 == 1, -100, torch.randint(3, (n,)))


def conv_1d() -> nn.Module:
    """Dilation, stride and an unpadded layer."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, dilation=2, padding=2),
        nn.Tanh(),
        nn.Conv1d(3, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def conv_2d() -> nn.Module:
    """What curvlinops can do: stride, padding, no groups."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, 2, padding=(1, 0)),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def conv_groups() -> nn.Module:
    """Groups, a depthwise layer, and padding that is not the same on both sides."""
    return nn.Sequential(
        nn.Conv2d(4, 4, (2, 3), groups=2, padding="same"),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=4, padding_mode="circular", padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def conv_3d() -> nn.Module:
    """One three-dimensional layer."""
    return nn.Sequential(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), nn.Flatten(), nn.Linear(16, 2))


def transposed_1d() -> nn.Module:
    """A decoder: stride, dilation and output padding, then padding that crops."""
    return nn.Sequential(
        nn.ConvTranspose1d(2, 3, 3, stride=3, dilation=2, output_padding=2),
        nn.Tanh(),
        nn.ConvTranspose1d(3, 1, 2, padding=4, bias=False),
        nn.Flatten(),
    )


def transposed_groups() -> nn.Module:
    """Groups, a depthwise layer, and axes that differ."""
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, (2, 3), groups=2, stride=(1, 2), padding=(0, 1)),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 6, 2, groups=6, stride=2, padding=2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def transposed_3d() -> nn.Module:
    """One three-dimensional layer."""
    return nn.Sequential(nn.ConvTranspose3d(1, 2, 2, stride=(1, 2, 1)), nn.Flatten(), nn.Linear(72, 2))


def one_patch() -> nn.Module:
    """A grouped convolution whose kernel is as large as the image: one place, so exact for one datum."""
    return nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(6, 2))


def norms() -> nn.Module:
    """Every normalisation layer that does not mix data."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.InstanceNorm1d(4, affine=True),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
        nn.RMSNorm(5),
        nn.Linear(5, 3),
    )


def batch_norm() -> nn.Module:
    """Normalised by the batch; torch.func cannot follow running statistics."""
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss


def sums(loss: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """The loss with `reduction="sum"`."""
    return lambda: loss(reduction="sum")


HUBER = partial(nn.HuberLoss, delta=0.8)

CASES = (
    Case("linear-mse", lambda: nn.Linear(3, 2), MSE, reals(3), reals(2), kfac_exact=BOTH),
    Case("linear-mse-sum", lambda: nn.Linear(3, 2), sums(MSE), reals(3), reals(2), kfac_exact=BOTH),
    Case("linear-ce", lambda: nn.Linear(4, 3), CE, reals(4), classes(3)),
    Case("linear-ce-datum", lambda: nn.Linear(4, 3), CE, reals(4), classes(3), 1, BOTH),
    Case("linear-bce-datum", lambda: nn.Linear(4, 3), BCE, reals(4), bits(3), 1, BOTH),
    Case("deep-linear-mse", deep_linear, MSE, reals(4), reals(2), kfac_exact=BOTH),
    Case("deep-linear-ce-datum", deep_linear, CE, reals(4), classes(2), 1, BOTH),
    Case("mlp-ce", mlp, CE, reals(4), classes(3)),
    Case("mlp-ce-sum", mlp, sums(CE), reals(4), classes(3)),
    Case("mlp-ce-datum", mlp, CE, reals(4), classes(3), 1, BOTH),
    Case("mlp-mse", mlp, MSE, reals(4), reals(3)),
    Case("mlp-bce", mlp, BCE, reals(4), bits(3)),
    Case("mlp-bce-sum", mlp, sums(BCE), reals(4), bits(3)),
    Case("mlp-huber", mlp, HUBER, reals(4), reals(3), curvlinops=False),
    Case("mlp-huber-sum", mlp, sums(HUBER), reals(4), reals(3), curvlinops=False),
    Case("mlp-smooth-l1", mlp, lambda: nn.SmoothL1Loss(beta=0.5), reals(4), reals(3), curvlinops=False),
    Case("mlp-poisson", mlp, nn.PoissonNLLLoss, reals(4), counts(3), curvlinops=False),
    Case("mlp-poisson-sum", mlp, sums(nn.PoissonNLLLoss), reals(4), counts(3), curvlinops=False),
    Case("mlp-weighted-ce", mlp, weighted, reals(4), classes(3), curvlinops=False),
    Case("mlp-ignored", mlp, CE, reals(4), partly_ignored, curvlinops=False),
    Case("in-place", Residual, CE, reals(3), classes(3)),
    Case("frozen", Frozen, CE, reals(3), classes(3), curvlinops=False),
    Case("unused", WithUnused, MSE, reals(3), reals(2), kfac_exact=BOTH, curvlinops=False),
    Case("shared-twice", Shared, MSE, reals(3), reals(2), curvlinops=False),
    Case("tied", Tied, MSE, reals(3), reals(2), curvlinops=False),
    Case("tied-embedding", TiedEmbedding, CE, classes(5), classes(5), curvlinops=False),
    Case("tied-language", lambda: TiedLanguage(1), CE, classes(5, 3), classes(5, 3), curvlinops=False),
    Case("sequence-linear-mse", deep_linear, MSE, reals(3, 4), reals(3, 2), kfac_exact=("expand",)),
    Case("sequence-ce", ClassesFirst, CE, reals(4, 3), classes(3, 4)),
    Case("sequence-bce", mlp, BCE, reals(2, 4), bits(2, 3), curvlinops=False),  # curvlinops misreads it
    Case(
        "sequence-mixed",
        MixedPositions,
        MSE,
        reals(3, 3),
        reals(3, 3),
        curvlinops=False,
        mixes_terms=True,
    ),
    Case(
        "pooled-linear-mse",
        lambda: Pooled(nn.Identity()),
        MSE,
        reals(3, 3),
        reals(2),
        kfac_exact=("reduce",),
    ),
    Case("pooled-ce", lambda: Pooled(nn.Tanh()), CE, reals(3, 3), classes(2)),
    Case("conv-1d", conv_1d, CE, reals(2, 7), classes(3), curvlinops=False),
    Case("conv-2d", conv_2d, CE, reals(2, 4, 4), classes(3)),
    Case("conv-groups", conv_groups, CE, reals(4, 3, 3), classes(3), 3, curvlinops=False),
    Case("conv-3d", conv_3d, MSE, reals(1, 3, 4, 3), reals(2), 3, curvlinops=False),
    Case("transposed-1d", transposed_1d, MSE, reals(2, 3), reals(6), 4, curvlinops=False),
    Case("transposed-groups", transposed_groups, CE, reals(4, 2, 2), classes(3), 3, curvlinops=False),
    Case("transposed-3d", transposed_3d, MSE, reals(1, 2, 2, 2), reals(2), 3, curvlinops=False),
    Case("conv-one-patch", one_patch, CE, reals(4, 2, 2), classes(2), 1, BOTH, curvlinops=False),
    Case("words", lambda: Words(None), CE, classes(6, 4), classes(3), curvlinops=False),
    Case("words-padded", lambda: Words(0), CE, classes(6, 4), classes(3), curvlinops=False),
    Case("bags", lambda: Bag(mode="sum"), CE, classes(6, 4), classes(3), curvlinops=False, twice=False),
    Case("bags-padded", lambda: Bag(padding_idx=2), CE, classes(6, 4), classes(3), curvlinops=False, twice=False),
    Case(
        "bags-cut",
        lambda: Bag(1, True, mode="sum", padding_idx=0),
        CE,
        classes(6, 4),
        classes(3),
        curvlinops=False,
        twice=False,
    ),
    Case("bilinear", TwoSided, CE, reals(2, 3), classes(2), 4, curvlinops=False),
    Case("rnn", lambda: Recurrent(nn.RNN, nonlinearity="relu"), CE, reals(3, 2), classes(3), 4, curvlinops=False),
    Case("lstm", lambda: Recurrent(nn.LSTM, batch_first=True), CE, reals(3, 2), classes(3), 4, curvlinops=False),
    Case(
        "lstm-projected",
        lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=1, bias=False),
        MSE,
        reals(3, 2),
        reals(3),
        3,
        curvlinops=False,
    ),
    Case(
        "gru-both-ways",
        lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True),
        CE,
        reals(2, 2),
        classes(3),
        3,
        curvlinops=False,
    ),
    Case("cells", Cells, MSE, reals(2, 2), reals(2), 3, curvlinops=False),
    Case("adapted", Adapted, CE, reals(4), classes(3), curvlinops=False),
    Case("norms", norms, CE, reals(2, 5), classes(3), curvlinops=False),
    Case("batch-norm", batch_norm, CE, reals(4), classes(3), curvlinops=False, mixes_data=True),
    Case("transformer", Encoder, CE, classes(6, 4), classes(3), 4, curvlinops=False),
    Case("cross-attention", CrossAttention, MSE, reals(4, 4), reals(2), 4, curvlinops=False),
)

# Losses whose own Hessian is zero or depends on the target: the Fisher information stands for it (`reference.bent`).
FISHER_CASES = (
    Case("mlp-nll", mlp_to(nn.LogSoftmax(-1)), nn.NLLLoss, reals(4), classes(3)),
    Case("mlp-nll-sum", mlp_to(nn.LogSoftmax(-1)), sums(nn.NLLLoss), reals(4), partly_ignored),
    Case(
        "sequence-nll", lambda: nn.Sequential(ClassesFirst(), nn.LogSoftmax(1)), nn.NLLLoss, reals(4, 3), classes(3, 4)
    ),
    Case("mlp-kl", mlp_to(nn.LogSoftmax(-1)), lambda: nn.KLDivLoss(reduction="batchmean"), reals(4), chances(3)),
    Case("mlp-kl-sum", mlp_to(nn.LogSoftmax(-1)), sums(nn.KLDivLoss), reals(4), chances(3)),
    Case("mlp-l1", mlp, nn.L1Loss, reals(4), reals(3)),
    Case("mlp-l1-sum", mlp, sums(nn.L1Loss), reals(4), reals(3)),
    Case("linear-l1", lambda: nn.Linear(3, 2), nn.L1Loss, reals(3), reals(2), kfac_exact=BOTH),
    Case("mlp-probability", mlp_to(nn.Sigmoid()), nn.BCELoss, reals(4), chances(3)),
    Case("mlp-probability-sum", mlp_to(nn.Sigmoid()), sums(nn.BCELoss), reals(4), bits(3)),
    Case("mlp-rate", mlp_to(nn.Softplus()), lambda: nn.PoissonNLLLoss(log_input=False, eps=0.0), reals(4), counts(3)),
)

BY_NAME = {case.name: case for case in (*CASES, *FISHER_CASES)}


def made_of(backend: type[kfacopt.LayerwiseBackend]) -> Callable[..., Optimizer]:
    """An optimizer class of a backend class, with the backend's schedules among its arguments."""

    def make(model: nn.Module, loss: Any, params: Any = None, **options: Any) -> Optimizer:
        intervals = {name: options.pop(name) for name in ("factor_every", "refresh_every") if name in options}
        return Optimizer(model, loss, params, backend=backend(**intervals), **options)

    return make


exact_kfac = made_of(kfacopt.EigenKFACBackend)
exact_ekfac = made_of(kfacopt.FullEKFACBackend)

OPTIMIZERS = {"kfac": kfacopt.KFAC, "ekfac": kfacopt.EKFAC, "exact-kfac": exact_kfac, "exact-ekfac": exact_ekfac}


def natural_direction() -> kfacopt.Direction:
    """The natural gradient's, as far in each layer as the layer is long: what takes all curvature there is."""
    return kfacopt.Grafted(kfacopt.Preconditioned())


def still(**options: Any) -> dict[str, Any]:
    """Options of an optimizer that estimates curvature with every step and moves nothing."""
    fixed = {"lr": 0.0, "adamw_lr": 0.0, "kl_clip": None, "momentum": 0.0, "ema_decay": 0.0}
    return fixed | {"factor_every": 1, "refresh_every": 1000, "curvature": "ggn"} | options


def backward(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """The user's own forward and backward."""
    value: Tensor = loss(model(x), y)
    value.backward()
    return value.detach()


def train_step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """The loop of the README, one turn."""
    optimizer.zero_grad()
    value = backward(model, loss, x, y)
    optimizer.step()
    return value


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Copies of a model's parameters."""
    return [p.detach().clone() for p in model.parameters()]
