"""bfloat16 autocast, gradient accumulation and gradient clipping: the loop stays as it is.

kfacopt needs to be told of none of them. Its statistics are float32 whatever autocast does; each micro-batch adds its
rows as its backward runs, and one step averages them; what `clip_grad_norm_` did to the gradients reaches the step and
never the curvature. (bfloat16 needs no GradScaler. With float16, unscale before the step as ever:
`scaler.unscale_(optimizer)` or `scaler.step` do it.)
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import nn

import kfacopt

STEPS = 30 if os.environ.get("KFACOPT_SHORT") else 150
BATCH = 256


def train(accumulate: int, autocast: bool) -> list[float]:
    """Steps on batches of 256 digits, each in `accumulate` micro-batches; returns the losses."""
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    # The type-2 Fisher samples nothing: so the rows of this example can be compared.
    optimizer = kfacopt.EKFAC(
        model,
        loss_func=criterion,
        lr=0.3,
        damping=0.01,
        kl_clip=0.03,
        curvature="ggn",
        factor_every=5,
        refresh_every=20,
    )
    losses = []
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        total = 0.0
        for part in batch.chunk(accumulate):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = criterion(model(x[part]), y[part]) / accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        losses.append(total)
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    shown = [1, 2, 3, 10, STEPS]
    print("training loss at step" + "".join(f"{step:11d}" for step in shown))
    for accumulate, autocast in [(1, False), (4, False), (1, True), (4, True)]:
        losses = train(accumulate, autocast)
        name = f"{'bfloat16' if autocast else 'float32'}, {accumulate} x {BATCH // accumulate}"
        print(f"{name:21}" + "".join(f"{losses[step - 1]:11.6f}" for step in shown))
