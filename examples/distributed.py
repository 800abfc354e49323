"""Several processes train one model, DistributedDataParallel around it or sharded by fully_shard, and EKFAC over that.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py fsdp2

Each process has its own share of every batch. The gradients are averaged by torch, the curvature's statistics by the
optimizer, and each layer is decomposed by one of the processes. Started without torchrun it is a run of one process,
with the same result: only the share of the data differs, and with fsdp2 each process holds its part of every parameter.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kfacopt

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
STEPS, BATCH = (6 if SHORT else 40), 64


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """A batch of all processes together; each takes its share."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 16, generator=generator)
    return x, (x[:, :4].sum(-1) > x[:, 4:8].square().sum(-1) - 4.0).long()


def network() -> nn.Sequential:
    """The same in all processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


def spread(model: nn.Sequential, engine: str) -> nn.Module:
    """The model as an engine of torch's trains it in several processes; in one as it is."""
    if not distributed.is_initialized():
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)  # before the optimizer is made
    return model


def train(model: nn.Module, rank: int, world: int) -> tuple[list[float], kfacopt.EKFAC]:
    """The losses over all processes, and the optimizer."""
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
    return losses, optimizer


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(rank: int, world: int, engine: str) -> None:
    """Train, and say how it went. What holds the process group is gone afterwards."""
    net = network()
    losses, optimizer = train(spread(net, engine), rank, world)
    length = float(torch.cat([whole(p.detach()).flatten() for p in net.parameters()]).norm())
    if rank == 0:
        # state_dict() asks no other process. Under DistributedDataParallel any number of them resumes from it; of a
        # sharded model it has this process's shards: torch.distributed.checkpoint saves all (get_state_dict).
        parts = optimizer.state_dict()["curvature"]["backend"]["blocks"]
        print(f"a checkpoint holds the curvature of {len(parts)} layers")
        print(f"{world} processes: loss {losses[0]:.4f} -> {losses[-1]:.4f}, length of the weights {length:.5f}")
    optimizer.close()


def main() -> None:
    """Start this process among the others, if there are any."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun started this process
        distributed.init_process_group("gloo")
    several = distributed.is_initialized()
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
    run(rank, world, sys.argv[1] if len(sys.argv) > 1 else "ddp")
    if several:
        distributed.barrier()  # none goes while another still talks to it
        distributed.destroy_process_group()
        # Gloo's threads let go of the last collective's tensors under Python's lock. One that comes for it when Python
        # is on its way out aborts the process, and where tensors were sharded torch keeps these threads until then.
        time.sleep(0.5)


if __name__ == "__main__":
    main()
