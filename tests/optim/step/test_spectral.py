"""Spectral, grafted and unit-gradient directions against dense truth: eigendecompositions and an SVD in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from kfacopt.linalg import kronecker
from kfacopt.optim.step import spectral
from kfacopt.optim.step.lengths import layer_length
from kfacopt.optim.step.spectral import dense_layers, matrix_layers
from tests.cases import BY_NAME, Case, backward, exact_ekfac, exact_kfac, mlp, parameters_of, train_step
from tests.optim.test_state import WAYS, Pair, batches

FAMILIES = ["mlp-ce", "conv-groups", "conv-1d", "words", "norms", "sequence-ce", "transformer", "tied"]
families = pytest.mark.parametrize("case", [BY_NAME[name] for name in FAMILIES], ids=FAMILIES)
DAMPING = 1e-3


def svd_polar(matrix: Tensor) -> Tensor:
    """By SVD, without what is only rounding: cross-entropy's gradients have no part that adds to all logits."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left * (values > 1e-9 * values[..., :1]).to(values).unsqueeze(-2)) @ right


EXACT: dict[str, Any] = {
    "momentum": 0.0,
    "polar": svd_polar,
    "layers": matrix_layers,
    "row_decay": None,
    "decay": 0.0,
    "margin": None,
}


class Identity(kfacopt.LayerwiseBackend):
    """No curvature at all."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def make_block(self, layer: Layer) -> Any:
        return kfacopt.KFACBackend().make_block(layer)

    def whiten(self, tensors: Any, settings: Any) -> Any:
        return tensors

    unwhiten = whiten


def of(backend: kfacopt.LayerwiseBackend, direction: kfacopt.Direction, case: Case, **options: Any) -> Pair:
    """An optimizer of plain steps after one backward, its model, and the updates it is about to write, by layer."""
    model, loss, x, y = case.make()
    fixed: dict[str, Any] = {"lr": 1.0, "damping": DAMPING, "kl_clip": None, "curvature": "ggn", "ema_decay": 0.0}
    made = kfacopt.SecondOrderOptimizer(model, loss, backend=backend, direction=direction, **fixed | options)
    before = {p: p.detach().clone() for p in model.parameters()}
    train_step(made, model, loss, x, y)
    steps = {
        layer: layer.pack(layer.share({p: before[p] - p.detach() for p in layer.parameters.values()}))
        for layer in made._layers
    }
    return made, steps


def momentum_of(layer: Layer) -> Tensor:
    """The gradient as a matrix: without memory it is the momentum."""
    return layer.pack(layer.share({p: p.grad for p in layer.parameters.values() if p.grad is not None}))


def power(factor: Tensor, damping: Tensor, exponent: float) -> Tensor:
    """`(factor + damping I)^-exponent` as a dense matrix."""
    dense = torch.diag(factor) if factor.ndim == 1 else factor
    values, vectors = torch.linalg.eigh(dense)
    return (vectors * (values + damping[..., None]).pow(-exponent).unsqueeze(-2)) @ vectors.mT


def lengthened(layer: Layer, step: Tensor) -> Tensor:
    return step * (layer_length(layer) / step.norm())


@families
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_kfac_against_symmetric_roots_and_svd(case: Case, exponent: float) -> None:
    backend = kfacopt.KFACBackend(1, 1, exponent=exponent)
    made, steps = of(backend, kfacopt.Spectral(**EXACT), case)
    assert steps
    for layer, step in steps.items():
        block = backend.blocks[layer.name]
        assert isinstance(block, FactoredBlock)
        left, right = block.factors()
        dampings = kronecker.pi_split(left, right, DAMPING)
        roots = [power(f, d, exponent / 2) for f, d in zip((left, right), dampings, strict=True)]
        inner = svd_polar(roots[0] @ momentum_of(layer) @ roots[1])
        torch.testing.assert_close(step, lengthened(layer, roots[0] @ inner @ roots[1]), rtol=1e-7, atol=1e-9)
    assert made.health()["skipped_steps"] == 0.0


@families
@pytest.mark.parametrize("backend_type", [kfacopt.EigenKFACBackend, kfacopt.FullEKFACBackend, kfacopt.EKFACBackend])
def test_eigenbases_against_the_dense_root(backend_type: Callable[..., Any], case: Case) -> None:
    """S as the symmetric root of the inverse, from the block's solve of each unit matrix."""
    backend = backend_type(1, 1)
    _, steps = of(backend, kfacopt.Spectral(**EXACT), case)
    for layer, step in steps.items():
        block, shape = backend.blocks[layer.name], step.shape
        if step.ndim > 2:
            continue  # groups are blocks beside each other: the next test
        units = torch.eye(step.numel(), dtype=step.dtype).reshape(-1, *shape)
        inverse = torch.stack([block.solve(unit.clone(), DAMPING).flatten() for unit in units])
        values, vectors = torch.linalg.eigh(0.5 * (inverse + inverse.mT))
        root = (vectors * values.sqrt()) @ vectors.mT
        inner = svd_polar((root @ momentum_of(layer).flatten()).reshape(shape))
        expected = lengthened(layer, (root @ inner.flatten()).reshape(shape))
        torch.testing.assert_close(step, expected, rtol=1e-6, atol=1e-8)


def test_each_group_of_a_convolution_has_singular_values_of_its_own() -> None:
    backend = Identity()
    _, steps = of(backend, kfacopt.Spectral(**EXACT), BY_NAME["conv-groups"])
    grouped = [(layer, step) for layer, step in steps.items() if step.ndim == 3]
    assert len(grouped) == 2
    for layer, step in grouped:
        apart = torch.stack([svd_polar(group) for group in momentum_of(layer)])
        torch.testing.assert_close(step, lengthened(layer, apart))


@families
def test_without_curvature_it_is_muon(case: Case) -> None:
    """Of Muon's length: an orthogonal matrix times `sqrt(max(1, o / i))`."""
    _, steps = of(Identity(), kfacopt.Spectral(**EXACT), case)
    for layer, step in steps.items():
        momentum = momentum_of(layer)
        orthogonal = svd_polar(momentum)
        if layer.handler.structure == "outer" and torch.linalg.matrix_rank(momentum).min() == min(step.shape[-2:]):
            outputs, inputs = step.shape[-2:]
            torch.testing.assert_close(step, orthogonal * max(1.0, outputs / inputs) ** 0.5)
        torch.testing.assert_close(step, lengthened(layer, orthogonal))


@families
@pytest.mark.parametrize("optimizer", [kfacopt.KFACBackend, kfacopt.EKFACBackend, kfacopt.EigenKFACBackend])
def test_the_frobenius_norm_gives_the_natural_gradient(optimizer: Callable[..., Any], case: Case) -> None:
    def frobenius(matrix: Tensor) -> Tensor:
        assert matrix.ndim >= 3
        return matrix

    direction = kfacopt.Spectral(**EXACT | {"polar": frobenius})
    _, ours = of(optimizer(1, 1), direction, case)
    natural = kfacopt.Grafted(kfacopt.Preconditioned(momentum=0.0))
    _, theirs = of(optimizer(1, 1), natural, case)
    by_name = {layer.name: step for layer, step in theirs.items()}
    for layer, step in ours.items():
        torch.testing.assert_close(step, by_name[layer.name], rtol=1e-7, atol=1e-9)


def test_nothing_in_the_unit_ball_descends_steeper() -> None:
    """`⟨M, D⟩` over D = S Z, `‖Z‖₂ ≤ 1`: the nuclear norm of `Sᵀ M`, against random others and the gradient's own."""
    backend = kfacopt.KFACBackend(1, 1)
    _, steps = of(backend, kfacopt.Spectral(**EXACT), BY_NAME["mlp-ce"])
    settings = {layer: kfacopt.Settings(DAMPING, 0.0) for layer in steps}
    for layer, step in steps.items():
        block, momentum = backend.blocks[layer.name], momentum_of(layer)
        whitened = block.whiten(momentum, settings[layer].damping)
        best = torch.linalg.svdvals(whitened).sum()
        unit = block.unwhiten(svd_polar(whitened), DAMPING)
        torch.testing.assert_close((momentum * unit).sum(), best)
        torch.testing.assert_close(step / step.norm(), unit / unit.norm())
        for _ in range(50):
            other = torch.randn_like(momentum)
            other = block.unwhiten(other / torch.linalg.matrix_norm(other, ord=2), DAMPING)
            assert (momentum * other).sum() <= best


def test_the_default_leaves_embeddings_and_normalisations_to_adamw_and_says_so() -> None:
    model, loss, x, y = BY_NAME["transformer"].make()
    made = kfacopt.SpectralDescent(model, loss)
    table = {row.module: row for row in made.coverage().rows}
    assert (table["embedding"].treatment, table["layer.norm1"].treatment) == ("AdamW", "AdamW")
    assert "dense_layers" in table["embedding"].why
    assert "elementwise" in table["layer.norm1"].why
    train_step(made, model, loss, x, y)
    assert "exp_avg" in made.state[model.embedding.weight]
    assert "momentum_buffer" in made.state[model.head.weight]
    assert set(made.backend.state_dict()["blocks"]) == {layer.name for layer in made._layers}
    assert all(dense_layers(layer) for layer in made._layers)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_embeddings_take_four_times_adamws_rate(factor: float | None) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    own = {} if factor is None else {"embedding_factor": factor}
    made = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(), [{"params": list(model.parameters()), **own}])
    before = copy.deepcopy(model)
    train_step(made, model, nn.CrossEntropyLoss(), torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 2, 0]))
    moved = [(p - old).abs().max().item() for p, old in zip(model.parameters(), before.parameters(), strict=True)]
    # AdamW's first step is its rate in each entry.
    assert moved[:3] == pytest.approx([0.01 * (factor or 4.0), 0.01, 0.01], rel=1e-4)
    assert not any((model[0].weight - before[0].weight)[[2, 4]].flatten())


def test_every_layer_moves_its_outputs_by_one() -> None:
    """Root of the mean square over white inputs, at every width: `‖U‖_F² = outputs`."""
    for width in (4, 64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
        whole = kfacopt.Spectral(margin=None)
        made = kfacopt.SpectralDescent(model, nn.MSELoss(), lr=1.0, factor_every=1, direction=whole)
        before = parameters_of(model)
        train_step(made, model, nn.MSELoss(), torch.randn(64, 3), torch.randn(64, 2))
        moved = [(old - new.detach()).square().sum() for old, new in zip(before, model.parameters(), strict=True)]
        assert [float(moved[0] + moved[1]), float(moved[2] + moved[3])] == pytest.approx([width, 2.0], rel=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_loss_has_no_unit(scale: float) -> None:
    """With relative damping a multiple of the loss takes the same steps."""

    def run(factor: float) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp().double()
        made = kfacopt.SpectralDescent(model, nn.MSELoss(), curvature="empirical")
        for _ in range(3):
            x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
            made.zero_grad()
            (factor * nn.functional.mse_loss(model(x), y)).backward()
            made.step()
        return parameters_of(model)

    for ours, theirs in zip(run(1.0), run(scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_layer_without_gradient_stays() -> None:
    model = mlp().double()
    made = kfacopt.SpectralDescent(model, nn.MSELoss(reduction="sum"))
    before = parameters_of(model)
    made.zero_grad()
    (0.0 * model(torch.randn(4, 4).double())).sum().backward()
    made.step()
    assert made.health()["skipped_steps"] == 0.0
    assert all(torch.equal(old, new.detach()) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(3, 6), (6, 3), (2, 2), (1, 3)])
def test_dead_layers_do_not_stop_the_others(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever lies below a `relu` that nothing passes has a gradient of zero, and a factor of zero."""
    first, second = sizes
    below = nn.Sequential(nn.Linear(4, first), nn.Linear(first, second), nn.ReLU())
    below[1].bias.data.fill_(-1e3)  # type: ignore[union-attr,operator]
    model = nn.Sequential(below, nn.Linear(second, 3)).to(dtype)
    made = kfacopt.SpectralDescent(model, nn.MSELoss(), factor_every=1, refresh_every=1)
    before = parameters_of(model)
    for _ in range(3):
        train_step(made, model, nn.MSELoss(), torch.randn(8, 4, dtype=dtype), torch.randn(8, 3, dtype=dtype))
    assert made.health()["skipped_steps"] == 0.0
    moved = [not torch.equal(old, new.detach()) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [False] * 5 + [True]  # nothing arrives at the last weight, either


DIRECTIONS: dict[str, Callable[[], kfacopt.Direction]] = {
    "spectral": kfacopt.Spectral,
    "unit": lambda: kfacopt.UnitGradients(kfacopt.Spectral(layers=matrix_layers)),
    "clipped": lambda: kfacopt.ClippedGradients(kfacopt.Spectral(layers=matrix_layers)),
    "grafted": lambda: kfacopt.Grafted(kfacopt.Preconditioned()),
    "twice": lambda: kfacopt.Grafted(kfacopt.Preconditioned(), length_of=kfacopt.Spectral(0.9, layers=matrix_layers)),
}
KINDS = {"kfac": kfacopt.KFAC, "ekfac": kfacopt.EKFAC, "exact-kfac": exact_kfac, "exact-ekfac": exact_ekfac}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_resuming_bit_for_bit(way: Callable[..., Pair], kind: Any, direction: Callable[[], Any]) -> None:
    def made_by(model: nn.Module, loss: Any, **options: Any) -> Any:
        intervals = {"factor_every": 2, "refresh_every": 3}
        return kind(model, loss, lr=0.05, kl_clip=None, direction=direction(), **intervals, **options)

    case = BY_NAME["transformer"]
    model, loss, _, _ = case.make()
    made = made_by(model, loss)
    data = batches(case, 9)
    for x, y in data[:4]:
        train_step(made, model, loss, x, y)
    other, restored = way(case, made_by, model, made)
    for x, y in data[4:]:
        assert torch.equal(train_step(made, model, loss, x, y), train_step(restored, other, loss, x, y))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_roots_are_renewed_when_the_backend_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    original = kronecker.root
    monkeypatch.setattr(kronecker, "root", lambda factor: counted.append(1) or original(factor))
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.KFAC(model, loss, factor_every=1, refresh_every=100, direction=kfacopt.Spectral())
    for _ in range(5):
        train_step(made, model, loss, x, y)
    # Two factors of the first layer; the other's matrix is long, 3 x 6: there the longer side's root is not met.
    assert len(counted) == 3


def wide(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with a layer whose sides are long, and one whose are short."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 4)).to(dtype)
    return model, torch.randn(64, 200, dtype=dtype), torch.randn(64, 4, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_products_in_bfloat16(kind: Any, dtype: torch.dtype) -> None:
    """Nearly the same step; short ones the very same; double precision stays."""
    moved = []
    for products in (torch.float32, torch.bfloat16):
        model, x, y = wide(dtype)
        direction = kfacopt.Spectral(dtype=products)
        options: dict[str, Any] = {"factor_every": 1, "refresh_every": 1, "curvature": "ggn"}
        made = kind(model, nn.MSELoss(), lr=1.0, kl_clip=None, damping=0.1, direction=direction, **options)
        before = parameters_of(model)
        train_step(made, model, nn.MSELoss(), x, y)
        moved.append([old - new.detach() for old, new in zip(before, model.parameters(), strict=True)])
        assert made.health()["skipped_steps"] == 0.0
    (long, *_), (coarse, *_) = moved
    assert coarse.dtype == dtype
    assert torch.equal(moved[0][2], moved[1][2])
    if dtype == torch.float64:
        assert torch.equal(long, coarse)
    else:
        assert not torch.equal(long, coarse)
        assert (long - coarse).norm() < 0.2 * long.norm()


def test_what_was_measured_goes_with_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> tuple[kfacopt.KFAC, tuple[nn.Module, Tensor, Tensor]]:
        made = wide(torch.float32)
        return kfacopt.KFAC(made[0], nn.MSELoss(), lr=0.05, direction=kfacopt.Spectral()), made

    monkeypatch.setattr(spectral, "fast_dtype", lambda device: torch.bfloat16)
    first, (model, x, y) = fresh()
    train_step(first, model, nn.MSELoss(), x, y)
    state, weights = copy.deepcopy((first.state_dict(), model.state_dict()))
    assert state["curvature"]["direction"] == {"measured": {"cpu": "bfloat16"}}
    monkeypatch.setattr(spectral, "fast_dtype", lambda device: torch.float32)
    second, (other, *_) = fresh()
    other.load_state_dict(weights)
    second.load_state_dict(state)
    for _ in range(3):
        train_step(first, model, nn.MSELoss(), x, y)
        train_step(second, other, nn.MSELoss(), x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_grafted_lengths_and_image() -> None:
    """Each layer has the other's length, and the trust region is told of the image what became of the step."""
    model, loss, x, y = BY_NAME["norms"].make()
    direction = kfacopt.Grafted(kfacopt.Preconditioned())
    made = kfacopt.KFAC(model, loss, factor_every=1, refresh_every=1, curvature="ggn", direction=direction)
    backward(model, loss, x, y)
    taken: list[kfacopt.Step] = []

    class Spying(kfacopt.Grafted):
        def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
            taken.append(step)
            return super().updates(step)

    made.direction = Spying(kfacopt.Preconditioned(), length_of=kfacopt.Preconditioned(momentum=None))
    made.step()
    (step,) = taken
    natural, plain = (d.updates(step) for d in (kfacopt.Preconditioned(), kfacopt.Preconditioned(momentum=None)))
    grafted = made.direction.updates(step)
    assert grafted.image is not None
    assert natural.image is not None
    for layer in step.layers:
        held = list(layer.parameters.values())
        lengths = [torch.cat([u.tensors[p].flatten() for p in held]).norm() for u in (natural, plain, grafted)]
        torch.testing.assert_close(lengths[2], lengths[1])
        for p in held:
            torch.testing.assert_close(grafted.tensors[p], natural.tensors[p] * lengths[1] / lengths[0])
            torch.testing.assert_close(grafted.image[p], natural.image[p] * lengths[1] / lengths[0])


def test_a_bent_path_is_run_as_fast_as_the_step() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()

    class Bent(kfacopt.Preconditioned):
        def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
            found = super().updates(step)
            found.bend = [torch.ones_like(t) for t in found.tensors.values()]
            return found

    seen: list[kfacopt.Updates] = []

    class Seeing(kfacopt.TrustRegion):
        def scaled(self, step: kfacopt.Step, updates: kfacopt.Updates) -> kfacopt.Updates | None:
            seen.append(updates)
            return super().scaled(step, updates)

    made = kfacopt.KFAC(model, loss, direction=kfacopt.Grafted(Bent(), lambda layer: 2.0), step_length=Seeing(None))
    train_step(made, model, loss, x, y)
    (updates,) = seen
    assert updates.bend is not None
    for layer in made._layers:
        held = list(layer.parameters.values())
        assert torch.cat([updates.tensors[p].flatten() for p in held]).norm() == pytest.approx(2.0)
    places = {p: place for place, p in enumerate(updates.tensors)}
    for layer in made._layers:
        bends = [updates.bend[places[p]] for p in layer.parameters.values()]
        assert all(torch.equal(b, torch.full_like(b, float(bends[0].flatten()[0]))) for b in bends)


def test_unit_gradients_bound_what_one_batch_can_do() -> None:
    """After a batch a million times as steep the momentum is no further turned than by any other."""

    def run(scale: float) -> list[Tensor]:
        torch.manual_seed(0)
        model, loss = mlp().double(), nn.MSELoss()
        direction = kfacopt.UnitGradients(kfacopt.Spectral())
        made = kfacopt.SpectralDescent(model, loss, backend=Identity(), factor_every=None, direction=direction)
        for factor in (1.0, scale, 1.0):
            x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
            made.zero_grad()
            (factor * loss(model(x), y)).backward()
            made.step()
        return parameters_of(model)

    for ours, theirs in zip(run(1.0), run(1e6), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clipped_gradients_against_the_running_average_of_their_norms() -> None:
    """One batch a million times as steep turns the momentum no further than one that is `limit` times as long."""
    torch.manual_seed(0)
    model, seen = nn.Linear(3, 2).double(), []

    class Seen(kfacopt.Direction):
        def updates(self, step: kfacopt.Step) -> kfacopt.Updates:
            seen.append(step.gradients[model.weight])
            return kfacopt.Updates({p: torch.zeros_like(p) for p in step.gradients})

    made = kfacopt.SecondOrderOptimizer(
        model, nn.MSELoss(), backend=Identity(), direction=kfacopt.ClippedGradients(Seen(), limit=2.0, decay=0.5)
    )
    unit = torch.randn(2, 3, dtype=torch.float64)
    unit /= unit.norm()
    usual = 3.0
    made.close()  # the gradients are set by hand
    for norm in (3.0, 3.3, 4e6, 0.0, 1e-3, 4.0):
        model.weight.grad, model.bias.grad = norm * unit, torch.zeros(2, dtype=torch.float64)
        with pytest.warns(UserWarning, match="no curvature has been captured") if not seen else nullcontext():
            made.step()
        clipped = min(norm, 2.0 * usual)
        torch.testing.assert_close(seen[-1], clipped * unit, rtol=1e-6, atol=0.0)
        usual = 0.5 * (usual + clipped)
    assert float(made.direction.state_dict()["usual_norms"][0]) == pytest.approx(usual, rel=1e-6)


def test_a_step_without_covered_gradients_is_adamws() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    made = kfacopt.SpectralDescent(model, nn.MSELoss())
    before = parameters_of(model)
    model[1].bias.grad = torch.ones_like(model[1].bias)
    made.step()
    moved = [not torch.equal(old, new.detach()) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, False, True]


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions_say_what_they_are(direction: Callable[[], kfacopt.Direction]) -> None:
    assert "Spectral(momentum=" in repr(direction()) or "Preconditioned(momentum=" in repr(direction())
    assert repr(direction()) == repr(copy.deepcopy(direction()))


def test_two_averages_in_one_step_are_refused() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    mixed = kfacopt.Grafted(kfacopt.UnitGradients(kfacopt.Spectral()), length_of=kfacopt.Preconditioned())
    made = kfacopt.KFAC(model, loss, direction=mixed)
    with pytest.raises(RuntimeError, match="UnitGradients around the whole"):
        train_step(made, model, loss, x, y)


@pytest.mark.parametrize(
    ("made", "error", "names"),
    [
        (lambda: kfacopt.Spectral(momentum=1.5), ValueError, "momentum"),
        (lambda: kfacopt.Grafted(torch.sign), TypeError, "direction"),  # type: ignore[arg-type]
        (lambda: kfacopt.Grafted(kfacopt.Spectral(), length_of=2.0), TypeError, "length_of"),  # type: ignore[arg-type]
        (lambda: kfacopt.UnitGradients(torch.sign), TypeError, "direction"),  # type: ignore[arg-type]
        (lambda: kfacopt.ClippedGradients(kfacopt.Spectral(), limit=1.0), ValueError, "limit"),
        (lambda: kfacopt.ClippedGradients(kfacopt.Spectral(), decay=1.0), ValueError, "decay"),
        (lambda: kfacopt.KFACBackend(exponent=0.0), ValueError, "exponent"),
    ],
)
def test_refusals(made: Callable[[], Any], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        made()


def test_a_backend_without_roots_is_told() -> None:
    class Plain(kfacopt.CurvatureBackend):
        def solve(self, gradients: Any, settings: Any) -> Any:
            return {}

        def mean_eigenvalues(self) -> dict[Layer, float]:
            return {}

    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.SecondOrderOptimizer(model, loss, backend=Plain(), direction=kfacopt.Spectral())
    with pytest.raises(NotImplementedError, match="whiten"):
        train_step(made, model, loss, x, y)


@families
@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("widest", [5120, 2])
def test_one_sided_kfac_against_symmetric_roots_and_svd(case: Case, exponent: float, widest: int) -> None:
    backend = kfacopt.OneSidedKFACBackend(1, 1, exponent=exponent, widest=widest)
    _, steps = of(backend, kfacopt.Spectral(**EXACT), case)
    whole = kfacopt.KFACBackend(1, 1)
    of(whole, kfacopt.Spectral(**EXACT), case)
    assert steps
    for layer, step in steps.items():
        block = whole.blocks[layer.name]
        assert isinstance(block, FactoredBlock)
        factor, matrix = block.factors()[0], momentum_of(layer)
        if factor.shape[-1] > widest:
            factor = torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1))
        damping = factor.new_full(factor.shape[:-2], DAMPING)
        root = power(factor, damping, exponent / 2)
        torch.testing.assert_close(step, lengthened(layer, root @ svd_polar(root @ matrix)), rtol=1e-7, atol=1e-9)
        held = backend.blocks[layer.name]
        solved = power(factor, damping, exponent) @ matrix
        torch.testing.assert_close(held.solve(matrix, DAMPING), solved, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(held.unwhiten(held.whiten(matrix, DAMPING), DAMPING), solved, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(held.matvec(matrix), factor @ matrix, rtol=1e-7, atol=1e-9)
        values = torch.linalg.eigvalsh(factor)[..., None].expand(matrix.shape)
        torch.testing.assert_close(held.eigenvalues().sort(-2).values, values.clamp_min(0.0), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(held.trace(), values.sum())
        torch.testing.assert_close(held.mean_eigenvalue(), values.mean())


@families
def test_evened_rows_are_over_the_root_of_their_mean_squares(case: Case) -> None:
    _, plain = of(kfacopt.KFACBackend(1, 1), kfacopt.Spectral(**EXACT), case)
    _, steps = of(kfacopt.KFACBackend(1, 1), kfacopt.Spectral(**EXACT | {"row_decay": 0.9}), case)
    for (layer, step), before in zip(steps.items(), plain.values(), strict=True):
        squares = before.square().mean(-1, keepdim=True) / before.square().mean()
        evened = before / squares.clamp_min(1e-2).sqrt()
        torch.testing.assert_close(step, lengthened(layer, evened), rtol=1e-9, atol=1e-11)


def test_the_running_mean_squares_of_rows_are_bias_corrected_and_resume() -> None:
    made = [kfacopt.Spectral(0.0, svd_polar, row_decay=decay) for decay in (0.5, None)]
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    optimizer = kfacopt.SpectralDescent(model, loss, lr=0.0, adamw_lr=0.0, direction=made[0])
    squares: list[Tensor] = []
    for _ in range(3):
        train_step(optimizer, model, loss, x, y)
        state = optimizer.state[next(model.parameters())]
        squares.append(state["row_squares"] / state["row_weight"])
    # Nothing moves, so that every step has the same rows but for the statistics, which settle in the first step.
    torch.testing.assert_close(squares[1], squares[2])
    assert optimizer.state_dict()["state"][0]["row_weight"] == 1.0 - 0.5**3


def test_the_momentum_grows_over_the_first_steps() -> None:
    """A new gradient weighs 3, 2 and 1 times `1 - momentum` in steps 0, 1 and 2 of a warmup of 2."""
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    direction = kfacopt.Spectral(momentum=0.8, warmup=2)
    made = kfacopt.SpectralDescent(model, loss, lr=0.01, momentum=0.8, direction=direction)
    (p, *_), average = model.parameters(), torch.zeros(())
    for weight in (0.6, 0.4, 0.2, 0.2):
        train_step(made, model, loss, x, y)
        average = average + weight * (p.grad - average)
        torch.testing.assert_close(made.state[p]["momentum_buffer"], average)


@pytest.mark.parametrize(
    "direction",
    [
        lambda: kfacopt.Spectral(0.0, full_steps=2),
        lambda: kfacopt.Grafted(kfacopt.Preconditioned(0.0), full_steps=2),
        lambda: kfacopt.Grafted(kfacopt.Preconditioned(0.0), length_of=kfacopt.Spectral(0.0, full_steps=2)),
    ],
    ids=["spectral", "grafted", "of-another"],
)
def test_the_length_shrinks_as_one_over_the_root_of_the_number_of_steps(
    direction: Callable[[], kfacopt.Direction],
) -> None:
    """Whole for two steps, then sqrt(2 / 3), sqrt(2 / 4), ...: of one layer, whose matrix tells its length."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 4, bias=False).double(), (torch.randn(8, 3).double(), torch.randn(8, 4).double())
    made = kfacopt.SpectralDescent(model, nn.MSELoss(), lr=1e-2, momentum=0.0, direction=direction())
    for part in (1.0, 1.0, (2 / 3) ** 0.5, (2 / 4) ** 0.5, (2 / 5) ** 0.5):
        before = model.weight.detach().clone()
        train_step(made, model, nn.MSELoss(), x, y)
        torch.testing.assert_close((model.weight - before).norm().item(), 1e-2 * part * 2.0, rtol=1e-10, atol=0.0)


WRONG: list[dict[str, float]] = [
    {"row_decay": 1.0},
    {"row_decay": -0.1},
    {"momentum": 1.5},
    {"warmup": -1},
    {"full_steps": 0},
    {"margin": 0.0},
]


@pytest.mark.parametrize("options", WRONG)
def test_refusals_of_spectral(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        kfacopt.Spectral(**options)  # type: ignore[arg-type]


class OwnLSTM(nn.LSTM):
    """A subclass with a forward of its own, which may compute anything."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x)


class Gates(nn.Module):
    """Attention, recurrent layers and a head: matrices that the handler refuses among such as handlers cover."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.recurrent = OwnLSTM(4, 3, 2, batch_first=True)
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        mixed, _ = self.attention(x, x, x, need_weights=False)
        hidden, _ = self.recurrent(mixed)
        return self.head(hidden[:, -1])


def recurrent_case() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Gates().double().eval(), nn.MSELoss(), torch.randn(6, 5, 4).double(), torch.randn(6, 2).double()


def test_matrices_without_curvature_take_the_spectral_step_of_no_curvature() -> None:
    model, loss, x, y = recurrent_case()
    direction = kfacopt.Spectral(momentum=0.0, polar=svd_polar, row_decay=None, margin=None)
    optimizer = kfacopt.SpectralDescent(model, loss, lr=1.0, adamw_lr=0.0, direction=direction)
    treatments = {(row.module, name): row.treatment for row in optimizer.coverage().rows for name in row.parameters}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(optimizer, model, loss, x, y)
    shapes = {name: p.shape for name, p in model.named_parameters() if name.startswith("recurrent.weight")}
    groups = {name: (4, 3, shape[1]) for name, shape in shapes.items()}
    covered = {p for layer in optimizer._layers for p in layer.parameters.values()}
    if model.attention.in_proj_weight not in covered:
        groups["attention.in_proj_weight"] = (3, 4, 4)
    for name, shape in groups.items():
        module, _, own = name.rpartition(".")
        assert treatments[module, own] == "spectral step, no curvature"
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        factor = svd_polar(parameter.grad.reshape(shape))
        step = before[name] - parameter.detach()
        want = (factor * (shape[0] * shape[1]) ** 0.5 / factor.norm()).reshape(parameter.shape)
        torch.testing.assert_close(step, want, rtol=1e-9, atol=1e-11)
    assert treatments["", "position"] == treatments["recurrent", "bias_ih_l0"] == "AdamW"


def test_a_layer_whose_use_is_not_seen_goes_on_without_curvature() -> None:
    """The residual of a differential equation: layers in a derivative of the model that the loop takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = kfacopt.SpectralDescent(model, nn.MSELoss(), lr=5e-2)
    x = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None].requires_grad_()
    losses = []
    for number in range(30):
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = nn.functional.mse_loss(slope, torch.cos(3.0 * x.detach()))
        optimizer.zero_grad()
        loss.backward()
        with nullcontext() if number else pytest.warns(UserWarning, match="no backward shows the curvature"):
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    rows = {row.parameters: row.treatment for row in optimizer.coverage().rows}
    assert rows[("weight", "bias")] == "spectral step, no curvature"


def test_frozen_refused_and_set_aside_matrices_are_no_plain_ones() -> None:
    model, loss, x, y = recurrent_case()
    assert isinstance(model, Gates)
    model.recurrent.weight_ih_l0.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": [model.attention.in_proj_weight], "curvature": False, "lr": 1e-3},
        {"params": [p for p in model.parameters() if p is not model.attention.in_proj_weight]},
    ]
    left_out = kfacopt.Spectral(layers=lambda layer: layer.name != "head")
    optimizer = kfacopt.SpectralDescent(model, loss, groups, direction=left_out)
    recurrent = model.recurrent
    plain = {recurrent.weight_hh_l0, recurrent.weight_ih_l1, recurrent.weight_hh_l1}
    assert set(optimizer._plain) - {model.attention.out_proj.weight} == plain
    before = copy.deepcopy(model.state_dict())
    train_step(optimizer, model, loss, x, y)
    assert torch.equal(before["recurrent.weight_ih_l0"], model.recurrent.weight_ih_l0)
    assert not torch.equal(before["recurrent.weight_hh_l0"], model.recurrent.weight_hh_l0)


def test_plain_matrices_resume_bit_for_bit() -> None:
    model, loss, x, y = recurrent_case()
    optimizer = kfacopt.SpectralDescent(model, loss)
    for _ in range(3):
        train_step(optimizer, model, loss, x, y)
    twin = copy.deepcopy(model)
    other = kfacopt.SpectralDescent(twin, loss)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        train_step(optimizer, model, loss, x, y)
        train_step(other, twin, loss, x, y)
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_usual_norms_belong_to_their_parameters_whichever_have_a_gradient() -> None:
    """The places that are kept are found anew when other parameters are stepped than before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    direction = kfacopt.ClippedGradients(kfacopt.Spectral(), limit=1e9, decay=0.5)
    made = kfacopt.SpectralDescent(model, nn.MSELoss(), direction=direction)
    usual: dict[nn.Parameter, Tensor] = {}
    for without in ((), (0,), (2, 3), ()):
        made.zero_grad()
        nn.functional.mse_loss(model(torch.randn(5, 3).double()), torch.randn(5, 3).double()).backward()
        for place, p in enumerate(model.parameters()):
            if place in without:
                p.grad = None
            elif p.grad is not None:
                norm = p.grad.norm()
                usual[p] = usual[p].lerp(norm, 0.5) if p in usual else norm
        made.step()
        expected = torch.stack([usual.get(p, torch.zeros(()).double()) for p in model.parameters()])
        torch.testing.assert_close(made.state_dict()["curvature"]["direction"]["usual_norms"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row_decay", [0.95, None])
def test_a_wide_layer_without_gradient_stays(row_decay: float | None, dtype: torch.dtype) -> None:
    """Its step has a length above 4, which over the smallest normal number would be infinite."""
    model = nn.Linear(3, 40).to(dtype)
    made = kfacopt.SpectralDescent(model, nn.MSELoss(), direction=kfacopt.Spectral(row_decay=row_decay))
    before = parameters_of(model)
    (0.0 * model(torch.randn(4, 3, dtype=dtype))).sum().backward()
    made.step()
    assert made.health()["skipped_steps"] == 0.0
    assert all(torch.equal(old, new.detach()) for old, new in zip(before, model.parameters(), strict=True))


def test_a_step_that_is_not_finite_is_forgotten() -> None:
    """It is skipped, and the next one is taken: running means of squares have none of it."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 4).double(), (torch.randn(8, 3).double(), torch.randn(8, 4).double())
    broken: list[bool] = [False, True, False]

    def polar(matrix: Tensor) -> Tensor:
        return svd_polar(matrix) * (torch.nan if broken.pop(0) else 1.0)

    made = kfacopt.SpectralDescent(model, nn.MSELoss(), direction=kfacopt.Spectral(polar=polar))
    moved = []
    for _ in range(3):
        before = model.weight.detach().clone()
        train_step(made, model, nn.MSELoss(), x, y)
        moved.append(not torch.equal(before, model.weight))
    assert moved == [True, False, True]
    assert made.health()["skipped_steps"] == 1.0


# -- cautious weight decay -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 7, 15])
def test_decay_takes_off_what_the_step_makes_smaller_anyway(number: int) -> None:
    def last_step(decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters before step `number`, the only one with decay, and after it."""
        model, loss, x, y = BY_NAME["mlp-ce"].make()
        made = kfacopt.SpectralDescent(model, loss, direction=kfacopt.Spectral(decay=0.0), lr=0.1)
        for step in range(number + 1):
            made.param_groups[0]["cautious_decay"] = decay if step == number else 0.0
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            train_step(made, model, loss, x, y)
        return before, dict(model.named_parameters())

    (before, free), (_, decayed) = last_step(0.0), last_step(0.5)
    due = number in (7, 15)
    for name, p in decayed.items():
        alike = (before[name] - free[name]) * before[name] > 0
        part = 0.1 * 0.5 * spectral._DECAY_EVERY if due and p.ndim > 1 else 0.0
        torch.testing.assert_close(p, free[name] - part * before[name] * alike)


def at_step(number: int, groups: Any, *likelihoods: Likelihood) -> Any:
    """What of a step the decay is told."""
    estimator = SimpleNamespace(likelihoods=dict(enumerate(likelihoods)))
    return SimpleNamespace(number=number, groups=groups, estimator=estimator)


@pytest.mark.parametrize(
    ("likelihoods", "whole"),
    [((Categorical(),), 64), ((Bernoulli(),), 64), ((Gaussian(),), 4), ((Categorical(), Gaussian()), 4)],
)
def test_decay_falls_as_steps_do_and_later_of_classes(likelihoods: tuple[Likelihood, ...], whole: int) -> None:
    direction = kfacopt.Spectral(full_steps=4)
    weight = nn.Parameter(torch.ones(2, 2))
    groups = [{"params": [weight], "cautious_decay": 0.2}]
    first, last, late = (
        direction._decays(at_step(number, groups, *likelihoods), [weight])[weight]
        for number in (0, whole - 1, 4 * whole - 1)
    )
    assert first == last == pytest.approx(8 * 0.2)
    assert late == pytest.approx(first / 2)


def test_whoever_says_weight_decay_has_no_other() -> None:
    model = mlp()
    made = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss())
    assert made.param_groups[0]["cautious_decay"] > 0.0 == made.param_groups[0]["weight_decay"]
    made = kfacopt.KFAC(model, nn.CrossEntropyLoss(), weight_decay=0.1)
    assert made.param_groups[0]["cautious_decay"] == 0.0 < made.param_groups[0]["weight_decay"]
    first, *rest = model.parameters()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": rest}]
    made = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(), groups)
    assert [group["cautious_decay"] > 0.0 for group in made.param_groups] == [False, True]
    assert "cautious_decay" not in kfacopt.KFAC(model, nn.CrossEntropyLoss(), kl_clip=0.1).param_groups[0]


def test_a_state_without_decay_goes_on_without() -> None:
    model, loss, x, y = BY_NAME["mlp-ce"].make()
    made = kfacopt.SpectralDescent(model, loss)
    train_step(made, model, loss, x, y)
    state = made.state_dict()
    del state["param_groups"][0]["cautious_decay"]
    made.load_state_dict(state)
    assert not made.direction.direction._decays(at_step(7, made.param_groups, Categorical()), model.parameters())  # type: ignore[attr-defined]
    train_step(made, model, loss, x, y)
