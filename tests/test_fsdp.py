"""torch's private names are what `kfacopt.fsdp` takes them for; one process of `fully_shard` is one without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

import kfacopt
from kfacopt.fsdp import ShardedModel, is_engines, is_sharded
from tests.processes import run_together

METHODS = {
    FSDPParamGroup: ("wait_for_unshard", "reshard", "post_backward", "_to_sharded", "is_unsharded"),
    FSDPState: ("_reset_iter_state", "_pre_backward"),
    FSDPParam: ("unsharded_param",),
}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_torch_has_the_names(kind: type) -> None:
    """The names that `kfacopt.fsdp` uses; where this fails, torch has changed, and that file is to be read again."""
    assert torch.__version__ >= "2.9"
    assert [name for name in METHODS[kind] if not hasattr(kind, name)] == []
    assert {"IDLE", "PRE_BACKWARD", "POST_BACKWARD"} <= {stage.name for stage in TrainingState}


def test_a_torch_with_other_names_is_refused() -> None:
    class FSDPModule(nn.Linear):
        def _get_fsdp_state(self) -> object:
            return object()

    with pytest.raises(RuntimeError, match="is not the one that kfacopt knows"):
        ShardedModel(FSDPModule(2, 1))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def train(net: nn.Module) -> torch.Tensor:
    made = kfacopt.EKFAC(net, nn.CrossEntropyLoss(), factor_every=1, refresh_every=2, damping=0.1)
    torch.manual_seed(1)
    for _ in range(4):
        made.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(6, 4).double()), torch.randint(3, (6,))).backward()
        made.step()
    ShardedModel(net).reshard()
    held = [p.full_tensor() if is_sharded(p) else p for p in net.parameters()]  # type: ignore[operator]
    return torch.cat([p.detach().flatten() for p in held])


def one_process_is_as_without() -> None:
    net = chain()
    fully_shard(net[0])
    assert torch.equal(train(fully_shard(net)), train(chain()))


def the_engine_is_left_as_it_was() -> None:
    net = chain()
    fully_shard(net[0])
    fully_shard(net)
    sharded = ShardedModel(net)
    first, last = net[0].weight, net[2].weight
    assert sharded.holds(first)
    assert sharded.leaf(first) is first  # no forward has made a copy yet
    out = net(torch.randn(6, 4).double())
    assert sharded.is_copy(sharded.leaf(first))
    assert net[2].weight is sharded.leaf(last)  # the root's stay between forward and backward
    assert not sharded.has_waiting
    groups = sharded._groups
    before = [(g.is_unsharded, list(g._post_forward_indices), g._training_state, g.post_backward) for g in groups]
    edges = [torch.autograd.graph.get_gradient_edge(sharded.leaf(p)) for p in (first, last)]
    with sharded.left_as_is():
        torch.autograd.grad(out.sum(), edges, retain_graph=True)
    after = [(g.is_unsharded, list(g._post_forward_indices), g._training_state, g.post_backward) for g in groups]
    assert after == before
    assert all(p.grad is None for p in net.parameters())
    hooks = list((out._backward_hooks or {}).values())
    assert hooks
    assert all(map(is_engines, hooks))
    net.set_requires_gradient_sync(False)
    out.sum().backward()
    assert sharded.has_waiting
    sharded.reshard()
    assert net[2].weight is last


def test_one_process() -> None:
    checks = {check.__name__: check for check in (one_process_is_as_without, the_engine_is_left_as_it_was)}
    found = run_together(checks, world=1, seconds=200.0)
    for name, (said,) in found.items():
        assert said == "", f"{name}: {said}"
