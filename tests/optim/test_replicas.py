"""Where some processes hold a layer's inverse, all take the step of one process; memory and traffic are what is said."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kfacopt
from kfacopt.backends.ownership import decomposition_cost
from kfacopt.replicas import Teams, delivered
from kfacopt.schedules import Background, WhenMoved
from kfacopt.sharding import Processes
from tests.optim.test_fully_shard import equals, per_block, train_sharded
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

OWNER, PAIR = kfacopt.Sharding(replicas=1), kfacopt.Sharding(replicas=2)
Options = dict[str, Any]


def kfac(**options: Any) -> Options:
    return {"backend": lambda: kfacopt.KFACBackend(1, 2, stagger=False)} | options


# What is made, but for who holds what.
MADE: dict[str, tuple[Any, Options]] = {
    "kfac": (kfacopt.KFAC, kfac()),
    "kfac-often": (kfacopt.KFAC, {}),
    "kfac-bounded": (kfacopt.KFAC, kfac(kl_clip=0.01, damping_rule=lambda: kfacopt.LevenbergMarquardt(every=1))),
    "kfac-half": (kfacopt.KFAC, {"backend": lambda: kfacopt.KFACBackend(1, 2, 0.5, stagger=False), "kl_clip": 0.01}),
    "kfac-wide": (kfacopt.KFAC, {"backend": lambda: kfacopt.KFACBackend(1, 2, widest=3, stagger=False)}),
    "kfac-auto": (kfacopt.KFAC, kfac(lr="auto")),
    "kfac-background": (
        kfacopt.KFAC,
        {"backend": lambda: kfacopt.KFACBackend(1, Background(2, delay=1), stagger=False)},
    ),
    "kfac-when-moved": (kfacopt.KFAC, {"backend": lambda: kfacopt.KFACBackend(1, WhenMoved(1, 0.5), stagger=False)}),
    "kfac-apart": (kfacopt.KFAC, kfac(separate_weight_and_bias=True)),
    "kfac-exact": (
        kfacopt.KFAC,
        {"backend": lambda: kfacopt.EigenKFACBackend(1, 2, stagger=False), "direction": kfacopt.Spectral},
    ),
    "spectral": (kfacopt.SpectralDescent, {}),
    "spectral-every-other": (
        kfacopt.SpectralDescent,
        {"backend": lambda: kfacopt.OneSidedKFACBackend(1, 2, 0.5, stagger=False)},
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
    teams = Teams(distributed.get_world_size(), sharding.replicas or 1, distributed.get_rank())
    holds_its_share(made, teams)


def holds_its_share(made: Any, teams: Teams) -> None:
    """Each layer with an inverse is in one team, and in all of it."""
    here = {name for name, block in made.backend.blocks.items() if block.ready}
    everywhere: list[Any] = [None] * teams.size
    distributed.all_gather_object(everywhere, here)
    shared = {name for name, block in made.backend.blocks.items() if decomposition_cost(block) > 0.0}
    for name in made.backend.blocks:
        holders = [rank for rank, names in enumerate(everywhere) if name in names]
        if name in shared:
            assert holders == list(teams.holders(holders[0]))
        else:
            assert holders == list(range(teams.size))
        assert made.backend.ready(made.backend._layers[name])
