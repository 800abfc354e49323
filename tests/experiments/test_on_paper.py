"""What is planned on paper is what two processes send and compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import kfacopt
from kfacopt.backends import EKFACBackend, KFACBackend, OneSidedKFACBackend
from kfacopt.backends.base import Settings
from kfacopt.blocks.outputs import OutputBlock
from kfacopt.experiments.on_paper import Plan, language_model, plan
from kfacopt.layers.layer import Layer
from kfacopt.optim.step import Spectral
from kfacopt.replicas import Sharding
from tests.processes import Found, run_together

DATA = 12
BACKENDS: dict[str, Callable[[], KFACBackend]] = {
    "kfac": partial(KFACBackend, 1, 1, widest=200),
    "one-sided": partial(OneSidedKFACBackend, 1, 1, widest=200),
}


def network() -> nn.Sequential:
    """One-hot inputs, biases, sides that are padded, too wide, of odd length, and fewer than processes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 5), nn.Linear(5, 210), nn.Tanh(), nn.Linear(210, 130), nn.Tanh(), nn.Linear(130, 1, bias=False)
    )


def refusal_of(name: str) -> Callable[[Layer], str | None]:
    return Spectral().refusal if name == "one-sided" else lambda layer: None


# By default a layer's owner alone has its inverse, and all have its statistics.
EVERYBODY, LEAST = Sharding(replicas=None), Sharding(statistics="holders")
WAYS = {"default": Sharding(), "all": EVERYBODY, "least": LEAST}


def planned(name: str, size: int = 2, sharding: Sharding | None = None, sharded: bool = False) -> Plan:
    with torch.device("meta"):
        model = network()
    return plan(model, BACKENDS[name](), DATA, size, refusal_of(name), name == "one-sided", sharding, sharded)


@contextmanager
def received() -> Iterator[Counter[str]]:
    """Bytes of numbers in float32 that pass through each collective; agreements are in float64 or not of numbers."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce", "broadcast", "all_gather_single", "all_to_all_single"):
            patch.setattr(distributed, name, partial(_noting, getattr(distributed, name), name, counts))
        yield counts


def _noting(real: Any, name: str, counts: Counter[str], tensor: Tensor, *others: Any, **options: Any) -> Any:
    if tensor.dtype == torch.float32:
        counts[name] += tensor.nbytes
    return real(tensor, *others, **options)


def sends_what_is_planned(name: str, sharded: bool, sharding: Sharding) -> None:
    model: Any = network()
    if sharded:
        for part in model:
            if list(part.parameters()):
                fully_shard(part)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    direction = Spectral() if name == "one-sided" else None
    options: dict[str, Any] = {"direction": direction} if direction is not None else {"kl_clip": 0.03}
    made = kfacopt.KFAC(model, nn.MSELoss(), backend=BACKENDS[name](), sharding=sharding, **options)
    torch.manual_seed(distributed.get_rank())
    nn.functional.mse_loss(model(torch.randint(9, (DATA,))), torch.randn(DATA, 1)).backward()
    with received() as counts:
        made.step()
    expected = planned(name, sharding=sharding, sharded=sharded)
    assert (min(expected.caches) > 0) == (sharding == EVERYBODY)
    assert counts["all_reduce"] == expected.statistics
    assert counts["reduce"] == sum(expected.divided)
    assert (sum(expected.divided) > 0) == (sharding == LEAST)
    assert counts["broadcast"] == sum(expected.caches)
    assert counts["all_gather_single"] == 0
    held: list[Tensor | None] = []
    for block in made.backend.blocks.values():  # type: ignore[attr-defined]
        held += [average.value for average in block.averages().values()]
        held += [*block.cache().values(), block._root if isinstance(block, OutputBlock) else None]
    own = [counts["all_to_all_single"], sum(t.nbytes for t in held if t is not None)]
    of_all: list[Any] = [None, None]
    distributed.all_gather_object(of_all, own)
    assert list(map(max, zip(*of_all, strict=True))) == [expected.exchanged, expected.held]


CHECKS = {
    f"{name}, {engine}, {way}": partial(sends_what_is_planned, name, engine == "fully_shard", sharding)
    for name in BACKENDS
    for engine in ("ddp", "fully_shard")
    for way, sharding in WAYS.items()
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_send_what_is_planned(found: Found, name: str) -> None:
    assert found[name] == ["", ""], "\n".join(found[name])


def test_flops_are_those_of_products() -> None:
    """A trained step's forward and backward, and the natural gradient's products with inverses that are there."""
    model = network()
    backend = BACKENDS["kfac"]()
    made = kfacopt.KFAC(model, nn.MSELoss(), backend=backend, kl_clip=0.03)
    loss = nn.functional.mse_loss(model(torch.randint(9, (DATA,))), torch.randn(DATA, 1))
    loss.backward()
    made.step()
    gradients = {layer: {r: p.grad for r, p in layer.parameters.items()} for layer in backend.mean_eigenvalues()}
    with FlopCounterMode(display=False) as counter:
        backend.solve(gradients, dict.fromkeys(gradients, Settings(1.0, 0.9)))  # type: ignore[arg-type]
    assert planned("kfac", size=1).solve == counter.get_total_flops()
    dense = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    assert planned("kfac").training == 6 * DATA * dense


def test_the_work_is_divided() -> None:
    """What an owner computes falls with their number until the longest layer is alone; so does a direction."""
    small = partial(language_model, width=64, blocks=3, words=100)
    plans = [plan(small(), KFACBackend(), 32, size, sharding=EVERYBODY) for size in (1, 2, 4, 64)]
    longest = 64**3 + 256**3  # six of them, and smaller ones
    assert plans[0].inverses >= 6 * longest
    assert plans[0].inverses / 2 <= plans[1].inverses < 0.51 * plans[0].inverses
    assert [one.inverses for one in plans[2:]] == [2 * longest, longest]
    assert len({one.solve for one in plans}) == len({sum(one.caches) for one in plans[1:]}) == 1
    assert [one.traffic(1, 1) > 0 for one in plans] == [False, True, True, True]
    apart = [plan(small(), KFACBackend(), 32, size, sharding=LEAST) for size in (1, 2, 4)]
    assert all(1.0 <= size * one.solve / plans[0].solve < 1.3 for size, one in zip((1, 2, 4), apart, strict=True))
    assert plans[0].held == apart[0].held
    assert all(1.0 <= size * one.held / plans[0].held < 1.1 for size, one in zip((1, 2, 4), apart, strict=True))
    assert [(one.statistics, sum(one.divided)) for one in apart[1:]] == [(0, plans[1].statistics)] * 2
    assert apart[1].traffic(1, 10**9) - apart[1].exchanged == plans[1].statistics / 2
    assert [sum(one.caches) for one in apart] == [0, 0, 0]
    by_default = [plan(small(), KFACBackend(), 32, size) for size in (1, 2, 4)]
    for least, usual, everything in zip(apart[1:], by_default[1:], plans[1:], strict=False):
        assert (usual.solve, usual.inverses) == (least.solve, least.inverses)
        assert (usual.statistics, sum(usual.divided), sum(usual.caches)) == (everything.statistics, 0, 0)
        assert least.held < usual.held < everything.held
    in_pairs = plan(small(), KFACBackend(), 32, 4, sharding=Sharding(replicas=2, statistics="holders"))
    assert apart[1].exchanged <= in_pairs.exchanged < apart[2].exchanged
    assert apart[2].held < in_pairs.held


def test_sharded_steps_are_divided() -> None:
    """A process receives two shares of the parameters, momentum and updates, whoever holds inverses."""
    small = partial(language_model, width=64, blocks=3, words=100)
    numbers = sum(p.numel() for p in small().parameters())
    for sharding in WAYS.values():
        plans = [plan(small(), KFACBackend(), 32, size, sharding=sharding, sharded=True) for size in (1, 2, 4)]
        assert plans[0].exchanged == 0
        for size, one in zip((2, 4), plans[1:], strict=True):
            assert 1.0 <= one.exchanged / (2 * 4 * numbers * (size - 1) / size**2) < 1.25
            assert 1.0 <= size * one.solve / plans[0].solve < 1.3


def test_layers_take_turns_on_paper() -> None:
    """Where a batch has few rows; in a long run each then moves in a sixth of the steps."""
    small = partial(language_model, width=64, blocks=3, words=100)
    few, some, many = (
        plan(small(), OneSidedKFACBackend(), tokens, 1, Spectral().refusal, spectral=True) for tokens in (8, 800, 40960)
    )
    assert few.solve / many.solve == some.solve / many.solve == pytest.approx(1 / 6)


def test_a_cache_of_unknown_size_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="CorrectedEigenBlock holds is not known on paper"):
        plan(language_model(32, 1, 10), EKFACBackend(), 4, 2)  # type: ignore[arg-type]
