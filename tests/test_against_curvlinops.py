"""curvlinops 3.0.1 as an independent second opinion, to float64 rounding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from tests.cases import BOTH, CASES, Case, backward, exact_ekfac, still

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what curvlinops imports is not ours to mend
    kfac = pytest.importorskip("curvlinops.kfac")
    ekfac = pytest.importorskip("curvlinops.ekfac")

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# Only predictions [n c]: for more axes curvlinops 3.0.1 has no EKFAC.
FLAT = [pytest.param(case, id=case.name) for case in CASES if case.curvlinops and not case.name.startswith("sequence")]
FISHERS = ("type-2", "empirical")
# Not the type-2 Fisher of sequences under reduce: curvlinops 3.0.1 backpropagates the positions' vectors together,
# so that its G has their cross terms, which the exact one has not.
COMPARED = [
    pytest.param(case, fisher_type, approx, id=f"{approx}-{fisher_type}-{case.name}")
    for case in CASES
    if case.curvlinops
    for fisher_type in FISHERS
    for approx in BOTH
    if not (case.name.startswith("sequence") and (approx, fisher_type) == ("reduce", "type-2"))
]


def estimate(case: Case, optimizer: Any, **options: Any) -> Any:
    """Blocks by layer name, from a batch seen twice."""
    model, loss, x, y = case.make()
    made = optimizer(model, loss, **still(**options))
    for _ in range(2):
        made.zero_grad()
        backward(model, loss, x, y)
        made.step()
    made.close()
    return made.backend.blocks


def operator(case: Case, kind: Any, fisher_type: str, **options: Any) -> Any:
    model, loss, x, y = case.make()
    trained = [p for p in model.parameters() if p.requires_grad]
    return kind(
        model,
        loss,
        trained,
        [(x, y)],
        fisher_type=fisher_type,
        check_deterministic=False,
        **options,
    )


def gradient_scale(case: Case, fisher_type: str) -> float:
    """Ours over curvlinops' G.

    curvlinops sums G over the data with reduction="sum", where we always mean the mean loss. And it squares the
    empirical gradients of MSE and BCE with reduction="mean" before it divides by the number c of outputs, once: the
    Fisher of a likelihood that is then weighted by 1/c. Ours are outer products of the gradients of the loss terms
    themselves, weighted by 1/c twice.
    """
    _, loss, x, y = case.make()
    if loss.reduction == "sum":
        return 1.0 / len(x)
    if fisher_type == "empirical" and not isinstance(loss, nn.CrossEntropyLoss):
        return 1.0 / y.shape[-1]
    return 1.0


def whole(block: Any) -> tuple[Tensor, Tensor]:
    left, right = block.factors()
    return left, right


@pytest.mark.parametrize(("case", "fisher_type", "approx"), COMPARED)
@pytest.mark.parametrize("separate", [False, True])
def test_factors(case: Case, fisher_type: str, approx: str, separate: bool) -> None:
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
    blocks = estimate(case, kfacopt.KFAC, curvature=fisher_type, **options)
    theirs = operator(case, kfac.KFACLinearOperator, fisher_type, **options)
    theirs.compute_kronecker_factors()
    scale = gradient_scale(case, fisher_type)
    compared = 0
    for name in theirs._gradient_covariances:
        # Under a name of their own where weight and bias have a block each.
        aliases = {name, *(f"{name}.{part}".lstrip(".") for part in ("weight", "bias"))}
        ours = {n: b for n, b in blocks.items() if n in aliases}
        for block_name, block in ours.items():
            left, right = whole(block)
            torch.testing.assert_close(left, scale * theirs._gradient_covariances[name], **CLOSE)
            if block_name.endswith("bias"):
                torch.testing.assert_close(right, torch.ones_like(right), **CLOSE)
            else:
                torch.testing.assert_close(right, theirs._input_covariances[name], **CLOSE)
            compared += 1
    assert compared == len(blocks)


@pytest.mark.parametrize("case", FLAT)
@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("approx", BOTH)
@pytest.mark.parametrize("separate", [False, True])
def test_corrected_eigenvalues(case: Case, fisher_type: str, approx: str, separate: bool) -> None:
    """In our eigenbasis, since that of a degenerate eigenspace is anybody's choice."""
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
    blocks = estimate(case, exact_ekfac, curvature=fisher_type, **options)
    theirs = operator(case, ekfac.EKFACLinearOperator, fisher_type, **options)
    modules = {name: parts_of(name, blocks, separate) for name in theirs._mapping}
    for name, ours in modules.items():
        left, right = blocks[ours.get("weight", name)].basis()
        theirs._gradient_covariances_eigenvectors[name] = left
        theirs._input_covariances_eigenvectors[name] = right
    theirs.compute_eigenvalue_correction()
    scale, compared = gradient_scale(case, fisher_type), 0
    for name, ours in modules.items():
        expected = theirs._corrected_eigenvalues[name]
        for part, block_name in ours.items():
            values = expected[theirs._mapping[name][part]] if isinstance(expected, dict) else expected
            value = blocks[block_name].corrected.value
            torch.testing.assert_close(value, scale * values.reshape(value.shape), **CLOSE)
            compared += 1
    assert compared == len(blocks)


def parts_of(name: str, blocks: Any, separate: bool) -> dict[str, str]:
    """The blocks of a module, by what they are of."""
    if not separate or name in blocks:
        return {"weight": name}
    found = {part: f"{name}.{part}".lstrip(".") for part in ("weight", "bias")}
    return {part: block for part, block in found.items() if block in blocks}


@pytest.mark.parametrize("name", ["mlp-ce", "conv-2d"])
def test_eigenbases_span_the_same(name: str) -> None:
    """Projections on the eigenspaces of the larger half of the spectrum, where it has a gap."""
    case = next(case for case in CASES if case.name == name)
    blocks = estimate(case, exact_ekfac)
    theirs = operator(case, ekfac.EKFACLinearOperator, "type-2", separate_weight_and_bias=False)
    theirs._compute_eigenvectors()
    compared = 0
    for layer, block in blocks.items():
        pairs = zip(
            block.basis(),
            (theirs._gradient_covariances_eigenvectors, theirs._input_covariances_eigenvectors),
            block.factor_eigenvalues(),
            strict=True,
        )
        for ours, other, values in pairs:
            gaps = values.diff()
            cut = int(gaps.argmax()) + 1
            a, b = ours[:, cut:], other[layer][:, cut:]
            torch.testing.assert_close(a @ a.mT, b @ b.mT, rtol=1e-9, atol=1e-9)
            compared += 1
    assert compared == 2 * len(blocks)


@pytest.mark.parametrize("name", ["mlp-ce", "conv-2d", "deep-linear-mse", "mlp-bce"])
@pytest.mark.parametrize("fisher_type", FISHERS)
def test_the_operators_agree_as_linear_maps(name: str, fisher_type: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, loss, x, y = case.make()
    made = kfacopt.KFAC(model, loss, **still(curvature=fisher_type))
    backward(model, loss, x, y)
    made.step()
    theirs = operator(case, kfac.KFACLinearOperator, fisher_type, separate_weight_and_bias=False)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    by_parameter = dict(zip(model.parameters(), vectors, strict=True))
    tensors = {layer: {role: by_parameter[p] for role, p in layer.parameters.items()} for layer in made._layers}
    ours = made.backend.multiply(tensors)
    flat = {id(p): ours[layer][role] for layer in ours for role, p in layer.parameters.items()}
    expected = theirs @ vectors
    for parameter, product in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(flat[id(parameter)], gradient_scale(case, fisher_type) * product, **CLOSE)
