"""Several processes train one model: DistributedDataParallel around it, and EKFAC over that.

    torchrun --nproc-per-node 2 examples/distributed.py

Each process has its own share of every batch. The gradients are averaged by torch, the curvature's statistics by the
optimizer, and each layer is decomposed by one of the processes. Started without torchrun it is a run of one process,
with the same result: only the share of the data differs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kfacopt

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
STEPS, BATCH = (6 if SHORT else 40), 64


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """A batch of all processes together; each takes its share."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 16, generator=generator)
    return x, (x[:, :4].sum(-1) > x[:, 4:8].square().sum(-1) - 4.0).long()


def train(rank: int, world: int) -> tuple[list[float], nn.Module]:
    """The losses over all processes, and the model."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    model = DistributedDataParallel(network) if distributed.is_initialized() else network
    # "ggn" draws no labels: any number of processes then takes the very same steps.
    optimizer = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), curvature="ggn", factor_every=1, refresh_every=1)
    losses = []
    for step in range(STEPS):
        x, y = (part.chunk(world)[rank] for part in batch_of(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        if distributed.is_initialized():
            distributed.all_reduce(mean)
        losses.append(float(mean))
    if rank == 0:  # state_dict() asks no other process: one is enough to save, and any number resumes from it
        parts = optimizer.state_dict()["curvature"]["backend"]["blocks"]
        print(f"a checkpoint holds the curvature of {len(parts)} layers")
    return losses, network


def main() -> None:
    """Train, and say how it went."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun started this process
        distributed.init_process_group("gloo")
    several = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
    losses, network = train(rank, world)
    if rank == 0:
        length = float(torch.cat([p.detach().flatten() for p in network.parameters()]).norm())
        print(f"{world} processes: loss {losses[0]:.4f} -> {losses[-1]:.4f}, length of the weights {length:.5f}")
    if several:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
