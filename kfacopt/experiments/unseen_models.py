"""The networks of the suite `unseen`: kinds that users of torch have and that its older suite has not."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kfacopt.experiments.models import CharacterTransformer, Perceptron


class VisionTransformer(nn.Module):
    """Patches of an image as a sequence (Dosovitskiy et al. 2021), in layers as torch brings them.

    Args:
        side: Height and width of the image, a multiple of `patch`.
        patch: Height and width of a patch.
        width: Of the residual stream; a multiple of `heads`.
        layers: How many.
        heads: Attention heads in a layer.
        classes: How many.

    >>> VisionTransformer()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, side: int = 28, patch: int = 7, width: int = 48, layers: int = 2, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch = patch
        self.patches = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n 1 side side]` to logits `[n classes]`."""
        cut = rearrange(images, "n 1 (y p) (x q) -> n (y x) (p q)", p=self.patch, q=self.patch)
        stream = self.layers(self.patches(cut) + self.positions)
        logits: Tensor = self.classifier(self.norm(stream).mean(1))
        return logits


class TiedTransformer(CharacterTransformer):
    """A `CharacterTransformer` whose head is its embedding (Press & Wolf 2017); arguments are the same.

    >>> model = TiedTransformer(context=16, layers=1)
    >>> model.head.weight is model.characters.weight, model(torch.zeros(2, 16, dtype=torch.long)).shape
    (True, torch.Size([2, 16, 256]))
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head.weight = self.characters.weight


class VariationalAutoencoder(nn.Module):
    """A perceptron each way, the code between them drawn anew on every call (Kingma & Welling 2014).

    After a call `divergence` is that of the codes' distributions from the standard normal one, in nats, a mean over the
    data.

    Args:
        pixels: Of an image.
        hidden: Width of the hidden layer on each side.
        code: Size of the code.

    >>> VariationalAutoencoder()(torch.zeros(2, 784)).shape
    torch.Size([2, 784])
    """

    divergence: Tensor

    def __init__(self, pixels: int = 784, hidden: int = 200, code: int = 16) -> None:
        super().__init__()
        self.encoder = Perceptron([pixels, hidden, 2 * code], nn.Tanh)
        self.decoder = Perceptron([code, hidden, pixels], nn.Tanh)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1] `[n pixels]` to logits of their pixels, as many."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        self.divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        logits: Tensor = self.decoder(code)
        return logits


class Ratings(nn.Module):
    """What a user thinks of an item, by an embedding of each and a small head on both and on their product.

    Args:
        users: How many.
        items: How many.
        width: Of an embedding.
        hidden: Width of the head's hidden layer.

    >>> Ratings(users=5, items=4)(torch.zeros(2, 2, dtype=torch.long)).shape
    torch.Size([2, 1])
    """

    def __init__(self, users: int, items: int, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.head = Perceptron([3 * width, hidden, 1], nn.ReLU)

    def forward(self, pairs: Tensor) -> Tensor:
        """Numbers of user and item, int64 `[n 2]`, to ratings `[n 1]`."""
        user, item = self.users(pairs[:, 0]), self.items(pairs[:, 1])
        ratings: Tensor = self.head(torch.cat([user, item, user * item], dim=1))
        return ratings


class RecurrentLanguageModel(nn.Module):
    """Embedded characters, an LSTM, and a linear head; torch's initialization.

    Args:
        vocabulary_size: How many different characters.
        width: Of the embedding.
        hidden: Of the LSTM's state.

    >>> RecurrentLanguageModel()(torch.zeros(2, 6, dtype=torch.long)).shape
    torch.Size([2, 6, 256])
    """

    def __init__(self, vocabulary_size: int = 256, width: int = 32, hidden: int = 96) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary_size, width)
        self.recurrent = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary_size)

    def forward(self, characters: Tensor) -> Tensor:
        """Numbers of characters, integer `[n t]`, to logits of the next, `[n t vocabulary]`."""
        states, _ = self.recurrent(self.characters(characters))
        logits: Tensor = self.head(states)
        return logits


class Waves(nn.Module):
    """A picture by its coordinates: sines of linear layers, thirty times as fast (Sitzmann et al. 2020).

    Weights are drawn as they have it, so that every layer's sines have the same distribution.

    Args:
        width: Of the hidden layers.
        layers: How many have sines.
        frequency: What their linear part is multiplied by.
        colours: Predicted numbers of a point.

    >>> Waves(width=16)(torch.zeros(2, 2)).shape
    torch.Size([2, 3])
    """

    def __init__(self, width: int = 64, layers: int = 3, frequency: float = 30.0, colours: int = 3) -> None:
        super().__init__()
        self.frequency = frequency
        self.hidden = nn.ModuleList(nn.Linear(width if layer else 2, width) for layer in range(layers))
        self.last = nn.Linear(width, colours)
        for layer, linear in enumerate([*self.hidden, self.last]):
            bound = math.sqrt(6 / width) / frequency if layer else 0.5
            nn.init.uniform_(linear.weight, -bound, bound)

    def forward(self, points: Tensor) -> Tensor:
        """Points in [-1, 1] `[n 2]` to colours `[n colours]`."""
        for linear in self.hidden:
            points = torch.sin(self.frequency * linear(points))
        colours: Tensor = self.last(points)
        return colours


class _NormalizedBlock(nn.Module):
    """A perceptron on the normalised stream, added to it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.perceptron = Perceptron([width, hidden, width], nn.GELU)

    def forward(self, stream: Tensor) -> Tensor:
        added: Tensor = self.perceptron(self.norm(stream))
        return stream + added


class ResidualPerceptron(nn.Sequential):
    """A deep and narrow residual network for tables: a linear layer, normalised blocks, a head.

    >>> ResidualPerceptron(6, width=8, blocks=3, outputs=4)(torch.zeros(2, 6)).shape
    torch.Size([2, 4])
    """

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, width),
            *(_NormalizedBlock(width, 2 * width) for _ in range(blocks)),
            nn.LayerNorm(width),
            nn.Linear(width, outputs),
        )


class PointSets(nn.Module):
    """Names what a set of points is of, whatever their order: attention between them, and one query of all.

    Args:
        axes: Coordinates of a point.
        width: Of what is known of a point; a multiple of `heads`.
        heads: Of attention.
        classes: How many.

    >>> PointSets()(torch.zeros(2, 24, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(self, axes: int = 3, width: int = 32, heads: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.point = Perceptron([axes, width, width], nn.ReLU)
        self.between = nn.MultiheadAttention(width, heads, batch_first=True)
        self.each = Perceptron([width, width, width], nn.ReLU)
        self.query = nn.Parameter(torch.randn(width))
        self.pooling = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classifier = Perceptron([width, width, classes], nn.ReLU)

    def forward(self, points: Tensor) -> Tensor:
        """Points `[n points axes]` to logits `[n classes]`."""
        known = self.point(points)
        known = known + self.between(known, known, known, need_weights=False)[0]
        known = known + self.each(known)
        query = self.query.expand(len(points), 1, -1)
        pooled = self.pooling(query, known, known, need_weights=False)[0]
        logits: Tensor = self.classifier(pooled.squeeze(1))
        return logits


def _convolved(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU())


class SmallUNet(nn.Module):
    """An image to an image by way of one of half its size, the fine one kept beside it (Ronneberger et al. 2015).

    Args:
        width: Channels of the fine images, a multiple of 4; the coarse ones have twice as many.

    >>> SmallUNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fine = _convolved(1, width)
        self.coarse = nn.Sequential(nn.MaxPool2d(2), _convolved(width, 2 * width), _convolved(2 * width, 2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.both = _convolved(2 * width, width)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n 1 h w]`, h and w even, to images of the same size."""
        fine = self.fine(images)
        up = self.up(self.coarse(fine))
        result: Tensor = self.last(self.both(torch.cat([fine, up], dim=1)))
        return result


class GraphNetwork(nn.Module):
    """Layers that add what a node is to what its neighbours are in the mean, and a number for every node.

    A graph is one matrix: its normalised adjacency, `[nodes nodes]`, with the features of the nodes beside it.

    Args:
        features: Of a node.
        width: Of the hidden layers.
        layers: How many.

    >>> GraphNetwork(features=8)(torch.zeros(2, 16, 16 + 8)).shape
    torch.Size([2, 16, 1])
    """

    def __init__(self, features: int, width: int = 48, layers: int = 3) -> None:
        super().__init__()
        self.features = features
        self.own = nn.ModuleList(nn.Linear(width if layer else features, width) for layer in range(layers))
        self.neighbours = nn.ModuleList(
            nn.Linear(width if layer else features, width, bias=False) for layer in range(layers)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, graphs: Tensor) -> Tensor:
        """Graphs `[n nodes nodes+features]` to numbers `[n nodes 1]`."""
        adjacency, hidden = graphs[..., : -self.features], graphs[..., -self.features :]
        for own, neighbours in zip(self.own, self.neighbours, strict=True):
            hidden = F.relu(own(hidden) + neighbours(adjacency @ hidden))
        numbers: Tensor = self.head(hidden)
        return numbers
