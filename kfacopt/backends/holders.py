"""Where statistics and caches of several processes are, and what is solved with them brought to where they are not."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacopt.backends.base import LayerTensors
from kfacopt.backends.divided import fetched_averages, leave, means_of
from kfacopt.backends.ownership import (
    Work,
    decomposition_cost,
    done_by_owners,
    in_teams,
    kinds_of,
    owners_of,
    sent_caches,
)
from kfacopt.blocks.base import Block
from kfacopt.layers.layer import Layer, connected
from kfacopt.replicas import Teams, delivered, owners
from kfacopt.sharding import Processes


class _Told(NamedTuple):
    """What a process knows of who holds what, and has itself."""

    owner_of: dict[str, int]
    costs: dict[str, float]
    means: dict[str, float]
    estimated: set[str]
    ready: set[str]


class Holders:
    """Which process decomposes which block, and which hold its statistics and what comes of them.

    Args:
        processes: Those that train together.
        divides: Whether statistics may be in a layer's team alone, where its user wants that of teams.

    Attributes:
        owner_of: By layer name, the rank that decomposes, and whose team solves; layers with nothing to decompose have
            none, all solve them. Where teams are several it stays: what is held is not sent after its owner.
        elsewhere: Names of the layers whose cache is there, in another team.
        means: Where statistics are divided, by name the mean eigenvalue of each layer that any process has those of.

    >>> Holders(Processes()).ready("head", False)
    False
    """

    def __init__(self, processes: Processes, divides: bool = True) -> None:
        self.processes = processes
        self.owner_of: dict[str, int] = {}
        self.elsewhere: set[str] = set()
        self.means: dict[str, float] = {}
        self._may_divide, self._costs, self._together = divides, dict[str, float](), dict[str, str]()
        self._settled = self._alone = False

    @property
    def teams(self) -> Teams:
        """The ranks that hold the same."""
        return Teams.of(self.processes)

    @property
    def apart(self) -> bool:
        """`Teams.apart`, asked often in every step: mostly there is one process."""
        return self.processes.replicas is not None and self.processes.size > self.processes.replicas

    @property
    def divides(self) -> bool:
        """Whether a layer's statistics are in its team alone."""
        return self._may_divide and self.processes.divides_statistics and self.apart

    def ready(self, name: str, here: bool) -> bool:
        """Whether there is a cache of a layer, here or elsewhere."""
        return here or name in self.elsewhere

    def estimated(self, name: str, block: Block) -> bool:
        """Whether there are statistics of a layer, here or elsewhere."""
        return name in self.means if self.divides else block.estimated

    def solved_here(self, tensors: LayerTensors) -> LayerTensors:
        """Those of the layers that this process solves for."""
        if not self._asks:
            return tensors
        own, teams = self.owner_of, self.teams
        return {la: parts for la, parts in tensors.items() if la.name not in own or teams.holds(own[la.name])}

    def solvers(self, layers: Sequence[Layer]) -> dict[Layer, Collection[int]]:
        """By layer, the ranks that can solve for it: its team, or all."""
        everybody, apart = range(self.processes.size), self.apart
        own = {la: self.owner_of[la.name] for la in layers if apart and la.name in self.owner_of}
        return {la: self.teams.holders(own[la]) if la in own else everybody for la in layers}

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Within it what is asked for is of layers that this process can solve for, and stays here."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    @property
    def _asks(self) -> bool:
        """Whether what is solved in one team is for all."""
        return self.apart and not self._alone

    def longest(self, seconds: Mapping[str, float]) -> float:
        """What the owner that worked longest took, of seconds by layer name."""
        by_owner: defaultdict[int, float] = defaultdict(float)
        for name, took in seconds.items():
            by_owner[self.owner_of.get(name, 0)] += took
        return max(by_owner.values(), default=0.0)

    def assign(self, blocks: Mapping[str, Block]) -> None:
        """Give each of these blocks an owner."""
        if not self.apart:
            self.owner_of = owners_of(blocks, self.processes)
            return
        # Of what is elsewhere there is nothing to be asked: costs are those of when all knew the shapes.
        new = {n: cost for n, b in blocks.items() if n not in self._costs and (cost := decomposition_cost(b)) > 0.0}
        self._costs |= new
        self.owner_of = self._owners(self.owner_of)

    def _owners(self, known: Mapping[str, int]) -> dict[str, int]:
        """By layer name, whose each is, be it anew; new ones that share a parameter, whose step is one, together."""
        costs, kept = dict[str, float](), dict[str, int]()
        for name, cost in self._costs.items():
            first = self._together.get(name, name)
            costs[first] = costs.get(first, 0.0) + cost
            if name in known:
                kept.setdefault(first, known[name])
        found = owners(costs, self.processes.size, kept)
        # The longest first, as each does its own in this order where refreshes are spread: equal ones side by side.
        names = sorted(self._costs, key=lambda name: -self._costs[name])
        return {name: known.get(name, found[self._together.get(name, name)]) for name in names}

    def destinations(self, blocks: Mapping[str, Block]) -> dict[str, int]:
        """By layer name, the owners of those whose statistics go to a team; all processes know what waits."""
        if not self.divides:
            return {}
        self.assign(blocks)
        return {name: self.owner_of[name] for name in blocks if name in self.owner_of}

    def agreed_fine(self, names: Sequence[str], here: Mapping[str, bool]) -> dict[str, bool]:
        """Whether what arrived of each layer is finite, wherever it went."""
        if not self.divides:
            return dict(here)
        broken = self.processes.sum_vector([float(not here.get(name, True)) for name in names])
        return {name: number == 0.0 for name, number in zip(names, broken, strict=True)}

    def note_means(self, names: Sequence[str], blocks: Mapping[str, Block]) -> None:
        """Tell all of the mean eigenvalues of layers whose statistics changed."""
        if not self.divides:
            return
        told = {n for n in names if self.owner_of.get(n, 0) == self.processes.rank and blocks[n].estimated}
        means: list[Tensor | float] = [blocks[n].mean_eigenvalue() if n in told else 0.0 for n in names]
        found = self.processes.sum_vector([*means, *(float(n in told) for n in names)])
        known = zip(names, found[: len(names)], found[len(names) :], strict=True)
        self.means |= {name: mean for name, mean, is_known in known if is_known}

    def follow(self, layers: Sequence[Layer], kept: Collection[str], anew: Collection[str] = ()) -> None:
        """Forget all layers but those that stay; what is held where is asked anew (`settle`).

        Args:
            layers: All that there are now.
            kept: Names of those that stay.
            anew: Names of those that have no statistics.
        """
        self._together = {layer.name: piece[0].name for piece in connected(layers) for layer in piece}
        if not self.apart:  # else those that are frozen come back to where theirs are
            self.owner_of = {name: rank for name, rank in self.owner_of.items() if name in kept}
        self.means = {name: mean for name, mean in self.means.items() if name not in anew}
        self.elsewhere &= set(kept)
        self._settled = False

    def state_dict(self) -> dict[str, Any]:
        """Who holds what, and of which layers there are statistics, where these are divided."""
        if not self.apart:
            return {}
        teams = [self.teams.size, self.teams.members]
        kept = {"teams": teams, "owners": dict(self.owner_of), "costs": dict(self._costs)}
        return kept | ({"means": dict(self.means)} if self.divides else {})

    def load_state_dict(self, state: Mapping[str, Any], blocks: Mapping[str, Block]) -> None:
        """Take over what `state_dict` returned, or of a state that had none what its blocks say.

        Raises:
            ValueError: If statistics are missing that this process is to have, and no other can have been given them.
        """
        self.owner_of, self._costs, self.means = {}, {}, {}
        self.elsewhere, self._settled = set(), False
        estimated = {name: block for name, block in blocks.items() if block.estimated}
        if self.apart and state.get("teams") == [self.teams.size, self.teams.members]:
            self.owner_of, self._costs = dict(state["owners"]), dict(state["costs"])
        if not self.divides:
            if missing := [name for name in state.get("means", ()) if name in blocks and name not in estimated]:
                raise ValueError(_missing(missing))
        elif "means" in state:
            # Layers that are frozen here begin anew: of what waits for them, others may have it.
            self.means = {name: mean for name, mean in state["means"].items() if name in blocks}
        else:
            self.means = means_of(estimated)
        self.assign(estimated)

    def settle(self, blocks: Mapping[str, Block]) -> list[str]:
        """Agree on what there is, once after layers came, went, or were loaded; a process asks the others.

        A cache that not all who are to have it have is dropped, and so is what this process is not to have.

        Args:
            blocks: By layer name.

        Returns:
            The layers that have no cache, and may have had one.

        Raises:
            RuntimeError: If some lack statistics or a basis that they are to have: not all loaded the same.
        """
        if self._settled or not self.apart:
            return []
        here = {name: decomposition_cost(block) for name, block in blocks.items() if block.estimated}
        ready = {name for name, block in blocks.items() if block.ready}
        own = self._costs | {name: cost for name, cost in here.items() if cost > 0.0}
        told = self.processes.gathered(_Told(self.owner_of, own, self.means, set(here), ready))
        # All go by the first one's word, and count in the same order.
        self._costs = {}
        for of_rank in told:
            self._costs = self._costs | {n: cost for n, cost in of_rank.costs.items() if n not in self._costs}
        self.owner_of = self._owners(told[0].owner_of)
        self._settle_statistics(blocks, told)
        lacking = self._settle_caches(blocks, told)
        self._settled = True
        return lacking

    def _settle_statistics(self, blocks: Mapping[str, Block], told: Sequence[_Told]) -> None:
        if not self.divides:
            return
        if any(of_rank.means.keys() != told[0].means.keys() for of_rank in told):
            raise RuntimeError("the processes have statistics of different layers: load the same state in all")
        self.means = dict(told[0].means)
        known = [name for name in blocks if name in self.means]
        everybody = range(self.teams.size)
        holders = {n: self.teams.holders(self.owner_of[n]) if n in self.owner_of else everybody for n in known}
        if missing := [n for n in known if any(n not in told[rank].estimated for rank in holders[n])]:
            raise RuntimeError(_missing(missing))
        for name, owner in self.owner_of.items():
            if name in blocks and not self.teams.holds(owner):
                leave(blocks[name])

    def _settle_caches(self, blocks: Mapping[str, Block], told: Sequence[_Told]) -> list[str]:
        lacking = []
        for name, owner in self.owner_of.items():
            if name not in blocks:
                continue
            apart = in_teams(blocks[name], self.teams)
            holders = self.teams.holders(owner) if apart else range(self.teams.size)
            whole = all(name in told[rank].ready for rank in holders)
            if not whole and not apart and any(name in of_rank.ready for of_rank in told):
                lacks = [rank for rank in holders if name not in told[rank].ready]
                raise RuntimeError(
                    f"processes {lacks} have no eigenbasis of {name!r}, and the others do: load the same state in all"
                )
            if not whole:
                lacking.append(name)
            is_elsewhere = whole and self.teams.rank not in holders
            (self.elsewhere.add if is_elsewhere else self.elsewhere.discard)(name)
            if not whole or name in self.elsewhere:
                blocks[name].load_cache(dict.fromkeys(blocks[name].cache()))
        return lacking

    def done(self, blocks: Mapping[str, Block], owner_of: Mapping[str, int], work: Work) -> dict[str, float]:
        """`done_by_owners`; the seconds that it took by name."""
        found = done_by_owners(blocks, owner_of, self.processes, work)
        self.elsewhere |= found.elsewhere
        return found.seconds

    def brought(
        self, found: Mapping[Layer, Mapping[str, Tensor]], given: LayerTensors
    ) -> dict[Layer, dict[str, Tensor]]:
        """What each team found of its layers, in all processes.

        Args:
            found: By layer and role, of those that this process solves for.
            given: Of all, tensors that are shaped alike.
        """
        if not self._asks:
            return {layer: dict(found[layer]) for layer in given}
        held = [layer for layer in given if layer.name in self.owner_of]
        kinds = {(la, role): (t.shape, _dtype(given[la].values())) for la in held for role, t in given[la].items()}
        own = {(layer, role): found[layer][role] for layer, role in kinds if layer in found}
        everywhere = self._from_teams(own, kinds, {key: self.owner_of[key[0].name] for key in kinds})
        brought = {layer: {role: everywhere[layer, role] for role in given[layer]} for layer in held}
        return {layer: brought[layer] if layer in brought else dict(found[layer]) for layer in given}

    def steppers(self, layers: Sequence[Layer]) -> dict[Layer, int] | None:
        """By layer, a rank whose team takes its step where that is far more than a solve, of layers of one shape.

        None: each process takes those that it is asked for.

        That is its owner; of layers that all can solve for, as they have none, each team's ranks in turn.
        """
        if not self._asks:
            return None
        count, members = self.teams.size // self.teams.members, self.teams.members
        free = [layer for layer in layers if layer.name not in self.owner_of]
        in_turn = {layer: members * (count - 1 - place % count) for place, layer in enumerate(free)}
        return {la: in_turn[la] if la in in_turn else self.owner_of[la.name] for la in layers}

    def brought_rows(self, steppers: Mapping[Layer, int], found: Mapping[Layer, Tensor], like: Tensor) -> Tensor:
        """`brought`, of matrices that are the rows of one tensor `[b *k o i]`.

        Args:
            steppers: By layer, one for each row: whose team found it.
            found: Matrices of those that this process' team did.
            like: Has the shape, and the dtype in which they are sent.
        """
        own = {layer: matrix.to(like.dtype) for layer, matrix in found.items()}
        everywhere = self._from_teams(own, dict.fromkeys(steppers, (like.shape[1:], like.dtype)), steppers)
        return torch.stack([everywhere[layer] for layer in steppers])

    def _from_teams(self, own: Mapping[Any, Tensor], kinds: Mapping[Any, Any], owners: Mapping[Any, int]) -> Any:
        """Tensors by any key, each of a rank's team: those of the own team are given, all are returned."""
        teams = self.teams
        of_rank = [[key for key in kinds if owners[key] in teams.holders(rank)] for rank in range(teams.size)]
        tensors = [
            [own[k].contiguous() if teams.holds(rank) else _empty(*kinds[k]) for k in keys]
            for rank, keys in enumerate(of_rank)
        ]
        arrived = delivered(self.processes, tensors, teams.readers)
        read = [rank for rank in range(teams.size) if rank == teams.rank or teams.rank in teams.readers(rank)]
        return {k: t for rank in read for k, t in zip(of_rank[rank], arrived[rank], strict=True)}

    def fetched(self, blocks: Mapping[str, Block], to: int | None) -> dict[str, dict[str, Any]]:
        """What other teams hold of a block's state, `averages` and `cache`, on the processor; all processes must ask.

        Args:
            blocks: By layer name.
            to: Which rank gets them, the others nothing; None: all.
        """
        if not self.apart:
            return {}
        owned = {n: blocks[n] for n, rank in self.owner_of.items() if rank == self.processes.rank and n in blocks}
        mine = {n: block for n, block in owned.items() if block.ready and in_teams(block, self.teams)}
        kinds = self.processes.gathered({name: kinds_of(block) for name, block in mine.items()})
        readers = range(self.teams.size) if to is None else [to]
        arrived = sent_caches(blocks, kinds, self.processes, lambda source: readers)
        found: dict[str, dict[str, Any]] = {
            name: {"cache": {key: None if t is None else t.cpu() for key, t in cache.items()}}
            for name, cache in arrived.items()
            if name in self.elsewhere
        }
        if self.divides:
            held = {name: block for name, block in owned.items() if block.estimated}
            for name, averages in fetched_averages(blocks, held, self.processes, lambda source: readers).items():
                if not self.teams.holds(self.owner_of[name]):
                    found.setdefault(name, {})["averages"] = averages
        return found


def _missing(names: Sequence[str]) -> str:
    return (
        f"this state has no statistics of {', '.join(map(repr, names))}: other processes held them when it was saved. "
        f"Call consolidate_state_dict() in all of them before state_dict(), or save by torch.distributed.checkpoint"
    )


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """That of what comes of a solve: at least float32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
