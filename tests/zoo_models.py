"""Whole models as torch users write them, at toy size: what `tests/zoo.py` trains.

They are written in the manner of the well-known ones (names of papers, habits of the common packages: raw parameters
for class tokens and layer scales, fused projections, points of all rays in one flat batch), and know no optimizer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, then a perceptron over the channels, scaled by a raw parameter (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.project(F.gelu(self.expand(h)))
        return x + h.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[n c h w]`, as packages subclass it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtLike(nn.Module):
    """Images `[n 3 16 16]` to logits `[n classes]`: a patchifying stem, two stages, a normed and pooled head."""

    def __init__(self, classes: int = 6, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, stride=2), ChannelNorm(width))
        self.first = ConvNeXtBlock(width)
        self.down = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, stride=2))
        self.second = ConvNeXtBlock(2 * width)
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.down(self.first(self.stem(x))))
        return self.head(self.norm(h.mean((2, 3))))


class Attention(nn.Module):
    """Self-attention with one fused projection, as timm and nanoGPT have it."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(attended.transpose(1, 2).reshape(n, t, width))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each on the normalised stream."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTLike(nn.Module):
    """Images `[n 3 16 16]` to logits `[n classes]`: patches, a class token and positions that are raw parameters."""

    def __init__(self, classes: int = 6, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 3) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole image says of them (Hu et al. 2018)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * scale.sigmoid()


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, squeeze-excite, project; in place where packages do it in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.skips = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(inplace=True)),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            *(nn.BatchNorm2d(hidden), nn.SiLU(inplace=True), SqueezeExcite(hidden, inputs)),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return x + h if self.skips else h


class EfficientNetLike(nn.Module):
    """Images `[n 3 16 16]` to logits `[n classes]` (Tan & Le 2019)."""

    def __init__(self, classes: int = 6, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU(inplace=True)
        )
        self.blocks = nn.Sequential(
            InvertedResidual(width, width, 1), InvertedResidual(width, 2 * width, 2), InvertedResidual(16, 16, 1)
        )
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(2 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def two_convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """The step of a U-Net."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True)),
    )


class UNet(nn.Module):
    """Images `[n 3 16 16]` to logits of each pixel `[n classes 16 16]`; skips join by concatenation."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = two_convolutions(3, width), two_convolutions(width, 2 * width)
        self.bottom = two_convolutions(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = two_convolutions(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = two_convolutions(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        h = self.bottom(F.max_pool2d(second, 2))
        h = self.join2(torch.cat([second, self.up2(h)], dim=1))
        return self.head(self.join1(torch.cat([first, self.up1(h)], dim=1)))


class TiedGPT(nn.Module):
    """Tokens `[n t]` to logits `[n t vocabulary]`; the head holds the embedding's weight, positions are looked up once.

    As nanoGPT has it: the positions' rows belong to no single datum.
    """

    def __init__(self, vocabulary: int = 24, length: int = 16, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 3, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.wte(tokens) + self.wpe(places))))


class LSTMLanguageModel(nn.Module):
    """Tokens `[n t]` to logits in torch's layout `[n vocabulary t]`."""

    def __init__(self, vocabulary: int = 24, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits.transpose(1, 2)


class GraphLayer(nn.Module):
    """Messages along the edges, summed where they arrive (Gilmer et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width + 1, width), nn.ReLU(), nn.Linear(width, width))
        self.update = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())

    def forward(self, nodes: Tensor, edges: Tensor, lengths: Tensor) -> Tensor:
        source, target = edges
        messages = self.message(torch.cat([nodes[source], nodes[target], lengths], dim=1))
        arrived = torch.zeros_like(nodes).index_add(0, target, messages)
        return nodes + self.update(torch.cat([nodes, arrived], dim=1))


class GraphNetwork(nn.Module):
    """Nodes `[nodes 4]`, edges `[2 edges]` and their lengths `[edges 1]` to logits of each node.

    Data of three kinds in one forward: the encoder sees nodes, the messages edges.
    """

    def __init__(self, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, width)
        self.layers = nn.ModuleList([GraphLayer(width), GraphLayer(width)])
        self.head = nn.Linear(width, classes)

    def forward(self, graph: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        nodes, edges, lengths = graph
        h = self.encoder(nodes)
        for layer in self.layers:
            h = layer(h, edges, lengths)
        return self.head(h)


class VAE(nn.Module):
    """Pixels `[n 64]` to logits of them, and the code's means and log-variances `[n code]` (Kingma & Welling 2014)."""

    def __init__(self, pixels: int = 64, hidden: int = 32, code: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


class NeRFLike(nn.Module):
    """Rays `[n 4]` (origin and direction in the plane) to colours `[n 3]`, by rendering what a perceptron says.

    The points of all rays go through it as one flat batch (Mildenhall et al. 2020).
    """

    def __init__(self, samples: int = 12, width: int = 32, frequencies: int = 4) -> None:
        super().__init__()
        self.samples = samples
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(frequencies))
        encoded = 2 + 4 * frequencies
        self.first = nn.Sequential(nn.Linear(encoded, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width + encoded, width), nn.ReLU())
        self.density, self.colour = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, rays: Tensor) -> Tensor:
        depths = torch.linspace(0.0, 2.0, self.samples, device=rays.device, dtype=rays.dtype)
        points = rays[:, None, :2] + depths[:, None] * rays[:, None, 2:]
        flat = points.reshape(-1, 2)
        waves = (flat[:, :, None] * self.frequencies).flatten(1)
        encoded = torch.cat([flat, waves.sin(), waves.cos()], dim=1)
        h = self.second(torch.cat([self.first(encoded), encoded], dim=1))
        density, colour = self.density(h).reshape(len(rays), -1), self.colour(h).reshape(len(rays), -1, 3)
        return rendered(F.softplus(density), colour.sigmoid(), 2.0 / self.samples)


def rendered(density: Tensor, colour: Tensor, step: float) -> Tensor:
    """Colours `[n 3]` of rays with densities `[n s]` and colours `[n s 3]` at points `step` apart."""
    passed = torch.exp(-step * density)
    arriving = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1].cumprod(1)], dim=1)
    return ((arriving * (1 - passed))[..., None] * colour).sum(1)
