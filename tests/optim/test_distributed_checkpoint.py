"""`torch.distributed.checkpoint` carries the curvature: a run goes on in another number of processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import kfacopt
from tests.optim.test_fully_shard import per_block, root_only, whole_weights
from tests.optim.test_processes import (
    CE,
    Batch,
    Make,
    Words,
    _batches_of,
    alone,
    make_batches,
    make_net,
    optimizer,
    plain,
    seeded,
    words,
)
from tests.processes import Found, run_together

# Caches older than the statistics where a run is cut, so that one that was computed anew would be another.
MAKES: dict[str, Make] = {
    "kfac": optimizer(backend=lambda: kfacopt.KFACBackend(1, 3, stagger=False)),
    "kfac-owner": optimizer(
        backend=lambda: kfacopt.KFACBackend(1, 3, stagger=False), sharding=kfacopt.Sharding(replicas=1)
    ),
    "ekfac": optimizer(backend=lambda: kfacopt.EKFACBackend(1, 3, stagger=False)),
    "spectral": optimizer(
        kfacopt.SpectralDescent, backend=lambda: kfacopt.OneSidedKFACBackend(1, 3, 0.5, stagger=False)
    ),
}
OPTIONS: dict[str, StateDictOptions] = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


def started(number: str, make: Make, net_of: Callable[[], nn.Module] = make_net, shard: Any = per_block) -> Any:
    """In two processes the model is sharded; one has all of it."""
    net = shard(net_of()) if number == "two" else net_of()
    return net, make(nn.parallel.DistributedDataParallel(net, process_group=alone()) if number == "one" else net)


def go_on(net: nn.Module, made: torch.optim.Optimizer, batches: list[Batch]) -> None:
    for batch in batches:
        made.zero_grad()
        plain(CE())(net, batch)
        made.step()


def through_disk(state: dict[str, Any], into: dict[str, Any], number: str, folder: str) -> dict[str, Any]:
    rank = distributed.get_rank()
    if number == "one" and rank > 0:
        distributed.barrier()
    else:
        checkpoint.save(state, checkpoint_id=folder, no_dist=number == "one")
        if number == "one":
            distributed.barrier()
    checkpoint.load(into, checkpoint_id=folder)
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    return into


def resumes(name: str, how: str) -> None:
    """From two processes to two, to one, and from one to two: the run that goes on is the uninterrupted one."""
    make, options = MAKES[name], OPTIONS[how]
    batches = make_batches(5)
    whole = {}
    for number in ("one", "two"):
        net, made = started(number, make)
        go_on(net, made, _batches_of(number, batches))
        whole[number] = whole_weights(net)
    for before, after in (("two", "two"), ("two", "one"), ("one", "two")):
        folders: list[Any] = [tempfile.mkdtemp()]
        distributed.broadcast_object_list(folders, src=0)
        net, made = started(before, make)
        go_on(net, made, _batches_of(before, batches[:2]))
        model_state = get_model_state_dict(net, options=options)
        state = get_optimizer_state_dict(net, made, options=options)
        resumed, again = started(after, make)
        if how == "full":
            told: list[Any] = [{"net": model_state, "made": state}]
            distributed.broadcast_object_list(told, src=0)
            stored = told[0]
        else:
            into = {
                "net": get_model_state_dict(resumed, options=options),
                "made": get_optimizer_state_dict(resumed, again, options=options),
            }
            stored = through_disk({"net": model_state, "made": state}, into, before, str(folders[0]))
        set_model_state_dict(resumed, stored["net"], options=options)
        set_optimizer_state_dict(resumed, again, stored["made"], options=options)
        go_on(resumed, again, _batches_of(after, batches[2:]))
        tolerance = 0.0 if before == after else 1e-12
        torch.testing.assert_close(whole_weights(resumed), whole[after], rtol=tolerance, atol=tolerance)


def asking_before_the_first_step_changes_nothing() -> None:
    nets: list[Tensor] = []
    for asks in (False, True):
        net, made = started("two", MAKES["kfac"])
        rates = [group["lr"] for group in made.param_groups]
        before = whole_weights(net)
        if asks:
            state = get_optimizer_state_dict(net, made)
            assert "curvature_state" in state["param_groups"][0]  # type: ignore[index]
        assert [group["lr"] for group in made.param_groups] == rates
        assert torch.equal(before, whole_weights(net))
        assert made.health()["skipped_steps"] == 0.0
        go_on(net, made, _batches_of("two", make_batches(3)))
        assert "curvature_state" not in made.state_dict()["param_groups"][0]
        nets.append(whole_weights(net))
    assert torch.equal(*nets)


def words_resume() -> None:
    """Rows' mean squares of packed parameters, tied weights and plain matrices, in the state of shards."""
    options, of = StateDictOptions(), partial(seeded, Words)
    for name in ("spectral", "ekfac"):
        net, made = started("two", MAKES[name], of, root_only)
        batches = _batches_of("two", words(6))
        go_on(net, made, batches)
        folders: list[Any] = [tempfile.mkdtemp()]
        distributed.broadcast_object_list(folders, src=0)
        half, made = started("two", MAKES[name], of, root_only)
        go_on(half, made, batches[:3])
        state = {"net": get_model_state_dict(half), "made": get_optimizer_state_dict(half, made, options=options)}
        resumed, again = started("two", MAKES[name], of, root_only)
        into = {
            "net": get_model_state_dict(resumed),
            "made": get_optimizer_state_dict(resumed, again, options=options),
        }
        stored = through_disk(state, into, "two", str(folders[0]))
        set_model_state_dict(resumed, stored["net"])
        set_optimizer_state_dict(resumed, again, stored["made"], options=options)
        go_on(resumed, again, batches[3:])
        assert torch.equal(whole_weights(resumed), whole_weights(net)), name


def each_process_may_save_its_own() -> None:
    """`state_dict()` as it is, to a file of each process; one of before goes in, too."""
    make = MAKES["ekfac"]
    net, made = started("two", make)
    batches = _batches_of("two", make_batches(6))
    go_on(net, made, batches)
    half, made = started("two", make)
    go_on(half, made, batches[:3])
    file = Path(tempfile.mkdtemp()) / "own"
    torch.save({"net": half.state_dict(), "made": made.state_dict()}, file)
    stored = torch.load(file, weights_only=True)
    assert stored["made"]["curvature"]["processes"] == 2
    resumed, again = started("two", make)
    resumed.load_state_dict(stored["net"])
    again.load_state_dict(stored["made"])
    go_on(resumed, again, batches[3:])
    assert torch.equal(whole_weights(resumed), whole_weights(net))


def whole_states_go_into_sharded_models() -> None:
    """What one process saved without `torch.distributed.checkpoint`; the other way there are shards only."""
    for name, make in MAKES.items():
        batches = make_batches(6)
        net, made = started("one", make)
        go_on(net, made, batches[:3])
        file = Path(tempfile.mkdtemp()) / "one"
        torch.save({"net": net.state_dict(), "made": made.state_dict()}, file)
        stored = torch.load(file, weights_only=True)
        go_on(net, made, batches[3:])
        fresh = make_net()
        fresh.load_state_dict(stored["net"])
        resumed = per_block(fresh)
        again = make(resumed)
        again.load_state_dict(stored["made"])
        go_on(resumed, again, _batches_of("two", batches[3:]))
        torch.testing.assert_close(whole_weights(resumed), whole_weights(net), rtol=1e-12, atol=1e-12)
        _, other = started("one", make)
        before = other.state_dict()
        with pytest.raises(ValueError, match="one process's shards"):
            other.load_state_dict(again.state_dict())
        assert other.state_dict().keys() == before.keys(), name
        assert not other.state


Checks = Mapping[str, Callable[[], None]]
RESUMED: Checks = {
    f"{how}: {name}": partial(resumes, name, how)
    for how in ("nested", "flattened")
    for name in MAKES
    if (how, name) != ("flattened", "kfac-owner")
}
CHECKS: Checks = {
    **{f"full: {name}": partial(resumes, name, "full") for name in MAKES},
    **{
        check.__name__: check
        for check in (
            asking_before_the_first_step_changes_nothing,
            words_resume,
            each_process_may_save_its_own,
            whole_states_go_into_sharded_models,
        )
    },
}


@pytest.fixture(scope="module")
def resumed() -> Found:
    return run_together(RESUMED, seconds=200.0)


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS, seconds=200.0)


@pytest.mark.parametrize("name", RESUMED)
def test_through_disk(resumed: Found, name: str) -> None:
    for rank, said in enumerate(resumed[name]):
        assert said == "", f"process {rank}: {said}"


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"
