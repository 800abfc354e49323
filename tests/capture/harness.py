"""What the tests of the capture share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from tests.cases import CASES, mlp, still

NAMED = [pytest.param(case, id=case.name) for case in CASES]
CURVATURES = ("ggn", "mc", "empirical")


def batch(seed: int = 0, data: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(data, 4, dtype=torch.float64, generator=generator),
        torch.randint(3, (data,), generator=generator),
    )


def fresh(build: Callable[[], nn.Module] = mlp) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def attached(model: nn.Module, loss: Any = None, **options: Any) -> kfacopt.SecondOrderOptimizer:
    return kfacopt.KFAC(model, loss or nn.CrossEntropyLoss(), **still(**options))


def factors(optimizer: kfacopt.SecondOrderOptimizer) -> dict[str, tuple[Tensor, ...]]:
    return {
        name: tuple(a.value.clone() for a in block.averages().values() if a.value is not None)
        for name, block in optimizer.backend.blocks.items()
        if block.estimated
    }


def assert_same_factors(
    one: kfacopt.SecondOrderOptimizer, other: kfacopt.SecondOrderOptimizer, names: dict[str, str]
) -> None:
    """Equal factors of the layers `names`: those of `one` by those of `other`."""
    a, b = factors(one), factors(other)
    assert set(a) == set(names)
    assert set(b) == set(names.values())
    for name, counterpart in names.items():
        for mine, theirs in zip(a[name], b[counterpart], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def pending(optimizer: kfacopt.SecondOrderOptimizer) -> list[str]:
    """Layers whose statistics wait for a step."""
    return [
        name
        for name, block in optimizer.backend.blocks.items()
        if any(average.pending is not None for average in block.averages().values())
    ]


def hooks_on(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
