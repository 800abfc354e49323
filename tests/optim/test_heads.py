"""Several outputs with a loss each: the curvature is the sum of theirs, whatever way the loop adds them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfacopt
from tests import reference
from tests.cases import exact_ekfac, still
from tests.reports.reports import heard
from tests.test_curvature import CLOSE, dense_basis, factors, grouped, kronecker

DATA = 6
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(DATA, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(3, (DATA,), generator=GENERATOR)
BOXES = torch.randn(DATA, 2, generator=GENERATOR, dtype=torch.float64)
MASKS = torch.rand(DATA, 2, generator=GENERATOR, dtype=torch.float64)

CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss


class Named(NamedTuple):
    label: Tensor
    box: Tensor


@dataclass
class Record:
    label: Tensor
    box: Tensor
    note: str = "more"


WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda label, box: {"label": label, "box": box, "other": None},
    "tuple": lambda label, box: (label, box),
    "named tuple": Named,
    "object": Record,
}


class Heads(nn.Module):
    """A trunk and two heads."""

    def __init__(self, way: str = "dict", linear: bool = False) -> None:
        super().__init__()
        self.trunk, self.label, self.box = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.way, self.linear = way, linear

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x) if self.linear else self.trunk(x).tanh()
        return WAYS[self.way](self.label(h), self.box(h))


class Head(nn.Module):
    """One output of a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)[self.name]
        return result


def heads(way: str = "dict", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Heads(way, **options).double()


Truth = dict[str, tuple[float, nn.Module, Tensor]]
TRUTH: Truth = {"label": (1.0, CE(), LABELS), "box": (0.5, MSE(), BOXES)}


def dense(model: nn.Module, layer: Any, truth: Truth, x: Tensor = X) -> Tensor:
    """The layer's block of the GGN of the weighted sum; a layer that a head does not reach has a zero Jacobian."""
    before, model.way = getattr(model, "way", "dict"), "dict"
    total = sum(w * reference.ggn(Head(model, name), loss, layer, x, y) for name, (w, loss, y) in truth.items())
    model.way = before
    assert isinstance(total, Tensor)
    return total


def assert_exact(optimizer: Any, model: nn.Module, truth: Truth, factor: float = 1.0, without: str = "") -> None:
    """EKFAC's corrected eigenvalues are the diagonal of the dense block in the eigenbasis."""
    for layer in optimizer._layers:
        block = optimizer.backend.blocks[layer.name]
        if layer.name == without:
            assert not block.estimated
            continue
        basis = dense_basis(block)
        want = factor * (basis.mT @ dense(model, layer, truth) @ basis).diagonal(dim1=1, dim2=2)
        close = CLOSE | {"atol": CLOSE["atol"] * max(1.0, factor)}
        torch.testing.assert_close(grouped(block.corrected.value, 2).flatten(1), want, **close)


def seen(optimizer: Any, model: nn.Module, backward: Callable[[nn.Module], None]) -> None:
    """Two steps that move nothing; the second has an eigenbasis."""
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def together(model: nn.Module) -> None:
    out = model(X)
    (F.cross_entropy(out["label"], LABELS) + 0.5 * F.mse_loss(out["box"], BOXES)).backward()


def apart(model: nn.Module) -> None:
    out = model(X)
    F.cross_entropy(out["label"], LABELS).backward(retain_graph=True)
    (0.5 * F.mse_loss(out["box"], BOXES)).backward()


def apart_the_other_way(model: nn.Module) -> None:
    out = model(X)
    (0.5 * F.mse_loss(out["box"], BOXES)).backward(retain_graph=True)
    F.cross_entropy(out["label"], LABELS).backward()


def two_forwards(model: nn.Module) -> None:
    F.cross_entropy(model(X)["label"], LABELS).backward()
    (0.5 * F.mse_loss(model(X)["box"], BOXES)).backward()


def micro_batches(model: nn.Module) -> None:
    for i in torch.arange(DATA).chunk(3):
        out = model(X[i])
        ((F.cross_entropy(out["label"], LABELS[i]) + 0.5 * F.mse_loss(out["box"], BOXES[i])) / 3).backward()


def by_roots(model: nn.Module) -> None:
    out = model(X)
    torch.autograd.backward([F.cross_entropy(out["label"], LABELS), 0.5 * F.mse_loss(out["box"], BOXES)])


LOOPS = (together, apart, apart_the_other_way, two_forwards, micro_batches, by_roots)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("optimizer", [kfacopt.EKFAC, exact_ekfac], ids=["partial", "exact"])
def test_the_curvature_is_the_sum_however_it_is_added_up(loop: Callable[[nn.Module], None], optimizer: Any) -> None:
    model = heads()
    made = optimizer(model, {"label": CE(), "box": (0.5, MSE())}, **still())
    seen(made, model, loop)
    assert_exact(made, model, TRUTH)


@pytest.mark.parametrize("factor", [3.0, 65536.0])
def test_a_factor_of_the_whole_loss_is_in_it(factor: float) -> None:
    """Squared errors, whose own does not tell, have that of the other loss."""
    for first in ("label", "box"):
        model = heads()
        order = {"label": CE(), "box": (0.5, MSE())}
        made = exact_ekfac(model, {first: order[first]} | order, **still())

        def loop(model: nn.Module) -> None:
            out = model(X)
            (factor * (F.cross_entropy(out["label"], LABELS) + 0.5 * F.mse_loss(out["box"], BOXES))).backward()

        seen(made, model, loop)
        assert_exact(made, model, TRUTH, factor)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent, kfacopt.NaturalGradient])
def test_a_grad_scaler_changes_no_step(optimizer: Any) -> None:
    moved = []
    for enabled in (False, True):
        model = heads()
        made = optimizer(model, {"label": CE(), "box": (0.5, MSE())}, damping=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(3):
            made.zero_grad()
            out = model(X)
            loss = F.cross_entropy(out["label"], LABELS) + 0.5 * F.mse_loss(out["box"], BOXES)
            scaler.scale(loss).backward()
            scaler.step(made)
            scaler.update()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(moved[0], moved[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by_place", [False, True])
def test_outputs_are_found_by_name_or_by_place(way: str, by_place: bool) -> None:
    losses: Any = (CE(), (0.5, MSE())) if by_place else {"label": CE(), "box": (0.5, MSE())}
    model = heads(way)
    made = exact_ekfac(model, losses, **still())

    def unpacked(model: nn.Module) -> None:
        out = model(X)
        label = out["label"] if way == "dict" else (out.label if way == "object" else out[0])
        box = out["box"] if way == "dict" else (out.box if way == "object" else out[1])
        (F.cross_entropy(label, LABELS) + 0.5 * F.mse_loss(box, BOXES)).backward()

    if (way in ("dict", "object") and by_place) or (way == "tuple" and not by_place):
        with pytest.raises(ValueError, match=r"has no tensors .* which loss_func names"):
            unpacked(model)
        return
    seen(made, model, unpacked)
    assert_exact(made, model, TRUTH)


@pytest.mark.parametrize("name", ["label", "box"])
def test_a_loss_that_is_left_out_of_a_step_has_no_curvature_there(name: str) -> None:
    model = heads()
    made = exact_ekfac(model, {"label": CE(), "box": MSE()}, **still())

    def loop(model: nn.Module) -> None:
        out = model(X)
        loss = F.cross_entropy(out["label"], LABELS) if name == "label" else F.mse_loss(out["box"], BOXES)
        loss.backward()

    with heard():  # that a layer is never reached is said
        seen(made, model, loop)
    whole = {"label": (1.0, CE(), LABELS), "box": (1.0, MSE(), BOXES)}
    assert_exact(made, model, {name: whole[name]}, without="box" if name == "label" else "label")


def test_ignored_targets_of_one_task_leave_the_other() -> None:
    model, labels = heads(), torch.where(torch.arange(DATA) < 3, -100, LABELS)
    made = exact_ekfac(model, {"label": CE(), "box": MSE()}, **still())

    def loop(model: nn.Module) -> None:
        out = model(X)
        (F.cross_entropy(out["label"], labels) + F.mse_loss(out["box"], BOXES)).backward()

    seen(made, model, loop)
    assert_exact(made, model, {"label": (1.0, CE(), labels), "box": (1.0, MSE(), BOXES)})


def test_other_weights_than_announced_are_those_of_the_loop_or_said() -> None:
    """Cross-entropies tell theirs; of squared errors the value of the loss contradicts the announced one."""
    model = heads()
    made = exact_ekfac(model, {"label": CE(), "box": BCE()}, **still())

    def loop(model: nn.Module) -> None:
        out = model(X)
        hard = (MASKS > 0.5).double()
        loss = 2.0 * F.cross_entropy(out["label"], LABELS)
        (loss + 0.25 * F.binary_cross_entropy_with_logits(out["box"], hard)).backward()

    seen(made, model, loop)
    assert_exact(made, model, {"label": (2.0, CE(), LABELS), "box": (0.25, BCE(), (MASKS > 0.5).double())})
    made.close()
    with pytest.warns(UserWarning, match="constant factor"):
        seen(kfacopt.EKFAC(model, {"label": CE(), "box": (7.0, MSE())}, **still()), model, together)


def test_the_modules_tell_the_weights_of_squares_too() -> None:
    model, box = heads(), MSE(reduction="none")
    made = exact_ekfac(model, {"label": CE(), "box": box}, **still())
    weights = torch.linspace(0.5, 2.0, DATA, dtype=torch.float64)

    def loop(model: nn.Module) -> None:
        out = model(X)
        (F.cross_entropy(out["label"], LABELS) + (weights[:, None] * box(out["box"], BOXES)).mean()).backward()

    class Weighted(nn.Module):
        reduction = "mean"

        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return (weights[:, None] * (f - y).square()).mean()

    seen(made, model, loop)
    assert_exact(made, model, {"label": (1.0, CE(), LABELS), "box": (1.0, Weighted(), BOXES)})


def test_kfac_is_the_dense_block_where_both_are() -> None:
    """No activation and squared errors: A is the same for both heads, and their G add up."""
    model = heads(linear=True)
    made = kfacopt.KFAC(model, {"label": (2.0, MSE()), "box": (0.5, MSE())}, **still())
    targets = torch.randn(DATA, 3, generator=GENERATOR, dtype=torch.float64)

    def loop(model: nn.Module) -> None:
        out = model(X)
        (2.0 * F.mse_loss(out["label"], targets) + 0.5 * F.mse_loss(out["box"], BOXES)).backward()

    seen(made, model, loop)
    truth: Truth = {"label": (2.0, MSE(), targets), "box": (0.5, MSE(), BOXES)}
    for layer in made._layers:
        found = kronecker(*factors(made.backend.blocks[layer.name]))
        torch.testing.assert_close(found, dense(model, layer, truth), **CLOSE)


@pytest.mark.parametrize("solver", [kfacopt.Gram, lambda: kfacopt.CG(tolerance=1e-11, progress=None)])
@pytest.mark.parametrize("way", ["tuple", "object"])
def test_natural_gradient_takes_the_dense_step(way: str, solver: Any) -> None:
    model, damping = heads(way), 0.1
    losses: Any = (CE(), (0.5, MSE())) if way == "tuple" else {"label": CE(), "box": (0.5, MSE())}
    made = kfacopt.NaturalGradient(model, losses, solver=solver(), damping=damping)
    out = model(X)
    label, box = out if isinstance(out, tuple) else (out.label, out.box)
    (F.cross_entropy(label, LABELS) + 0.5 * F.mse_loss(box, BOXES)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    model.way = "dict"
    curvature = sum(w * reference.whole_ggn(Head(model, n), loss, X, y) for n, (w, loss, y) in TRUTH.items())
    model.way = way  # type: ignore[assignment]
    made.step()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    want = torch.linalg.solve(curvature + damping * torch.eye(len(step)), gradient)
    torch.testing.assert_close(step, want, rtol=1e-7, atol=1e-9)


class Deep(nn.Module):
    """A loss on an output that the next is computed from (deep supervision)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = self.first(x)
        return {"early": early, "late": self.second(early.tanh())}


@pytest.mark.parametrize("early", [0.3, 1.0])
@pytest.mark.parametrize("backwards", [1, 2])
def test_a_loss_of_an_intermediate_output(early: float, backwards: int) -> None:
    torch.manual_seed(0)
    model = Deep().double()
    made = exact_ekfac(model, {"late": CE(), "early": (early, CE())}, **still())

    def loop(model: nn.Module) -> None:
        out = model(X)
        late, other = F.cross_entropy(out["late"], LABELS), early * F.cross_entropy(out["early"], LABELS)
        if backwards == 1:
            (late + other).backward()
        else:
            late.backward(retain_graph=True)
            other.backward()

    seen(made, model, loop)
    assert_exact(made, model, {"late": (1.0, CE(), LABELS), "early": (early, CE(), LABELS)})


@pytest.mark.parametrize("curvature", ["mc", "empirical"])
def test_sampled_and_empirical(curvature: str) -> None:
    model, losses = heads(), {"label": CE(), "box": BCE()}
    fisher = kfacopt.Fisher("mc", samples=2000) if curvature == "mc" else "empirical"
    made = exact_ekfac(model, losses, **still(curvature=fisher))
    hard = (MASKS > 0.5).double()

    def loop(model: nn.Module) -> None:
        out = model(X)
        loss = F.cross_entropy(out["label"], LABELS)
        (loss + 0.25 * F.binary_cross_entropy_with_logits(out["box"], hard)).backward()

    seen(made, model, loop)
    truth: Truth = {"label": (1.0, CE(), LABELS), "box": (0.25, BCE(), hard)}
    for layer in made._layers:
        block = made.backend.blocks[layer.name]
        trace = float(block.corrected.value.sum())
        if curvature == "mc":
            assert trace == pytest.approx(
                float(dense(model, layer, truth).detach().diagonal(dim1=1, dim2=2).sum()), rel=0.1
            )
            continue
        want = 0.0
        for name, (weight, loss, y) in truth.items():
            head = Head(model, name)
            g = reference.term_gradients(loss, head(X), y)
            count = reference.term_count(loss, head(X), y)
            moment = reference.fisher(head, layer, X, g, count)
            want += weight * float(moment.detach().diagonal(dim1=1, dim2=2).sum())
        assert trace == pytest.approx(want)


def test_the_empirical_fisher_needs_to_know_each_weight() -> None:
    model, box = heads(), MSE()
    made = kfacopt.KFAC(model, {"label": CE(), "box": (0.5, box)}, **still(curvature="empirical"))
    with pytest.raises(ValueError, match=r"several losses: what 'box' .* call the very loss module"):
        together(model)
    made.zero_grad()
    out = model(X)
    (F.cross_entropy(out["label"], LABELS) + 0.5 * box(out["box"], BOXES)).backward()
    made.step()


def test_refusals_name_the_loss() -> None:
    for losses, message in (
        ({}, "empty dict"),
        ((), "empty dict"),
        ((0.5, MSE()), "of a sole loss it has no meaning"),
        ({"label": (0.0, CE())}, "weight of loss term 'label' must be positive"),
        ((CE(), MSE(reduction="sum")), "loss term '1' has reduction='sum'"),
    ):
        with pytest.raises(ValueError, match=message):
            kfacopt.EKFAC(heads(), losses)  # type: ignore[arg-type]
    model = heads()
    kfacopt.EKFAC(model, {"label": CE(), "depth": MSE()})
    with pytest.raises(ValueError, match=r"has no tensors \['depth'\].*'label', 'box'"):
        together(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": "auto"}, {"damping_rule": kfacopt.LevenbergMarquardt(every=1)}],
    ids=["plain", "auto", "damping rule"],
)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent])
def test_they_train_and_resume(optimizer: Any, options: dict[str, Any]) -> None:
    if optimizer is kfacopt.SpectralDescent and options:
        pytest.skip("its length is its own")
    values, losses = [], {"label": CE(), "box": (0.5, MSE())}
    model = heads()
    made = optimizer(model, losses, **options)
    for turn in range(20):
        made.zero_grad()
        together(model)
        made.step()
        with torch.no_grad():
            out = model(X)
            values.append(float(F.cross_entropy(out["label"], LABELS) + 0.5 * F.mse_loss(out["box"], BOXES)))
        if turn == 10:
            state = made.state_dict()
            made.close()
            made = optimizer(model, losses, **options)
            made.load_state_dict(state)
    assert values[-1] < values[0]


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_a_functional_loss_with_errors_beyond_its_threshold_is_not_doubted(size: float) -> None:
    """Their size is in no gradient, so that the value cannot be compared (a warning would be an error)."""
    torch.manual_seed(0)
    model = Heads().double()
    optimizer = kfacopt.KFAC(model, {"label": CE(), "box": nn.HuberLoss()}, lr=0.0)
    x, labels = torch.randn(8, 4).double(), torch.randint(3, (8,))
    out = model(x)
    target = out["box"].detach() + size * torch.randn(8, 2).double()
    (F.cross_entropy(out["label"], labels) + F.huber_loss(out["box"], target)).backward()
    optimizer.step()
