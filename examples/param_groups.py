"""Param groups as in torch: what gets curvature, what decays, and a look at what the optimizer did.

The digits are read as text: each of the 64 pixels is one of 17 grey levels, and each level has a learned embedding. It
is excluded from curvature here, as one does with a large vocabulary.
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfacopt

EPOCHS = 2 if os.environ.get("KFACOPT_SHORT") else 10


class PixelReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        self.normalize = nn.LayerNorm(64 * 8)
        self.hidden = nn.Linear(64 * 8, 64)
        self.classify = nn.Linear(64, 10)

    def forward(self, levels: Tensor) -> Tensor:
        x = self.normalize(self.embedding(levels).flatten(1))
        logits: Tensor = self.classify(self.hidden(x).tanh())
        return logits


def param_groups(model: PixelReader) -> list[dict[str, object]]:
    """The usual three: embeddings, matrices, and vectors (biases and norms), which do not decay."""
    rest = [p for p in model.parameters() if p is not model.embedding.weight]
    return [
        # Trained by AdamW inside the same optimizer, with this group's lr.
        {"params": [model.embedding.weight], "curvature": False, "lr": 1e-2, "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 1e-2},
        # A layer's weight and bias share one block, so that damping must be equal for both; everything else may differ.
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]


def main() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data).long(), torch.tensor(digits.target)
    torch.manual_seed(0)
    model, criterion = PixelReader(), nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(
        model,
        loss_func=criterion,
        params=param_groups(model),
        lr=0.3,
        damping=0.01,
        kl_clip=0.03,
        factor_every=5,
        refresh_every=20,
    )
    print(optimizer.coverage(), "\n")

    # A schedule scales every group's own lr; hyper-parameters are plain numbers in param_groups.
    batches = [*range(0, len(x), 128)]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=EPOCHS * len(batches),
        cycle_momentum=False,
    )
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(len(x))
        for start in batches:
            batch = order[start : start + 128]
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
            scheduler.step()
        loss = criterion(model(x), y).item()
        rates = ", ".join(f"{group['lr']:.2g}" for group in optimizer.param_groups)
        print(f"epoch {epoch:2d}  training loss {loss:.5f}  learning rates {rates}")

    print("\nhealth of the last step")
    for name, value in optimizer.health().items():
        print(f"  {name:16}{value:12.4g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
