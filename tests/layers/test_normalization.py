"""Scale and shift of normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from kfacopt.layers import handler_for
from kfacopt.likelihoods import KFACType

Check = Callable[..., None]

PER_DATUM = {
    "layer norm": (nn.LayerNorm(4), (3, 4)),
    "layer norm, sequence": (nn.LayerNorm(4), (3, 5, 4)),
    "layer norm, two axes": (nn.LayerNorm((2, 4)), (3, 5, 2, 4)),
    "layer norm, no bias": (nn.LayerNorm(4, bias=False, eps=0.1), (3, 4)),
    "rms norm": (nn.RMSNorm(4), (3, 5, 4)),
    "rms norm, eps": (nn.RMSNorm((5, 4), eps=0.1), (3, 5, 4)),
    "group norm": (nn.GroupNorm(2, 4), (3, 4)),
    "group norm, image": (nn.GroupNorm(2, 4, eps=0.1), (3, 4, 2, 3)),
    "instance norm 1d": (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "instance norm 2d": (nn.InstanceNorm2d(4, affine=True, eps=0.1), (3, 4, 2, 3)),
    "instance norm 3d": (nn.InstanceNorm3d(4, affine=True), (3, 4, 2, 3, 2)),
}
BATCH = {
    "batch norm": (nn.BatchNorm1d(4), (3, 4)),
    "batch norm, sequence": (nn.BatchNorm1d(4, eps=0.1), (3, 4, 5)),
    "batch norm 2d": (nn.BatchNorm2d(4), (3, 4, 2, 3)),
    "batch norm 3d": (nn.BatchNorm3d(4), (3, 4, 2, 3, 2)),
}


def _random_parameters(module: nn.Module) -> nn.Module:
    """Parameters and running statistics that are not those of a new layer."""
    module = module.double()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_()
        for name, buffer in module.named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(("module", "shape"), PER_DATUM.values(), ids=PER_DATUM.keys())
def test_rows(module: nn.Module, shape: tuple[int, ...], check_rows: Check) -> None:
    check_rows(_random_parameters(module), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(("module", "shape"), BATCH.values(), ids=BATCH.keys())
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(module: nn.Module, shape: tuple[int, ...], training: bool, check_rows: Check) -> None:
    module = _random_parameters(module).train(training)
    check_rows(module, torch.randn(shape, dtype=torch.float64), examples_mix=training)


def test_batch_norm_without_running_statistics(check_rows: Check) -> None:
    module = nn.BatchNorm1d(4, track_running_stats=False).double().eval()
    check_rows(module, torch.randn(3, 4, dtype=torch.float64), examples_mix=True)


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_with_running_statistics(training: bool, check_rows: Check) -> None:
    module = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    module = _random_parameters(module).train(training)
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    check_rows(module, x, examples_mix=training)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (nn.InstanceNorm2d(4, affine=True), (4, 2, 3)),
        (nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2)),
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm((2, 4)), (2, 4)),
    ],
)
def test_unbatched(module: nn.Module, shape: tuple[int, ...], check_rows_sum_to_gradient: Check) -> None:
    check_rows_sum_to_gradient(_random_parameters(module), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("module", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, True, affine=True)])
def test_rows_leave_running_statistics_alone(module: nn.Module) -> None:
    handler = handler_for(module)
    assert handler is not None
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    x = torch.randn(3, 4, 5)
    handler.input_rows(module, (x,), {}, handler.roles(module), KFACType.EXPAND)
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_inputs_are_normalised_in_float32(module: nn.Module, half: torch.dtype) -> None:
    handler = handler_for(module)
    assert handler is not None
    x = torch.randn(3, 8).to(half)
    roles = handler.roles(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = handler.input_rows(module, (x,), {}, roles, KFACType.EXPAND)
    assert rows.dtype == torch.float32
    expected = handler.input_rows(module, (x.float(),), {}, roles, KFACType.EXPAND)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_without_parameters_there_is_nothing_to_cover() -> None:
    for module in (nn.LayerNorm(4, elementwise_affine=False), nn.InstanceNorm1d(4)):
        handler = handler_for(module)
        assert handler is not None
        assert handler.roles(module) == ()
        with pytest.raises(ValueError, match="neither weight nor bias"):
            handler.unpack(module, torch.zeros(4, 0), ())


def test_synchronised_batch_norm_is_not_taken_for_batch_norm() -> None:
    assert handler_for(nn.SyncBatchNorm(4)) is None
