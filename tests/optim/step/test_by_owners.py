"""Sharded parameters: of each layer one process has the momentum as a whole, and takes the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

import kfacopt
from kfacopt.layers.coverage import find_layers
from kfacopt.layers.plain import PlainMatrix
from kfacopt.linalg.polar import exact_polar
from kfacopt.optim.step import Preconditioned, Step, TrustRegion, Updates
from kfacopt.optim.step.by_owners import takers
from tests.optim.test_fully_shard import equals, per_block, root_only, train_sharded, whole_weights
from tests.optim.test_processes import (
    CE,
    Batch,
    Make,
    Words,
    make_batches,
    make_net,
    optimizer,
    plain,
    seeded,
    share,
    train,
    words,
)
from tests.processes import Found, alone, run_together

WIDTH = 8
OWNER = kfacopt.Sharding(replicas=1)


def equal_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))).double()


def batches_of_layers() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, WIDTH, dtype=torch.float64, generator=generator),
            torch.randint(WIDTH, (8,), generator=generator),
        )
        for _ in range(3)
    ]


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """Bytes that this process receives in each call of what moves tensors; what is summed is some numbers."""
    found: dict[str, list[int]] = {"to one each": [], "to all": []}

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(arrived: Tensor, *others: Any, **options: Any) -> Any:
            found[name].append(arrived.nbytes)
            return real(arrived, *others, **options)

        return call

    def whole(self: DTensor, **options: Any) -> Any:
        found["to all"].append(self.numel() * self.element_size())
        return full_tensor(self, **options)

    full_tensor = DTensor.full_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_to_all_single", noted("to one each", distributed.all_to_all_single))
        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(distributed, name):
                patch.setattr(distributed, name, noted("to all", getattr(distributed, name)))
        patch.setattr(DTensor, "full_tensor", whole)
        yield found


MADE: dict[str, Make] = {
    "spectral": optimizer(kfacopt.SpectralDescent),
    "kfac": optimizer(),
    "kfac, one owner": optimizer(sharding=OWNER),
    "ekfac, bounded": optimizer(kfacopt.EKFAC, kl_clip=0.03, relative_clip=0.01),
    "natural": optimizer(kl_clip=0.03, sharding=OWNER),
}


def two_parts_a_process_and_no_whole(name: str) -> None:
    """Half of a process's share comes from the other one, with the momentum, and with the updates again."""
    batches = batches_of_layers()
    net, made = train_sharded(MADE[name], [share(b) for b in batches[:2]], plain(CE()), per_block, equal_layers)
    plain(CE())(net, share(batches[2]))
    with counted() as found:
        made.step()
    parameters = 4 * WIDTH * WIDTH * 8
    rows = 0 if name in ("ekfac, bounded", "natural") else 2 * WIDTH * 8  # of the other's layers, their mean squares
    assert found["to all"] == []
    assert found["to one each"] == [parameters // 4, parameters // 4 + rows]


def state_is_everywhere() -> None:
    """What one process remembers of its layers all save; a state dict asks nobody."""
    net, made = train_sharded(MADE["spectral"], [share(b) for b in make_batches(3)], plain(CE()))
    states = [
        {name: value for name, value in made.state[p].items() if name.startswith("row_")} for p in net.parameters()
    ]
    assert sum(map(len, states)) >= 6
    everybodys: list[Any] = [None, None]
    distributed.all_gather_object(everybodys, states)
    torch.testing.assert_close(everybodys[0], everybodys[1], rtol=0.0, atol=0.0)
    one, reference = train(MADE["spectral"], make_batches(3), plain(CE()), alone())
    for p, own in zip(one.parameters(), states, strict=True):
        expected = {name: value for name, value in reference.state[p].items() if name.startswith("row_")}
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


def an_outlier_is_clipped_as_in_one_process() -> None:
    """By the norms of whole gradients, of which no process has one."""
    batches = [(50.0 * x if number == 2 else x, y) for number, (x, y) in enumerate(make_batches(4))]
    found = []
    for direction in (kfacopt.Spectral, lambda: kfacopt.ClippedGradients(kfacopt.Spectral())):
        make = optimizer(kfacopt.SpectralDescent, direction=direction)
        one, _ = train(make, batches, plain(CE()), alone())
        two, _ = train_sharded(make, [share(batch) for batch in batches], plain(CE()))
        equals(two, one, 1e-10)
        found.append(whole_weights(two))
    assert float((found[0] - found[1]).norm()) > 1e-4


def a_step_that_is_too_long_is_shortened_as_in_one_process() -> None:
    """By the slope of all layers together, of which each process has its own."""
    make = optimizer(kfacopt.SpectralDescent, lr=4.0, curvature="ggn")
    one, reference = train(make, make_batches(4), plain(CE()), alone())
    two, made = train_sharded(make, [share(batch) for batch in make_batches(4)], plain(CE()))
    assert made.health()["kl_scale"] < 0.5
    assert made.health()["kl_scale"] == pytest.approx(reference.health()["kl_scale"], rel=1e-9)
    equals(two, one, 1e-9)


def layers_may_have_no_gradient() -> None:
    """Some of them, of a layer one parameter, and in the end all: what is left trains by AdamW."""
    for make in (MADE["spectral"], MADE["natural"]):
        found = []
        for net in (make_net(), per_block(make_net())):
            model: Any = net if found else nn.parallel.DistributedDataParallel(net, process_group=alone())
            made = make(model)
            for number, batch in enumerate(make_batches(3)):
                made.zero_grad()
                plain(CE())(model, share(batch) if found else batch)
                for name, p in net.named_parameters():
                    if (number == 1 and name in ("head.bias", "expert.weight")) or (number == 2 and "norm" not in name):
                        p.grad = None
                made.step()
            found.append(net)
        equals(found[1], found[0], 1e-10)


class Doubled(kfacopt.Spectral):
    """A user's own, which says nothing of whether it goes by layers, and looks at all of them."""

    def updates(self, step: Step) -> Updates:
        assert all(p in step.averaged() for layer in step.layers for p in layer.parameters.values())
        total = sum(float(g.norm()) for g in step.gradients.values())
        found = super().updates(step)
        return Updates({p: (1.0 + 1e-3 * total) * update for p, update in found.tensors.items()})


class Shortened(TrustRegion):
    """A length of one's own, which wants whole updates."""

    def scaled(self, step: Step, updates: Updates) -> Updates | None:
        assert not any(isinstance(update, DTensor) for update in updates.tensors.values())
        return updates.scaled(1.0 / (1.0 + sum(float(update.norm()) for update in updates.tensors.values())))


def what_says_nothing_has_everything() -> None:
    for make in (optimizer(direction=Doubled), optimizer(step_length=Shortened), optimizer(direction=_unaveraged)):
        one, _ = train(make, make_batches(3), plain(CE()), alone())
        two, _ = train_sharded(make, [share(batch) for batch in make_batches(3)], plain(CE()))
        equals(two, one)


def layers_that_share_a_parameter_are_of_one_owner() -> None:
    """Projections packed in one parameter, tied weights, and matrices without curvature."""
    for sharding in (None, OWNER):
        one, _ = train(optimizer(), words(2), plain(CE()), alone(), net_of=partial(seeded, Words))
        make, batches = optimizer(sharding=sharding), [share(b) for b in words(2)]
        two, made = train_sharded(make, batches, plain(CE()), root_only, partial(seeded, Words))
        equals(two, one, 1e-10)
        assert {"mixed.q_proj", "mixed.k_proj"} <= set(made.backend.blocks)
        plain(CE())(two, share(words(1)[0]))
        with counted() as found:
            made.step()
        assert found["to all"] == []
        assert len(found["to one each"]) == 2


def _unaveraged() -> kfacopt.Direction:
    return Preconditioned(momentum=None)


class Root(kfacopt.KFACBackend):
    """Another power of the curvature: a bound on the step needs the product with it, of whole updates."""

    newton = False


def a_bound_without_an_image() -> None:
    for sharding in (None, OWNER):
        make = optimizer(backend=lambda: Root(1, 1), kl_clip=0.01, sharding=sharding)
        one, reference = train(
            optimizer(backend=lambda: Root(1, 1), kl_clip=0.01), make_batches(3), plain(CE()), alone()
        )
        two, made = train_sharded(make, [share(batch) for batch in make_batches(3)], plain(CE()))
        equals(two, one)
        assert made.health()["kl"] == pytest.approx(reference.health()["kl"], rel=1e-9)


def broken_in_one(kind: str) -> Callable[[Tensor], Tensor]:
    """A polar factor that fails in the process that steps the head, which has three rows."""

    def polar(matrices: Tensor) -> Tensor:
        if 3 not in matrices.shape[-2:]:
            return exact_polar(matrices)
        if kind == "raises":
            raise ArithmeticError("no polar factor")
        return torch.full_like(matrices, float("nan"))

    return polar


def a_failure_in_one_is_everybodys() -> None:
    direction = partial(kfacopt.Spectral, polar=broken_in_one("raises"))
    net = per_block(make_net())
    made = optimizer(direction=direction)(net)
    before = whole_weights(net)
    plain(CE())(net, share(make_batches(1)[0]))
    with pytest.raises((ArithmeticError, RuntimeError), match=r"no polar factor"):
        made.step()
    assert torch.equal(whole_weights(net), before)


def what_is_not_a_number_in_one_is_skipped_by_all() -> None:
    direction = partial(kfacopt.Spectral, polar=broken_in_one("nan"))
    net, made = train_sharded(optimizer(direction=direction), [share(b) for b in make_batches(2)], plain(CE()))
    assert torch.equal(whole_weights(net), torch.cat([p.detach().flatten() for p in make_net().parameters()]))
    assert made.health()["skipped_steps"] == 2.0


CHECKS: Mapping[str, Callable[[], None]] = {
    **{f"bytes: {name}": partial(two_parts_a_process_and_no_whole, name) for name in MADE},
    **{
        check.__name__: check
        for check in (
            state_is_everywhere,
            an_outlier_is_clipped_as_in_one_process,
            a_step_that_is_too_long_is_shortened_as_in_one_process,
            layers_may_have_no_gradient,
            what_says_nothing_has_everything,
            layers_that_share_a_parameter_are_of_one_owner,
            a_bound_without_an_image,
            a_failure_in_one_is_everybodys,
            what_is_not_a_number_in_one_is_skipped_by_all,
        )
    },
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"


class Solving(kfacopt.KFACBackend):
    """One that solves in its own way, and may ask all for that."""

    def solve(self, gradients: Any, settings: Any) -> Any:
        return super().solve(gradients, settings)


def test_who_does_otherwise_says_anew_whether_it_can_be_divided() -> None:
    assert kfacopt.KFACBackend(1, 1).solvers([]) == {}
    assert Solving(1, 1).solvers([]) is None
    assert Root(1, 1).solvers([]) == {}
    assert (TrustRegion.reads_shards, Shortened.reads_shards) == (True, False)
    assert Doubled.by_layers is kfacopt.Direction.by_layers


def test_layers_go_to_who_can_solve_for_them() -> None:
    """The longest first; what shares a parameter together, or not at all; matrices without curvature where least is."""
    model = nn.ModuleList([nn.MultiheadAttention(4, 2, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(2, 2)])
    layers, _ = find_layers(model, list(model.parameters()), {}, separate=False)
    everybody: dict[Any, range] = dict.fromkeys(layers, range(3))
    raw = nn.Parameter(torch.zeros(3, 3))
    found = takers(layers, {raw: PlainMatrix((3, 3), False)}, everybody, 3)
    assert found is not None
    by_name = {name: found[p] for name, p in model.named_parameters()}
    assert by_name == {
        "1.weight": 0,  # 6 · 6 · 12
        "0.in_proj_weight": 1,  # 3 · 4 · 4 · 8
        "0.out_proj.weight": 2,  # 4 · 4 · 8
        "2.weight": 2,
        "2.bias": 2,
    }
    assert found[raw] == 2
    teams: dict[Any, range] = {layer: range(1) if "q_proj" in layer.name else range(1, 3) for layer in layers}
    assert takers(layers, {}, teams, 3) is None
    assert takers([la for la in layers if "proj" not in la.name], {}, teams, 3) is not None
