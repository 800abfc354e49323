"""Reading and writing hyper-parameters in param groups, plain numbers that schedulers and users write too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kfacopt.backends.base import CurvatureBackend, Settings
from kfacopt.damping import RelativeDamping
from kfacopt.layers.layer import Layer

Groups = Sequence[dict[str, Any]]

_Own = tuple[float, bool, float]
"""A group's damping, whether that is relative, and its `ema_decay`."""

YOUNGER = frozenset({"cautious_decay", "embedding_factor"})
"""What a param group of an older state may lack: it goes on without."""


def with_plain_damping(group: dict[str, Any]) -> dict[str, Any]:
    """A group whose `damping` object, if it has one, is replaced by plain values.

    >>> with_plain_damping({"damping": RelativeDamping(3.0)})
    {'damping': 3.0, 'relative_damping': True}
    >>> with_plain_damping({"damping": 0.1})
    {'damping': 0.1, 'relative_damping': False}
    """
    if "damping" not in group or "relative_damping" in group:
        return group
    damping = group["damping"]
    relative = isinstance(damping, RelativeDamping)
    return group | {"damping": damping.factor if relative else damping, "relative_damping": relative}


def with_own_decay(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group that, if it says its weight decay, has no other: what its user asked for is all that is taken off.

    >>> with_own_decay({"weight_decay": 0.0}, {"cautious_decay": 0.2})
    {'cautious_decay': 0.0, 'weight_decay': 0.0}
    """
    told = "weight_decay" in group and "cautious_decay" in defaults
    return {"cautious_decay": 0.0} | group if told else group


def settings_of(layers: Sequence[Layer], groups: Groups, backend: CurvatureBackend) -> dict[Layer, Settings]:
    """Every layer's hyper-parameters; a relative damping of a layer without statistics yet is as it stands.

    Raises:
        ValueError: If parameters of one layer lie in groups that differ.
    """
    owns = [(float(g["damping"]), bool(g["relative_damping"]), float(g["ema_decay"])) for g in groups]
    means = backend.mean_eigenvalues() if any(relative for _, relative, _ in owns) else {}
    # Mostly all groups say the same, and where a parameter lies need not be asked.
    same = owns[0] if owns.count(owns[0]) == len(owns) else None
    home = {} if same else {id(p): own for group, own in zip(groups, owns, strict=True) for p in group["params"]}
    result = {}
    for layer in layers:
        damping, relative, ema_decay = same or _only(layer, home)
        # A layer without curvature (a dead one) has no unit: any damping will do, and zero would divide by zero.
        unit = (means.get(layer, 1.0) or 1.0) if relative else 1.0
        result[layer] = Settings(damping * unit, ema_decay)
    return result


def _only(layer: Layer, home: Mapping[int, _Own]) -> _Own:
    """What all parameters of a layer say, by where each lies."""
    found = {home[id(p)] for p in layer.parameters.values()}
    if len(found) > 1:
        raise ValueError(
            f"the parameters of {layer.name!r} lie in param groups with different damping or ema_decay, but "
            f"share one block: give the groups the same, or pass separate_weight_and_bias=True"
        )
    return found.pop()


def dense_gradients(groups: Groups) -> dict[nn.Parameter, Tensor]:
    """The gradients of all parameters that have one.

    Raises:
        TypeError: If one is sparse.
    """
    gradients: dict[nn.Parameter, Tensor] = {p: p.grad for g in groups for p in g["params"] if p.grad is not None}
    for gradient in gradients.values():
        if gradient.is_sparse:
            raise TypeError(
                f"a gradient of shape {tuple(gradient.shape)} is sparse: make the embedding with sparse=False, or give "
                f"its parameters to torch.optim.SparseAdam"
            )
    return gradients


def peak_rate(group: Mapping[str, Any]) -> float:
    """The highest learning rate that a group has had at a step, or that its scheduler announces (`OneCycleLR`).

    It is the unit of what does not follow schedules: bounds on a step, and AdamW's rate over `adamw_lr`.

    >>> peak_rate({"base_lr": 0.1, "lr": 0.01, "max_lr": 0.3})
    0.3
    """
    return max(float(group[name]) for name in ("base_lr", "lr", "initial_lr", "max_lr") if name in group)


def adamw_rate(group: Mapping[str, Any]) -> float:
    """AdamW's learning rate: the group's own without curvature, else `adamw_lr · lr / peak_rate`.

    >>> adamw_rate({"curvature": True, "adamw_lr": 1e-3, "base_lr": 0.4, "lr": 0.1})
    0.00025
    """
    if not group["curvature"]:
        return float(group["lr"])
    peak = peak_rate(group)
    return float(group["adamw_lr"]) * float(group["lr"]) / peak if peak > 0.0 else 0.0


def embedding_rate(group: Mapping[str, Any]) -> float:
    """AdamW's learning rate of embeddings: `embedding_factor` times that of all else, where a group has one.

    >>> embedding_rate({"curvature": True, "adamw_lr": 1e-3, "base_lr": 0.4, "lr": 0.1, "embedding_factor": 4.0})
    0.001
    """
    return adamw_rate(group) * (float(group.get("embedding_factor", 1.0)) if group["curvature"] else 1.0)
