"""Layers with a side too wide to be squared: the factor there is its diagonal, and said to be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kfacopt
from kfacopt.blocks import CorrectedEigenBlock
from kfacopt.blocks.factored import FactoredBlock
from tests import reference
from tests.cases import BY_NAME, CASES, Case, TiedLanguage, parameters_of, train_step
from tests.test_curvature import APART, Estimate, factors, grouped, kronecker, named

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# Wider than this is too wide: of the table's layers nearly all have such a side, many two.
WIDEST = 3

Backend = Callable[..., kfacopt.LayerwiseBackend]
BACKENDS: dict[str, Backend] = {
    "kfac": kfacopt.KFACBackend,
    "ekfac": kfacopt.EKFACBackend,
    "exact-kfac": kfacopt.EigenKFACBackend,
    "exact-ekfac": kfacopt.FullEKFACBackend,
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def narrow(backend: Backend, widest: int = WIDEST, **schedules: Any) -> Callable[..., Any]:
    """An optimizer class with that backend; schedules of `still()` go to the backend."""

    def make(model: nn.Module, loss: Any, params: Any = None, **options: Any) -> Any:
        own = {name: options.pop(name) for name in ("factor_every", "refresh_every") if name in options}
        made = backend(**own | schedules, widest=widest)
        return kfacopt.SecondOrderOptimizer(model, loss, params, backend=made, **options)

    return make


def wide_blocks(found: Estimate) -> list[tuple[Any, Any]]:
    return [(layer, block) for layer, block in found.blocks(FactoredBlock) if any(block.diagonals)]


@named(list(CASES))
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_a_wide_side_has_the_diagonal_of_the_factor(case: Case, approx: str) -> None:
    found = Estimate(case, narrow(kfacopt.KFACBackend), kfac_approx=approx)
    whole = Estimate(case, kfacopt.KFAC, kfac_approx=approx)
    of_whole = {layer.name: block.factors() for layer, block in whole.blocks(FactoredBlock)}
    for layer, block in wide_blocks(found):
        if layer.handler.structure == "tied":
            continue  # its factors are those of both uses together
        for ours, other, diagonal in zip(block.factors(), of_whole[layer.name], block.diagonals, strict=True):
            expected = other.diagonal() if diagonal and other.ndim == 2 else other
            torch.testing.assert_close(ours, expected, **CLOSE)


def test_the_table_has_layers_of_every_kind() -> None:
    kinds = {
        (layer.handler.structure, *block.diagonals)
        for case in CASES
        for layer, block in wide_blocks(Estimate(case, narrow(kfacopt.KFACBackend)))
    }
    assert kinds >= {("outer", True, True), ("outer", True, False), ("outer", False, True), ("one-hot", True, True)}
    assert {structure for structure, *_ in kinds} == {"outer", "one-hot", "tied"}


@named(APART)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("backend", [kfacopt.EKFACBackend, kfacopt.FullEKFACBackend])
def test_corrected_eigenvalues_are_the_diagonal_of_the_ggn(case: Case, approx: str, backend: Backend) -> None:
    """Exactly, in the basis of what is narrow: a diagonal factor costs the rotation, no second moment."""
    found = Estimate(case, narrow(backend), kfac_approx=approx)
    for layer, block in wide_blocks(found):
        assert isinstance(block, CorrectedEigenBlock)
        sides = zip(block.basis(), layer.shape, strict=True)
        left, right = (torch.eye(size).double() if basis is None else basis for basis, size in sides)
        basis = kronecker(grouped(left, 2), grouped(right, 2))
        truth = basis.mT @ reference.ggn(found.model, found.loss, layer, found.x, found.y) @ basis
        assert block.corrected.value is not None
        torch.testing.assert_close(block.corrected.value.flatten(), truth.diagonal(dim1=1, dim2=2)[0], **CLOSE)


@every_backend
@pytest.mark.parametrize("sizes", [(5, 5), (2, 5), (5, 2)])
def test_wide_layers_of_one_shape_are_solved_as_each_alone(backend: Backend, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    inputs, outputs = sizes
    linear = [nn.Linear(outputs, inputs), nn.Linear(inputs, outputs)] * 3
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a.in_features, a.out_features), nn.Tanh()) for a in linear))
    made = narrow(backend, factor_every=1, refresh_every=1)(model.double(), nn.MSELoss())
    train_step(made, model, nn.MSELoss(), torch.randn(9, outputs).double(), torch.randn(9, outputs).double())
    settings = {layer: kfacopt.backends.Settings(0.1, 0.9) for layer in made._layers}
    gradients = {layer: layer.share({p: p.grad for p in layer.parameters.values()}) for layer in made._layers}
    assert any(any(block.diagonals) for block in made.backend.blocks.values())
    for layer, found in made.backend.solve(gradients, settings).items():
        alone = made.backend.blocks[layer.name].solve(layer.pack(gradients[layer]), 0.1)
        torch.testing.assert_close(layer.pack(found), alone, **CLOSE)


@named([BY_NAME[name] for name in ("mlp-ce", "sequence-ce", "conv-2d", "words", "tied-embedding")])
@every_backend
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_a_solve_is_that_of_the_damped_operator_written_out(case: Case, backend: Backend, damping: float) -> None:
    found = Estimate(case, narrow(backend), damping=damping)
    assert wide_blocks(found)
    for layer, block in wide_blocks(found):
        left, right = (f[0] for f in factors(block))
        eye_left, eye_right = torch.eye(len(left)).double(), torch.eye(len(right)).double()
        pi = ((right.trace() / len(right)) / (left.trace() / len(left))).sqrt()
        # (G + √damping/π I) ⊗ (A + π √damping I), Martens & Grosse 2015, multiplied out.
        split = torch.kron(left, right) + damping * torch.kron(eye_left, eye_right)
        split += damping**0.5 * (pi * torch.kron(left, eye_right) + torch.kron(eye_left, right) / pi)
        if isinstance(block, CorrectedEigenBlock):
            bases = zip(block.basis(), (eye_left, eye_right), strict=True)
            basis = torch.kron(*(other if own is None else own.contiguous() for own, other in bases))
            # EKFAC's second moments in the place of the product's eigenvalues, the rest of the damping as it is.
            corrected = block.corrected.value.flatten() - (basis.mT @ torch.kron(left, right) @ basis).diagonal()
            split = split + (basis * corrected) @ basis.mT
        elif backend is kfacopt.EigenKFACBackend:
            split = torch.kron(left, right) + damping * torch.kron(eye_left, eye_right)
        matrix = torch.randn(layer.shape).double()
        kept = matrix.clone()
        ours = block.solve(matrix, damping)
        assert torch.equal(matrix, kept)
        # The condition number is at most about 1e6 here.
        torch.testing.assert_close(split @ ours.flatten(), matrix.flatten(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(block.unwhiten(block.whiten(matrix, damping), damping), ours, rtol=1e-9, atol=1e-10)
        other = torch.randn(layer.shape).double()
        white = [block.whiten(m, damping).flatten() for m in (matrix, other)]
        torch.testing.assert_close(white[0] @ white[1], other.flatten() @ ours.flatten(), rtol=1e-9, atol=1e-10)


@named([BY_NAME[name] for name in ("mlp-ce", "words", "tied-embedding", "conv-2d")])
@every_backend
def test_training_resumes_bit_for_bit(case: Case, backend: Backend) -> None:
    """With staggered refreshes, and factors and eigenbases of different ages."""
    make = narrow(backend, factor_every=2, refresh_every=3)
    model, loss, x, y = case.make()
    made = make(model, loss, lr=0.05)
    losses = [float(train_step(made, model, loss, x, y)) for _ in range(5)]
    resumed_model = case.make(seed=1)[0]
    resumed = make(resumed_model, loss, lr=0.05)
    resumed_model.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(made.state_dict()))
    for _ in range(4):
        losses.append(float(train_step(made, model, loss, x, y)))
        train_step(resumed, resumed_model, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), parameters_of(resumed_model), strict=True))
    assert losses[-1] < losses[0]


@every_backend
def test_a_state_of_another_width_is_refused_by_name(backend: Backend) -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    narrowed, whole = narrow(backend)(model, loss), narrow(backend, widest=100)(model, loss)
    for made in (narrowed, whole, narrowed, whole):  # twice: EKFAC's corrections come after its basis
        train_step(made, model, loss, x, y)
    for made, other in ((narrowed, whole), (whole, narrowed)):
        before = copy.deepcopy(made.state_dict())
        with pytest.raises(ValueError, match=r"curvature state of '.*' is of factors .* widest="):
            made.load_state_dict(copy.deepcopy(other.state_dict()))
        after = made.state_dict()["curvature"]["backend"]["blocks"]
        for name, kept in before["curvature"]["backend"]["blocks"].items():
            for average, held in kept["averages"].items():
                assert torch.equal(after[name]["averages"][average]["value"], held["value"])


@every_backend
def test_coverage_and_health_say_so(backend: Backend) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 9), nn.Linear(9, 2))
    made = narrow(backend, widest=8)(model, nn.CrossEntropyLoss())
    said = {row.module: row.treatment for row in made.coverage().rows}
    assert {name: "diagonal" in treatment for name, treatment in said.items()} == {
        "0": False,  # its A is diagonal by itself
        "1": True,
        "3": True,
        "4": True,
    }
    assert [said[name].partition(", ")[2].split(", ")[-1] for name in "134"] == [
        "G diagonal",
        "G and A diagonal",
        "A diagonal",
    ]
    assert made.health()["diagonal_factors"] == 4.0
    whole = narrow(backend, widest=9)(model, nn.CrossEntropyLoss())
    assert whole.health()["diagonal_factors"] == 0.0
    assert "diagonal" not in str(whole.coverage())


def test_a_tied_layer_says_so() -> None:
    made = narrow(kfacopt.EKFACBackend, widest=4)(TiedLanguage(3).double(), nn.CrossEntropyLoss())
    (row,) = (row for row in made.coverage().rows if row.module == "embedding")
    assert row.treatment.endswith("A diagonal")


@pytest.mark.parametrize("backend", [*BACKENDS.values(), kfacopt.OneSidedKFACBackend])
@pytest.mark.parametrize("widest", [0, -1, 2.5, "all"])
def test_nonsense_is_named(backend: Any, widest: Any) -> None:
    with pytest.raises(ValueError, match="widest"):
        backend(widest=widest)


class Language(nn.Module):
    """Words, a hidden layer, a distribution over words at every place; with `tied`, one weight for both."""

    def __init__(self, words: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=not tied)
        nn.init.normal_(self.embedding.weight, std=0.1)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.embedding(x)).tanh())
        return logits


def test_a_vector_for_each_word_is_warned_of() -> None:
    model = Language(1002, 2, tied=False)
    made = kfacopt.EKFAC(model, nn.CrossEntropyLoss(), curvature="ggn")
    x = torch.randint(1002, (2, 1))
    with pytest.warns(UserWarning, match="there are 1001: sampling, curvature='mc'"):
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    made.step()
    assert made.health()["unseen_layers"] == 0.0


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns, on any thread of this process' main one."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@contextmanager
def no_larger_than(elements: int) -> Iterator[None]:
    with Largest() as largest:
        yield
    assert largest.elements <= elements


@every_backend
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(6, 1), (2, 5)])
def test_nothing_is_as_large_as_the_vocabulary_squared(backend: Backend, tied: bool, shape: tuple[int, int]) -> None:
    """Of 6,000 words: no temporary of a step is larger than logits, per-datum gradients or parameters."""
    torch.manual_seed(0)
    words, width = 6000, 4
    model = Language(words, width, tied)
    made = kfacopt.SecondOrderOptimizer(model, nn.CrossEntropyLoss(), backend=backend(1, 1))
    x, y = torch.randint(words, shape), torch.randint(words, shape)
    tokens = x.numel()
    for _ in range(3):
        with no_larger_than(max(2 * tokens, len(x) * (width + 1)) * words):
            made.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            made.step()
    assert made.health()["diagonal_factors"] == 1.0
    assert made.health()["unseen_layers"] == 0.0
    assert made.health()["skipped_steps"] == 0.0
