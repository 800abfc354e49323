"""The functions on tensors: curvlinops' where that is right, and what it averages away or refuses."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from kfacopt import operators as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what curvlinops imports is not ours to mend
    theirs = pytest.importorskip("curvlinops.kfac_utils")

LOSSES = [(nn.MSELoss(reduction=reduction), torch.rand(1, 4).double()) for reduction in ("mean", "sum")] + [
    (nn.CrossEntropyLoss(), torch.tensor([2])),
    (nn.BCEWithLogitsLoss(), torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double()),
    (nn.BCEWithLogitsLoss(reduction="sum"), torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double()),
]
WEIGHTED = [
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), reduction="sum"), torch.tensor([2])),
    (nn.CrossEntropyLoss(label_smoothing=0.2), torch.tensor([2])),
    (nn.CrossEntropyLoss(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double()),
    (nn.BCEWithLogitsLoss(pos_weight=torch.rand(4).double()), torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double()),
    (nn.BCEWithLogitsLoss(), torch.tensor([[0.3, 1.0, 0.5, 0.0]]).double()),
]


@pytest.mark.parametrize(("loss", "target"), LOSSES + WEIGHTED)
def test_the_square_root_is_that_of_the_hessian(loss: nn.Module, target: Tensor) -> None:
    torch.manual_seed(0)
    output = torch.randn(1, 4).double()
    root = ours.loss_hessian_matrix_sqrt(output, target, loss)
    hessian = _hessian(loss, output, target)
    torch.testing.assert_close(root @ root.mT, hessian)


@pytest.mark.parametrize(("loss", "target"), LOSSES)
def test_the_square_root_is_curvlinops(loss: nn.Module, target: Tensor) -> None:
    torch.manual_seed(0)
    output = torch.randn(1, 4).double()
    torch.testing.assert_close(
        ours.loss_hessian_matrix_sqrt(output, target, loss), theirs.loss_hessian_matrix_sqrt(output, target, loss)
    )


def _hessian(loss: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda f: loss(f.unsqueeze(0), target))
    result: Tensor = torch.func.jacrev(gradient)(output[0])
    return result


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [*itertools.product([3, (2, 3)], [1, (2, 1)], [0, (1, 0)], [1, (1, 2)], [1, 2]), (3, 1, "same", 1, 2)],
)
def test_patches_are_curvlinops(kernel: object, stride: object, padding: object, dilation: object, groups: int) -> None:
    torch.manual_seed(0)
    arguments = (torch.randn(3, 4, 6, 7).double(), kernel, stride, padding, dilation, groups)
    for name in ("extract_patches", "extract_averaged_patches"):
        torch.testing.assert_close(getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments))


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_patches_of_each_group_make_the_convolution(padding: object) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (2, 3), padding=padding, groups=2, bias=False).double()  # type: ignore[arg-type]
    x = torch.randn(3, 4, 5, 6).double()
    seen = ours.extract_patches_per_group(x, (2, 3), 1, padding, 1, 2)  # type: ignore[arg-type]
    weight = conv.weight.detach().flatten(1).unflatten(0, (2, 3))
    output = torch.einsum("ngsi,goi->ngos", seen, weight).flatten(1, 2)
    torch.testing.assert_close(output, conv(x).detach().flatten(2))
    average = ours.extract_averaged_patches_per_group(x, (2, 3), 1, padding, 1, 2)  # type: ignore[arg-type]
    torch.testing.assert_close(average, seen.mean(2))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, C\]"):
        ours.loss_hessian_matrix_sqrt(torch.zeros(2, 3), torch.zeros(2, 3), nn.MSELoss())
    with pytest.raises(ValueError, match="batch size 1"):
        ours.loss_hessian_matrix_sqrt(torch.zeros(1, 3), torch.zeros(2, 3), nn.MSELoss())
    with pytest.raises(ValueError, match="C_in"):
        ours.extract_patches(torch.zeros(3, 4, 4), 3, 1, 0, 1, 1)
