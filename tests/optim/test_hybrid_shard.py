"""HSDP: four processes, shards in two of them each, are one with all their data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import kfacopt
from tests.optim.test_fully_shard import Blocks, Narrow, blocks_apart, equals, first_number, per_block, train_sharded
from tests.optim.test_processes import CE, EQUAL, make_batches, make_net, optimizer, plain, seeded, share, train
from tests.processes import Found, alone, run_together


def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def hybrid(net: Any) -> nn.Module:
    return per_block(net, mesh=two_by_two())


def equals_one_process(name: str) -> None:
    make, backward, _ = EQUAL[name]
    one, _ = train(make, make_batches(3), backward, alone())
    four, made = train_sharded(make, [share(batch) for batch in make_batches(3)], backward, hybrid)
    equals(four, one)
    assert made.state_dict()["curvature"]["processes"] == 4


def there_may_be_fewer_rows_than_processes() -> None:
    make = optimizer(loss=nn.MSELoss())
    one, _ = train(make, make_batches(), first_number, alone(), net_of=partial(seeded, Narrow))
    batches = [share(batch) for batch in make_batches()]
    four, _ = train_sharded(make, batches, first_number, hybrid, partial(seeded, Narrow))
    equals(four, one)


def gradients_are_those_of_the_engine() -> None:
    """Also where the copies are brought together in the last backward only."""

    def late(model: Any, batch: Any) -> None:
        for last, half in enumerate(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True)):
            model.set_requires_all_reduce(bool(last))
            (0.5 * nn.functional.cross_entropy(model(half[0]), half[1])).backward()

    mesh = two_by_two()
    for backward in (plain(CE()), late):
        found = []
        for watched in (False, True):
            torch.manual_seed(0)
            net = blocks_apart(Blocks().double(), mesh=mesh)
            if watched:
                made = kfacopt.EKFAC(net, CE(), factor_every=1, curvature="ggn")
            for batch in make_batches(2):
                backward(net, share(batch))
            found.append([p.grad.to_local() for p in net.parameters() if isinstance(p.grad, DTensor)])
        assert len(found[0]) == 18
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        made.step()
        assert all(block.ready for block in made.backend.blocks.values())


def a_mesh_may_be_of_some_processes() -> None:
    """One axis of a mesh is a group of processes; several meshes in a model are refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "shard"))
    net = per_block(make_net(), mesh=mesh["shard"])
    made = optimizer()(net)
    half = [share(batch) for batch in make_batches(2)]
    for batch in half:
        made.zero_grad()
        plain(CE())(net, batch)
        made.step()
    assert made.state_dict()["curvature"]["processes"] == 2
    cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("one", "replicate", "shard"))
    optimizer()(per_block(make_net(), mesh=cube["replicate", "shard"]))
    several = make_net()
    fully_shard(several.inner, mesh=mesh["shard"])
    fully_shard(several, mesh=mesh)
    with pytest.raises(RuntimeError, match="different device meshes"):
        optimizer()(several)
    distributed.barrier()


CHECKS: Mapping[str, Callable[[], None]] = {
    **{f"equal: {name}": partial(equals_one_process, name) for name in ("kfac", "ekfac", "spectral")},
    **{
        check.__name__: check
        for check in (
            there_may_be_fewer_rows_than_processes,
            gradients_are_those_of_the_engine,
            a_mesh_may_be_of_some_processes,
        )
    },
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS, world=4, seconds=200.0)


@pytest.mark.parametrize("name", CHECKS)
def test_four_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"
