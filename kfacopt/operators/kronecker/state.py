"""Saving a Kronecker-factored operator, and making it again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from kfacopt.operators.empirical_risk import Batches

if TYPE_CHECKING:
    from kfacopt.operators.kronecker.statistics import KroneckerLinearOperator

    Operator = TypeVar("Operator", bound=KroneckerLinearOperator)

# What a loss is rebuilt from: its constructor's arguments.
_LOSSES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.CrossEntropyLoss: ("weight", "ignore_index", "reduction", "label_smoothing"),
    nn.MSELoss: ("reduction",),
    nn.BCEWithLogitsLoss: ("weight", "reduction", "pos_weight"),
}


def describe_loss(loss_func: Any) -> dict[str, Any]:
    """A loss as plain Python and tensors."""
    kind = next(kind for kind in _LOSSES if isinstance(loss_func, kind))
    return {"type": kind.__name__, "arguments": {name: getattr(loss_func, name) for name in _LOSSES[kind]}}


def make_loss(described: dict[str, Any]) -> nn.Module:
    """The loss that `describe_loss` described.

    >>> make_loss(describe_loss(nn.CrossEntropyLoss(label_smoothing=0.1))).label_smoothing
    0.1
    """
    kind = next(kind for kind in _LOSSES if kind.__name__ == described["type"])
    loss: nn.Module = kind(**described["arguments"])
    return loss


def same_loss(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two descriptions are of equal losses."""

    def plain(described: dict[str, Any]) -> list[Any]:
        values = described["arguments"].values()
        return [described["type"], *(v.tolist() if isinstance(v, torch.Tensor) else v for v in values)]

    return plain(first) == plain(second)


def fingerprint(params: Sequence[Tensor]) -> list[float]:
    """Numbers that change when a parameter does, whatever way it was written to."""
    with torch.no_grad():
        norms = torch._foreach_norm([p.detach() for p in params])
        sums = [p.detach().sum() for p in params]
        return torch.stack([x.double() for x in (*norms, *sums)]).tolist()


def load_model(model: nn.Module, stored: dict[str, Any]) -> None:
    """Give a model stored values, with a warning if that changes any.

    Raises:
        RuntimeError: As `load_state_dict` does, if names or shapes differ; nothing is changed then.
    """
    present = model.state_dict()
    if present.keys() == stored.keys() and all(torch.equal(present[k], stored[k].to(present[k])) for k in stored):
        return
    shapes = {k: list(v.shape) for k, v in present.items()}
    others = {k: list(v.shape) for k, v in stored.items()}
    if shapes != others:
        odd = sorted(k for k in shapes.keys() | others.keys() if shapes.get(k) != others.get(k))
        raise ValueError(f"the state is of another model: {', '.join(odd)} differ in shape or are missing")
    warnings.warn(
        "loading this state overwrites the values of the model: they differ from those of the stored statistics",
        stacklevel=3,
    )
    model.load_state_dict(stored)


def from_state(
    kind: type[Operator],
    state: dict[str, Any],
    model_func: nn.Module,
    params: Sequence[nn.Parameter],
    data: Batches,
    check_deterministic: bool,
    batch_size_fn: Callable[[Any], int] | None,
) -> Operator:
    """An operator made from its `state_dict`."""
    options = {name: state[name] for name in STORED}
    operator = kind(
        model_func,
        make_loss(state["loss"]),
        params,
        data,
        check_deterministic=False,
        batch_size_fn=batch_size_fn,
        **options,
    )
    operator.load_state_dict(state)
    if check_deterministic:
        operator._check_deterministic()
    return operator


STORED = (
    "progressbar",
    "seed",
    "fisher_type",
    "mc_samples",
    "kfac_approx",
    "num_per_example_loss_terms",
    "separate_weight_and_bias",
    "num_data",
    "uncovered",
    "byte_budget",
)
"""The constructor's arguments that a state has, under their own names."""
