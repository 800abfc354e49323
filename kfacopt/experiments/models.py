"""The networks of the training runs: plain modules, with no knowledge of optimizer or trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class DeepAutoencoder(nn.Sequential):
    """The deep autoencoder of Hinton & Salakhutdinov (2006), as in Martens & Grosse (2015).

    Linear layers 784-1000-500-250-30-250-500-1000-784 with tanh between them, except that the code in the middle is
    linear and the output is logits. Weights are drawn as Glorot & Bengio (2010) have it, uniform with variance 2 /
    (inputs + outputs), which keeps a signal's size through tanh layers; biases are zero.

    Args:
        input_size: Features of a datum.
        hidden: Sizes of the encoder's hidden layers; the decoder mirrors them.
        code: Size of the code.

    >>> DeepAutoencoder()(torch.zeros(2, 784)).shape
    torch.Size([2, 784])
    """

    def __init__(self, input_size: int = 784, hidden: Sequence[int] = (1000, 500, 250), code: int = 30) -> None:
        sizes = [input_size, *hidden, code, *reversed(hidden), input_size]
        code_layer, last_layer = len(hidden), len(sizes) - 2
        modules: list[nn.Module] = []
        for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            modules.append(linear)
            if layer not in (code_layer, last_layer):
                modules.append(nn.Tanh())
        super().__init__(*modules)


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.normalization1 = nn.BatchNorm2d(outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.normalization2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.normalization1(self.convolution1(images)))
        hidden = self.normalization2(self.convolution2(hidden))
        return F.relu(hidden + self.shortcut(images))


class SmallResNet(nn.Module):
    """A residual network for small grey images (He et al. 2016, section 4.2, at a third its depth).

    A 3 x 3 convolution, stages of residual blocks (each stage but the first halves height and width), the mean over
    what is left of the image, and a linear classifier. BatchNorm follows every convolution, so the convolutions have no
    bias. Convolutions are drawn as He et al. (2015) have it (normal, variance 2 / fan-out), the classifier as torch
    does.

    Args:
        channels: Of the image.
        classes: How many.
        widths: Channels of each stage.
        blocks: Residual blocks in a stage.

    >>> SmallResNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, widths: Sequence[int] = (16, 32, 64), blocks: int = 1
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(_ResidualBlock(inputs, width, stride))
                inputs = width
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n channels h w]` to logits `[n classes]`."""
        hidden = F.relu(self.normalization(self.convolution(images)))
        logits: Tensor = self.classifier(self.blocks(hidden).mean((2, 3)))
        return logits


class _TransformerBlock(nn.Module):
    """Causal self-attention and a perceptron, each on the normalised stream (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        # Three projections rather than one of triple width: each has Kronecker factors of its own.
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron_input = nn.Linear(width, 4 * width)
        self.perceptron_output = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        normalized = self.attention_norm(stream)
        query, key, value = (
            rearrange(projection(normalized), "n t (h d) -> n h t d", h=self.heads)
            for projection in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        attended = self.attention_output(rearrange(attended, "n h t d -> n t (h d)"))
        stream = stream + F.dropout(attended, self.dropout, self.training)
        hidden = F.gelu(self.perceptron_input(self.perceptron_norm(stream)))
        hidden = self.perceptron_output(hidden)
        return stream + F.dropout(hidden, self.dropout, self.training)


class CharacterTransformer(nn.Module):
    """A small pre-norm transformer that predicts each next character (Radford et al. 2019).

    Embedded characters plus learned positions, blocks of causal attention and a perceptron, a last LayerNorm and a
    linear head that shares no weight with the embedding. Weights and embeddings are normal with standard deviation
    0.02, the two layers of a block that write into the residual stream with 0.02 / sqrt(2 x layers), so that the stream
    does not grow with depth; biases are 0.

    Args:
        vocabulary_size: How many different characters (256: the bytes of UTF-8).
        context: The longest sequence.
        width: Of the residual stream; a multiple of `heads`.
        layers: How many blocks.
        heads: Attention heads in a block.
        dropout: Probability to drop an attention weight or a block's output, in training.

    Raises:
        ValueError: The heads do not divide the width; or, on call, the sequence is too long.

    >>> CharacterTransformer(context=16)(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 256])
    """

    def __init__(
        self,
        vocabulary_size: int = 256,
        context: int = 128,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.context = context
        self.dropout = dropout
        self.characters = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("attention_output.weight", "perceptron_output.weight"))
                deviation = 0.02 / math.sqrt(2 * layers) if into_stream else 0.02
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, characters: Tensor) -> Tensor:
        """Numbers of characters, integer `[n t]`, to logits of the next, `[n t vocabulary]`."""
        count, length = characters.shape
        if length > self.context:
            raise ValueError(f"a sequence of {length} characters exceeds context={self.context}")
        # Looked up once for every sequence, not once for the batch: each row of the positions' gradient then belongs to
        # one datum, which is what a Kronecker factor is an average of.
        places = torch.arange(length, device=characters.device).expand(count, length)
        stream = self.characters(characters) + self.positions(places)
        stream = self.blocks(F.dropout(stream, self.dropout, self.training))
        logits: Tensor = self.head(self.norm(stream))
        return logits


class TabularMLP(nn.Sequential):
    """A multilayer perceptron for tables.

    Linear layers with tanh between them, weights as in `DeepAutoencoder`, biases zero.

    Args:
        input_size: columns.
        hidden: Sizes of the hidden layers.
        output_size: Predicted numbers.

    >>> TabularMLP()(torch.zeros(2, 10)).shape
    torch.Size([2, 1])
    """

    def __init__(self, input_size: int = 10, hidden: Sequence[int] = (64, 64), output_size: int = 1) -> None:
        sizes = [input_size, *hidden, output_size]
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            modules.extend([linear, nn.Tanh()])
        super().__init__(*modules[:-1])


class SmallConvNet(nn.Sequential):
    """Two convolutions of 5 x 5 with ReLU and pooling, a hidden layer and a classifier; torch's initialization.

    >>> SmallConvNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: tuple[int, int] = (8, 16), hidden: int = 64, classes: int = 10) -> None:
        first, second = channels
        super().__init__(
            *(nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(second * 49, hidden), nn.ReLU(), nn.Linear(hidden, classes)),
        )


class Perceptron(nn.Sequential):
    """Linear layers with an activation between them; torch's initialization.

    >>> Perceptron([8, 16, 1], nn.GELU)(torch.zeros(2, 8)).shape
    torch.Size([2, 1])
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module]) -> None:
        modules: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            modules += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*modules[:-1])


class DeepChain(Perceptron):
    """A deep narrow perceptron of tanh layers, Glorot's initialization: hard for first-order methods.

    >>> DeepChain(784, width=24, depth=16)(torch.zeros(2, 784)).shape
    torch.Size([2, 10])
    """

    def __init__(self, inputs: int, width: int, depth: int, outputs: int = 10) -> None:
        super().__init__([inputs, *[width] * depth, outputs], nn.Tanh)
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


class HeatResiduals(nn.Module):
    """A physics-informed network: what it leaves of the heat equation, of its initial values and at its ends.

    `∂u/∂t = ¼ ∂²u/∂x²` for 0 ≤ x, t ≤ 1, `u = sin(πx)` at t = 0 and u = 0 at both ends. Points `[n 6]` are three pairs
    (x, t): in the interior, of which x serves for t = 0 too, and t for the ends; the residuals are `[n 3]`, those of
    the conditions times √10.

    >>> HeatResiduals(width=16)(torch.rand(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = Perceptron([2, width, width, width, 1], nn.Tanh)

    def forward(self, points: Tensor) -> Tensor:
        """Points `[n 2]` to residuals `[n 3]`."""
        with torch.enable_grad():  # its own derivatives are part of the forward, also when a loss is only measured
            inside = points.detach().clone().requires_grad_()
            x, t = points.unbind(1)
            start = torch.stack([x, torch.zeros_like(t)], dim=1)
            ends = torch.stack([x.round(), t], dim=1)
            u = self.network(inside)
            (first,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 0].sum(), inside, create_graph=True)
            equation = first[:, 1] - 0.25 * second[:, 0]
            initial = self.network(start).squeeze(1) - torch.sin(math.pi * x)
            return torch.stack([equation, math.sqrt(10) * initial, math.sqrt(10) * self.network(ends).squeeze(1)], 1)
