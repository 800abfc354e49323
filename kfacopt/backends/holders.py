"""Where the caches of several processes are, and what is solved with them brought to where they are not."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacopt.backends.base import LayerTensors
from kfacopt.backends.ownership import Work, done_by_owners, in_teams, kinds_of, owners_of, sent_caches
from kfacopt.blocks.base import Block
from kfacopt.layers.layer import Layer
from kfacopt.replicas import Teams, delivered
from kfacopt.sharding import Processes


class Holders:
    """Which process decomposes which block, and which hold what comes of it.

    Args:
        processes: Those that train together.

    Attributes:
        owner_of: By layer name, the rank that decomposes, and whose team solves; layers with nothing to decompose have
            none, all solve them. Where teams are several it stays: a cache is not sent after its owner.
        elsewhere: Names of the layers whose cache is there, in another team.

    >>> Holders(Processes()).ready("head", False)
    False
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.owner_of: dict[str, int] = {}
        self.elsewhere: set[str] = set()
        self._settled = False

    @property
    def teams(self) -> Teams:
        """The ranks that hold the same."""
        return Teams.of(self.processes)

    @property
    def apart(self) -> bool:
        """`Teams.apart`, asked of every layer in every step: mostly nobody wanted teams."""
        return self.processes.replicas is not None and self.teams.apart

    def ready(self, name: str, here: bool) -> bool:
        """Whether there is a cache of a layer, here or elsewhere."""
        return here or name in self.elsewhere

    def solves(self, name: str) -> bool:
        """Whether this process solves for a layer."""
        return not self.apart or name not in self.owner_of or self.teams.holds(self.owner_of[name])

    def assign(self, blocks: Mapping[str, Block]) -> None:
        """Give each of these blocks an owner."""
        known = self.owner_of if self.apart else {}
        self.owner_of = owners_of(blocks, self.processes, known)

    def forget(self, kept: Collection[str]) -> None:
        """Forget all layers but these; what is held where is asked anew (`settle`)."""
        self.owner_of = {name: rank for name, rank in self.owner_of.items() if name in kept}
        self.elsewhere &= set(kept)
        self._settled = False

    def settle(self, blocks: Mapping[str, Block]) -> list[str]:
        """Agree on which caches there are, once after layers came, went, or were loaded; a process asks the others.

        A cache that not all who are to have it have is dropped, and so is one that this process is not to have.

        Args:
            blocks: By layer name.

        Returns:
            The layers that have none, and may have had one.

        Raises:
            RuntimeError: If some processes alone have a basis that all need: they did not load the same.
        """
        if self._settled or not self.apart:
            return []
        self._settled = True
        self.assign({name: block for name, block in blocks.items() if block.estimated})
        told = self.processes.gathered({name for name in self.owner_of if blocks[name].ready})
        lacking = []
        for name, owner in self.owner_of.items():
            apart = in_teams(blocks[name], self.teams)
            holders = self.teams.holders(owner) if apart else range(self.teams.size)
            whole = all(name in told[rank] for rank in holders)
            if not whole and not apart and any(name in of_rank for of_rank in told):
                lacks = [rank for rank in holders if name not in told[rank]]
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
        if not self.apart:
            return {layer: dict(found[layer]) for layer in given}
        held = [layer for layer in given if layer.name in self.owner_of]
        kinds = {(la, role): (t.shape, _dtype(given[la].values())) for la in held for role, t in given[la].items()}
        own = {(layer, role): found[layer][role] for layer, role in kinds if layer in found}
        everywhere = self._from_teams(own, kinds, {key: self.owner_of[key[0].name] for key in kinds})
        brought = {layer: {role: everywhere[layer, role] for role in given[layer]} for layer in held}
        return {layer: brought[layer] if layer in brought else dict(found[layer]) for layer in given}

    def steppers(self, layers: Sequence[Layer]) -> dict[Layer, int]:
        """By layer, a rank whose team takes its step where that is far more than a solve, of layers of one shape.

        That is its owner; of layers that all can solve for, as they have none, each team's ranks in turn.
        """
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

    def fetched(self, blocks: Mapping[str, Block], to: int | None) -> dict[str, dict[str, Tensor | None]]:
        """The caches of layers that are held elsewhere, on the processor; all processes must ask.

        Args:
            blocks: By layer name.
            to: Which rank gets them, the others nothing; None: all.
        """
        if not self.apart:
            return {}
        mine = [n for n, r in self.owner_of.items() if r == self.processes.rank and in_teams(blocks[n], self.teams)]
        kinds = self.processes.gathered({name: kinds_of(blocks[name]) for name in mine if blocks[name].ready})
        readers = range(self.teams.size) if to is None else [to]
        arrived = sent_caches(blocks, kinds, self.processes, lambda source: readers)
        return {
            name: {key: None if t is None else t.cpu() for key, t in cache.items()}
            for name, cache in arrived.items()
            if name in self.elsewhere
        }


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """That of what comes of a solve: at least float32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
