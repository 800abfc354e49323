"""ChainHessian and ChainGGN against dense float64 Hessians of torch.func."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from kfacopt.linalg.riccati import RiccatiFactorization
from kfacopt.operators import CGInverseLinearOperator, ChainGGN, ChainHessian, IdentityLinearOperator, Residual
from kfacopt.operators.convergence import ConvergenceWarning
from tests.cases import bits, classes, reals

THREE, LABELS = reals(3), classes(2)
Truth = Callable[..., Tensor]
DAMPINGS = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0)


def dropped() -> list[nn.Module]:
    return [nn.Flatten(), *mlp(), nn.Identity(), nn.Dropout(0.0), nn.Unflatten(1, (2, 1))]


def pre_activated() -> list[nn.Module]:
    return [nn.Tanh(), nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2), nn.Tanh()]


def residual_nested() -> nn.Module:
    return Residual(nn.Tanh(), Residual(nn.Linear(4, 4), nn.SiLU()), nn.Linear(4, 4))


def residual_first() -> list[nn.Module]:
    return [Residual(nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 2)]


@dataclass(frozen=True)
class Chain:
    """A chain of layers with a loss and a batch, small enough for a dense Hessian."""

    name: str
    layers: Callable[[], list[nn.Module]]
    inputs: Callable[[int], Tensor] = THREE
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    targets: Callable[[int], Tensor] = LABELS
    data: int = 5

    def make(self) -> tuple[nn.Sequential, nn.Module, Tensor, Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(*self.layers()).double()
        for parameter in model.parameters():  # norms start at one and zero, where some derivatives vanish
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        return model, self.loss(), self.inputs(self.data), self.targets(self.data)


def around(*middle: Callable[[], nn.Module]) -> Callable[[], list[nn.Module]]:
    """Layers of width four between two linear layers."""
    return lambda: [nn.Linear(3, 4), *(make() for make in middle), nn.Linear(4, 2)]


def mlp() -> list[nn.Module]:
    return [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]


def weighted() -> nn.Module:
    weight = torch.tensor([0.5, 2.0])
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, ignore_index=7)


def partly_ignored(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 1, 7, torch.randint(2, (n,)))


def weighted_bce() -> nn.Module:
    return nn.BCEWithLogitsLoss(weight=torch.tensor([0.5, 2.0]), pos_weight=torch.tensor([3.0, 1.0]))


def partly_frozen() -> list[nn.Module]:
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)]
    layers[0].requires_grad_(False)
    layers[2].weight.requires_grad_(False)
    layers[4].bias.requires_grad_(False)
    layers[5].bias.requires_grad_(False)
    layers[6].requires_grad_(False)
    return layers


def batch_norm() -> list[nn.Module]:
    norm = nn.BatchNorm1d(4)
    norm.running_mean += 0.3
    norm.running_var *= 2.0
    return [nn.Linear(3, 4), nn.Tanh(), norm.eval(), nn.Linear(4, 2)]


def convolutional_2d() -> list[nn.Module]:
    return [
        nn.Conv2d(2, 2, 2, padding=1, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 1, groups=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ]


ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    lambda: nn.ReLU(inplace=True),
    nn.ReLU6,
    nn.SELU,
    lambda: nn.SiLU(inplace=True),
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    lambda: nn.Threshold(0.1, 0.2),
)
ALL_ACTIVATIONS = tuple(Chain(f"activation-{make()._get_name()}", around(make)) for make in ACTIVATIONS)
LAYERS = (
    Chain("linear", lambda: [nn.Linear(3, 2)]),
    Chain("deep", lambda: [m for _ in range(5) for m in (nn.Linear(3, 3), nn.Tanh())]),
    Chain("no-bias", lambda: [nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)]),
    Chain("linear-only", lambda: [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)]),
    Chain("wide", lambda: [nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2)]),
    Chain("one-datum", mlp, data=1),
    Chain("many-data", mlp, data=12),
    Chain("sequence", mlp, reals(2, 3), nn.MSELoss, reals(2, 2), data=3),
    Chain("activation-at-both-ends", pre_activated),
    Chain("nested", lambda: [nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 2))]),
    Chain("arranging", dropped, reals(3, 1), nn.MSELoss, reals(2, 1)),
    Chain("layer-norm", around(nn.Tanh, lambda: nn.LayerNorm(4))),
    Chain("layer-norm-plain", around(lambda: nn.LayerNorm(4, elementwise_affine=False))),
    Chain("rms-norm", around(nn.Tanh, lambda: nn.RMSNorm(4))),
    Chain("group-norm", around(nn.Tanh, lambda: nn.GroupNorm(2, 4))),
    Chain("batch-norm-eval", batch_norm),
    Chain("conv-1d", lambda: [nn.Conv1d(2, 2, 2, dilation=2), nn.Tanh(), nn.Conv1d(2, 2, 2, padding="same"),
                              nn.AvgPool1d(2), nn.Flatten(), nn.Linear(2, 2)], reals(2, 4), data=3),
    Chain("conv-2d", convolutional_2d, reals(2, 4, 4), data=3),
    Chain("conv-3d", lambda: [nn.Conv3d(1, 2, 2), nn.SiLU(), nn.Flatten(), nn.Linear(4, 2)], reals(1, 2, 3, 2), data=3),
    Chain("conv-transposed", lambda: [nn.ConvTranspose1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)],
          reals(1, 3), data=3),
    Chain("residual", around(lambda: Residual(nn.Linear(4, 4), nn.Tanh()))),
    Chain("residual-nested", around(residual_nested)),
    Chain("residual-row", around(*[lambda: Residual(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU())] * 3)),
    Chain("residual-first", residual_first),
    Chain("frozen", partly_frozen),
)  # fmt: skip
LOSSES = (
    Chain("ce-sum", mlp, loss=lambda: nn.CrossEntropyLoss(reduction="sum")),
    Chain("ce-weighted", mlp, loss=weighted, targets=partly_ignored),
    Chain("ce-soft", mlp, targets=lambda n: torch.rand(n, 2).double().softmax(-1)),
    Chain("ce-positions", lambda: [*mlp(), nn.Unflatten(1, (2, 1))], targets=classes(2, 1)),
    Chain("mse", mlp, loss=nn.MSELoss, targets=reals(2)),
    Chain("mse-sum", mlp, loss=lambda: nn.MSELoss(reduction="sum"), targets=reals(2)),
    Chain("bce", mlp, loss=nn.BCEWithLogitsLoss, targets=bits(2)),
    Chain("bce-sum", mlp, loss=lambda: nn.BCEWithLogitsLoss(reduction="sum"), targets=bits(2)),
    Chain("bce-weighted", mlp, loss=weighted_bce, targets=bits(2)),
)
BY_NAME = {chain.name: chain for chain in LAYERS + LOSSES + ALL_ACTIVATIONS}
every = pytest.mark.parametrize("chain", BY_NAME.values(), ids=BY_NAME)
# Enough kinds for what does not depend on a layer's derivatives.
some = pytest.mark.parametrize("name", ["deep", "wide", "conv-1d", "residual-nested", "frozen", "mse-sum"])


def pieces(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    named = [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
    return [n for n, _ in named], [p for _, p in named]


def dense_hessian(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    names, parts = pieces(model)
    loss = loss.double()

    def value(flat: Tensor) -> Tensor:
        split = [q.reshape(p.shape) for q, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        result: Tensor = loss(functional_call(model, dict(zip(names, split, strict=True)), (x,)), y)
        return result

    result: Tensor = jacrev(grad(value))(torch.cat([p.flatten() for p in parts]))
    return result


def dense_ggn(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    names, parts = pieces(model)
    loss = loss.double()
    prediction = model(x).detach()
    jacobians = jacrev(lambda q: functional_call(model, q, (x,)))(dict(zip(names, parts, strict=True)))
    flat = torch.cat([jacobians[n].reshape(prediction.numel(), -1) for n in names], dim=1)
    hessian = jacrev(grad(lambda f: loss(f.reshape(prediction.shape), y)))(prediction.flatten())
    return flat.T @ hessian @ flat


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    assert float((got - want).norm()) <= tolerance * max(1e-3, float(want.norm()))


KINDS = {"hessian": (ChainHessian, dense_hessian), "ggn": (ChainGGN, dense_ggn)}
kinds = pytest.mark.parametrize(("operator", "truth"), KINDS.values(), ids=KINDS)


@kinds
@every
def test_product_solve_inertia_and_determinant(chain: Chain, operator: type[ChainHessian], truth: Truth):
    model, loss, x, y = chain.make()
    dense, curvature = truth(model, loss, x, y), operator(model, loss, x, y)
    unit = torch.eye(len(dense), dtype=torch.float64)
    assert_near(curvature @ unit, dense, 1e-12)
    b = torch.randn(len(dense), 2, dtype=torch.float64)
    for damping in DAMPINGS:
        want = torch.linalg.solve(dense + damping * unit, b)
        assert_near(curvature.solve(b, damping), want)
        assert curvature.stats is not None
        assert curvature.stats.residual <= 1e-8
        eigenvalues = torch.linalg.eigvalsh(dense) + damping
        assert curvature.inertia(damping) == int((eigenvalues < 0).sum())
        assert curvature.positive_definite(2.0 * damping) == bool((eigenvalues + damping > 0).all())
        # The recursion's values grow with 1 / damping, so eigenvalues as small as the damping keep that many digits.
        logdet = float(eigenvalues.abs().log().sum())
        assert curvature.logdet(damping) == pytest.approx(logdet, abs=1e-9 + 1e-15 / damping**2)


@every
def test_gradient(chain: Chain) -> None:
    model, loss, x, y = chain.make()
    loss.double()(model(x), y).backward()
    want = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(ChainHessian(model, loss, x, y).gradient, want, rtol=1e-10, atol=1e-13)


@some
def test_a_negative_damping_counts_the_eigenvalues_below(name: str) -> None:
    chain = BY_NAME[name]
    model, loss, x, y = chain.make()
    eigenvalues, H = torch.linalg.eigvalsh(dense_hessian(model, loss, x, y)), ChainHessian(model, loss, x, y)
    for shift in (1e-3, 0.03, 0.5):
        assert H.inertia(-shift) == int((eigenvalues < shift).sum())


@some
def test_formats(name: str) -> None:
    model, loss, x, y = BY_NAME[name].make()
    H = ChainHessian(model, loss, x, y)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    columns = [torch.randn(*s, 3, dtype=torch.float64) for s in shapes]
    flat = torch.cat([c.reshape(-1, 3) for c in columns])
    for apply in (H.__matmul__, lambda v: H.solve(v, 0.1)):
        whole = apply(flat)
        assert_near(torch.cat([c.reshape(-1, 3) for c in apply(columns)]), whole, 1e-12)
        assert_near(apply(flat[:, 1]), whole[:, 1], 1e-11)
        assert_near(torch.cat([c.flatten() for c in apply([c[..., 1] for c in columns])]), whole[:, 1], 1e-11)
    assert H.shape == (len(flat), len(flat))
    with pytest.raises(ValueError, match="is applied to a tensor of shape"):
        H.solve(flat[1:], 0.1)


def test_float32_models_are_computed_in_float64() -> None:
    model, loss, x, y = BY_NAME["deep"].make()
    model, x = model.float(), x.float()
    H = ChainHessian(model, loss, x, y)
    dense = dense_hessian(model.double(), loss, x.double(), y)
    b = torch.randn(len(dense))
    got = H.solve(b, 1e-3)
    assert got.dtype == H.dtype == torch.float32
    want = torch.linalg.solve(dense + 1e-3 * torch.eye(len(dense)), b.double())
    assert_near(got.double(), want, 1e-6)
    assert H.stats is not None
    assert H.stats.residual < 1e-12


def test_float32_throughout_for_those_who_want_it() -> None:
    model, loss, x, y = BY_NAME["residual-nested"].make()
    exact = ChainHessian(model, loss, x, y)
    H = ChainHessian(model.float(), loss.float(), x.float(), y, dtype=torch.float32, tolerance=1e-4)
    b = torch.randn(H.shape[0])
    assert_near(H.solve(b, 0.1).double(), exact.solve(b.double(), 0.1), 1e-4)


def test_later_changes_of_the_parameters_are_not_seen() -> None:
    model, loss, x, y = BY_NAME["deep"].make()
    H = ChainHessian(model, loss, x, y)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    before = H @ v
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    assert torch.equal(H @ v, before)


def orthogonal_chain(data: int, width: int, depth: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The chain of the benchmark."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, gain=1.2)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers).double(), *torch.randn(2, data, width, dtype=torch.float64)


@pytest.mark.parametrize(("data", "width", "depth"), [(1, 24, 16), (4, 8, 64), (16, 4, 64)])
def test_residual_at_depth(data: int, width: int, depth: int) -> None:
    model, x, y = orthogonal_chain(data, width, depth)
    H = ChainHessian(model, nn.MSELoss(), x, y)
    assert H.inertia(0.1) > 0
    for b in (torch.cat([g.flatten() for g in H.gradient]), torch.randn(H.shape[0], dtype=torch.float64)):
        solution = H.solve(b, 0.1)
        residual = float((H @ solution + 0.1 * solution - b).norm() / b.norm())
        assert H.stats is not None
        assert H.stats.residual == pytest.approx(residual, rel=0.5, abs=1e-15)
        assert residual < 1e-10


def test_products_at_depth_are_autograds() -> None:
    model, x, y = orthogonal_chain(4, 8, 64)
    parameters = list(model.parameters())
    v = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(nn.functional.mse_loss(model(x), y), parameters, create_graph=True)
    inner = sum((g * d).sum() for g, d in zip(gradients, v, strict=True))
    for got, want in zip(
        ChainHessian(model, nn.MSELoss(), x, y) @ v, torch.autograd.grad(inner, parameters), strict=True
    ):
        assert_near(got, want, 1e-11)


def test_what_conditioning_makes_impossible_is_said() -> None:
    model, x, y = orthogonal_chain(4, 8, 150)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(1.3)
    H = ChainHessian(model, nn.MSELoss(), x, y)
    b = torch.randn(H.shape[0], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=r"reached a relative residual of .*e.*, above tolerance=1e-08"):
        H.solve(b, 1e-6)
    assert H.stats is not None
    assert H.stats.residual > 1e-8


def test_preconditions_cg_on_a_larger_batch() -> None:
    """The GGN of a sub-batch solves for the larger batch in far fewer steps than CG alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(64, 6).double(), torch.randint(3, (64,))
    whole, part = (ChainGGN(model, nn.CrossEntropyLoss(), x[:n], y[:n]) for n in (64, 32))
    b, damping = torch.randn(whole.shape[0], dtype=torch.float64), 1e-3

    damped = whole + damping * IdentityLinearOperator.like(whole)
    iterations = {}
    for name, preconditioner in (("none", None), ("sub-batch", lambda r: part.solve(r, damping))):
        inverse = CGInverseLinearOperator(damped, tolerance=1e-8, preconditioner=preconditioner)
        assert_near(damped @ (inverse @ b), b, 1e-7)
        iterations[name] = inverse.stats[0].iterations
    assert iterations["sub-batch"] < 0.6 * iterations["none"]


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Subclass(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


def tied() -> list[nn.Module]:
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2)]
    layers[2].weight = layers[0].weight
    return layers


REFUSED = {
    "custom": (around(Custom), TypeError, r"the layer '1' is Custom, which does not fit"),
    "prelu": (around(nn.PReLU), TypeError, r"the layer '1' is PReLU, which does not fit"),
    "nested-custom": (around(lambda: nn.Sequential(nn.Tanh(), Custom())), TypeError, r"the layer '1\.1' is Custom"),
    "subclass": (around(lambda: Subclass(nn.Tanh())), TypeError, r"'1' is Subclass, a subclass of nn\.Sequential"),
    "batch-norm": (around(lambda: nn.BatchNorm1d(4)), TypeError, r"'1' is BatchNorm1d, which in training mode makes"),
    "dropout": (around(nn.Dropout), ValueError, r"the layer '1' \(Dropout\) drops at random"),
    "tied": (tied, ValueError, r"'2\.weight' is the same parameter as '0\.weight'"),
    "frozen": (lambda: [nn.Linear(3, 2).requires_grad_(False)], ValueError, r"no trainable parameter"),
    "residual-shape": (
        lambda: [Residual(nn.Linear(3, 1), nn.Tanh()), nn.Linear(3, 2)],
        ValueError,
        r"the residual block '0' maps \[5, 3\] to \[5, 1\]",
    ),
    "unbatched": (lambda: [nn.Conv1d(5, 2, 2), nn.Linear(2, 2)], ValueError, r"'0' \(Conv1d\) gets \[5, 3\]"),
}


@pytest.mark.parametrize(("layers", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_refused_layers(layers: Callable[[], list[nn.Module]], error: type[Exception], match: str) -> None:
    model = nn.Sequential(*layers()).double()
    with pytest.raises(error, match=match):
        ChainHessian(model, nn.CrossEntropyLoss(), torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1]))


def test_refused_losses_targets_and_dampings() -> None:
    model, x, y = nn.Sequential(*mlp()).double(), torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1])
    with pytest.raises(TypeError, match="loss_func SoftMarginLoss is not supported"):
        ChainHessian(model, nn.SoftMarginLoss(), x, y)
    with pytest.raises(ValueError, match="reduction='none', which is no number"):
        ChainHessian(model, nn.CrossEntropyLoss(reduction="none"), x, y)
    with pytest.raises(ValueError, match=r"target has shape \[5\], prediction \[5, 2\]"):
        ChainHessian(model, nn.MSELoss(), x, y.double())
    with pytest.raises(ValueError, match="the loss is nan"):
        ChainHessian(model, nn.MSELoss(), x, torch.full((5, 2), math.nan))
    H = ChainHessian(model, nn.CrossEntropyLoss(), x, y)
    for damping in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping must be a number other than 0"):
            H.solve(torch.ones(H.shape[0]), damping)


def test_a_hook_that_changes_what_passes_is_refused() -> None:
    model = nn.Sequential(*mlp()).double()
    model[1].register_forward_hook(lambda module, inputs, output: 2.0 * output)
    with pytest.raises(RuntimeError, match="is not the composition of its layers"):
        ChainHessian(model, nn.CrossEntropyLoss(), torch.randn(5, 3).double(), torch.tensor([0, 1, 0, 1, 1]))


def test_nothing_is_left_on_the_model() -> None:
    model, loss, x, y = BY_NAME["deep"].make()
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChainHessian(model, loss, x, y).solve(torch.ones(60, dtype=torch.float64), 0.1)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("width", "inside"), [(3, 1), (513, 2)])
def test_small_states_keep_to_one_thread_and_leave_the_callers(
    width: int, inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of two: 6 and 1,026 numbers in a state."""
    before, seen = torch.get_num_threads(), []
    make = RiccatiFactorization.__init__

    def watched(*args: object, **options: object) -> None:
        seen.append(torch.get_num_threads())
        make(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RiccatiFactorization, "__init__", watched)
    torch.set_num_threads(2)
    try:
        model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
        x, y = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
        hessian = ChainHessian(model, nn.MSELoss(), x, y)
        hessian.solve(hessian.gradient, damping=0.1)
        with pytest.raises(ValueError, match="damping"):
            hessian.solve(hessian.gradient, damping=0.0)
        assert hessian.positive_definite(100.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {inside}
