"""More whole models for `tests/zoo.py`, of the kinds that came after those of `zoo_models.py`, in the same manner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo_models import Attention


class SelectiveScan(nn.Module):
    """A state space whose step, input and output depend on the token (Gu & Dao 2023, arXiv:2312.00752, section 3)."""

    def __init__(self, width: int, states: int = 4, rank: int = 4, kernel: int = 3) -> None:
        super().__init__()
        inner = 2 * width
        self.states, self.rank = states, rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().expand(inner, states).clone())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[:, :, : x.shape[1]].transpose(1, 2))
        low, b, c = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        step = F.softplus(self.dt_proj(low))
        decay = torch.exp(-step[..., None] * self.A_log.exp())
        driven = torch.einsum("btd,btn,btd->btdn", step, b, u)
        state, seen = torch.zeros_like(decay[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + driven[:, t]
            seen.append(torch.einsum("bdn,bn->bd", state, c[:, t]))
        return self.out_proj((torch.stack(seen, dim=1) + self.D * u) * F.silu(gate))


class MambaLike(nn.Module):
    """Tokens `[n t]` to logits `[n t vocabulary]` without attention."""

    def __init__(self, vocabulary: int = 24, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(SelectiveScan(width) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norm(x))


class SparseExperts(nn.Module):
    """Each token goes through the two experts that a router likes most, by their weights (Jiang et al. 2024)."""

    def __init__(self, width: int, hidden: int, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            result = result.index_add(0, token, expert(flat[token]) * weights[token, place, None])
        return result.view_as(x)


class MixtureLike(nn.Module):
    """Tokens `[n t]` to logits `[n t vocabulary]`; an expert's data are the tokens that came to it, if any."""

    def __init__(self, vocabulary: int = 24, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.attn, self.experts = Attention(width, 3, causal=True), SparseExperts(width, 2 * width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attn(self.norms[0](x))
        return self.head(self.norms[2](x + self.experts(self.norms[1](x))))


class TimedBlock(nn.Module):
    """Two convolutions, told the time by a bias for each channel, beside a skip (Ho et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1, self.conv2 = (nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class DiffusionUNet(nn.Module):
    """Noisy images `[n 1 8 8]` and times `[n]` to the noise in them; attention over the places at the bottom."""

    def __init__(self, width: int = 8, time: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(time // 2))
        self.time = nn.Sequential(nn.Linear(time, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down, self.bottom = TimedBlock(width, width, time), TimedBlock(width, 2 * width, time)
        self.norm, self.attn = nn.GroupNorm(4, 2 * width), Attention(2 * width, 2, causal=False)
        self.up = TimedBlock(3 * width, width, time)
        self.head = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, noisy: tuple[Tensor, Tensor]) -> Tensor:
        x, t = noisy
        waves = t[:, None] * self.frequencies
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        first = self.down(self.stem(x), time)
        h = self.bottom(F.avg_pool2d(first, 2), time)
        h = h + self.attn(self.norm(h).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        joined = torch.cat([first, F.interpolate(h, scale_factor=2)], dim=1)
        return self.head(self.up(joined, time))


class PointNetLike(nn.Module):
    """Clouds of points `[n 2 points]` to logits `[n classes]`: turned as a small network says, then the largest of each
    feature over the points (Qi et al. 2017)."""

    def __init__(self, classes: int = 3, width: int = 24) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv1d(2, width, 1), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        self.turn = nn.Linear(width, 4)
        self.points = nn.Sequential(
            *(nn.Conv1d(2, width, 1), nn.BatchNorm1d(width), nn.ReLU(inplace=True)),
            *(nn.Conv1d(width, 2 * width, 1), nn.BatchNorm1d(2 * width), nn.ReLU(inplace=True)),
        )
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes))

    def forward(self, points: Tensor) -> Tensor:
        turned = self.turn(self.look(points).amax(-1)).view(-1, 2, 2) + torch.eye(2, device=points.device)
        return self.head(self.points(torch.bmm(turned, points)).amax(-1))


class PerceiverLike(nn.Module):
    """Images `[n 3 16 16]` to logits `[n classes]`: a few latents look at all pixels (Jaegle et al. 2021)."""

    def __init__(self, classes: int = 6, latents: int = 4, width: int = 24) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(latents, width))
        grid = torch.linspace(-1.0, 1.0, 8)
        waves = torch.pi * torch.tensor([1.0, 2.0, 4.0]) * grid[:, None]
        waves = torch.cat([waves.sin(), waves.cos()], dim=1)
        places = torch.cat([waves[:, None].expand(8, 8, -1), waves[None].expand(8, 8, -1)], dim=-1)
        self.register_buffer("places", places.flatten(0, 1))
        self.attend = nn.MultiheadAttention(width, 3, kdim=24, vdim=24, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.inner = Attention(width, 3, causal=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        seen = torch.cat([patches, self.places.expand(len(x), -1, -1)], dim=2)
        h = self.latents.expand(len(x), -1, -1)
        h = h + self.attend(self.norms[0](h), seen, seen, need_weights=False)[0]
        h = h + self.inner(self.norms[1](h))
        return self.head((h + self.mlp(self.norms[2](h))).mean(1))
