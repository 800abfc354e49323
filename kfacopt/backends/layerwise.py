"""Backends that keep one block a layer; which block, a subclass says."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kfacopt.backends.background import UnderWay, check_devices
from kfacopt.backends.base import CurvatureBackend, LayerTensors, Settings
from kfacopt.backends.divided import means_of
from kfacopt.backends.fitting import described, fitting, key_of, mismatch, narrowed, without_roles
from kfacopt.backends.holders import Holders
from kfacopt.backends.ownership import Work, decomposition_cost
from kfacopt.backends.reduction import reduce_pending
from kfacopt.blocks.base import Block
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.blocks.storage import Storage
from kfacopt.blocks.tied import TransposedFactors
from kfacopt.layers.base import Rows
from kfacopt.layers.layer import Layer, packed_together, unpacked_together
from kfacopt.linalg.polar import PolarFactor
from kfacopt.linalg.tensors import as_statistic
from kfacopt.schedules import Background, Interval, MaxOverhead, OwnShare, Timetable, WhenMoved, as_interval
from kfacopt.sharding import Processes

_SOLVING = ("solve", "whiten", "unwhiten", "steepest", "multiply")


class LayerwiseBackend(CurvatureBackend):
    """One `Block` a layer, fed on one schedule and refreshed on another.

    Args:
        factor_every: Steps between two updates of the statistics: an int, a callable of the step, or a schedule of
            `kfacopt.schedules`.
        refresh_every: Steps between two refreshes of a layer's cache (inverse, eigenbasis); likewise. With a
            `kfacopt.schedules.Background` they run beside the training, with a `WhenMoved` where they must.
        stagger: Spread the layers' refreshes over the interval, so that no step is a spike; False: all at once.
        storage: How Kronecker factors are kept between two updates; None: as they are.
    """

    def __init__(
        self, factor_every: Interval, refresh_every: Interval, stagger: bool = True, storage: Storage | None = None
    ) -> None:
        self._storage = storage
        self._factor_interval = as_interval("factor_every", factor_every)
        self._refresh_interval = as_interval("refresh_every", refresh_every)
        self._updates = Timetable(self._interval_for("factors", self._factor_interval), stagger=False)
        self._refreshes = Timetable(self._interval_for("refresh", self._refresh_interval), stagger)
        self._layers: dict[str, Layer] = {}
        self.blocks: dict[str, Block] = {}
        """The blocks by layer name."""
        self.dropped: Counter[str] = Counter()
        """By layer name: updates that were not finite and left its statistics as they were."""
        self._means: dict[Layer, float] | None = None
        self._dormant: dict[str, dict[str, Any]] = {}
        self._step = 0
        self._processes, self._averaged = Processes(), True
        self._refresh_seconds: dict[str, float] = {}
        self._last_refresh_seconds = 0.0
        background = self._refresh_interval
        self._background = background if isinstance(background, Background) else None
        # What is launched beside the training is in all processes.
        self._holders = Holders(self._processes, divides=self._background is None)
        self._fetched: dict[str, dict[str, Any]] = {}
        self._still = self._refresh_interval if isinstance(self._refresh_interval, WhenMoved) else None
        self._spared = 0
        self._under_way = UnderWay(1 if self._background is None else self._background.threads)

    @abstractmethod
    def make_block(self, layer: Layer) -> Block:
        """A fresh block for a layer."""

    def refusal(self, layer: Layer) -> str | None:
        able = layer.handler.structure != "tied" or isinstance(self.make_block(layer), FactoredBlock)
        return None if able else super().refusal(layer)

    def _new_block(self, layer: Layer) -> Block:
        block = self.make_block(layer)
        if layer.handler.structure == "tied" and isinstance(block, FactoredBlock):
            block.transposed = TransposedFactors(block.diagonals)
        return block.kept_as(self._storage)

    def treatment(self, layer: Layer) -> str:
        diagonal = narrowed(self.blocks[layer.name], layer)
        return self.blocks[layer.name].title + (f", {diagonal.named()}" if any(diagonal) else "")

    def attach(self, layers: Sequence[Layer]) -> None:
        """Blocks of layers that stay keep their statistics; those of layers that go (frozen ones) wait for them."""
        if self._background is not None:
            check_devices(layers)
        for name in self.blocks:
            self._dormant[key_of(self._layers[name])] = self._stored(name)
        self._means = None
        known, self._layers, old = self._layers, {layer.name: layer for layer in layers}, self.blocks
        self.blocks, anew = {}, list[str]()
        for name, layer in self._layers.items():
            waiting = self._dormant.pop(key_of(layer), None)
            if name in old and known[name].roles == layer.roles:
                self.blocks[name] = old[name]
                continue
            self.blocks[name] = self._new_block(layer)
            if waiting is not None and mismatch(self.blocks[name], layer, waiting) is None:
                self.blocks[name].load_state_dict(waiting, _device(layer))
            else:
                anew.append(name)
        stayed = {name: block for name, block in self.blocks.items() if old.get(name) is block}
        self._under_way.follow(stayed, self._processes.rank)
        self._holders.follow(layers, stayed, anew)

    def join(self, processes: Processes, averaged: bool) -> None:
        self._processes, self._averaged, self._means = processes, averaged, None
        if any(getattr(type(self), name) is not getattr(LayerwiseBackend, name) for name in _SOLVING):
            processes.replicas = None  # what a subclass does of its own is with the blocks of all layers
        self._holders.processes = processes

    def wants_rows(self, step: int) -> bool:
        return bool(self._updates.due(step, ["all"]))

    def update(self, layer: Layer, rows: Rows) -> None:
        self.blocks[layer.name].update(rows)

    def discard(self) -> None:
        for block in self.blocks.values():
            block.discard()

    def rescale(self, factors: Mapping[Layer, float]) -> None:
        for layer, factor in factors.items():
            self.blocks[layer.name].rescale(factor)

    def fold(self, step: int, settings: Mapping[Layer, Settings]) -> None:
        self._step = step
        self._settle()
        arrived = reduce_pending(self.blocks, self._processes, self._averaged, self._holders.destinations)
        if not arrived:
            return
        self._means = None
        self._updates.done(step, ["all"])
        found = {name: self.blocks[name].pending_checksum() for name in arrived}
        checks = {name: check.to(torch.float32) for name, check in found.items() if check is not None}
        finite = torch.stack(list(checks.values())).isfinite().tolist() if checks else []
        fine = self._holders.agreed_fine(arrived, dict(zip(checks, finite, strict=True)))
        decays = {layer.name: setting.ema_decay for layer, setting in settings.items()}
        for name in arrived:
            if fine[name]:
                self.blocks[name].fold(decays[name])
            else:
                self._drop(name)
        self._holders.note_means(arrived, self.blocks)

    def _settle(self) -> None:
        """Agree with the other processes on who holds what, where that may have changed."""
        self._refreshes.forget(lacking := self._holders.settle(self.blocks))
        self._under_way.forget([name for name in lacking if name in self._under_way])

    def _drop(self, name: str) -> None:
        """Leave a layer's statistics as they are; the user is told of each layer once."""
        self.blocks[name].discard()
        self.dropped[name] += 1
        if self.dropped[name] == 1:
            warnings.warn(
                f"what a batch showed of the curvature of {name!r} is not finite and was left out of its statistics; "
                f"health() counts how often that happens, in 'dropped_updates/{name}'",
                stacklevel=2,
            )

    def mean_eigenvalues(self) -> dict[Layer, float]:
        if self._means is None:
            means = self._holders.means if self._holders.divides else means_of(self.blocks)
            self._means = {layer: means[name] for name, layer in self._layers.items() if name in means}
        return self._means

    def refresh(self, step: int, settings: Mapping[Layer, Settings]) -> None:
        self._fetched = {}
        self._settle()
        took = self._taken_over(step) | self._renewed(step, settings)
        self._refresh_seconds |= took
        self._last_refresh_seconds = self._holders.longest(took)

    def _taken_over(self, step: int) -> dict[str, float]:
        """What was decomposed beside the training and is due, taken over; what that took, by name."""
        if not (arrived := self._under_way.due(step)):
            return {}
        took = self._by_owners(arrived, self._under_way.renew, self._under_way.owners(arrived))
        self._under_way.forget(arrived)
        return took

    def _renewed(self, step: int, settings: Mapping[Layer, Settings]) -> dict[str, float]:
        """Refresh or launch what is due; what was done here and now took, by name."""
        if not self._refreshes.due(step, self._idle(self.blocks)):
            return {}
        by_name = {layer.name: setting for layer, setting in settings.items()}
        able = [n for n, block in self.blocks.items() if self._holders.estimated(n, block) and n in by_name]
        due = self._refreshes.due(step, self._idle(able))
        if due:
            self._holders.assign({name: self.blocks[name] for name in able})
        beside = [] if self._background is None else [name for name in due if self._can_wait(name)]
        now = [name for name in due if name not in beside]
        took = self._by_owners(now, lambda name, block: self._refresh(block, by_name[name].damping))
        for name in beside:
            assert self._background is not None
            hand_over, owner = self._background.hand_over(step), self._holders.owner_of.get(name, 0)
            damping, rank = by_name[name].damping, self._processes.rank
            self._under_way.launch(name, self.blocks[name], damping, hand_over, owner, rank)
        # Without a cache a layer trains by AdamW: it stays due until it has one.
        self._refreshes.done(step, [name for name in due if self._has_cache(name)], self._holders.owner_of)
        return took

    def _refresh(self, block: Block, damping: float) -> None:
        if self._still is None:
            block.refresh(damping)
        elif not block.refresh_if_moved(damping, self._still.tolerance):
            self._spared += 1

    def _idle(self, names: Iterable[str]) -> list[str]:
        """Those of which nothing is under way."""
        return [name for name in names if name not in self._under_way] if self._under_way else list(names)

    def _can_wait(self, name: str) -> bool:
        """Whether a layer has a cache to go on with, and something that takes time to decompose."""
        block = self.blocks[name]
        return self._has_cache(name) and decomposition_cost(block) > 0.0 and bool(block.snapshot())

    def _by_owners(self, names: Sequence[str], work: Work, owners: Mapping[str, int] | None = None) -> dict[str, float]:
        """Work on some blocks, each in one process, by default its own; what it took, by name."""
        owner_of = self._holders.owner_of if owners is None else owners
        return self._holders.done({name: self.blocks[name] for name in names}, owner_of, work)

    def _has_cache(self, name: str) -> bool:
        """Whether there is a cache of a layer, be it in other processes."""
        return self._holders.ready(name, self.blocks[name].ready)

    def solvers(self, layers: Sequence[Layer]) -> Mapping[Layer, Collection[int]] | None:
        return self._holders.solvers(layers)

    def by_itself(self) -> AbstractContextManager[None]:
        return self._holders.by_itself()

    def ready(self, layer: Layer) -> bool:
        return self._has_cache(layer.name)

    def _apart(self, tensors: LayerTensors) -> tuple[LayerTensors, LayerTensors]:
        """Those of the layers that have a cache, and of them those that this process solves for."""
        ready = {layer: parts for layer, parts in tensors.items() if self.ready(layer)}
        return ready, self._holders.solved_here(ready)

    def solve(self, gradients: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        ready, here = self._apart(gradients)
        found: dict[Layer, dict[str, Tensor]] = {}
        for layers, matrices in packed_together(here, lambda layer: type(self.blocks[layer.name])):
            blocks, dampings = zip(*((self.blocks[la.name], settings[la].damping) for la in layers), strict=True)
            solved = type(blocks[0]).solve_together(blocks, as_statistic(matrices), dampings)
            found |= unpacked_together(layers, solved)
        return self._holders.brought(found, ready)

    def whiten(self, tensors: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        return self._applied(lambda block, matrix, damping: block.whiten(matrix, damping), tensors, settings)

    def unwhiten(self, tensors: LayerTensors, settings: Mapping[Layer, Settings]) -> dict[Layer, dict[str, Tensor]]:
        return self._applied(lambda block, matrix, damping: block.unwhiten(matrix, damping), tensors, settings)

    def steepest(
        self, layers: Sequence[Layer], matrices: Tensor, settings: Mapping[Layer, Settings], polar: PolarFactor
    ) -> Tensor:
        own = type(self)
        if own.whiten is not LayerwiseBackend.whiten or own.unwhiten is not LayerwiseBackend.unwhiten:
            return super().steepest(layers, matrices, settings, polar)
        if (steppers := self._holders.steppers(layers)) is None:
            return self._steepest(layers, matrices, settings, polar)
        here = [place for place, layer in enumerate(layers) if self._holders.teams.holds(steppers[layer])]
        held = [layers[place] for place in here]
        found = self._steepest(held, matrices[here], settings, polar) if held else matrices[:0]
        return self._holders.brought_rows(steppers, dict(zip(held, found.unbind(), strict=True)), matrices)

    def _steepest(
        self, layers: Sequence[Layer], matrices: Tensor, settings: Mapping[Layer, Settings], polar: PolarFactor
    ) -> Tensor:
        """`steepest` of layers whose cache is here."""
        blocks = [self.blocks[layer.name] for layer in layers]
        kinds = {type(block) for block in blocks}
        kind = kinds.pop() if len(kinds) == 1 else Block
        return kind.steepest(blocks, matrices, [settings[layer].damping for layer in layers], polar)

    def multiply(self, tensors: LayerTensors) -> dict[Layer, dict[str, Tensor]]:
        undamped = dict.fromkeys(tensors, Settings(0.0, 0.0))
        return self._applied(lambda block, matrix, damping: block.matvec(matrix), tensors, undamped)

    def _applied(
        self,
        function: Callable[[Block, Tensor, float], Tensor],
        tensors: LayerTensors,
        settings: Mapping[Layer, Settings],
    ) -> dict[Layer, dict[str, Tensor]]:
        """A function of each block and matrix, for the layers that have a cache: the one place that decides."""
        ready, here = self._apart(tensors)
        found = {
            layer: layer.unpack(
                function(self.blocks[layer.name], as_statistic(layer.pack(parts)), settings[layer].damping)
            )
            for layer, parts in here.items()
        }
        return self._holders.brought(found, ready)

    def observe(self, factor_seconds: float, step_seconds: float) -> None:
        if not any(isinstance(schedule, MaxOverhead) for schedule in self._schedules()):
            return
        # All have to do the same in the same step, and the slowest is waited for.
        times = [factor_seconds, step_seconds, self._holders.longest(self._refresh_seconds), self._last_refresh_seconds]
        factor_seconds, step_seconds, whole, self._last_refresh_seconds = self._processes.largest(times)
        if isinstance(self._factor_interval, MaxOverhead) and factor_seconds > 0.0:
            self._factor_interval.observe("factors", factor_seconds, step_seconds)
        if isinstance(self._refresh_interval, MaxOverhead) and self._last_refresh_seconds > 0.0:
            self._refresh_interval.observe("refresh", whole, step_seconds)

    def health(self, settings: Mapping[Layer, Settings]) -> dict[str, float]:
        ready = [(layer, s) for layer, s in settings.items() if self.blocks[layer.name].ready]
        found = [self.blocks[layer.name].condition(s.damping).double() for layer, s in ready]
        conditions = torch.stack(found).tolist() if found else []  # together: the device is waited for once
        return {
            "condition": max(conditions, default=float("nan")),
            **{f"condition/{layer.name or '(root)'}": of for (layer, _), of in zip(ready, conditions, strict=True)},
            "staleness": float(self._refreshes.staleness(self._step)),
            "refresh_ms": 1e3 * self._last_refresh_seconds,
            "fallbacks": float(sum(block.retries for block in self.blocks.values())),
            "dropped_updates": float(self.dropped.total()),
            "spared_refreshes": float(self._spared),
            "under_way": float(len(self._under_way)),
            "diagonal_factors": float(sum(sum(narrowed(self.blocks[n], la)) for n, la in self._layers.items())),
            **{f"dropped_updates/{name}": float(count) for name, count in self.dropped.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": {name: self._stored(name) for name in self.blocks},
            "holders": self._holders.state_dict(),
            "dormant": dict(self._dormant),
            "updates": self._updates.state_dict(),
            "refreshes": self._refreshes.state_dict(),
            "under_way": self._under_way.state_dict(),
            "schedules": [s.state_dict() if isinstance(s, MaxOverhead) else None for s in self._schedules()],
            "dropped": dict(self.dropped),
            "spared": self._spared,
            "step": self._step,
        }

    def _stored(self, name: str) -> dict[str, Any]:
        own = described(self.blocks[name], self._layers[name]) | self.blocks[name].state_dict()
        fetched = self._fetched.get(name, {})
        return own | fetched | {"averages": own["averages"] | fetched.get("averages", {})}

    def consolidate(self, to: int | None) -> None:
        self._fetched = self._holders.fetched(self.blocks, to)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; blocks of layers that are frozen here wait for them, layers without a block start anew.

        Raises:
            ValueError: If it is of another model or backend; nothing is changed then.
        """
        self._means = None
        stored, dormant = state["blocks"], dict(state.get("dormant", {}))
        chosen, waiting = fitting(self._layers, self.blocks, stored, dormant)
        for name, layer in self._layers.items():
            if name in chosen:
                self.blocks[name].load_state_dict(chosen[name], _device(layer))
            else:
                self.blocks[name] = self._new_block(layer)
        self._holders.load_state_dict(state.get("holders", {}), self.blocks)
        self._fetched, apart = {}, self._holders.apart
        able = {name for name, block in self.blocks.items() if block.estimated and (apart or block.ready)}
        launched = {name: kept for name, kept in state.get("under_way", {}).items() if name in able}
        self._under_way.load_state_dict(launched, self.blocks, self._holders.owner_of, self._processes.rank)
        self._dormant = {key: kept for key, kept in waiting.items() if not without_roles(kept)}
        self._updates.load_state_dict(state["updates"])
        self._refreshes.load_state_dict(state["refreshes"])
        if not apart:  # else it takes all to know what there is
            self._refreshes.forget([name for name, block in self.blocks.items() if not block.ready])
        for schedule, timed in zip(self._schedules(), state["schedules"], strict=True):
            if isinstance(schedule, MaxOverhead) and timed is not None:
                schedule.load_state_dict(timed)
        self.dropped, self._step = Counter(state.get("dropped", {})), int(state["step"])
        self._spared = int(state.get("spared", 0))

    def _schedules(self) -> tuple[Any, Any]:
        return self._factor_interval, self._refresh_interval

    @staticmethod
    def _interval_for(kind: str, schedule: Any) -> Any:
        # One MaxOverhead may time both kinds of work: each asks for its own interval.
        return OwnShare(schedule, kind) if isinstance(schedule, MaxOverhead) else schedule


def _device(layer: Layer) -> torch.device:
    return next(iter(layer.parameters.values())).device
