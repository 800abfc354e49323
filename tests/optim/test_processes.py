"""Two processes with B data each are one with 2B; what one of them sees, none of them does alone."""

from __future__ import annotations

import copy
import io
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt.schedules import Background, WhenMoved
from kfacopt.solvers.base import Solver
from tests.processes import Found, alone, run_together

CE, MSE = nn.CrossEntropyLoss, nn.MSELoss
Make = Callable[[nn.Module], torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]
# Refreshed at every step: where refreshes are spread, each process spreads its own.
OFTEN = {"factor_every": 1, "refresh_every": 1}
IGNORED = -100


class Net(nn.Module):
    """A layer of most kinds, and one that is used only where an input's first number is positive on average."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.table, self.inner, self.norm = nn.Embedding(7, 4), nn.Linear(5, 4), nn.LayerNorm(4)
        self.expert, self.head, self.gated = nn.Linear(4, 4), nn.Linear(4, 3), gated

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm((self.inner(x) + self.table(x[:, 0].abs().long().clamp(max=6))).tanh())
        if not self.gated or float(x.mean()) > 0.0:
            h = self.expert(h).tanh()
        return self.head(h)


def make_net(gated: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(gated).double()


def make_batches(steps: int = 5, data: int = 8, seed: int = 1) -> list[Batch]:
    torch.manual_seed(seed)
    return [(2.0 * torch.randn(data, 5).double(), torch.randint(3, (data,))) for _ in range(steps)]


def share(batch: Batch) -> Batch:
    """This process's data: so many in all processes, but not the same."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x, y = batch
    return x.chunk(world)[rank], y.chunk(world)[rank]


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same_everywhere(tensor: Tensor) -> bool:
    others = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, tensor)
    return all(torch.equal(tensor, other) for other in others)


def optimizer(kind: Any = kfacopt.KFAC, loss: nn.Module | None = None, **options: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        given = {key: value() if callable(value) and key != "prediction" else value for key, value in options.items()}
        given = {"curvature": "ggn"} | ({} if "backend" in given else OFTEN) | given
        made: torch.optim.Optimizer = kind(model, CE() if loss is None else loss, **given)
        return made

    return make


def plain(loss: nn.Module) -> Callable[[nn.Module, Batch], None]:
    """One backward of a batch."""

    def backward(model: nn.Module, batch: Batch) -> None:
        loss(model(batch[0]), batch[1]).backward()

    return backward


def squared(model: nn.Module, batch: Batch) -> None:
    nn.functional.mse_loss(model(batch[0]), nn.functional.one_hot(batch[1], 3).double()).backward()


def huber(model: nn.Module, batch: Batch) -> None:
    nn.functional.huber_loss(model(batch[0]), nn.functional.one_hot(batch[1], 3).double()).backward()


def weighted(model: nn.Module, batch: Batch) -> None:
    (0.25 * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()


def loud(model: nn.Module, batch: Batch) -> None:
    """Inputs in units of their own; the processes' batches are not alike."""
    units = torch.tensor([1.0, 50.0, 1.0, 900.0, 1.0]).double()
    nn.functional.cross_entropy(model(units * batch[0]), batch[1]).backward()


def in_halves(model: nn.Module, batch: Batch) -> None:
    """Micro-batches, of which the engine averages the last alone."""
    halves = list(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))
    for last, half in enumerate(halves):
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            (0.5 * nn.functional.cross_entropy(model(half[0]), half[1])).backward()


# What is trained, the backward, and what torch is told of the wrapper.
EQUAL: dict[str, tuple[Make, Callable[[nn.Module, Batch], None], dict[str, Any]]] = {
    "kfac": (optimizer(), plain(CE()), {}),
    "kfac-bucket-view": (optimizer(), plain(CE()), {"gradient_as_bucket_view": True}),
    "ekfac": (optimizer(kfacopt.EKFAC), plain(CE()), {}),
    "kfac-every-other": (optimizer(backend=lambda: kfacopt.KFACBackend(1, 2, stagger=False)), plain(CE()), {}),
    "ekfac-every-other": (optimizer(backend=lambda: kfacopt.EKFACBackend(1, 2, stagger=False)), plain(CE()), {}),
    "ekfac-exact": (
        optimizer(backend=lambda: kfacopt.FullEKFACBackend(1, 3, 1, stagger=False)),
        plain(CE()),
        {},
    ),
    "kfac-background": (
        optimizer(backend=lambda: kfacopt.KFACBackend(1, Background(2, delay=1), stagger=False)),
        plain(CE()),
        {},
    ),
    "ekfac-background": (
        optimizer(backend=lambda: kfacopt.EKFACBackend(1, Background(2, delay=2), stagger=False)),
        plain(CE()),
        {},
    ),
    "kfac-when-moved": (
        optimizer(backend=lambda: kfacopt.KFACBackend(1, WhenMoved(1, 0.5), stagger=False)),
        plain(CE()),
        {},
    ),
    "ekfac-when-moved": (
        optimizer(backend=lambda: kfacopt.EKFACBackend(1, WhenMoved(1, 0.5), stagger=False)),
        plain(CE()),
        {},
    ),
    "kfac-exact": (optimizer(backend=lambda: kfacopt.EigenKFACBackend(1, 2, stagger=False)), plain(CE()), {}),
    "kfac-wide": (optimizer(backend=lambda: kfacopt.KFACBackend(1, 2, widest=3)), plain(CE()), {}),
    "ekfac-wide": (optimizer(backend=lambda: kfacopt.EKFACBackend(1, 2, widest=3)), plain(CE()), {}),
    "kfac-exact-wide": (optimizer(backend=lambda: kfacopt.EigenKFACBackend(1, 2, widest=3)), plain(CE()), {}),
    "spectral": (optimizer(kfacopt.SpectralDescent), plain(CE()), {}),
    "spectral-large-inputs": (optimizer(kfacopt.SpectralDescent), loud, {}),
    "spectral-every-other": (
        optimizer(kfacopt.SpectralDescent, backend=lambda: kfacopt.OneSidedKFACBackend(1, 2, 0.5, stagger=False)),
        plain(CE()),
        {},
    ),
    "spectral-wide": (
        optimizer(kfacopt.SpectralDescent, backend=lambda: kfacopt.OneSidedKFACBackend(1, 1, 0.5, widest=3)),
        plain(CE()),
        {},
    ),
    "spectral-both-sides": (
        optimizer(kfacopt.SpectralDescent, backend=lambda: kfacopt.KFACBackend(1, 1, 0.5)),
        plain(CE()),
        {},
    ),
    "spectral-sum": (optimizer(kfacopt.SpectralDescent, loss=CE(reduction="sum")), plain(CE(reduction="sum")), {}),
    "spectral-unit": (
        optimizer(kfacopt.SpectralDescent, direction=lambda: kfacopt.UnitGradients(kfacopt.Spectral())),
        plain(CE()),
        {},
    ),
    "huber": (optimizer(loss=nn.HuberLoss()), huber, {}),
    "empirical": (optimizer(curvature="empirical"), plain(CE()), {}),
    "reduce": (optimizer(kfac_approx="reduce", separate_weight_and_bias=True), plain(CE()), {}),
    "sum": (optimizer(loss=CE(reduction="sum")), plain(CE(reduction="sum")), {}),
    "squared": (optimizer(loss=MSE()), squared, {}),
    "weighted": (optimizer(), weighted, {}),
    "accumulation": (optimizer(), in_halves, {}),
    "relative-clip": (optimizer(relative_clip=0.01), plain(CE()), {}),
    "damping-rule": (
        optimizer(damping=0.3, damping_rule=lambda: kfacopt.LevenbergMarquardt(every=1)),
        plain(CE()),
        {},
    ),
    "damping-rule-sum": (
        optimizer(loss=CE(reduction="sum"), damping_rule=lambda: kfacopt.LevenbergMarquardt(every=2)),
        plain(CE(reduction="sum")),
        {},
    ),
    "static-graph": (optimizer(), plain(CE()), {"static_graph": True}),
    "static-graph-squared": (optimizer(loss=MSE()), squared, {"static_graph": True}),
    "find-unused": (optimizer(), plain(CE()), {"find_unused_parameters": True}),
}


def train(
    make: Make,
    batches: list[Batch],
    backward: Any,
    group: Any = None,
    over: str = "wrapper",
    net_of: Callable[[], nn.Module] = make_net,
    **wrap: Any,
) -> Any:
    net = net_of()
    model = DistributedDataParallel(net, process_group=group, **wrap)
    made = make(model if over == "wrapper" else net)
    for batch in batches:
        made.zero_grad()
        backward(model, batch)
        made.step()
        if group is None:
            assert same_everywhere(weights_of(net))
    return net, made


def equals_one_process(name: str) -> None:
    make, backward, wrap = EQUAL[name]
    batches = make_batches()
    one, reference = train(make, batches, backward, alone(), **wrap)
    two, made = train(make, [share(batch) for batch in batches], backward, None, **wrap)
    assert isinstance(reference, kfacopt.SecondOrderOptimizer)
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)
    assert float((weights_of(two) - weights_of(make_net())).norm()) > 1e-3
    for key in ("damping", "rho", "kl", "kl_scale"):
        if key in reference.health():
            assert made.health()[key] == pytest.approx(reference.health()[key], rel=1e-9), key
    conditions_are_known_where_inverses_are(made, reference)


def conditions_are_known_where_inverses_are(made: Any, reference: Any) -> None:
    """Each process says them of its own layers, and of all what holds for these; together they say all."""
    own, want = (
        {key: value for key, value in one.health().items() if key.startswith("condition/")} for one in (made, reference)
    )
    assert own == {key: pytest.approx(want[key], rel=1e-9) for key in own}
    assert made.health()["condition"] == max(own.values(), default=pytest.approx(float("nan"), nan_ok=True))
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, set(own))
    assert set().union(*everywhere) == set(want)


class Words(nn.Module):
    """A small language model: attention in a packed and in a separate form, and the embedding is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mixed = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(4, 2, batch_first=True, kdim=4, vdim=4)
        self.recurrent, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        h = h + self.mixed(h, h, h)[0]
        h = h + self.apart(h, h.tanh(), h)[0]
        return self.head(self.recurrent(h)[0]).transpose(1, 2)


class Heads(nn.Module):
    """Two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.classes, self.values = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.inner(x).tanh()
        return {"class": self.classes(h), "value": self.values(h)}


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def words(steps: int = 4) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randint(7, (8, 3)), torch.randint(7, (8, 3))) for _ in range(steps)]


def both_heads(model: nn.Module, batch: Batch) -> None:
    found = model(batch[0])
    classes = nn.functional.cross_entropy(found["class"], batch[1])
    (classes + 0.5 * nn.functional.mse_loss(found["value"], batch[0][:, :2])).backward()


HEADS: dict[str, Any] = {"class": CE(), "value": (0.5, MSE())}
KINDS: dict[str, Make] = {
    "kfac": optimizer(),
    "ekfac": optimizer(kfacopt.EKFAC),
    "spectral": optimizer(kfacopt.SpectralDescent),
    "spectral-both-sides": optimizer(
        kfacopt.SpectralDescent, backend=lambda: kfacopt.KFACBackend(1, 2, 0.5, stagger=False)
    ),
}


def equals_one_process_of_words(name: str) -> None:
    """Shares of packed parameters, tied weights, and matrices without curvature."""
    one, reference = train(KINDS[name], words(), plain(CE()), alone(), net_of=partial(seeded, Words))
    two, made = train(KINDS[name], [share(b) for b in words()], plain(CE()), net_of=partial(seeded, Words))
    assert str(made.coverage()) == str(reference.coverage())
    assert "mixed.q_proj" in made.backend.blocks
    assert ("tokens" in made.backend.blocks) == (name != "spectral")
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-10, atol=1e-10)


def heads_equal_one_process() -> None:
    for kind in (kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent):
        make, of = optimizer(kind, loss=HEADS), partial(seeded, Heads)  # type: ignore[arg-type]
        one, _ = train(make, make_batches(), both_heads, alone(), net_of=of)
        two, _ = train(make, [share(batch) for batch in make_batches()], both_heads, net_of=of)
        torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-10, atol=1e-10)


def uneven_data_are_micro_batches() -> None:
    """DistributedDataParallel averages the processes' means, as a loop does that divides by the micro-batches."""
    make = optimizer()
    whole = make_batches()
    for _, y in whole:
        y[:3] = IGNORED

    def in_two(model: nn.Module, batch: Batch) -> None:
        for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
            (0.5 * nn.functional.cross_entropy(model(x), y)).backward()

    one, _ = train(make, whole, in_two, alone())
    two, _ = train(make, [share(batch) for batch in whole], plain(CE()))
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)


SUMMED = plain(CE(reduction="sum"))
OF_SUMS = optimizer(kfacopt.EKFAC, loss=CE(reduction="sum"))
JUDGED = optimizer(loss=CE(reduction="sum"), damping_rule=lambda: kfacopt.LevenbergMarquardt(every=1))


def summed_in_two(model: nn.Module, batch: Batch) -> None:
    """A backward for each process' share, as one process does it."""
    for half in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        SUMMED(model, half)


def batches_without_terms() -> list[Batch]:
    """In two of the steps all targets of process 0 are ignored."""
    whole = make_batches()
    for _, y in whole[:3:2]:
        y[: len(y) // 2] = IGNORED
    return whole


def a_process_without_terms() -> None:
    """All targets of process 0 are ignored in two of the steps; the sum's gradient is that of the others then."""
    whole = batches_without_terms()
    one, _ = train(OF_SUMS, whole, summed_in_two, alone())
    two, _ = train(OF_SUMS, [share(batch) for batch in whole], SUMMED)
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)
    one, _ = train(JUDGED, whole, summed_in_two, alone())
    two, _ = train(JUDGED, [share(batch) for batch in whole], SUMMED)
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)


def a_layer_that_one_process_does_not_use() -> None:
    """Its gradient is the mean of one and nothing, and so is its curvature."""
    for kind in (kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent):
        net = make_net(gated=True)
        made = kind(net, CE(), curvature="ggn", **OFTEN)
        model = DistributedDataParallel(net, find_unused_parameters=True)
        alone_net = make_net(gated=True)
        reference = kind(DistributedDataParallel(alone_net, process_group=alone()), CE(), curvature="ggn", **OFTEN)
        for step, (x, y) in enumerate(make_batches(4)):
            sign = torch.tensor([1.0, -1.0] if step % 2 else [-1.0, 1.0]).double()
            halves = [s * part.abs() for s, part in zip(sign, x.chunk(2), strict=True)]
            targets = y.chunk(2)
            made.zero_grad()
            nn.functional.cross_entropy(
                model(halves[distributed.get_rank()]), targets[distributed.get_rank()]
            ).backward()
            reference.zero_grad()
            for part, target in zip(halves, targets, strict=True):
                (0.5 * nn.functional.cross_entropy(alone_net(part), target)).backward()
            made.step()
            reference.step()
            assert same_everywhere(weights_of(net))
        torch.testing.assert_close(weights_of(net), weights_of(alone_net), rtol=1e-12, atol=1e-12)
        assert made.health()["unseen_layers"] == 0.0


GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
}


class Recomputed(nn.Module):
    """Activation checkpointing within."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.net, x, use_reentrant=False))


def gradients_are_those_of_the_engine() -> None:
    """Bit for bit, whatever the engine was told, and whether the optimizer was given the model or the wrapper."""
    for name, wrap in GRADIENTS.items():
        for over in ("wrapper", "model"):
            for recomputed in (False, True):
                # torch itself fails where a static graph's first backward is in no_sync().
                for accumulate in (False,) if "static_graph" in wrap else (False, True):
                    found = []
                    for watched in (False, True):
                        torch.manual_seed(0)
                        net = Recomputed(make_net()) if recomputed else make_net()
                        model = DistributedDataParallel(net, **wrap)
                        if watched:
                            kfacopt.EKFAC(model if over == "wrapper" else net, CE(), factor_every=1)
                        for batch in make_batches(2):
                            (in_halves if accumulate else plain(CE()))(model, share(batch))
                        found.append([p.grad for p in net.parameters() if p.grad is not None])
                    assert found[0], name
                    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
                    assert same, (name, over, recomputed, accumulate)


def a_gradient_that_is_not_finite_skips_the_step_everywhere() -> None:
    net = make_net()
    model = DistributedDataParallel(net)
    made = optimizer()(model)
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    for step, batch in enumerate(make_batches(4)):
        x, y = share(batch)
        broken = step == 1 and distributed.get_rank() == 1
        made.zero_grad()
        (nn.functional.cross_entropy(model(x), y) * (float("nan") if broken else 1.0)).backward()
        made.step()
        assert same_everywhere(weights_of(net))
    assert made.health()["skipped_steps"] == 1.0


def curvature_that_is_not_finite_is_dropped_everywhere() -> None:
    net = make_net()
    made = optimizer()(DistributedDataParallel(net))
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    model = DistributedDataParallel(net)
    for step, batch in enumerate(make_batches(3)):
        made.zero_grad()
        plain(CE())(model, share(batch))
        if step == 1 and distributed.get_rank() == 1:
            made.backend.blocks["head"].input_factor.pending.fill_(float("inf"))
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            made.step()
        assert same_everywhere(weights_of(net))
    assert made.health()["dropped_updates/head"] == 1.0


def an_error_of_one_process_is_everybodys() -> None:
    net = make_net()
    model = DistributedDataParallel(net)
    made = optimizer()(model)
    batches = make_batches(3)
    train_step = plain(CE())
    train_step(model, share(batches[0]))
    made.step()
    made.zero_grad()
    before = weights_of(net)
    x, y = share(batches[1])
    gradients = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
    if distributed.get_rank() == 1:
        wrong = net(x).mean()  # no loss of the announced kind
        gradients = torch.autograd.grad(wrong, list(net.parameters()))
    for p, g in zip(net.parameters(), gradients, strict=True):
        distributed.all_reduce(g)
        p.grad = 0.5 * g
    with pytest.raises((ValueError, RuntimeError)) as caught:
        made.step()
    if distributed.get_rank() == 0:
        assert "process 1 cannot take this step" in str(caught.value)
    assert torch.equal(before, weights_of(net))
    made.zero_grad()
    train_step(model, share(batches[2]))
    made.step()
    assert same_everywhere(weights_of(net))


def labels_are_drawn_by_every_process_anew() -> None:
    """The streams of two processes and of two steps differ; a process's own repeats itself."""
    drawn = []
    for _ in range(2):
        net = make_net()
        model = DistributedDataParallel(net)
        made = optimizer(curvature=lambda: kfacopt.Fisher("mc", samples=1, seed=3))(model)
        assert isinstance(made, kfacopt.SecondOrderOptimizer)
        mine = []
        for _ in range(2):
            made.zero_grad()
            plain(CE())(model, make_batches(1)[0])  # the same data everywhere
            pending = made.backend.blocks["head"].gradient_factor.pending
            assert pending is not None
            mine.append(pending.clone())
            made.step()
        drawn.append(torch.stack(mine))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert not same_everywhere(drawn[0][0])


def a_slow_process_does_not_hang_the_others() -> None:
    """MaxOverhead follows the clock, and theirs differ."""
    net = make_net()
    model = DistributedDataParallel(net)
    schedule = kfacopt.schedules.MaxOverhead(0.05)
    made = kfacopt.EKFAC(model, CE(), factor_every=schedule, refresh_every=schedule)
    for batch in make_batches(25):
        made.zero_grad()
        plain(CE())(model, share(batch))
        if distributed.get_rank() == 1:
            time.sleep(0.002)
        made.step()
        assert same_everywhere(weights_of(net))
    assert same_everywhere(torch.tensor(schedule.interval("factors")))
    assert same_everywhere(torch.tensor(schedule.interval("refresh")))
    assert schedule.interval("refresh") > 1


def every_layer_is_decomposed_by_one_process() -> None:
    """Each does its own and gets the others'; spread over the steps, all have something to do in the same ones."""
    for kind in (kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent):
        torch.manual_seed(0)
        net = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3))
        model = DistributedDataParallel(net)
        made = kind(model, CE(), factor_every=1, refresh_every=4)
        done: list[tuple[int, str]] = []
        for step in range(12):
            made.zero_grad()
            torch.manual_seed(10 * step + distributed.get_rank())
            nn.functional.cross_entropy(model(torch.randn(5, 6)), torch.randint(3, (5,))).backward()
            for name, block in made.backend.blocks.items():
                block.refresh = partial(_noted, type(block).refresh, block, done, (step, name))  # type: ignore[method-assign]
            made.step()
            assert same_everywhere(weights_of(net))
            for name, block in made.backend.blocks.items():
                caches = [t for t in block.renewed().values() if t is not None]
                assert all(t.is_contiguous() for t in caches)
                ready = torch.tensor(float(block.ready))
                distributed.all_reduce(ready)
                assert made.backend.ready(made.backend._layers[name])
                assert int(ready) == (2 if block.rows_need_cache else 1)
                if block.rows_need_cache:
                    assert same_everywhere(torch.cat([t.flatten() for t in caches]))
        all_done: list[Any] = [None, None]
        distributed.all_gather_object(all_done, done)
        first, second = ({name for _, name in of_rank} for of_rank in all_done)
        assert first | second == set(made.backend.blocks)
        assert not first & second
        steps = [[step for step, _ in of_rank] for of_rank in all_done]
        assert set(steps[1]) <= set(steps[0])  # five layers: one has three of them
        assert abs(len(steps[0]) - len(steps[1])) <= 4


def a_step_without_rows_sums_nothing() -> None:
    """All know from one table that nothing waits, what is in one process alone included."""
    calls: list[int] = []
    for kind in (kfacopt.KFAC, kfacopt.SpectralDescent):
        net = make_net()
        model = DistributedDataParallel(net)
        made = optimizer(kind, factor_every=2, refresh_every=4)(model)
        for batch in make_batches(5):
            calls.append(0)
            made.zero_grad()
            plain(CE())(model, share(batch))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(distributed, "all_reduce", partial(_counted, distributed.all_reduce, calls))
                made.step()
            assert same_everywhere(weights_of(net))
        assert [count > 0 for count in calls] == [True, False, True, False, True]
        calls.clear()


def _counted(all_reduce: Any, calls: list[int], *arguments: Any, **options: Any) -> Any:
    calls[-1] += 1
    return all_reduce(*arguments, **options)


def _noted(refresh: Any, block: Any, done: list[tuple[int, str]], what: tuple[int, str], damping: float) -> None:
    done.append(what)
    refresh(block, damping)


def a_failing_refresh_ends_all() -> None:
    net = make_net()
    model = DistributedDataParallel(net)
    made = optimizer()(model)
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    plain(CE())(model, share(make_batches(1)[0]))
    if distributed.get_rank() == 1:
        for block in made.backend.blocks.values():
            block.refresh = _broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of luck"):
        made.step()


def _broken(damping: float) -> None:
    raise RuntimeError("out of luck")


def the_first_alone_may_ask() -> None:
    """No communication in what is only looked at; statistics are there of all layers, wherever their inverses are."""
    for kind in (kfacopt.KFAC, kfacopt.EKFAC):
        net, made = train(optimizer(kind), [share(batch) for batch in make_batches(2)], plain(CE()))
        if distributed.get_rank() == 0:
            curvature = made.state_dict()["curvature"]
            assert curvature["processes"] == 2
            for stored in curvature["backend"]["blocks"].values():
                assert all(average["value"] is not None for average in stored["averages"].values())
            assert made.health()["skipped_steps"] == 0.0
            assert kind.__name__ in str(made.coverage())
        assert same_everywhere(weights_of(net))


def checkpoints_go_from_any_number_to_any() -> None:
    """Written by the first process alone; the run that goes on is the uninterrupted one.

    What others hold is fetched for it, but where inverses are renewed in each step anyway: without them they are
    renewed in the first.
    """
    for kind, curvature, options in (
        (kfacopt.KFAC, "ggn", {}),
        (kfacopt.KFAC, "ggn", {"backend": lambda: kfacopt.KFACBackend(1, 3, stagger=False)}),
        (kfacopt.EKFAC, "ggn", {}),
        (kfacopt.EKFAC, "ggn", {"backend": lambda: kfacopt.EKFACBackend(1, Background(2, delay=2), stagger=False)}),
        (kfacopt.SpectralDescent, "ggn", {}),
        (kfacopt.EKFAC, "mc", {}),
    ):
        make = optimizer(kind, curvature=curvature, **options)
        batches = make_batches(7)
        numbers = ("one", "two") if curvature == "ggn" else ("two",)
        whole = {n: train(make, _batches_of(n, batches), plain(CE()), _group_of(n))[0] for n in numbers}
        for before in numbers:
            net, made = train(make, _batches_of(before, batches[:4]), plain(CE()), _group_of(before))
            if options:
                made.consolidate_state_dict()
            buffer = io.BytesIO()
            torch.save({"net": net.state_dict(), "made": made.state_dict()}, buffer)
            written: list[Any] = [buffer.getvalue()]
            distributed.broadcast_object_list(written, src=0)
            for after in numbers:
                stored = torch.load(io.BytesIO(written[0]), weights_only=True)
                resumed = make_net()
                resumed.load_state_dict(stored["net"])
                model = DistributedDataParallel(resumed, process_group=_group_of(after))
                again = make(model)
                again.load_state_dict(stored["made"])
                for batch in _batches_of(after, batches[4:]):
                    again.zero_grad()
                    plain(CE())(model, batch)
                    again.step()
                tolerance = 0.0 if before == after else 1e-12
                want = weights_of(whole[after])
                torch.testing.assert_close(weights_of(resumed), want, rtol=tolerance, atol=tolerance)


def _group_of(number: str) -> Any:
    return alone() if number == "one" else None


def _batches_of(number: str, batches: list[Batch]) -> list[Batch]:
    return batches if number == "one" else [share(batch) for batch in batches]


def what_does_not_work_yet_is_refused() -> None:
    class Own(kfacopt.CurvatureBackend):
        def solve(self, gradients: Any, settings: Any) -> Any:
            return {}

    class OwnSolver(Solver):
        def solve(self, problem: Any) -> Any:
            return None

    class OwnLength(kfacopt.StepLength):
        def __repr__(self) -> str:
            return "OwnLength()"

        def wants_replays(self, step: int) -> bool:
            return True

        def scaled(self, step: Any, updates: Any) -> Any:
            return updates

    def chain() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = DistributedDataParallel(chain())

    refused: dict[str, tuple[Callable[[], Any], str]] = {
        "natural gradient": (
            lambda: kfacopt.NaturalGradient(chain(), CE(), solver=OwnSolver()),
            "2 processes.*NaturalGradient with OwnSolver",
        ),
        "own": (lambda: kfacopt.KFAC(chain(), CE(), step_length=OwnLength()), "2 processes.*OwnLength"),
        "backend": (lambda: kfacopt.KFAC(chain(), CE(), backend=Own(), damping=0.1), "Own has no join"),
        "part": (lambda: kfacopt.KFAC(Part(), CE()), "'inner' is a DistributedDataParallel within"),
        "batch norm": (
            lambda: kfacopt.KFAC(nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2)), CE()),
            "'1' is a SyncBatchNorm",
        ),
    }
    for name, (make, message) in refused.items():
        with pytest.raises((RuntimeError, NotImplementedError), match=f"(?s){message}"):
            make()
        assert same_everywhere(torch.tensor(len(name)))


class FromTheSecondOn(kfacopt.TrustRegion):
    def wants_replays(self, step: int) -> bool:
        return step > 0


def what_asks_for_replays_later_is_refused_then() -> None:
    model = DistributedDataParallel(make_net())
    made = optimizer(step_length=FromTheSecondOn)(model)
    first, second = make_batches(2)
    plain(CE())(model, share(first))
    made.step()
    made.zero_grad()
    plain(CE())(model, share(second))
    before = weights_of(model.module)
    with pytest.raises(RuntimeError, match=r"2 processes.*TrustRegion"):
        made.step()
    assert torch.equal(weights_of(model.module), before)


def gradients_that_nobody_averaged_are_refused() -> None:
    net = make_net()
    made = optimizer()(net)
    for batch in make_batches(2):
        made.zero_grad()
        plain(CE())(net, share(batch))
        before = weights_of(net)
        with pytest.raises(RuntimeError, match=r"different gradients.*DistributedDataParallel"):
            made.step()
        assert torch.equal(before, weights_of(net))
    model = DistributedDataParallel(net)
    made = optimizer()(model)
    with model.join(), pytest.raises(RuntimeError, match=r"join\(\)"):
        made.step()


def sharded_models_are_refused() -> None:
    """FSDP1, tensor parallelism, and FSDP2 of a part or after the optimizer was made, by name."""

    def chain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    mesh = init_device_mesh("cpu", (2,))
    part, parallel = chain(), parallelize_module(chain(), mesh, {"0": ColwiseParallel()})
    offloaded, divided = chain(), chain()
    fully_shard(offloaded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(divided).set_gradient_divide_factor(1.0)
    refused = {
        "'0.weight' is a DTensor": parallel,
        "the model is a FullyShardedDataParallel": FullyShardedDataParallel(chain(), device_id=torch.device("cpu")),
        "the model has CPUOffloadPolicy": offloaded,
        "gradient divide factor of 1.0": divided,
    }
    for message, model in refused.items():
        with pytest.raises(RuntimeError, match=message):
            kfacopt.KFAC(model, CE())
        assert not any(module._forward_hooks for module in model.modules() if type(module) is nn.Tanh)
    fully_shard(part[0])
    made = kfacopt.KFAC(part, CE())
    nn.functional.cross_entropy(part(torch.randn(4, 4) * distributed.get_rank()), torch.arange(4) % 3).backward()
    with pytest.raises(RuntimeError, match=r"different gradients.*fully_shard"):
        made.step()
    before = chain()
    made = kfacopt.KFAC(before, CE())
    fully_shard(before)
    nn.functional.cross_entropy(before(torch.randn(4, 4)), torch.arange(4) % 3).backward()
    with pytest.raises(RuntimeError, match="after the optimizer was made"):
        made.step()
    copied = fully_shard(chain())
    copied(torch.randn(4, 4))
    with pytest.raises(ValueError, match="whole copies"):
        kfacopt.KFAC(copied, CE(), params=list(copied.parameters()))
    kfacopt.KFAC(copied, CE())


def labels_of_two_processes_have_half_the_variance() -> None:
    """G of the same data: unbiased for the exact one, and its mean over the processes half as noisy as each."""
    net, data = make_net(), make_batches(1)[0]
    model = DistributedDataParallel(net)
    still = {"lr": 0.0, "adamw_lr": 0.0}
    exact = optimizer(**still)(model)
    sampled = optimizer(curvature="mc", **still)(model)
    drawn = []
    for step in range(200):
        exact.zero_grad()
        sampled.zero_grad()
        plain(CE())(model, data)
        average = sampled.backend.blocks["head"].gradient_factor  # type: ignore[attr-defined]
        drawn.append(average.pending / average.count)
        if step == 0:
            exact.step()
            exact.close()  # type: ignore[attr-defined]
        sampled.step()
    mine = torch.stack(drawn)
    both = mine.clone()
    distributed.all_reduce(both)
    both /= 2
    want = exact.backend.blocks["head"].gradient_factor.value  # type: ignore[attr-defined]
    deviation = both.std(0) / len(both) ** 0.5
    assert bool(((both.mean(0) - want).abs() <= 4.0 * deviation).all())  # nine numbers, six of them different
    ratio = float(both.var(0).sum() / mine.var(0).sum())
    assert 0.35 < ratio < 0.65  # one half; its own deviation is 0.07


def one_is_killed() -> None:
    """The other ends with an error instead of waiting for ever. (The last check: there is one process less then.)"""
    net = make_net()
    model = DistributedDataParallel(net)
    made = optimizer()(model)
    for step, batch in enumerate(make_batches(2)):
        made.zero_grad()
        plain(CE())(model, share(batch))
        if step == 1 and distributed.get_rank() == 1:
            os._exit(1)
        if step == 1:
            with pytest.raises(RuntimeError, match=r"(?i)gloo|connection|closed"):
                made.step()
        else:
            made.step()


def a_copy_trains_on() -> None:
    net, made = train(optimizer(), [share(batch) for batch in make_batches(2)], plain(CE()))
    copied = copy.deepcopy(made)
    assert isinstance(copied, kfacopt.SecondOrderOptimizer)
    model = DistributedDataParallel(copied.model)
    copied.zero_grad()
    plain(CE())(model, share(make_batches(1)[0]))
    copied.step()
    assert same_everywhere(weights_of(copied.model))
    assert not torch.equal(weights_of(copied.model), weights_of(net))


CHECKS: Mapping[str, Callable[[], None]] = {
    **{f"equal: {name}": partial(equals_one_process, name) for name in EQUAL},
    **{f"words: {name}": partial(equals_one_process_of_words, name) for name in KINDS},
    **{
        check.__name__: check
        for check in (
            heads_equal_one_process,
            uneven_data_are_micro_batches,
            a_process_without_terms,
            a_layer_that_one_process_does_not_use,
            gradients_are_those_of_the_engine,
            a_gradient_that_is_not_finite_skips_the_step_everywhere,
            curvature_that_is_not_finite_is_dropped_everywhere,
            an_error_of_one_process_is_everybodys,
            labels_are_drawn_by_every_process_anew,
            a_slow_process_does_not_hang_the_others,
            every_layer_is_decomposed_by_one_process,
            a_step_without_rows_sums_nothing,
            a_failing_refresh_ends_all,
            the_first_alone_may_ask,
            checkpoints_go_from_any_number_to_any,
            what_does_not_work_yet_is_refused,
            what_asks_for_replays_later_is_refused_then,
            gradients_that_nobody_averaged_are_refused,
            sharded_models_are_refused,
            labels_of_two_processes_have_half_the_variance,
            a_copy_trains_on,
        )
    },
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together({**CHECKS, "killed": one_is_killed}, seconds=300.0)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"


def test_one_is_killed(found: Found) -> None:
    assert found["killed"] == ["", "not run"]
