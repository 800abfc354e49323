"""Under `fully_shard` two processes are one with all their data, too, and the engine does what it does without us."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt.fsdp import ShardedModel
from kfacopt.layers.products import ProductsHandler
from tests.cases import natural_direction
from tests.layers.test_own_forward import Dora, InputScaled, Lora
from tests.optim.test_processes import (
    CE,
    EQUAL,
    HEADS,
    JUDGED,
    OF_SUMS,
    SUMMED,
    Batch,
    Heads,
    Make,
    Words,
    batches_without_terms,
    both_heads,
    conditions_are_known_where_inverses_are,
    in_halves,
    make_batches,
    make_net,
    optimizer,
    plain,
    seeded,
    share,
    summed_in_two,
    train,
    weights_of,
    words,
)
from tests.processes import Found, alone, run_together

Shard_ = Callable[[Any], nn.Module]
SECONDS = 300.0


def root_only(net: nn.Module) -> nn.Module:
    return fully_shard(net)


def per_block(net: Any, **options: Any) -> nn.Module:
    """Each child with parameters is a unit, so that a prediction's own layer is one, and the rest of the root."""
    for child in net.children():
        fully_shard(child, **options)
    return fully_shard(net, **options)


def kept_unsharded(net: Any) -> nn.Module:
    return per_block(net, reshard_after_forward=False)


def by_columns(net: Any) -> nn.Module:
    return fully_shard(net, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % 2 == 0 else None)


def whole_weights(net: nn.Module) -> Tensor:
    ShardedModel(net).reshard()
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def train_sharded(
    make: Make,
    batches: list[Batch],
    backward: Callable[[nn.Module, Batch], None],
    shard: Shard_ = per_block,
    net_of: Callable[[], nn.Module] = make_net,
) -> Any:
    net = shard(net_of())
    made = make(net)
    for batch in batches:
        made.zero_grad()
        backward(net, batch)
        made.step()
    return net, made


def equals(net: nn.Module, reference: nn.Module, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(whole_weights(net), weights_of(reference), rtol=tolerance, atol=tolerance)


# Those of `EQUAL` that take another way where parameters are sharded.
SHARDED = [
    "kfac",
    "ekfac",
    "ekfac-exact",
    "spectral",
    "spectral-unit",
    "reduce",
    "sum",
    "squared",
    "weighted",
    "accumulation",
    "relative-clip",
    "damping-rule",
]


def equals_one_process(name: str) -> None:
    make, backward, _ = EQUAL[name]
    batches = make_batches()
    one, reference = train(make, batches, backward, alone())
    for shard in (per_block, root_only):
        two, made = train_sharded(make, [share(batch) for batch in batches], backward, shard)
        equals(two, one)
        assert float((whole_weights(two) - weights_of(make_net())).norm()) > 1e-3
        for key in ("damping", "rho", "kl", "kl_scale"):
            if key in reference.health():
                assert made.health()[key] == pytest.approx(reference.health()[key], rel=1e-9), key
        conditions_are_known_where_inverses_are(made, reference)
        assert str(made.coverage()).replace("FSDP", "").split() == str(reference.coverage()).split()


def columns_are_as_good_as_rows() -> None:
    make = optimizer(kfacopt.EKFAC)
    one, _ = train(make, make_batches(), plain(CE()), alone())
    two, _ = train_sharded(make, [share(batch) for batch in make_batches()], plain(CE()), by_columns)
    equals(two, one)


class Narrow(nn.Module):
    """Fewer rows than processes: the second has none of the head, nor of a bias in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.neck, self.head = nn.Linear(5, 3), nn.Linear(3, 1), nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.inner(x).tanh()).tanh())


class Dot(nn.Module):
    """One row in all: the second process holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def first_number(model: nn.Module, batch: Batch) -> None:
    nn.functional.mse_loss(model(batch[0]), batch[0][:, :1].sin()).backward()


def twice_scaled(model: nn.Module, batch: Batch) -> None:
    """Scaled, and unscaled by hand: what was done to the gradients is seen by whoever holds some."""
    (64.0 * nn.functional.mse_loss(model(batch[0]), batch[0][:, :1].sin())).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(64.0)


def there_may_be_fewer_rows_than_processes() -> None:
    for kind in (kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent):
        make = optimizer(kind, loss=nn.MSELoss())
        for net_of in (partial(seeded, Narrow), partial(seeded, Dot)):
            for backward in (first_number, twice_scaled):
                one, _ = train(make, make_batches(3), backward, alone(), net_of=net_of)
                batches = [share(batch) for batch in make_batches(3)]
                for shard in (per_block, root_only):
                    two, _ = train_sharded(make, batches, backward, shard, net_of)
                    equals(two, one)


class Gated(nn.Module):
    """Raw matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ParameterList(torch.randn(4, 4) / 2 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.pair[0]).sigmoid() * nn.functional.linear(x, self.pair[1])


class Unusual(nn.Module):
    """Layers that are not called as a `Linear` is."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(5, 4, batch_first=True)
        self.block = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.25), nn.Tanh(), Gated())
        normed = (parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 3)))
        self.normed = nn.Sequential(*normed)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, x.cos()], dim=1)
        return self.normed(self.block(self.recurrent(steps)[0].sum(1)))


def unusual_layers_equal_one_process() -> None:
    """Rows computed from whole parameters, of recurrent layers and weights under a norm; pruned and raw ones, too."""

    def each(net: Any) -> nn.Module:
        for child in (net.recurrent, *net.normed):
            fully_shard(child)
        return fully_shard(net)

    # EKFAC's basis of a repeated eigenvalue is another in one process: it is compared with two that hold everything.
    cases: list[tuple[Make, Any, list[Batch], Any]] = [
        (optimizer(), plain(CE()), make_batches(3), alone()),
        (optimizer(kfacopt.SpectralDescent), plain(CE()), make_batches(3), alone()),
        (optimizer(kfacopt.EKFAC), plain(CE()), make_batches(3), None),
        (OF_SUMS, SUMMED, batches_without_terms(), None),
    ]
    with kfacopt.register_handler(Gated, ProductsHandler(linear=["pair.1"], matmul=["pair.0"])):
        for make, backward, whole, group in cases:
            batches = [share(batch) for batch in whole]
            given = batches if group is None else whole
            one, reference = train(make, given, backward, group, net_of=partial(seeded, Unusual))
            for shard in (each, per_block, root_only):
                two, made = train_sharded(make, batches, backward, shard, partial(seeded, Unusual))
                assert set(made.backend.blocks) == set(reference.backend.blocks)
                assert {"recurrent.ih_l0", "recurrent.hh_l0", "normed.0.direction"} <= set(made.backend.blocks)
                assert made.health()["unseen_layers"] == 0.0
                equals(two, one, 1e-12)
                assert not any(hasattr(p, "_kfacopt_whole") for p in two.parameters())


class Experts(nn.Module):
    """A mixture of three: each datum goes through the expert that its first number chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,nio->no", x, self.weight[(8 * x[:, 0].abs()).long() % 3])


class Adapted(nn.Module):
    """Layers that only the graph shows: experts, adapters by a parametrization and by hand, scaled inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.dora, self.scaled = Experts(), Dora(4, 4), InputScaled(4, 3)
        self.lora = register_parametrization(nn.Linear(4, 4), "weight", Lora(4, 4))
        self.lora.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr,operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.dora(self.lora(self.experts(x)).tanh()).tanh())


def layers_found_in_the_graph_equal_one_process() -> None:
    """Of units that have freed their copies when the graph is asked, and of the root's."""
    names = {"experts.weight.2", "lora.parametrizations.weight.0.b", "dora.lora.a", "dora.magnitude", "scaled.scale"}
    # EKFAC, as above, is compared with two processes that hold everything; its spectral step is of matrices.
    cases = ((optimizer(kl_clip=0.03), names, alone()), (optimizer(kfacopt.EKFAC), {"scaled.weight"}, None))
    with kfacopt.register_handler(Experts, ProductsHandler(matmul=["weight"])):
        for make, wanted, group in cases:
            batches = [share(batch) for batch in make_batches(2)]
            given = batches if group is None else make_batches(2)
            one, reference = train(make, given, plain(CE()), group, net_of=partial(seeded, Adapted))
            for shard in (per_block, root_only):
                two, made = train_sharded(make, batches, plain(CE()), shard, partial(seeded, Adapted))
                assert set(made.backend.blocks) == set(reference.backend.blocks)
                assert wanted <= {name for name, la in made.backend._layers.items() if made.backend.ready(la)}
                equals(two, one)
        found = []
        for watch in (lambda net: None, optimizer()):
            net = per_block(seeded(Adapted))
            watcher = watch(net)
            plain(CE())(net, batches[0])
            found.append([p.grad.to_local() for p in net.parameters() if isinstance(p.grad, DTensor)])
        assert watcher is not None
        assert len(found[0]) == 11
        assert all(map(torch.equal, *found))


def words_equal_one_process() -> None:
    """Shares of packed parameters, tied weights, and matrices without curvature."""

    def by_module(net: Any) -> nn.Module:
        for child in (net.mixed, net.apart, net.recurrent):
            fully_shard(child)
        return fully_shard(net)

    for make in (optimizer(), optimizer(kfacopt.EKFAC), optimizer(kfacopt.SpectralDescent)):
        one, reference = train(make, words(3), plain(CE()), alone(), net_of=partial(seeded, Words))
        for shard in (by_module, root_only):
            batches = [share(b) for b in words(3)]
            two, made = train_sharded(make, batches, plain(CE()), shard, partial(seeded, Words))
            assert "mixed.q_proj" in made.backend.blocks
            assert made.health()["unseen_layers"] == reference.health()["unseen_layers"]
            equals(two, one, 1e-10)


def decay_is_of_each_one_s_shards() -> None:
    """A cautious weight decay comes with the eighth step; the shards are weights of few rows and their steps."""
    make, batches = optimizer(kfacopt.SpectralDescent, direction=lambda: kfacopt.Spectral(decay=2.0)), make_batches(8)
    one, _ = train(make, batches, plain(CE()), alone())
    for shard in (per_block, root_only):
        two, _ = train_sharded(make, [share(batch) for batch in batches], plain(CE()), shard)
        equals(two, one, 1e-10)


def heads_equal_one_process() -> None:
    make, of = optimizer(loss=HEADS), partial(seeded, Heads)  # type: ignore[arg-type]
    one, _ = train(make, make_batches(), both_heads, alone(), net_of=of)
    two, _ = train_sharded(make, [share(batch) for batch in make_batches()], both_heads, net_of=of)
    equals(two, one, 1e-10)


class Blocks(nn.Module):
    """A chain of blocks, one of which may be recomputed in the backward, and be called twice."""

    def __init__(self, recomputed: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(4))
        self.head, self.recomputed, self.twice = nn.Linear(5, 3), recomputed, twice

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for _ in range(1 + self.twice):
                x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return self.head(x)


def blocks_apart(net: Any, **options: Any) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, **options)
    fully_shard(net.head, **options)
    return fully_shard(net, **options)


def without_sync(model: Any, batch: Batch) -> None:
    """Micro-batches whose gradients wait within the engine until the last."""
    halves = list(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))
    for last, (x, y) in enumerate(halves):
        model.set_requires_gradient_sync(bool(last))
        (0.5 * nn.functional.cross_entropy(model(x), y)).backward()


def two_forwards(model: nn.Module, batch: Batch) -> None:
    """Both before the backward."""
    halves = list(zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))
    torch.stack([0.5 * nn.functional.cross_entropy(model(x), y) for x, y in halves]).sum().backward()


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
MODES: dict[str, tuple[Shard_, Callable[[Any, Batch], None], dict[str, bool], str]] = {
    "blocks": (blocks_apart, plain(CE()), {}, "ggn"),
    "blocks, sampled": (blocks_apart, plain(CE()), {}, "mc"),
    "root": (root_only, plain(CE()), {}, "ggn"),
    "kept": (partial(blocks_apart, reshard_after_forward=False), plain(CE()), {}, "ggn"),
    "blocks, halves": (blocks_apart, in_halves, {}, "ggn"),
    "blocks, without sync": (blocks_apart, without_sync, {}, "ggn"),
    "root, without sync": (root_only, without_sync, {}, "ggn"),
    "blocks, two forwards": (blocks_apart, two_forwards, {}, "ggn"),
    "blocks, twice": (blocks_apart, plain(CE()), {"twice": True}, "mc"),
    "blocks, recomputed": (blocks_apart, plain(CE()), {"recomputed": True}, "ggn"),
    "root, recomputed": (root_only, plain(CE()), {"recomputed": True}, "ggn"),
    "half": (partial(blocks_apart, mp_policy=HALF), plain(CE()), {}, "ggn"),
    "half, without sync": (partial(blocks_apart, mp_policy=HALF), without_sync, {}, "mc"),
    "half, recomputed": (partial(blocks_apart, mp_policy=HALF), plain(CE()), {"recomputed": True}, "mc"),
}


@contextmanager
def counted(inside: list[bool]) -> Iterator[dict[str, int]]:
    """What the engine does by itself, our passes left out."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module

    found = {"reduced": 0, "fetched ahead": 0}
    reduce, prefetch = module.foreach_reduce, module.FSDPParamGroup._prefetch_unshard

    def reducing(*arguments: Any, **options: Any) -> Any:
        found["reduced"] += 1
        return reduce(*arguments, **options)

    def fetching(*arguments: Any) -> None:
        found["fetched ahead"] += not inside
        prefetch(*arguments)

    module.foreach_reduce = reducing
    module.FSDPParamGroup._prefetch_unshard = staticmethod(fetching)  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        module.foreach_reduce = reduce
        module.FSDPParamGroup._prefetch_unshard = staticmethod(prefetch)  # type: ignore[method-assign,assignment]


def gradients_are_those_of_the_engine() -> None:
    """Bit for bit, at as many reductions and prefetches, and with curvature of every layer."""
    inside: list[bool] = []
    whole = ShardedModel.left_as_is

    @contextmanager
    def noted(self: ShardedModel) -> Iterator[None]:
        inside.append(True)
        with whole(self):
            yield
        inside.pop()

    ShardedModel.left_as_is = noted  # type: ignore[method-assign]
    for name, (shard, backward, kind, curvature) in MODES.items():
        found, counts = [], []
        for watched in (False, True):
            torch.manual_seed(0)
            net = shard(Blocks(**kind) if "half" in name else Blocks(**kind).double())
            if watched:
                made = kfacopt.EKFAC(net, CE(), factor_every=1, curvature=curvature)
            with counted(inside) as count:
                for x, y in make_batches(2):
                    backward(net, share((x.float() if "half" in name else x, y)))
            counts.append(count)
            found.append([shard_.to_local() for p in net.parameters() if isinstance(shard_ := p.grad, DTensor)])
        assert len(found[0]) == len(list(net.parameters())), name
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), name
        assert counts[0] == counts[1], (name, counts)
        made.step()
        assert made.health()["unseen_layers"] == 0.0, name
        assert len(made.backend.blocks) == 9, name
        assert all(block.ready for block in made.backend.blocks.values()), name
    ShardedModel.left_as_is = whole  # type: ignore[method-assign]


def half_precision_trains() -> None:
    """Statistics of a bfloat16 forward: as near to the float32 ones as its rounding."""
    values = []
    for policy in (MixedPrecisionPolicy(), HALF):
        torch.manual_seed(0)
        net = blocks_apart(Blocks(), mp_policy=policy)
        # The spectral step makes of rounding, where nothing else is left, a step as long as any.
        made = kfacopt.KFAC(net, CE(), factor_every=1, refresh_every=1, curvature="ggn", direction=natural_direction())
        for x, y in make_batches(2):
            made.zero_grad()
            plain(CE())(net, share((x.float(), y)))
            made.step()
        values.append(
            [made.backend.blocks["blocks.0.0"].averages()[n].value for n in ("input_factor", "gradient_factor")]
        )
    for full, half in zip(*values, strict=True):
        assert half is not None
        assert half.dtype == torch.float32
        assert float((full - half).norm() / full.norm()) < 0.05  # a rounding of 0.004 through nine layers, two steps


def the_engine_goes_on_where_it_was() -> None:
    """Evaluation between the steps, and a backward that is refused half-way, in all processes."""
    net = per_block(make_net())
    made = optimizer()(net)
    one, _ = train(optimizer(), make_batches(3), plain(CE()), alone())
    batches = make_batches(3)
    for batch in batches:
        made.zero_grad()
        plain(CE())(net, share(batch))
        made.step()
        with torch.no_grad():
            net.eval()
            net(batch[0])
            net.train()
        if batch is not batches[-1]:
            with pytest.raises(ValueError, match="is not that of CrossEntropyLoss"):
                net(share(batch)[0]).sum().backward()
    equals(net, one)


def a_gradient_that_is_not_finite_skips_the_step_everywhere() -> None:
    net = per_block(make_net())
    made = optimizer()(net)
    assert isinstance(made, kfacopt.SecondOrderOptimizer)
    for step, batch in enumerate(make_batches(4)):
        made.zero_grad()
        plain(CE())(net, share(batch))
        if step == 1 and distributed.get_rank() == 1:
            net.head.weight.grad.to_local().fill_(float("nan"))  # type: ignore[union-attr,operator]
        before = whole_weights(net)
        made.step()
        assert torch.equal(before, whole_weights(net)) == (step == 1)
    assert made.health()["skipped_steps"] == 1.0


def a_process_without_terms() -> None:
    """All targets of process 0 are ignored in two of the steps; what runs forwards again waits for nobody then."""
    whole = batches_without_terms()
    one, _ = train(OF_SUMS, whole, summed_in_two, alone())
    two, _ = train_sharded(OF_SUMS, [share(batch) for batch in whole], SUMMED)
    equals(two, one)
    net, made = train_sharded(JUDGED, [share(batch) for batch in whole], SUMMED)
    assert bool(whole_weights(net).isfinite().all())
    assert made.param_groups[0]["damping"] != JUDGED(make_net()).param_groups[0]["damping"]


def processes_may_have_unlike_many_data() -> None:
    """One has six of eight, and then none: its passes are other in number, and wait for each other all the same."""
    make, backward = optimizer(kfacopt.EKFAC, loss=CE(reduction="sum")), plain(CE(reduction="sum"))

    def parts(step: int, batch: Batch) -> list[Batch]:
        sizes = ([6, 2], [0, 8], [4, 4], [8, 0])[step % 4]
        return list(zip(batch[0].split(sizes), batch[1].split(sizes), strict=True))

    rank, steps = distributed.get_rank(), list(enumerate(make_batches(5)))
    net = make_net()
    made = make(nn.parallel.DistributedDataParallel(net, process_group=alone()))
    for step, batch in steps:
        made.zero_grad()
        for part in parts(step, batch):
            if len(part[0]):
                backward(net, part)
        made.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfacopt.capture.chunks._CACHED", 700)  # some cotangents at a time
        two, _ = train_sharded(make, [parts(step, batch)[rank] for step, batch in steps], backward)
    equals(two, net)


def an_operator_is_refused() -> None:
    net = per_block(make_net())
    with pytest.raises(RuntimeError, match="params are sharded"):
        kfacopt.operators.GGNLinearOperator(net, CE(), list(net.parameters()), make_batches(1))


def the_first_alone_may_ask() -> None:
    """No communication in what is only looked at."""
    net, made = train_sharded(optimizer(kfacopt.EKFAC), [share(b) for b in make_batches(2)], plain(CE()))
    if distributed.get_rank() == 0:
        assert made.state_dict()["curvature"]["processes"] == 2
        assert made.health()["skipped_steps"] == 0.0
        assert "EKFAC" in str(made.coverage())
    assert bool(whole_weights(net).isfinite().all())


def compiled_it_is_the_same() -> None:
    """The whole model or block by block; gradients and steps are, bit for bit, those of the model as it is."""

    def trained(compiled: Callable[[Any], Any]) -> list[Tensor]:
        net = per_block(seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))))
        model = compiled(net)
        made = kfacopt.KFAC(model, CE(), curvature="ggn", factor_every=1, refresh_every=1)
        found = []
        for batch in make_batches(2):
            made.zero_grad()
            plain(CE())(model, share(batch))
            found += [p.grad.full_tensor() for p in net.parameters()]  # type: ignore[union-attr]
            made.step()
        assert made.health()["unseen_layers"] == 0.0
        return [*found, whole_weights(net)]

    def block_by_block(net: Any) -> Any:
        for child in net.children():
            child.compile(backend="aot_eager")
        return net

    expected = trained(lambda net: net)
    for compiled in (partial(torch.compile, backend="aot_eager"), block_by_block):
        assert all(map(torch.equal, trained(compiled), expected))


def what_works_in_one_process_only_is_refused() -> None:
    refused: dict[str, Callable[[nn.Module], Any]] = {
        "NaturalGradient with Gram under fully_shard": lambda net: kfacopt.NaturalGradient(net, CE()),
        "NaturalGradient with CG under fully_shard": lambda net: kfacopt.NaturalGradient(
            net, CE(), solver=kfacopt.CG()
        ),
        "TrustRegionNewton under fully_shard": lambda net: kfacopt.TrustRegionNewton(net, CE()),
        "QuadraticModel": lambda net: kfacopt.KFAC(net, CE(), lr="auto"),
    }
    for name, make in refused.items():
        with pytest.raises(RuntimeError, match=f"2 processes.*{name}"):
            make(per_block(make_net()))


def one_is_killed() -> None:
    """The other ends with an error, in a step or in the engine's next collective, within 30 seconds. (The last check.)

    In the second step one process is gone, as one is that ran out of memory.
    """
    net = per_block(make_net())
    made, (first, second) = optimizer(kfacopt.EKFAC)(net), make_batches(2)
    plain(CE())(net, share(first))
    made.step()
    made.zero_grad()
    plain(CE())(net, share(second))
    if distributed.get_rank() == 1:
        os._exit(1)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)gloo|connection|closed"):
        made.step()
    assert time.monotonic() - started < 30.0


GRADIENTS: Mapping[str, Callable[[], None]] = {
    check.__name__: check for check in (gradients_are_those_of_the_engine, half_precision_trains)
}
TRAJECTORIES: Mapping[str, Callable[[], None]] = {
    f"equal: {name}": partial(equals_one_process, name) for name in SHARDED
}
MODELS: Mapping[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        columns_are_as_good_as_rows,
        there_may_be_fewer_rows_than_processes,
        words_equal_one_process,
        unusual_layers_equal_one_process,
        layers_found_in_the_graph_equal_one_process,
        heads_equal_one_process,
        decay_is_of_each_one_s_shards,
    )
}
OTHERS: Mapping[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        the_engine_goes_on_where_it_was,
        a_gradient_that_is_not_finite_skips_the_step_everywhere,
        a_process_without_terms,
        processes_may_have_unlike_many_data,
        an_operator_is_refused,
        the_first_alone_may_ask,
        compiled_it_is_the_same,
        what_works_in_one_process_only_is_refused,
    )
}


@pytest.fixture(scope="module")
def gradients() -> Found:
    return run_together(GRADIENTS, seconds=SECONDS)


@pytest.fixture(scope="module")
def trajectories() -> Found:
    return run_together(TRAJECTORIES, seconds=SECONDS)


@pytest.fixture(scope="module")
def models() -> Found:
    return run_together(MODELS, seconds=SECONDS)


@pytest.fixture(scope="module")
def others() -> Found:
    return run_together({**OTHERS, "killed": one_is_killed}, seconds=SECONDS)


def holds(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(gradients: Found, name: str) -> None:
    holds(gradients, name)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories(trajectories: Found, name: str) -> None:
    holds(trajectories, name)


@pytest.mark.parametrize("name", MODELS)
def test_models(models: Found, name: str) -> None:
    holds(models, name)


@pytest.mark.parametrize("name", OTHERS)
def test_two_processes(others: Found, name: str) -> None:
    holds(others, name)


def test_one_is_killed(others: Found) -> None:
    assert others["killed"] == ["", "not run"]
