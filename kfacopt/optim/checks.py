"""What no optimizer here can train, refused by name before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from kfacopt.backends.base import CurvatureBackend
from kfacopt.fsdp import ShardedModel, is_sharded
from kfacopt.likelihoods import Likelihood
from kfacopt.schedules import Interval
from kfacopt.sharding import Processes


def check_model(model: nn.Module, takes_complex: bool = False) -> None:
    """Refuse a model that cannot be captured.

    Args:
        model: What the optimizer was given.
        takes_complex: Whether parameters without curvature train by a rule that does with complex numbers.

    Raises:
        TypeError: If it is no module, has complex or sparse parameters, or parameters that are not yet initialised.
        ValueError: If its parameters are on several devices.
        RuntimeError: If an engine shards it that we do not know, or wraps a part of it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the first argument must be the model (an nn.Module), got {type(model).__name__}: curvature needs the "
            f"modules, not only the parameters; param groups go into params="
        )
    check_engine(model)
    devices: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise TypeError(
                f"the parameter {name!r} is not initialised yet: run one forward before the optimizer is made"
            )
        if parameter.is_complex() and not takes_complex:
            raise TypeError(
                f"the parameter {name!r} is complex ({parameter.dtype}), and this optimizer steps all parameters as "
                f"one vector of real numbers: hold it as such (torch.view_as_complex in the forward), or take KFAC, "
                f"EKFAC or SpectralDescent, which train it by AdamW"
            )
        if parameter.layout != torch.strided:
            raise TypeError(
                f"the parameter {name!r} is sparse ({parameter.layout}): only dense parameters are supported"
            )
        devices.setdefault(str(parameter.device), name)
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"the model is on several devices ({places}): put it on one, or shard it with DDP")


def check_processes(processes: Processes, alone: Callable[[], str | None]) -> None:
    """Refuse several processes where something cannot be done in them.

    Args:
        processes: Those that train together.
        alone: Says what works in one process only; None: nothing.

    Raises:
        RuntimeError: If there are several and something cannot.
    """
    if processes.size > 1 and (one := alone()) is not None:
        raise RuntimeError(
            f"{processes.size} processes train together, but {one} knows the data of one only, and their weights "
            f"would drift apart: it works in one process so far. KFAC, EKFAC and SpectralDescent with a learning rate "
            f"work in several; under DistributedDataParallel so do lr='auto', GridLineSearch, NaturalGradient and "
            f"TrustRegionNewton"
        )
    if processes.joins:
        raise RuntimeError(
            "DistributedDataParallel's join() is at work, but a step of curvature needs all processes: give them "
            "equally many batches (DistributedSampler does)"
        )


def check_engine(model: nn.Module) -> None:
    """Refuse a model whose parameters an engine of torch's shards that we do not know, or is wrapped in part only.

    Raises:
        RuntimeError: If so.
    """
    for name, module in model.named_modules():
        place = f"the module {name!r}" if name else "the model"
        if isinstance(module, DistributedDataParallel):
            raise RuntimeError(
                f"{place} is a DistributedDataParallel within the model: wrap the whole model, and give the optimizer "
                f"that or the module within"
            )
        if "FullyShardedDataParallel" in {kind.__name__ for kind in type(module).__mro__}:
            raise RuntimeError(
                f"{place} is a FullyShardedDataParallel (FSDP1), which flattens parameters: their layers cannot be "
                f"told. Use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if isinstance(module, nn.SyncBatchNorm) and Processes().size > 1:
            raise RuntimeError(
                f"{place} is a SyncBatchNorm, whose backward waits for the other processes: the curvature's own pass "
                f"through it is not there yet. Use BatchNorm, GroupNorm or LayerNorm"
            )
    sharded = ShardedModel(model)
    sharded.check()
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and not sharded.holds(parameter):
            raise RuntimeError(
                f"the parameter {name!r} is a DTensor, but not one of fully_shard's (tensor parallelism): curvature "
                f"of a layer whose outputs are divided is not there yet. Shard it by fully_shard alone"
            )


_BOUNDS: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf),
    "damping": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "cautious_decay": (0.0, math.inf),
    "embedding_factor": (0.0, math.inf),
    "ema_decay": (0.0, 1.0),
    "adamw_lr": (0.0, math.inf),
}


def check_number(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is no number or out of its range.

    Raises:
        TypeError: If it is not one number.
        ValueError: If it is out of range.
    """
    low, high = _BOUNDS[name]
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be one number, got {value!r}") from None
    inside = low <= number and (number < high if name in ("momentum", "ema_decay") else number <= high)
    if not inside or math.isinf(number):
        raise ValueError(f"{name} must lie in [{low}, {high}), got {number}")
    if name == "damping" and number == 0.0:
        raise ValueError("damping must be positive: directions that no datum excites have no curvature to divide by")


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters out of range.

    Raises:
        TypeError: If one is not a number, or `curvature` not a bool.
        ValueError: If one is out of its range.
    """
    for name in _BOUNDS:
        if name in group:
            check_number(name, group[name])
    for name in ("kl_clip", "relative_clip"):
        if name in group and not float(group[name]) > 0.0:
            raise ValueError(f"{name} must be positive, or None for no bound, got {group[name]}")
    if not isinstance(group.get("curvature", True), bool):
        raise TypeError(f"a param group's 'curvature' must be True or False, got {group['curvature']!r}")


def check_known(likelihoods: Iterable[Likelihood], what: Mapping[str, bool]) -> None:
    """Refuse a loss of which only the gradient is known where more is needed.

    Args:
        likelihoods: Of the loss.
        what: By argument of the optimizer, whether it needs the loss' curvature or its change.

    Raises:
        ValueError: If there is one.
    """
    for one in likelihoods:
        for name in (name for name, needs in what.items() if needs and not one.is_known):
            raise ValueError(
                f"{name} needs the curvature of the loss, but of {one!r} only the gradient is known: leave {name} out, "
                f"or pass a loss whose curvature is known"
            )


def check_params(params: Any) -> None:
    """Refuse what is no collection of parameters: a learning rate that was passed by position, or a module.

    Raises:
        TypeError: If it is one.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params must be parameters or param groups, got a {type(params).__name__}: pass its .parameters()"
        )
    if isinstance(params, (int, float, str)) or (isinstance(params, Tensor) and not isinstance(params, nn.Parameter)):
        raise TypeError(
            f"params must be parameters or param groups (default: all of the model's), got {params!r}: "
            f"hyper-parameters are keywords, so say lr={params!r}"
        )


def check_copies(sharded: ShardedModel, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse parameters that were asked for between a forward and what follows: they are copies, which nobody trains.

    Raises:
        ValueError: If there are such.
    """
    if copies := sum(sharded.is_copy(p) for group in groups for p in group["params"]):
        raise ValueError(
            f"{copies} of params are the whole copies that fully_shard makes for a forward, not the parameters that "
            f"are trained: call reshard() on the model before its parameters() are asked for, or leave params out"
        )


def check_unchanged(model: nn.Module, sharded: ShardedModel) -> None:
    """Refuse a model that was sharded since the optimizer was made.

    Raises:
        RuntimeError: If so.
    """
    if not ShardedModel(model).same_parameters(sharded):
        raise RuntimeError(
            "fully_shard was called on the model, or a part of it, after the optimizer was made: the parameters that "
            "the optimizer holds are not the model's any more, and nothing would move. Make the optimizer after it"
        )


def backend_of(
    optimizer: str,
    backend: CurvatureBackend | None,
    made_by: Callable[..., CurvatureBackend] | None,
    intervals: Mapping[str, Interval | None],
) -> CurvatureBackend:
    """The backend that was passed, or one of the optimizer's own with the intervals that were.

    Raises:
        TypeError: If there is none, or what was passed is not one.
        ValueError: If intervals come with a backend, which has its own.
    """
    said = {name: interval for name, interval in intervals.items() if interval is not None}
    if backend is None:
        if made_by is None:
            raise TypeError(f"{optimizer} has no curvature of its own: pass backend=, or use kfacopt.KFAC")
        return made_by(**said)
    if not isinstance(backend, CurvatureBackend):
        raise TypeError(f"backend must be a kfacopt.CurvatureBackend object, got {backend!r}")
    if said:
        raise ValueError(f"{' and '.join(said)} must be set on the backend that was passed, {backend!r}")
    return backend
