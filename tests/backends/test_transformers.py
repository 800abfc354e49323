"""Attention models train without a crash, whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from tests.cases import OPTIMIZERS, natural_direction


class Language(nn.Module):
    def __init__(self, batch_first: bool, norm_first: bool, kind: str) -> None:
        super().__init__()
        self.kind, self.batch_first = kind, batch_first
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        length = x.shape[1 if self.batch_first else 0]
        if self.kind == "attention":
            return self.head(h + self.attention(h, h, h, need_weights=False)[0])
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.layer(h, src_mask=mask, is_causal=True))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["attention", "layer"])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_transformers_train(optimizer: Any, fisher_type: str, kind: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Language(batch_first, norm_first=fisher_type == "mc", kind=kind)
    x = torch.randint(7, (5, 4))
    loss = nn.CrossEntropyLoss()
    direction = natural_direction()
    intervals = {"factor_every": 2, "refresh_every": 2}
    made = optimizer(model, loss, curvature=fisher_type, lr=0.05, adamw_lr=1e-2, direction=direction, **intervals)
    losses = []
    for _ in range(8):
        made.zero_grad()
        value = loss(model(x).flatten(0, 1), x.flatten())
        value.backward()
        made.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    treated = {(r.module, p): r.treatment for r in made.coverage().rows for p in r.parameters}
    used = "attention" if kind == "attention" else "layer.self_attn"
    assert treated[f"{used}.k_proj", "in_proj_weight[8:16]"] != "AdamW"
    assert treated[f"{used}.out_proj", "weight"] != "AdamW"
    assert treated["embedding", "weight"] != "AdamW"


@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_of_a_watched_transformer(grad: bool) -> None:
    """Its fused path and ours agree to rounding: hooks keep torch from fusing."""
    torch.manual_seed(0)
    model = Language(batch_first=True, norm_first=False, kind="layer").eval()
    x = torch.randint(7, (5, 4))
    with torch.set_grad_enabled(grad):
        before = model(x).detach()
        made = kfacopt.EKFAC(model, nn.CrossEntropyLoss())
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-6)
        made.close()
        torch.testing.assert_close(model(x).detach(), before, rtol=1e-5, atol=1e-6)
