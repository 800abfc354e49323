"""A direction's step of sharded parameters, of each layer in one process, which alone has its momentum as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfacopt.exchange import Parcel, Spread, everywhere, from_owners, laid, spread_of, to_owners
from kfacopt.fsdp import is_sharded
from kfacopt.layers.layer import Layer, connected
from kfacopt.layers.plain import PlainMatrix
from kfacopt.linalg.tensors import checksum, inner_products
from kfacopt.optim.step.base import ByParameter, Direction, Prospect, Step, StepLength, Updates
from kfacopt.replicas import owners
from kfacopt.sharding import Whole, shard_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)
# What is said of a parameter beside the dtype of its update, which counts from 1.
_LEFT_OUT, _RESTS = 0, -1


def takers(
    layers: Sequence[Layer],
    plain: Mapping[nn.Parameter, PlainMatrix],
    solvers: Mapping[Layer, Collection[int]],
    size: int,
) -> dict[nn.Parameter, int] | None:
    """Which process takes the step of which parameter; None: layers that share one are solved in different processes.

    Layers that share a parameter are one piece of work, of as many products as all of them take.

    Args:
        layers: With curvature.
        plain: Matrices without.
        solvers: By layer, the processes that can solve for it.
        size: How many processes there are.
    """
    pieces: list[list[nn.Parameter]] = []
    place_of: dict[nn.Parameter, int] = {}
    costs: list[float] = []
    among: dict[int, Collection[int]] = {}
    for place, piece in enumerate(connected(layers)):
        if any(solvers[layer] != solvers[piece[0]] for layer in piece):
            return None
        among[place] = solvers[piece[0]]
        costs.append(sum(_cost(layer.shape) for layer in piece))
        pieces.append([p for layer in piece for p in layer.parameters.values()])
        place_of |= dict.fromkeys(pieces[-1], place)
    for parameter, matrix in plain.items():
        if parameter in place_of:
            costs[place_of[parameter]] += _cost(matrix.shape)
            continue
        pieces.append([parameter])
        costs.append(_cost(matrix.shape))
    found = owners(dict(enumerate(costs)), size, among=among)
    return {parameter: found[place] for place, piece in enumerate(pieces) for parameter in piece}


def _cost(shape: Sequence[int]) -> float:
    """Products that the step of matrices `[*k o i]` takes, up to a constant."""
    return float(torch.Size(shape).numel() * sum(shape[-2:]))


class _Kept(NamedTuple):
    """A value that a direction remembers of a parameter; a tensor has a shape, a number has none."""

    parameter: nn.Parameter
    name: str
    like: Tensor | None


class _Plan(NamedTuple):
    """What stays as long as layers and processes do.

    Attributes:
        owner_of: The rank that takes a parameter's step.
        spreads: How each lies in the processes.
        kept: What the direction remembers of them.
    """

    owner_of: dict[nn.Parameter, int]
    spreads: dict[nn.Parameter, Spread]
    kept: list[_Kept]


class ByOwners:
    """Asks a direction for updates: where parameters are sharded and it takes each layer by itself, in divided labour.

    The momentum of a layer goes to one process, which has its curvature and takes its step; each process gets its shard
    of the update. Nobody has, or computes, more than its share. What a direction remembers of a parameter
    (`Direction.remembered`) is brought to all with it, so that any process can save it.

    Everything else, other directions and lengths, goes by whole tensors, which all processes gather and compute alike.
    One is to be made whenever layers are chosen anew.
    """

    def __init__(self) -> None:
        self._known: tuple[Any, _Plan | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": None}

    def updates(self, step: Step, direction: Direction, length: StepLength) -> Updates:
        """The direction's updates, at length one; of a step that is divided they are sharded as the parameters are."""
        gradients = step.gradients
        if type(gradients) is not Whole or not length.reads_shards or not direction.by_layers(step):
            return direction.updates(step)
        if (plan := self._planned(step, direction)) is None:
            return direction.updates(step)
        return _Divided(plan, step, direction).updates(gradients.shards)

    def _planned(self, step: Step, direction: Direction) -> _Plan | None:
        """Who takes what; None: it cannot be divided."""
        solvers = None if step.backend is None else step.backend.solvers(step.layers)
        key = solvers, step.processes.size, direction
        if self._known is None or self._known[0] != key:
            self._known = key, None if solvers is None else _planned(step, direction, solvers)
        return self._known[1]


def _planned(step: Step, direction: Direction, solvers: Mapping[Layer, Collection[int]]) -> _Plan | None:
    owner_of = takers(step.layers, step.plain, solvers, step.processes.size)
    spreads = {p: spread for p in step.stepped if (spread := spread_of(p, step.processes)) is not None}
    if owner_of is None or len(spreads) < len(step.stepped):
        return None
    remembered = direction.remembered(step.layers, step.plain)
    kept = [
        _Kept(p, name, value.to("meta") if isinstance(value, Tensor) else None)
        for p, values in remembered.items()
        for name, value in values.items()
    ]
    return _Plan({p: owner_of[p] for p in step.stepped}, spreads, kept)


class _Told(NamedTuple):
    """What all know of what each process found.

    Attributes:
        codes: By parameter, the place of its update's dtype in the table of them, from 1 on, or why there is none.
        decays: `Updates.decays`.
        products: `Updates.products`; None: there is no image.
        kept: Whether there is each of the values that a direction remembers, and which number it is.
        check: A number that is finite exactly if all updates are.
        prospect: The sum of what each promises; None: nobody has asked.
    """

    codes: dict[nn.Parameter, int]
    decays: dict[nn.Parameter, float]
    products: dict[nn.Parameter, float] | None
    kept: list[tuple[bool, float]]
    check: float
    prospect: Prospect | None


class _Divided:
    """One step in divided labour.

    Args:
        plan: Who takes what.
        step: Of all layers, the same in all processes.
        direction: Which goes by layers.
    """

    def __init__(self, plan: _Plan, step: Step, direction: Direction) -> None:
        self._step, self._direction, self._processes = step, direction, step.processes
        self._owner_of = {p: rank for p, rank in plan.owner_of.items() if p in step.gradients}
        self._spreads = plan.spreads
        self._kept = [one for one in plan.kept if one.parameter in self._owner_of]

    def updates(self, gradients: ByParameter) -> Updates:
        """What the direction finds for each process's own parameters, as shards of all.

        Args:
            gradients: As the engine lays them out.
        """
        found, failure, codes = Updates({}), None, dict[nn.Parameter, int]()
        seen = replace(self._step, gradients=gradients, _brought=self._momentum)
        assert seen.backend is not None
        try:
            with seen.backend.by_itself():
                found = self._direction.updates(seen)
            codes = {p: 1 + _DTYPES.index(update.dtype) for p, update in found.tensors.items()}
            if found.bend is not None or found.scale != 1.0:
                raise RuntimeError(f"{self._direction!r} goes by layers, but its path bends, or has a length already")
        except Exception as error:  # the others wait for what comes of it
            failure = error
        told = self._agreed(found, codes | dict.fromkeys(found.resting, _RESTS), failure)
        return Updates(
            self._brought_back(found, told),
            check=torch.tensor(told.check, dtype=torch.float64),
            products=told.products,
            prospect=told.prospect,
            decays=told.decays,
            resting=frozenset(p for p, code in told.codes.items() if code == _RESTS),
        )

    def _is_own(self, parameter: nn.Parameter) -> bool:
        return self._owner_of[parameter] == self._processes.rank

    def _momentum(self, shards: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Whole tensors, of the parameters whose step is taken here."""
        chosen = [p for p in self._owner_of if p in shards]
        parcels = [Parcel(self._owner_of[p], self._spreads[p], shards[p].dtype) for p in chosen]
        wholes = to_owners(self._processes, parcels, [shards[p] for p in chosen])
        return {p: whole.view(p.shape) for p, whole in zip(chosen, wholes, strict=True) if whole is not None}

    def _agreed(self, found: Updates, codes: Mapping[nn.Parameter, int], failure: Exception | None) -> _Told:
        """What each found, told to all, in one sum: of what another has taken a process says nothing, which is zero.

        Raises:
            Exception: What went wrong here.
            RuntimeError: If something did elsewhere.
        """
        count, numbers = len(self._owner_of), [float(failure is not None)]
        for p in self._owner_of:
            told = self._is_own(p) and failure is None
            numbers += [float(codes.get(p, _LEFT_OUT)), found.decays.get(p, 0.0)] if told else [0.0, 0.0]
        for one in self._kept:
            value = self._step.state[one.parameter].get(one.name) if self._is_own(one.parameter) else None
            numbers += [float(value is not None), 0.0 if value is None or one.like is not None else float(value)]
        own = [p for p in found.tensors if self._is_own(p)]
        imaged = {} if found.image is None else {p: found.image[p] for p in own if p in found.image}
        products = torch.zeros(count, dtype=torch.float64, device=self._processes.device)
        if imaged and failure is None:
            places = {p: place for place, p in enumerate(self._owner_of)}
            at = torch.tensor([places[p] for p in imaged], device=products.device)
            products[at] = inner_products([found.tensors[p] for p in imaged], list(imaged.values())).to(products)
        check = checksum([found.tensors[p] for p in own]) if found.check is None else found.check
        promised = (0.0, 0.0) if found.prospect is None else found.prospect
        parts = [torch.as_tensor(n, dtype=products.dtype, device=products.device) for n in (numbers, *promised, check)]
        [summed] = self._processes.sum([torch.cat([*(part.reshape(-1) for part in parts), products])])
        *all_told, slope, cost, finite = summed[: len(numbers) + 3].tolist()
        if all_told[0] > 0.0:
            self._processes.raise_together(failure)
        pairs = list(zip(all_told[1::2], all_told[2::2], strict=True))
        return _Told(
            codes={p: int(code) for p, (code, _) in zip(self._owner_of, pairs, strict=False)},
            decays={p: decay for p, (_, decay) in zip(self._owner_of, pairs, strict=False) if decay > 0.0},
            products=None
            if found.image is None
            else dict(zip(self._owner_of, summed[len(numbers) + 3 :].tolist(), strict=True)),
            kept=[(present > 0.0, number) for present, number in pairs[count:]],
            check=finite,
            prospect=Prospect(torch.tensor(slope, dtype=torch.float64), cost) if cost > 0.0 else None,
        )

    def _brought_back(self, found: Updates, told: _Told) -> dict[nn.Parameter, Tensor]:
        """Every process's shards of the updates; what is remembered is brought to all with them, as a whole."""
        chosen = [p for p, code in told.codes.items() if code > 0]
        parcels = [Parcel(self._owner_of[p], self._spreads[p], _DTYPES[told.codes[p] - 1]) for p in chosen]
        wholes = [found.tensors[p] if self._is_own(p) else None for p in chosen]
        stepped = frozenset(chosen)  # of the others nothing has changed
        kept = [(one, one.like) for one, (present, _) in zip(self._kept, told.kept, strict=True) if present]
        tensors = [(one, like) for one, like in kept if like is not None and one.parameter in stepped]
        for (parameter, name, _), like in tensors:
            spread = everywhere(like.numel(), self._processes.size)
            parcels.append(Parcel(self._owner_of[parameter], spread, like.dtype))
            wholes.append(self._step.state[parameter][name] if self._is_own(parameter) else None)
        parts = from_owners(self._processes, parcels, wholes)
        for (one, like), part in zip(tensors, parts[len(chosen) :], strict=True):
            self._remember(one, part.view(like.shape))
        for one, (present, number) in zip(self._kept, told.kept, strict=True):
            if present and one.like is None:
                self._step.state[one.parameter][one.name] = number
        return {p: _laid(part, p) for p, part in zip(chosen, parts, strict=False)}

    def _remember(self, one: _Kept, value: Tensor) -> None:
        if self._is_own(one.parameter):
            return
        own = self._step.state[one.parameter]
        if one.name in own and own[one.name].shape == value.shape:
            own[one.name].copy_(value)
        else:
            own[one.name] = value.clone()  # a view would keep, and save, all that came with it


def _laid(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """A process's part of an update, which was a vector on its way, laid out as the parameter is."""
    part = part.view(shard_of(parameter).shape)
    return laid(part, parameter) if is_sharded(parameter) else part
