"""Where some of the processes hold a layer's inverse, all take the step of one process, and memory is divided."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kfacopt
from kfacopt.backends.divided import averages_of_team
from kfacopt.backends.ownership import decomposition_cost
from kfacopt.replicas import Teams, delivered
from kfacopt.schedules import Background, WhenMoved
from kfacopt.sharding import Processes
from tests.optim.test_fully_shard import equals, per_block, train_sharded
from tests.optim.test_hybrid_shard import hybrid
from tests.optim.test_processes import (
    CE,
    Make,
    Net,
    Words,
    alone,
    make_batches,
    make_net,
    optimizer,
    plain,
    same_everywhere,
    seeded,
    share,
    train,
    weights_of,
    words,
)
from tests.processes import Found, run_together

# The default, which `test_processes` trains by, all hold all, and least memory of owners and pairs.
DEFAULT, EVERYBODY = kfacopt.Sharding(), kfacopt.Sharding(replicas=None)
OWNER, PAIR = kfacopt.Sharding(statistics="holders"), kfacopt.Sharding(replicas=2, statistics="holders")
Options = dict[str, Any]
# Of `MADE`, in four processes.
SOME = {
    "kfac": PAIR,
    "kfac-half": kfacopt.Sharding(replicas=2),
    "kfac-exact": OWNER,
    "ekfac": PAIR,
    "spectral": PAIR,
    "spectral-both-sides": DEFAULT,
}


def kfac(**options: Any) -> Options:
    return {"backend": lambda: kfacopt.KFACBackend(1, 2, stagger=False)} | options


# What is made, but for who holds what.
MADE: dict[str, tuple[Any, Options]] = {
    "kfac": (kfacopt.KFAC, kfac()),
    "kfac-every-third": (kfacopt.KFAC, {"backend": lambda: kfacopt.KFACBackend(1, 3, stagger=False)}),
    "kfac-bounded": (kfacopt.KFAC, kfac(kl_clip=0.01, damping_rule=lambda: kfacopt.LevenbergMarquardt(every=1))),
    "kfac-half": (
        kfacopt.KFAC,
        {"backend": lambda: kfacopt.KFACBackend(1, 2, 0.5, stagger=False), "kl_clip": 0.01},
    ),
    "kfac-wide": (kfacopt.KFAC, {"backend": lambda: kfacopt.KFACBackend(1, 2, widest=3, stagger=False)}),
    "kfac-auto": (kfacopt.KFAC, kfac(lr="auto")),
    "kfac-background": (
        kfacopt.KFAC,
        {"backend": lambda: kfacopt.KFACBackend(1, Background(2, delay=1), stagger=False)},
    ),
    "kfac-when-moved": (kfacopt.KFAC, {"backend": lambda: kfacopt.KFACBackend(1, WhenMoved(1, 0.5), stagger=False)}),
    "kfac-exact": (
        kfacopt.KFAC,
        {"backend": lambda: kfacopt.EigenKFACBackend(1, 2, stagger=False), "direction": kfacopt.Spectral},
    ),
    "ekfac": (kfacopt.EKFAC, {"backend": lambda: kfacopt.EKFACBackend(1, 2, stagger=False)}),
    "ekfac-spectral": (kfacopt.EKFAC, {}),
    "ekfac-refined": (
        kfacopt.EKFAC,
        {"backend": lambda: kfacopt.FullEKFACBackend(1, 3, 1, stagger=False), "kl_clip": 0.01},
    ),
    "ekfac-background": (
        kfacopt.EKFAC,
        {"backend": lambda: kfacopt.EKFACBackend(1, Background(2, delay=2), stagger=False)},
    ),
    "spectral": (kfacopt.SpectralDescent, {}),
    "spectral-wide": (
        kfacopt.SpectralDescent,
        {"backend": lambda: kfacopt.OneSidedKFACBackend(1, 2, 0.5, widest=3, stagger=False)},
    ),
    "spectral-both-sides": (
        kfacopt.SpectralDescent,
        {"backend": lambda: kfacopt.KFACBackend(1, 2, 0.5, stagger=False)},
    ),
}


def made_by(name: str, sharding: kfacopt.Sharding | None) -> Make:
    kind, options = MADE[name]
    return optimizer(kind, sharding=sharding, **options)


def equals_one_process(name: str, sharding: kfacopt.Sharding) -> None:
    batches = make_batches()
    one, reference = train(made_by(name, None), batches, plain(CE()), alone())
    several, made = train(made_by(name, sharding), [share(batch) for batch in batches], plain(CE()))
    torch.testing.assert_close(weights_of(several), weights_of(one), rtol=1e-12, atol=1e-12)
    assert float((weights_of(several) - weights_of(make_net())).norm()) > 1e-3
    assert str(made.coverage()) == str(reference.coverage())
    for key in ("damping", "rho", "kl", "kl_scale"):
        if key in reference.health():
            assert made.health()[key] == pytest.approx(reference.health()[key], rel=1e-9), key
    world = distributed.get_world_size()
    teams = Teams(world, sharding.replicas or world, distributed.get_rank())
    assert made.backend._holders.divides == (
        teams.apart and sharding.statistics == "holders" and "background" not in name
    )
    holds_its_share(made, teams)


def holds_its_share(made: Any, teams: Teams) -> None:
    """Each layer with an inverse, and what is known of its factors, is in one team, and in all of it."""
    blocks, divided = made.backend.blocks, made.backend._holders.divides
    here = {name for name, block in blocks.items() if block.ready}
    costs = {name: decomposition_cost(block) for name, block in blocks.items()}
    known = {name for name, block in blocks.items() if any(a.known for a in averages_of_team(block).values())}
    everywhere: list[Any] = [None] * teams.size
    distributed.all_gather_object(everywhere, (here, costs, known))
    everybody = list(range(teams.size))
    for name, block in blocks.items():
        holders = [rank for rank, (names, _, _) in enumerate(everywhere) if name in names]
        knowing = [rank for rank, (_, _, names) in enumerate(everywhere) if name in names]
        has_owner = any(of_rank[name] > 0.0 for _, of_rank, _ in everywhere)
        team = list(teams.holders(made.backend._holders.owner_of[name])) if has_owner and teams.apart else everybody
        assert holders == (everybody if block.rows_need_cache else team)
        assert knowing == (team if divided else everybody)
        assert made.backend.ready(made.backend._layers[name])


def words_equal_one_process() -> None:
    """Shares of packed parameters and tied weights."""
    for make, sharded in ((made_by("kfac", None), made_by("kfac", OWNER)),):
        one, _ = train(make, words(), plain(CE()), alone(), net_of=partial(seeded, Words))
        two, made = train(sharded, [share(b) for b in words()], plain(CE()), net_of=partial(seeded, Words))
        assert made.backend._holders.elsewhere
        torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-10, atol=1e-10)


def sharded_parameters_equal_one_process(shard: Callable[[Any], nn.Module], sharding: kfacopt.Sharding) -> None:
    for name in ("kfac", "kfac-bounded", "ekfac", "spectral"):
        one, _ = train(made_by(name, None), make_batches(3), plain(CE()), alone())
        batches = [share(batch) for batch in make_batches(3)]
        several, made = train_sharded(made_by(name, sharding), batches, plain(CE()), shard)
        equals(several, one)
        holds_its_share(made, Teams.of(made._processes))


def memory_is_divided() -> None:
    """Of equal layers each process has its team's share of the bytes, of inverses and of statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(8)))
    world = distributed.get_world_size()
    batches = [(torch.randn(4, 8), torch.randint(8, (4,))) for _ in range(6)]
    for replicas, divided in ((1, True), (1, False), (2, True), (world, True)):
        own = copy.deepcopy(net)
        sharding = kfacopt.Sharding(replicas=replicas, statistics="holders" if divided else "all")
        made = kfacopt.KFAC(DistributedDataParallel(own), CE(), factor_every=1, refresh_every=4, sharding=sharding)
        for x, y in batches:
            made.zero_grad()
            nn.functional.cross_entropy(own(x), y).backward()
            made.step()
        assert isinstance(made.backend, kfacopt.LayerwiseBackend)
        blocks = made.backend.blocks.values()
        held = [t for block in blocks for t in block.cache().values()]
        known = [average.value for block in blocks for average in block.averages().values()]
        whole = 8 * 2 * 8 * 8 * 4
        assert sum(t.nbytes for t in held if t is not None) == whole * replicas // world
        assert sum(t.nbytes for t in known if t is not None) == (whole * replicas // world if divided else whole)


def _saved(state: Any) -> Any:
    """As the first process writes it, read in all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    written: list[Any] = [buffer.getvalue()]
    distributed.broadcast_object_list(written, src=0)
    return torch.load(io.BytesIO(written[0]), weights_only=True)


def _half_way(name: str, sharding: kfacopt.Sharding | None) -> tuple[Net, Any]:
    net, made = train(made_by(name, sharding), [share(batch) for batch in make_batches(7)[:4]], plain(CE()))
    return net, made


def _went_on(name: str, sharding: kfacopt.Sharding | None, net_state: Any, state: Any) -> Tensor:
    net = make_net()
    net.load_state_dict(net_state)
    model = DistributedDataParallel(net)
    made = made_by(name, sharding)(model)
    made.load_state_dict(copy.deepcopy(state))  # torch's momentum would go on in it
    for batch in make_batches(7)[4:]:
        made.zero_grad()
        plain(CE())(model, share(batch))
        made.step()
        assert same_everywhere(weights_of(net))
    return weights_of(net)


def a_consolidated_state_goes_to_any_number_of_holders() -> None:
    """Refreshed in steps 0, 3, 6: an inverse that was computed anew would be another."""
    name = "kfac-every-third"
    whole = weights_of(train(made_by(name, OWNER), [share(batch) for batch in make_batches(7)], plain(CE()))[0])
    bases = weights_of(train(made_by("ekfac", None), [share(batch) for batch in make_batches(7)], plain(CE()))[0])
    net, made = _half_way("ekfac", OWNER)
    made.consolidate_state_dict()
    stored = _saved({"net": net.state_dict(), "made": made.state_dict()})
    for after in (OWNER, EVERYBODY):
        found = _went_on("ekfac", after, stored["net"], stored["made"])
        torch.testing.assert_close(found, bases, rtol=1e-12, atol=1e-12)
    ways = (OWNER, DEFAULT, EVERYBODY)  # of the last as states were saved while it was the default
    for before, after in ((OWNER, OWNER), *itertools.permutations(ways, 2)):
        net, made = _half_way(name, before)
        made.consolidate_state_dict()
        stored = _saved({"net": net.state_dict(), "made": made.state_dict()})
        found = _went_on(name, after, stored["net"], stored["made"])
        tolerance = 0.0 if before == after else 1e-12
        torch.testing.assert_close(found, whole, rtol=tolerance, atol=tolerance)
    net, made = _half_way(name, OWNER)
    own = copy.deepcopy(made.state_dict())  # of each process its own
    assert torch.equal(_went_on(name, OWNER, net.state_dict(), own), whole)
    stored = _saved({"net": net.state_dict(), "made": made.state_dict()})  # what others hold is missing
    for after, error in ((OWNER, RuntimeError), (DEFAULT, ValueError), (EVERYBODY, ValueError)):
        with pytest.raises(error, match=r"no statistics of '.*consolidate_state_dict\(\) in all"):
            _went_on(name, after, stored["net"], stored["made"])


def what_is_not_consolidated_is_renewed() -> None:
    """The first process' state has all statistics; inverses that others hold are made of these in the next step."""
    name = "kfac-every-third"
    net, made = _half_way(name, DEFAULT)
    stored = _saved({"net": net.state_dict(), "made": made.state_dict()})
    blocks = stored["made"]["curvature"]["backend"]["blocks"]
    missing = [n for n, kept in blocks.items() if all(t is None for t in kept["cache"].values())]
    assert 0 < len(missing) < len(blocks)
    found = {after: _went_on(name, after, stored["net"], stored["made"]) for after in (DEFAULT, OWNER, EVERYBODY)}
    made.backend._refreshes.forget(missing)  # two steps before it would be their turn
    model = DistributedDataParallel(net)
    for batch in make_batches(7)[4:]:
        made.zero_grad()
        plain(CE())(model, share(batch))
        made.step()
    for after, weights in found.items():
        tolerance = 0.0 if after is DEFAULT else 1e-12
        torch.testing.assert_close(weights, weights_of(net), rtol=tolerance, atol=tolerance)


def a_refused_state_changes_nothing() -> None:
    batches = [share(batch) for batch in make_batches(6)]
    found = []
    for asks in (False, True):
        net = make_net()
        model = DistributedDataParallel(net)
        made = made_by("kfac", OWNER)(model)
        for number, batch in enumerate(batches):
            if asks and number == 3:
                state = made.state_dict()
                state["curvature"]["backend"]["blocks"]["head"]["shape"] = [1, 1]
                with pytest.raises(ValueError, match="'head' is of shape"):
                    made.load_state_dict(state)
            made.zero_grad()
            plain(CE())(model, batch)
            made.step()
        found.append(weights_of(net))
    assert torch.equal(*found)


def frozen_layers_come_back() -> None:
    for sharding in (OWNER, DEFAULT):
        _comes_back(sharding)


def _comes_back(sharding: kfacopt.Sharding) -> None:
    net = make_net()
    model = DistributedDataParallel(net, find_unused_parameters=True)
    made = optimizer(kfacopt.KFAC, sharding=sharding)(model)
    for number, batch in enumerate(make_batches(6)):
        net.inner.weight.requires_grad_(number not in (2, 3))
        made.zero_grad()
        plain(CE())(model, share(batch))
        made.step()
        assert same_everywhere(weights_of(net))
    holds_its_share(made, Teams.of(made._processes))  # type: ignore[attr-defined]


def what_is_frozen_as_it_is_saved_begins_anew() -> None:
    """Its statistics were one process's; after the resume it has curvature from its first update on."""
    net, made = _half_way("kfac", OWNER)
    net.inner.requires_grad_(False)
    made.zero_grad()
    made.consolidate_state_dict()
    stored = _saved({"net": net.state_dict(), "made": made.state_dict()})
    again = make_net()
    again.inner.requires_grad_(False)
    again.load_state_dict(stored["net"])
    resumed = made_by("kfac", OWNER)(again)
    resumed.load_state_dict(stored["made"])
    model = DistributedDataParallel(again, find_unused_parameters=True)
    for step, batch in enumerate(make_batches(5)):
        if step == 1:
            again.inner.requires_grad_(True)
            model = DistributedDataParallel(again)
        resumed.zero_grad()
        plain(CE())(model, share(batch))
        resumed.step()
        assert same_everywhere(weights_of(again))
    assert isinstance(resumed, kfacopt.SecondOrderOptimizer)
    assert "inner" in resumed.backend.blocks  # type: ignore[attr-defined]
    holds_its_share(resumed, Teams.of(resumed._processes))


def a_copy_goes_on() -> None:
    _, made = _half_way("kfac", OWNER)
    copied = copy.deepcopy(made)
    model = DistributedDataParallel(copied.model)
    for batch in make_batches(3):
        copied.zero_grad()
        plain(CE())(model, share(batch))
        copied.step()
        assert same_everywhere(weights_of(copied.model))
    holds_its_share(copied, Teams.of(copied._processes))


def _broken(damping: float) -> None:
    raise RuntimeError("out of luck")


def what_one_process_sees_all_know() -> None:
    """A layer that one process does not use, curvature of one that is not finite; and one alone asks."""
    net, alone_net = make_net(gated=True), make_net(gated=True)
    model = DistributedDataParallel(net, find_unused_parameters=True)
    made = optimizer(sharding=OWNER)(model)
    reference = optimizer()(DistributedDataParallel(alone_net, process_group=alone()))
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    assert isinstance(reference, kfacopt.SecondOrderOptimizer)
    rank = distributed.get_rank()
    for step, (x, y) in enumerate(make_batches(4)):
        signs = (1.0, -1.0) if step % 2 else (-1.0, 1.0)
        halves = [(sign * part.abs(), own) for sign, part, own in zip(signs, x.chunk(2), y.chunk(2), strict=True)]
        made.zero_grad()
        reference.zero_grad()
        plain(CE())(model, halves[rank])
        for half in halves:
            (0.5 * nn.functional.cross_entropy(alone_net(half[0]), half[1])).backward()
        if step == 2:
            for one, broken in ((made, rank == 1), (reference, True)):
                if broken:
                    one.backend.blocks["head"].input_factor.pending.fill_(float("inf"))  # type: ignore[attr-defined]
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            made.step()
            reference.step()
        assert same_everywhere(weights_of(net))
    torch.testing.assert_close(weights_of(net), weights_of(alone_net), rtol=1e-12, atol=1e-12)
    assert made.health()["dropped_updates/head"] == reference.health()["dropped_updates/head"] == 1.0
    holds_its_share(made, Teams.of(made._processes))
    if rank == 0:
        assert made.state_dict()["curvature"]["backend"]["holders"]["means"].keys() == made.backend.blocks.keys()  # type: ignore[attr-defined]
        assert made.health()["skipped_steps"] == 0.0
        assert "KFAC" in str(made.coverage())


class OwnSolve(kfacopt.KFACBackend):
    """Reads blocks as it likes."""

    def solve(self, gradients: Any, settings: Any) -> Any:
        return {
            la: la.unpack(self.blocks[la.name].solve(la.pack(parts), settings[la].damping))
            for la, parts in gradients.items()
            if self.ready(la)
        }


class Opposite(kfacopt.Direction):
    """Asks for the curvature's step of every other layer, and for its product with the rest."""

    def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
        assert step.backend is not None
        shares = {layer: layer.share(step.gradients) for layer in step.layers}
        even = {la: parts for number, (la, parts) in enumerate(shares.items()) if number % 2}
        odd = {la: parts for la, parts in shares.items() if la not in even}
        found = step.backend.solve(even, step.settings) | step.backend.multiply(odd)
        return kfacopt.Updates({la.parameters[role]: u for la, parts in found.items() for role, u in parts.items()})


def what_users_write_goes_on() -> None:
    """A backend with a solve of its own holds all in every process; a direction is brought what it asks for."""
    for made in (
        optimizer(backend=lambda: OwnSolve(1, 2, stagger=False), kl_clip=0.01),
        optimizer(direction=Opposite, kl_clip=0.01),
    ):
        one, _ = train(made, make_batches(), plain(CE()), alone())
        two, trained = train(made, [share(batch) for batch in make_batches()], plain(CE()))
        torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)
        ready = [block.ready for block in trained.backend.blocks.values()]
        assert all(ready) == isinstance(trained.backend, OwnSolve)


def a_failing_owner_ends_all() -> None:
    model = DistributedDataParallel(make_net())
    made = made_by("kfac", OWNER)(model)
    plain(CE())(model, share(make_batches(1)[0]))
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    if distributed.get_rank() == 1:
        for block in made.backend.blocks.values():  # type: ignore[attr-defined]
            block.refresh = _broken
    with pytest.raises(RuntimeError, match="out of luck"):
        made.step()


def a_basis_that_some_lack_is_refused() -> None:
    net = make_net()
    model = DistributedDataParallel(net)
    made = made_by("ekfac", OWNER)(model)
    for step, batch in enumerate(make_batches(2)):
        made.zero_grad()
        plain(CE())(model, share(batch))
        if step == 0:
            made.step()
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    state = made.state_dict()
    if distributed.get_rank() == 1:
        cache = state["curvature"]["backend"]["blocks"]["head"]["cache"]
        cache |= dict.fromkeys(cache)
    made.load_state_dict(state)
    made.zero_grad()
    plain(CE())(model, share(make_batches(1)[0]))
    with pytest.raises(RuntimeError, match=r"processes \[1\] have no eigenbasis of 'head'"):
        made.step()


def what_cannot_be_is_refused() -> None:
    model = DistributedDataParallel(make_net())
    with pytest.raises(TypeError, match=r"sharding must be a kfacopt.Sharding, got 1"):
        kfacopt.KFAC(model, CE(), sharding=1)  # type: ignore[arg-type]
    if distributed.get_world_size() == 4:
        with pytest.raises(ValueError, match=r"replicas=3 does not divide the 4 processes.*\[1, 2, 4\]"):
            kfacopt.KFAC(model, CE(), sharding=kfacopt.Sharding(replicas=3))
    with pytest.raises(ValueError, match=r"Sharding\(group=...\) has the processes \[\d\], but the engine"):
        kfacopt.KFAC(model, CE(), sharding=kfacopt.Sharding(group=alone()))
    for module in model.modules():
        assert not module._forward_hooks


def a_group_may_be_some_of_the_processes() -> None:
    """Two pairs train apart; who averages gradients by himself names the group."""
    pairs = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    rank = distributed.get_rank()
    pair = pairs[rank // 2]
    for replicas in (None, 1):
        net = make_net()
        made = optimizer(sharding=kfacopt.Sharding(pair, replicas))(net)
        one_net = make_net()
        one = optimizer()(DistributedDataParallel(one_net, process_group=alone()))
        for x, y in make_batches(3, seed=1 + rank // 2):
            made.zero_grad()
            one.zero_grad()
            plain(CE())(net, (x.chunk(2)[rank % 2], y.chunk(2)[rank % 2]))
            plain(CE())(one_net, (x, y))
            for p in net.parameters():
                if p.grad is not None:
                    distributed.all_reduce(p.grad, group=pair)
                    p.grad /= 2
            made.step()
            one.step()
        torch.testing.assert_close(weights_of(net), weights_of(one_net), rtol=1e-12, atol=1e-12)
    assert not same_everywhere(weights_of(net))


def tensors_are_delivered() -> None:
    """In several rounds, of several dtypes, to some: each gets what its sources sent, all else is as it was given."""
    processes = Processes()
    size, rank = processes.size, processes.rank
    dtypes = (torch.float64, torch.float32, torch.float64)
    tensors = [[torch.full((r + 1, 2), 10.0 * r + n, dtype=d) for n, d in enumerate(dtypes)] for r in range(size)]
    given = [own if r == rank else [t.to("meta") for t in own] for r, own in enumerate(tensors)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfacopt.replicas.BUCKET", 4 * size)
        arrived = delivered(processes, given, lambda source: [(source + 1) % size])
    for source in range(size):
        for was, got in zip(tensors[source], arrived[source], strict=True):
            if rank in (source, (source + 1) % size):
                assert torch.equal(was, got)
            else:
                assert got.is_meta


TOGETHER = (
    a_failing_owner_ends_all,
    what_cannot_be_is_refused,
    memory_is_divided,
    tensors_are_delivered,
)
TWO: Mapping[str, Callable[[], None]] = {
    **{f"equal: {name}": partial(equals_one_process, name, OWNER) for name in MADE},
    **{f"all: {name}": partial(equals_one_process, name, EVERYBODY) for name in ("kfac", "ekfac", "spectral")},
    **{
        check.__name__: check
        for check in (
            words_equal_one_process,
            a_consolidated_state_goes_to_any_number_of_holders,
            what_is_not_consolidated_is_renewed,
            a_refused_state_changes_nothing,
            a_basis_that_some_lack_is_refused,
            frozen_layers_come_back,
            what_one_process_sees_all_know,
            what_is_frozen_as_it_is_saved_begins_anew,
            a_copy_goes_on,
            what_users_write_goes_on,
            *TOGETHER,
        )
    },
    "fully_shard": partial(sharded_parameters_equal_one_process, per_block, OWNER),
}
FOUR: Mapping[str, Callable[[], None]] = {
    **{f"equal: {name}": partial(equals_one_process, name, sharding) for name, sharding in SOME.items()},
    **{check.__name__: check for check in (*TOGETHER, a_group_may_be_some_of_the_processes)},
    "hybrid": partial(sharded_parameters_equal_one_process, hybrid, PAIR),
}
RUNS = {2: TWO, 4: FOUR}


@pytest.fixture(scope="module")
def found() -> dict[int, Found]:
    return {world: run_together(checks, world) for world, checks in RUNS.items()}


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, checks in RUNS.items() for name in checks])
def test_several_processes(found: dict[int, Found], world: int, name: str) -> None:
    for rank, said in enumerate(found[world][name]):
        assert said == "", f"process {rank}: {said}"


def test_one_process_may_have_any_number_of_holders() -> None:
    """So that the same program runs in one."""
    found = []
    for sharding in (None, OWNER, kfacopt.Sharding(replicas=3)):
        net = make_net()
        made = made_by("kfac", sharding)(net)
        for batch in make_batches(3):
            made.zero_grad()
            plain(CE())(net, batch)
            made.step()
        made.consolidate_state_dict()  # type: ignore[attr-defined]
        found.append(weights_of(net))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("replicas", "error"), [(0, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_number_of_holders_is_one(replicas: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="replicas must be"):
        kfacopt.Sharding(replicas=replicas)


def test_teams_partition_the_ranks() -> None:
    for size, members in ((1, 1), (4, 1), (4, 2), (6, 3), (6, 6)):
        teams = [Teams(size, members, rank) for rank in range(size)]
        for owner in range(size):
            team = set(teams[0].holders(owner))
            assert {rank for rank in range(size) if teams[rank].holds(owner)} == team
            readers = [rank for source in team for rank in teams[0].readers(source)]
            assert sorted(readers) == sorted(set(range(size)) - team)  # each of the others is sent it once
        assert teams[0].apart == (members < size)
