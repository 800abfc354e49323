"""Several processes on paper: what a step takes in each of them, for models and numbers of processes not at hand.

Nothing is trained and nothing is sent. Blocks are filled with tensors without memory (torch's meta device), so that the
bytes are those of the very code that reduces, divides and sends, and the flops of products are counted as they are
called. Not counted: attention and elementwise operations, and the some hundred bytes with which a step is agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kfacopt.backends import LayerwiseBackend
from kfacopt.backends.holders import Holders
from kfacopt.backends.ownership import decomposition_cost, message_bytes
from kfacopt.backends.reduction import reduce_pending
from kfacopt.blocks.base import Block
from kfacopt.blocks.kronecker import KroneckerBlock
from kfacopt.blocks.outputs import OutputBlock
from kfacopt.exchange import chunks
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.coverage import find_layers
from kfacopt.layers.layer import Layer
from kfacopt.linalg import alignment
from kfacopt.linalg.polar import NewtonSchulz
from kfacopt.optim.step.by_owners import takers
from kfacopt.optim.step.turns import LONG, LONGEST, Turns
from kfacopt.replicas import Sharding, Teams
from kfacopt.sharding import Processes

FLOAT32 = 4
"""Bytes of a number: statistics, caches and momentum have this dtype, and so, here, parameters and gradients."""


class OnPaper(Processes):
    """So many processes that are not there: what they would sum is noted.

    Args:
        size: How many.

    Attributes:
        summed: Bytes given to sums so far.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._number, self.summed = size, 0

    @property
    def size(self) -> int:
        """How many train together."""
        return self._number

    @property
    def rank(self) -> int:
        """The first."""
        return 0

    def sum_vector(self, numbers: Sequence[Tensor | float]) -> list[float]:
        """Every process has rows of every layer."""
        return [float(self._number)] * len(numbers)

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as they are."""
        self.summed += sum(tensor.nbytes for tensor in tensors)
        return list(tensors)


@dataclass(frozen=True)
class Plan:
    """What is done when it is due, in one of several processes.

    Attributes:
        size: How many processes there are.
        sharded: Whether `fully_shard` keeps the parameters; else `DistributedDataParallel`.
        parameters: Numbers in the model's parameters.
        statistics: Bytes that are summed over the processes, for all of them, when statistics are due.
        divided: Bytes of those that are summed in their owner alone, which sends them on to its team, by rank.
        members: How many processes hold the same layers' inverses, a team (`kfacopt.Sharding`).
        caches: Bytes that each owner sends to the others of these after a refresh of all layers, by rank.
        exchanged: Bytes that a process receives for the direction of a step in which all layers move, of the process
            with most: other layers' steps; of sharded parameters the momentum of those whose step it takes, and its
            shards of the others' steps.
        held: Bytes of statistics and caches, with the roots of a spectral step, of the process with most.
        training: Flops of forward and backward.
        rows: Flops of the curvature's own pass and of the products of its rows.
        inverses: Flops of the inverses of all layers, of the owner with most.
        solve: Flops of a step's direction, of the process with most, averaged over steps.
    """

    size: int
    sharded: bool
    parameters: int
    statistics: int
    divided: tuple[int, ...]
    members: int
    caches: tuple[int, ...]
    exchanged: int
    held: int
    training: float
    rows: float
    inverses: float
    solve: float

    @property
    def engine_traffic(self) -> float:
        """Bytes that a process receives in a step without us: gradients all-reduced, or `fully_shard`'s three ways.

        Rings: of S bytes an all-gather or a reduce-scatter brings each process S (W - 1) / W, an all-reduce twice that.
        """
        return (3 if self.sharded else 2) * self._ring(FLOAT32 * self.parameters)

    def traffic(self, factor_every: int, refresh_every: int) -> float:
        """Bytes that a process receives for the curvature, a step, averaged over the intervals."""
        # Our pass fetches sharded parameters once more.
        of_passes = self._ring(FLOAT32 * self.parameters) if self.sharded else 0.0
        sums = 2 * self._ring(self.statistics) + self._ring(sum(self.divided))
        if self.members > 1:
            sums += self._from_team(self.divided)
        return (sums + of_passes) / factor_every + self._from_team(self.caches) / refresh_every + self.exchanged

    def _from_team(self, sent: Sequence[int]) -> int:
        """What a process receives of the others of its team, who send so much each, in the team with most."""
        teams = [sent[first : first + self.members] for first in range(0, self.size, self.members)]
        return max(sum(of_team) - min(of_team) for of_team in teams)

    def flops(self, factor_every: int, refresh_every: int) -> float:
        """Flops of the busiest process for the curvature, a step, averaged over the intervals."""
        return self.rows / factor_every + self.inverses / refresh_every + self.solve

    def _ring(self, size: float) -> float:
        return size * (self.size - 1) / self.size


def language_model(width: int = 2048, blocks: int = 17, words: int = 32_000) -> nn.Module:
    """The matrices of a transformer, without memory: by default of 0.99e9 parameters.

    >>> sum(p.numel() for p in language_model().parameters()) / 1e9
    0.986710016
    """
    with torch.device("meta"):
        parts: list[nn.Module] = [nn.Embedding(words, width)]
        for _ in range(blocks):
            parts += [nn.Linear(width, width, bias=False) for _ in range(4)]
            parts += [nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)]
        return nn.Sequential(*parts, nn.Linear(width, words, bias=False))


def plan(
    model: nn.Module,
    backend: LayerwiseBackend,
    tokens: int,
    size: int,
    refusal: Callable[[Layer], str | None] = lambda layer: None,
    spectral: bool = False,
    sharding: Sharding | None = None,
    sharded: bool = False,
) -> Plan:
    """What a step takes.

    Args:
        model: On the meta device; linear layers and embeddings.
        backend: A fresh `KFACBackend` or `OneSidedKFACBackend` of exponent 1.
        tokens: Rows of every layer in one process's batch.
        size: How many processes there are.
        refusal: Of the direction: which layers have no curvature.
        spectral: Whether a step is spectral; else the natural gradient.
        sharding: How many processes hold each layer's inverse and statistics; None: as by default.
        sharded: Whether parameters are, by rows.

    Raises:
        ValueError: If teams of so many leave some processes over.
        NotImplementedError: For a block whose cache has a size that only its numbers tell.
    """
    parameters = list(model.parameters())
    layers, _ = find_layers(model, parameters, {}, separate=False, refusal=refusal)
    backend.attach(layers)
    processes = OnPaper(size)
    sharding = Sharding() if sharding is None else sharding
    processes.replicas, processes.divides_statistics = sharding.replicas, sharding.statistics == "holders"
    teams = Teams.of(processes)
    products = 2.0 * tokens * sum(layer.parameters["weight"].numel() for layer in layers if not _one_hot(layer))
    rows = products + _counted(lambda layer: backend.update(layer, _rows(layer, tokens)), layers)
    summed = _filled(backend.blocks, processes)
    holders = Holders(processes)
    holders.assign(backend.blocks)
    divided, costs = [0] * size, [0.0] * size
    for name, owner in holders.owner_of.items():
        costs[owner] += decomposition_cost(backend.blocks[name])  # Cholesky d³/3, and the inverse from it 2 d³/3
        divided[owner] += summed.pop(name) if holders.divides else 0
    division = _Division(layers, holders, spectral, sharded)
    moves = _moves(layers, size * tokens) if spectral else dict.fromkeys(layers, 1.0)
    shares = [_Share() for _ in range(size)]
    for layer in layers:
        solve = moves[layer] * _counted(lambda la: _direction(backend.blocks[la.name], la, spectral), [layer])
        division.add_to(shares, layer, backend.blocks[layer.name], solve)
    return Plan(
        size=size,
        sharded=sharded,
        parameters=sum(p.numel() for p in parameters),
        statistics=sum(summed.values()),
        divided=tuple(divided),
        members=teams.members,
        caches=tuple(_sent_by_owners(holders, backend.blocks)),
        exchanged=max(share.exchanged for share in shares),
        held=max(share.held for share in shares),
        training=6.0 * tokens * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        rows=rows,
        inverses=max(costs),
        solve=max(share.solve for share in shares),
    )


@dataclass
class _Share:
    """What one process has, does and receives."""

    held: int = 0
    solve: float = 0.0
    exchanged: int = 0


class _Division:
    """Who holds, and who takes the step of, which layer.

    Args:
        layers: All of them.
        holders: Which know their owners.
        spectral: Whether a step is spectral.
        sharded: Whether parameters are, by rows.
    """

    def __init__(self, layers: Sequence[Layer], holders: Holders, spectral: bool, sharded: bool) -> None:
        self._size, self._spectral, self._sharded = holders.processes.size, spectral, sharded
        self._holders_of = holders.solvers(layers)
        self._knowers_of = self._holders_of if holders.divides else dict.fromkeys(layers, range(self._size))
        self._takers: dict[Layer, Collection[int]] = dict(self._holders_of)
        if sharded:
            taken = takers(layers, {}, self._holders_of, self._size)
            assert taken is not None, "no layers share a parameter"
            self._takers = {layer: [taken[layer.parameters["weight"]]] for layer in layers}
        elif spectral and holders.apart:
            alike: dict[torch.Size, list[Layer]] = {}
            for layer in layers:
                alike.setdefault(layer.shape, []).append(layer)
            for some in alike.values():
                self._takers |= {la: holders.teams.holders(r) for la, r in (holders.steppers(some) or {}).items()}

    def add_to(self, shares: Sequence[_Share], layer: Layer, block: Block, solve: float) -> None:
        """Add to each process's share what is its of a layer, whose step takes so many flops."""
        cache, root = _bytes_of_cache(block)
        statistics = _bytes_of_statistics(block)
        of_step = self._received_of_shards(layer) if self._sharded else self._received(layer)
        for rank, share in enumerate(shares):
            takes = rank in self._takers[layer]
            share.held += statistics if rank in self._knowers_of[layer] else 0
            share.held += cache if rank in self._holders_of[layer] else 0
            share.held += root if takes and self._spectral else 0
            share.solve += solve if takes else 0.0
            share.exchanged += of_step[rank]

    def _received(self, layer: Layer) -> list[int]:
        step = FLOAT32 * layer.shape.numel()
        return [0 if rank in self._takers[layer] else step for rank in range(self._size)]

    def _received_of_shards(self, layer: Layer) -> list[int]:
        """The others' shards of the momentum in whose takes the step, and of what that finds a shard in the others."""
        [taker] = self._takers[layer]
        found = [0] * self._size
        for p in layer.parameters.values():
            for rank, (start, end) in enumerate(chunks(p.shape[0], self._size, p.shape[1:].numel())):
                if rank != taker:
                    found[rank] += FLOAT32 * (end - start)
                    found[taker] += FLOAT32 * (end - start)
        # What evens a layer's rows is remembered by all.
        rows = FLOAT32 * layer.shape[:-1].numel() if self._spectral else 0
        return [of_rank + (rows if rank != taker else 0) for rank, of_rank in enumerate(found)]


def _filled(blocks: Mapping[str, Block], processes: OnPaper) -> dict[str, int]:
    """By layer, the bytes of statistics that are summed when they are due; the blocks have them, and a cache, then."""
    summed: dict[str, int] = {}
    for name, block in blocks.items():
        before = processes.summed
        reduce_pending({name: block}, processes, averaged=True)
        summed[name] = processes.summed - before
        block.fold(0.0)
        block.load_cache(_cache(block))
    return summed


def _sent_by_owners(holders: Holders, blocks: Mapping[str, Block]) -> list[int]:
    """Bytes that each sends to the others of its team, when it has renewed all its blocks."""
    sent = [0] * holders.processes.size
    for name, owner in holders.owner_of.items() if holders.teams.members > 1 else ():
        sent[owner] += message_bytes(blocks[name])
    return sent


def _moves(layers: Sequence[Layer], rows: int) -> dict[Layer, float]:
    """In which part of a long run's steps each layer moves, where so many rows of each are in a step (`Turns`)."""
    turns, steps = Turns(), range(LONG, LONG + LONGEST)
    strides = [turns.strides(step, layers, {layer.name: float(rows) for layer in layers}) for step in steps]
    return {layer: sum(of_step[layer] > 0 for of_step in strides) / len(steps) for layer in layers}


def _rows(layer: Layer, tokens: int) -> Rows:
    outputs, inputs = layer.shape
    seen: Tensor | OneHot = torch.empty(1, tokens, inputs, device="meta")
    if _one_hot(layer):
        seen = OneHot(torch.empty(1, tokens, dtype=torch.int64, device="meta"), inputs)
    return Rows(seen, torch.empty(1, 1, tokens, outputs, device="meta"), torch.empty((), device="meta"))


def _one_hot(layer: Layer) -> bool:
    return layer.handler.structure == "one-hot"


def _cache(block: Block) -> dict[str, Tensor | None]:
    """What a refresh leaves: the inverses, which on paper cannot be computed."""
    if isinstance(block, KroneckerBlock):
        left, right = block.factors()
        return {"inverse_gradient_factor": left, "inverse_input_factor": alignment.square(right)}
    if isinstance(block, OutputBlock):
        return {"inverse_gradient_factor": block.factor()}
    raise NotImplementedError(
        f"what {type(block).__name__} holds is not known on paper: plan a KFACBackend or a OneSidedKFACBackend"
    )


def _direction(block: Block, layer: Layer, spectral: bool) -> None:
    matrix = torch.empty(*layer.shape, device="meta")
    block.solve(matrix, 1.0)  # whitening and back takes as much, each
    if spectral:
        block.solve(matrix, 1.0)
        NewtonSchulz(iterations=3)(matrix)


def _counted(work: Callable[[Layer], None], layers: Iterable[Layer]) -> float:
    """Flops of the products that some work on layers calls, on tensors without memory."""
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            work(layer)
    return float(counter.get_total_flops())


def _bytes_of_statistics(block: Block) -> int:
    values = [average.value for average in block.averages().values()]
    return sum(t.nbytes for t in values if t is not None)


def _bytes_of_cache(block: Block) -> tuple[int, int]:
    """Of the inverses, and of the roots that a spectral step makes of them; that of a number is not kept."""
    cache = [t for t in block.cache().values() if t is not None]
    return sum(t.nbytes for t in cache), sum(t.nbytes for t in cache if t.numel() > 1)
