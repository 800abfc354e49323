"""KFAC, EKFAC and their inverses are curvlinops 3.0.1's, to float64 rounding, wherever that is right."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt.operators as ours
from tests.cases import BOTH, CASES, Case, classes, reals

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what curvlinops imports is not ours to mend
    theirs = pytest.importorskip("curvlinops")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FISHERS = ("type-2", "empirical", "forward-only")
DAMPINGS = (
    {"damping": 1e-2},
    {"damping": (1e-2, 1e-3)},
    {"damping": 1e-3, "use_heuristic_damping": True},
    {"damping": 1e-2, "use_exact_damping": True},
)


def unpadded() -> nn.Module:
    """Convolutions whose averaged patches have full rank."""
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3))


UNPADDED = Case("conv-unpadded", unpadded, nn.CrossEntropyLoss, reals(2, 4, 4), classes(3))


def is_right(case: Case, kind: str, fisher_type: str, approx: str) -> bool:
    """What curvlinops can do, and does right."""
    sequence = case.name.startswith("sequence")
    if kind == "EKFACLinearOperator":
        if case.name == "conv-2d" and approx == "reduce":
            return False  # its averaged patches are dependent: no unique eigenbasis
        return fisher_type != "forward-only" and not sequence  # only predictions [n c]
    # It backpropagates the positions' vectors together: cross terms of independent terms.
    return not (sequence and (approx, fisher_type) == ("reduce", "type-2"))


COMPARED = [
    # Enough data for factors of full rank: the eigenbasis of a null space is nobody's.
    pytest.param(replace(case, data=max(case.data, 24)) if case.data > 1 else case, kind, fisher_type, approx, id=name)
    for case in (*CASES, UNPADDED)
    for kind in ("KFACLinearOperator", "EKFACLinearOperator")
    for fisher_type in FISHERS
    for approx in BOTH
    for name in [f"{kind[:-14]}-{approx}-{fisher_type}-{case.name}"]
    if case.curvlinops and is_right(case, kind, fisher_type, approx)
    # One datum's factors have rank one: no unique basis either.
    if not (kind == "EKFACLinearOperator" and case.data == 1)
]


def dense(linear: Any) -> Tensor:
    product: Tensor = linear @ torch.eye(linear.shape[1], dtype=torch.float64)
    return product


def pair(case: Case, kind: str, **options: Any) -> tuple[Any, Any]:
    """Ours and theirs, on two mini-batches of different length."""
    model, loss, x, y = case.make()
    params = [p for p in model.parameters() if p.requires_grad]
    cut = max(1, len(x) // 3)
    data = [(x[:cut], y[:cut]), (x[cut:], y[cut:])] if len(x) > 1 else [(x, y)]
    both = [
        getattr(library, kind)(model, loss, params, data, check_deterministic=False, **options)
        for library in (ours, theirs)
    ]
    return both[0], both[1]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(("case", "kind", "fisher_type", "approx"), COMPARED)
def test_operator_and_inverses(case: Case, kind: str, fisher_type: str, approx: str, separate: bool) -> None:
    options = {"fisher_type": fisher_type, "kfac_approx": approx, "separate_weight_and_bias": separate}
    mine, other = pair(case, kind, **options)
    torch.testing.assert_close(dense(mine), dense(other), **CLOSE)
    for scalar in ("trace", "frobenius_norm"):
        torch.testing.assert_close(getattr(mine, scalar), getattr(other, scalar), **CLOSE)
    for damping in DAMPINGS if kind == "KFACLinearOperator" else DAMPINGS[-1:]:
        inverse, others = (
            library.KFACInverseLinearOperator(linear, **damping) for library, linear in ((ours, mine), (theirs, other))
        )
        torch.testing.assert_close(dense(inverse), dense(others), **CLOSE)


@pytest.mark.parametrize("kind", ["KFACLinearOperator", "EKFACLinearOperator"])
def test_determinants(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    data = [(torch.randn(20, 3).double(), torch.randn(20, 2).double())]
    mine, other = (
        getattr(library, kind)(model, nn.MSELoss(), list(model.parameters()), data, fisher_type="type-2")
        for library in (ours, theirs)
    )
    torch.testing.assert_close(mine.logdet, other.logdet, **CLOSE)
    torch.testing.assert_close(mine.det, other.det, **CLOSE)
