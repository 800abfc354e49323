"""Stop in the middle, resume bit for bit: statistics, caches, momentum and generators travel along.

The checkpoint holds tensors and plain Python only, so `torch.load(weights_only=True)` reads it. The cut is made where
it hurts most: between two updates of the factors and two refreshes of the bases.
"""

import io
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kfacopt

STEPS, CUT = 60, 33


class Run(NamedTuple):
    """All that has a state, but for the generator of the data."""

    model: nn.Module
    optimizer: kfacopt.EKFAC
    scheduler: torch.optim.lr_scheduler.LRScheduler


def build() -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Dropout(0.1), nn.LayerNorm(48), nn.Linear(48, 10))
    optimizer = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), factor_every=5, refresh_every=20)
    return Run(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS))


def train(run: Run, steps: int) -> list[float]:
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        loss: Tensor = nn.functional.cross_entropy(run.model(x[batch]), y[batch])
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    whole = build()
    losses = train(whole, STEPS)

    interrupted = build()
    first = train(interrupted, CUT)
    checkpoint = {name: part.state_dict() for name, part in interrupted._asdict().items()}
    # torch's own generator (dropout, shuffling) is the loop's; kfacopt's is in its state.
    checkpoint["rng"] = torch.get_rng_state()
    file = io.BytesIO()  # or a path
    torch.save(checkpoint, file)
    print(f"checkpoint after step {CUT} of {STEPS}: {file.tell() / 2**10:.0f} KiB")

    # ... another process, another day ...
    resumed = build()
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    for name, part in resumed._asdict().items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["rng"])
    second = train(resumed, STEPS - CUT)

    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    same_weights = all(torch.equal(a, b) for a, b in pairs)
    print(f"last loss uninterrupted {losses[-1]!r}, resumed {second[-1]!r}")
    print(f"every loss equal: {losses == first + second}, every weight equal: {same_weights}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
