"""The reports of silent errors: which there are, what kind each stands for, and where its tests are.

A report is a small program that went wrong without a word. Its test file holds that program with the right value, from
dense float64 truth or from torch itself, and further programs of the same kind. Where what is right is hard to do, an
error or a warning that names the thing is as good as the right value (`exact_or_named`); silence never is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests import reference

TYPE2: dict[str, Any] = {"curvature": "ggn"}
"""The exact Hessian at the prediction, as the optimizers spell it."""

OPERATOR_TYPE2: dict[str, Any] = {"fisher_type": "type-2"}
"""The same as the operators spell it (and curvlinops)."""

MC: dict[str, Any] = {"curvature": "mc"}
EMPIRICAL: dict[str, Any] = {"curvature": "empirical"}


class Report(NamedTuple):
    """What went wrong, the kind of error it is one of, the file of its tests in this folder."""

    title: str
    kind: str
    file: str


# Report 10 (what a wide output layer costs) is about cost, not silence: it belongs to the work on daily use.
REPORTS = {
    1: Report("a layer called with no rows poisons the statistics", "a mean over nothing", "test_empty_calls.py"),
    2: Report(
        "gradients corrupted by a backward inside a backward", "gradients stay bit for bit", "test_nested_backward.py"
    ),
    3: Report("a module that returns the loss", "the prediction is verified, not guessed", "test_prediction.py"),
    4: Report("a weight used outside its module", "one parameter, several uses", "test_functional_use.py"),
    6: Report(
        "backwards that are not the step's are counted", "only the step's backwards", "test_foreign_backwards.py"
    ),
    7: Report("covered layers that no pass reaches", "what coverage() says happens", "test_unseen_layers.py"),
    9: Report("resuming after unfreezing is refused", "state follows parameters", "test_resume_unfrozen.py"),
    13: Report(
        "user code in the backward runs twice", "user code sees the user's pass", "test_user_code_in_backward.py"
    ),
    16: Report("cost, scripting, positional lr, lr=0", "as plain as torch's optimizers", "test_handles.py"),
    17: Report("weights and scale of the loss", "what the gradient reveals is taken", "test_loss_weights.py"),
    19: Report(
        "damping rule and a layer without curvature", "one place decides who steps", "test_uncovered_layer_step.py"
    ),
    21: Report("a loss times a constant", "the step is invariant to the scale", "test_loss_scale.py"),
    22: Report("a raw network under a PDE residual", "the replayed gradient is the user's", "test_pinn.py"),
    23: Report("input gradients raise", "a gradient that is no step's", "test_saliency.py"),
    26: Report("weights that act through a double backward", "handled or named", "test_pinn.py"),
    34: Report("schedulers raise AdamW's rate", "AdamW's rate follows lr", "test_schedulers.py"),
}


def exact_or_named(make: Callable[[], Any], check: Callable[[Any], None], *names: str) -> None:
    """What `make` returns passes `check`; or `make` raises an error or a warning that says one of `names`.

    `check` also runs what follows from an answer given, so it may not raise anything but an AssertionError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = make()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, UserWarning) as refusal:
        if not any(name in str(refusal) for name in names):
            raise AssertionError(f"refused, but without naming any of {names}") from refusal
        return
    check(result)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Within this context warnings are no errors; yields their texts, complete at its end."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(warning.message) for warning in caught]


def treatment(optimizer: Any, module: str) -> str:
    """What `coverage()` says happens to a module's parameters."""
    return "; ".join(row.treatment for row in optimizer.coverage().rows if row.module == module)


def uncovered(optimizer: Any, module: str) -> bool:
    """Whether `coverage()` says that a module trains by AdamW, as a whole."""
    rows = [row for row in optimizer.coverage().rows if row.module == module]
    return bool(rows) and all(row.treatment.startswith("AdamW") for row in rows)


def named(optimizer: Any, module: str, said: Sequence[str] = ()) -> bool:
    """Whether the user was told of a module: by `coverage()`, a warning, or a key or text of `health()`."""
    return uncovered(optimizer, module) or any(repr(module) in text for text in [*said, str(optimizer.health())])


def still(**options: Any) -> dict[str, Any]:
    """Options of an optimizer that takes exact statistics of each step's batches alone, and moves nothing."""
    fixed = {"lr": 0.0, "adamw_lr": 0.0, "kl_clip": None, "momentum": 0.0, "ema_decay": 0.0, "factor_every": 1}
    return fixed | {"refresh_every": 1} | TYPE2 | options


def plain(**options: Any) -> dict[str, Any]:
    """Options of an optimizer whose step is the preconditioned gradient of its own batches and nothing else."""
    return still() | {"lr": 1.0, "adamw_lr": 1e-3} | options


def flat(tensors: Any) -> Tensor:
    """All numbers of some tensors, one after the other."""
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of what lies in `.grad`."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor | None], want: dict[str, Tensor | None]) -> None:
    """Bit for bit."""
    for name, gradient in want.items():
        here = found[name]
        same = here is gradient if here is None or gradient is None else torch.equal(here, gradient)
        assert same, f"{name}: .grad is not what it is without an optimizer"


def block_traces(model: nn.Module, whole: Tensor) -> dict[str, float]:
    """Traces of the diagonal blocks of a matrix over all parameters, by the module that holds them."""
    result: dict[str, float] = {}
    pieces = whole.diagonal().split([p.numel() for p in model.parameters()])
    for (name, _), piece in zip(model.named_parameters(), pieces, strict=True):
        module = name.rpartition(".")[0]
        result[module] = result.get(module, 0.0) + float(piece.sum())
    return result


def ggn_traces(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> dict[str, float]:
    """True traces of the blocks of the Gauss-Newton matrix, by module; the trace of an EKFAC block is this."""
    return block_traces(model, reference.whole_ggn(model, loss, x, y))


def near(found: float, want: float) -> bool:
    """Equal to rounding."""
    return bool(found == pytest.approx(want, rel=1e-6, abs=1e-12))
