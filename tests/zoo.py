"""One table of whole models as torch users write them, with data they can learn, and how they train.

    python -m tests.zoo    writes the table of `kfacopt/docs/pages/guides/models.md` anew (some minutes)

A new model is a class in `tests/zoo_models.py` or `zoo_newer.py` and a row here; what must hold for it is said once, in
`test_zoo.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfacopt
from tests import zoo_models as models
from tests import zoo_newer as newer
from tests.cases import natural_direction

PAGE = Path(__file__).parents[1] / "kfacopt" / "docs" / "pages" / "guides" / "models.md"
STEPS, BATCH, HELD_OUT = 150, 32, 8
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
"""AdamW's learning rates; the best counts."""
OURS = {"SpectralDescent": kfacopt.SpectralDescent, "KFAC": kfacopt.KFAC, "EKFAC": kfacopt.EKFAC}

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Model:
    """A model, its loss and its data.

    Attributes:
        name: What pytest and the page show.
        make: Makes the model, in float32.
        loss: What the optimizer is told.
        batch: Makes a batch, of random numbers of torch's own generator.
        value: The loss of a batch; default: `loss(model(x), y)`.
        options: More for the optimizer.
        uncovered: What `coverage()` says where less than 95 % of the parameters get curvature; "": they do.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: nn.Module
    batch: Callable[[], Batch]
    value: Callable[[nn.Module, Any, Tensor], Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    uncovered: str = ""

    def loss_of(self, model: nn.Module, x: Any, y: Tensor) -> Tensor:
        """The loss of one batch, as the user's loop computes it."""
        result: Tensor = self.loss(model(x), y) if self.value is None else self.value(model, x, y)
        return result


# -- data ------------------------------------------------------------------------------------------


def smooth(count: int, channels: int, size: int) -> Tensor:
    """Random images without fine detail, the same in every call."""
    coarse = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(size, size), mode="bicubic")


def images() -> Batch:
    """One of six patterns, shifted, in noise: `[n 3 16 16]` and its class."""
    patterns, y = smooth(6, 3, 16), torch.randint(6, (BATCH,))
    shifts = torch.randint(-3, 4, (BATCH, 2)).tolist()
    shifted = [patterns[c].roll(shift, dims=(1, 2)) for c, shift in zip(y.tolist(), shifts, strict=True)]
    return torch.stack(shifted) + 2.0 * torch.randn(BATCH, 3, 16, 16), y


def segments() -> Batch:
    """A rectangle and a disc before noise; which of the three each pixel is `[n 16 16]`."""
    n, grid = BATCH // 2, torch.arange(16)
    corner, size = torch.randint(0, 10, (2, n, 1)), torch.randint(4, 8, (2, n, 1))
    rows, columns = ((grid >= c) & (grid < c + s) for c, s in zip(corner, size, strict=True))
    centre = torch.randint(3, 13, (2, n, 1, 1))
    disc = (grid[:, None] - centre[0]).square() + (grid - centre[1]).square() <= 9
    y = (rows[:, :, None] & columns[:, None]).long()
    y = torch.where(disc, 2, y)
    colours = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.3, 0.0], [0.0, 0.3, 1.0]])
    return colours[y].permute(0, 3, 1, 2) + 0.5 * torch.randn(n, 3, 16, 16), y


def tokens() -> Batch:
    """Sequences of 24 tokens in which the two before decide the next, but for one in ten: inputs and followers."""
    sequence = [torch.randint(24, (BATCH,)), torch.randint(24, (BATCH,))]
    for _ in range(15):
        following = (3 * sequence[-1] + 7 * (sequence[-2] // 8)) % 24
        sequence.append(torch.where(torch.rand(BATCH) < 0.1, torch.randint(24, (BATCH,)), following))
    whole = torch.stack(sequence, dim=1)
    return whole[:, :-1], whole[:, 1:]


def graph() -> Batch:
    """A hundred random points, near ones joined; a node's class is what its neighbours' features say most of."""
    places, features = torch.rand(100, 2), torch.randn(100, 2)
    distances = torch.cdist(places, places)
    near = (distances < 0.17) & (distances > 0)
    source, target = near.nonzero(as_tuple=True)
    around = torch.zeros(100, 2).index_add(0, target, features[source])
    y = torch.where(around[:, 0].abs() < 1, 0, torch.where(around[:, 0] > 0, 1, 2))
    return (torch.cat([places, features], 1), torch.stack([source, target]), distances[near][:, None]), y


def pixels() -> Batch:
    """Black and white patterns `[n 64]` of six kinds, one pixel in twenty flipped; they are their own targets."""
    clean = (smooth(6, 1, 8).flatten(1) > 0)[torch.randint(6, (BATCH,))]
    x = (clean ^ (torch.rand(BATCH, 64) < 0.05)).float()
    return x, x


def rays() -> Batch:
    """Rays through two coloured blobs: origin and direction `[n 4]`, the colour that arrives `[n 3]`."""
    angle, offset = torch.rand(BATCH, 1) * 2 * torch.pi, torch.rand(BATCH, 1) - 0.5
    direction = torch.cat([angle.cos(), angle.sin()], 1)
    origin = -direction + offset * torch.cat([-angle.sin(), angle.cos()], 1)
    points = origin[:, None] + torch.linspace(0, 2, 48)[:, None] * direction[:, None]
    blobs = torch.tensor([[0.3, 0.2], [-0.3, -0.1]])
    densities = 20.0 * torch.exp(-(points[:, :, None] - blobs).square().sum(-1) / 0.03)
    shares = densities / densities.sum(-1, keepdim=True)
    colour = shares @ torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.4, 0.9]])
    return torch.cat([origin, direction], 1), models.rendered(densities.sum(-1), colour, 2 / 48)


def noisy() -> Batch:
    """Patterns of six kinds mixed with noise, and by how much: `([n 1 8 8], [n])`; the noise is what to find."""
    clean, noise = smooth(6, 1, 8)[torch.randint(6, (BATCH,))], torch.randn(BATCH, 1, 8, 8)
    angle = 0.5 * torch.pi * torch.rand(BATCH)
    cosine, sine = (wave[:, None, None, None] for wave in (angle.cos(), angle.sin()))
    return (cosine * clean + sine * noise, angle), noise


def clouds() -> Batch:
    """Points on a ring, a cross or a bow, turned and blurred: `[n 2 24]` and which it is."""
    y, t = torch.randint(3, (BATCH,)), 2.0 * torch.rand(BATCH, 24) - 1.0
    ring = torch.stack([(torch.pi * t).cos(), (torch.pi * t).sin()], dim=1)
    on_first = (torch.rand(BATCH, 24) < 0.5).float()
    cross = torch.stack([t * on_first, t * (1 - on_first)], dim=1)
    bow = torch.stack([t, t.square() - 0.5], dim=1)
    shapes = torch.stack([ring, cross, bow])[y, torch.arange(BATCH)]
    angle = 2.0 * torch.pi * torch.rand(BATCH)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    return turn @ shapes + 0.2 * torch.randn(BATCH, 2, 24), y


# -- losses of more than one term ------------------------------------------------------------------


def evidence(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The negative evidence lower bound over the number of pixels, as `BCEWithLogitsLoss` takes the mean of them."""
    logits, mean, log_variance = model(x)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return F.binary_cross_entropy_with_logits(logits, y) + divergence / logits.shape[1]


def shifted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits `[n t c]`, as loops of language models flatten them."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


CE = nn.CrossEntropyLoss()

MODELS = (
    Model("ConvNeXt", models.ConvNeXtLike, CE, images),
    Model("ViT", models.ViTLike, CE, images),
    Model("EfficientNet", models.EfficientNetLike, CE, images),
    Model("U-Net", models.UNet, CE, segments),
    Model("GPT", models.TiedGPT, CE, tokens, shifted),
    Model("LSTM", models.LSTMLanguageModel, CE, tokens),
    Model("graph network", models.GraphNetwork, CE, graph),
    Model("VAE", models.VAE, nn.BCEWithLogitsLoss(), pixels, evidence, {"prediction": lambda output: output[0]}),
    Model("NeRF", models.NeRFLike, nn.MSELoss(), rays),
    Model("Mamba", newer.MambaLike, CE, tokens, shifted),
    Model("mixture of experts", newer.MixtureLike, CE, tokens, shifted),
    Model("diffusion U-Net", newer.DiffusionUNet, nn.MSELoss(), noisy),
    Model("PointNet", newer.PointNetLike, CE, clouds),
    Model("Perceiver", newer.PerceiverLike, CE, images),
)


# -- what is said of them --------------------------------------------------------------------------


def covered_share(optimizer: Any) -> float:
    """The part of a model's numbers that get curvature, as `coverage()` says."""
    without = 0
    for row in optimizer.coverage().rows:
        if row.treatment in ("AdamW", "frozen", "not optimized"):
            names = (".".join(filter(None, [row.module, name])) for name in row.parameters)
            without += sum(optimizer.model.get_parameter(name).numel() for name in names)
    return 1.0 - without / sum(p.numel() for p in optimizer.model.parameters())


def train(model: Model, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = STEPS) -> tuple[float, float]:
    """Train by a plain loop, each batch seen once, the rate on a line to zero: the loss held out, before and after."""
    torch.manual_seed(0)
    net = model.make()
    held_out = [model.batch() for _ in range(HELD_OUT)]
    optimizer = make(net)
    scheduler = kfacopt.schedules.to_zero(optimizer, steps)
    before = mean_loss(model, net, held_out)
    for step in range(steps):
        torch.manual_seed(100 + step)  # the same batches for every optimizer
        x, y = model.batch()
        optimizer.zero_grad()
        model.loss_of(net, x, y).backward()
        optimizer.step()
        scheduler.step()
    return before, mean_loss(model, net, held_out)


def mean_loss(model: Model, net: nn.Module, batches: list[Batch]) -> float:
    """Over some batches, in the mode that the model is left in for use."""
    torch.manual_seed(1)  # of a code that is drawn
    net.eval()
    with torch.no_grad():
        result = sum(float(model.loss_of(net, x, y)) for x, y in batches) / len(batches)
    net.train()
    return result


def ours(model: Model, name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """One of our optimizers with its defaults."""
    return lambda net: OURS[name](net, model.loss, **model.options)


def with_curvature(model: Model, name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """KFAC or EKFAC with the direction that takes all curvature there is."""
    return lambda net: OURS[name](net, model.loss, direction=natural_direction(), **model.options)


def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """torch's AdamW at a rate."""
    return lambda net: torch.optim.AdamW(net.parameters(), lr=rate)


@dataclass(frozen=True)
class Line:
    """A model's line of the table: `losses` by optimizer, AdamW's at the best of its rates."""

    parameters: int
    share: float
    losses: dict[str, float]
    rate: float

    @classmethod
    def of(cls, model: Model) -> Line:
        """Train it with each."""
        rivals = {rate: train(model, adamw(rate))[1] for rate in RATES}
        best = min(rivals, key=rivals.__getitem__)
        losses = {"AdamW": rivals[best]} | {name: train(model, ours(model, name))[1] for name in OURS}
        net = model.make()
        return cls(
            sum(p.numel() for p in net.parameters()), covered_share(with_curvature(model, "EKFAC")(net)), losses, best
        )

    def __str__(self) -> str:
        rival = self.losses["AdamW"]
        numbers = [f"{loss:.3g} ({loss / rival:.2f})" for name, loss in self.losses.items() if name != "AdamW"]
        cells = [f"{self.parameters:,}", f"{100 * self.share:.1f}", f"{rival:.3g} ({self.rate:g})", *numbers]
        return " | ".join(cells)


def table(lines: dict[str, Line]) -> str:
    """The table of the page."""
    head = ["model", "parameters", "% with curvature", "AdamW (lr)", *OURS]
    rows = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*rows, *(f"| {name} | {line} |" for name, line in lines.items())])


def cells_on_the_page() -> dict[str, list[str]]:
    """By model, the cells of its line on the page."""
    rows = re.search(r"<!-- zoo -->\n.*?\n<!-- end -->", PAGE.read_text(), flags=re.DOTALL)
    assert rows is not None
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows[0].splitlines()[3:-1]]
    return {name: cells for name, *cells in lines}


def shares_on_the_page() -> dict[str, float]:
    """By model, the part with curvature that the page says."""
    return {name: float(cells[1]) / 100 for name, cells in cells_on_the_page().items()}


def bracketed(cell: str) -> float:
    """The number in brackets."""
    return float(cell[cell.index("(") + 1 : -1])


def rate_on_the_page(name: str) -> float:
    """AdamW's best learning rate."""
    return bracketed(cells_on_the_page()[name][2])


def ratios_on_the_page(name: str) -> dict[str, float]:
    """By optimizer of ours, its loss over AdamW's."""
    return dict(zip(OURS, map(bracketed, cells_on_the_page()[name][3:]), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    lines = {}
    for model in MODELS:
        lines[model.name] = Line.of(model)
        print(model.name, lines[model.name], flush=True)
    before, marks, after = re.split(r"(<!-- zoo -->\n).*(?=<!-- end -->)", PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(f"{before}{marks}{table(lines)}\n{after}")


if __name__ == "__main__":
    main()
