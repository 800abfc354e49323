"""Layers with a weight that is computed, or a forward of one's own: adapters, quantized, standardized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

import kfacopt
from kfacopt.layers import check_handler, handler_for
from kfacopt.operators import KFACLinearOperator
from tests import reference
from tests.cases import exact_ekfac, still, train_step

MSE = nn.MSELoss()


class Lora(nn.Module):
    """`W + B A / 2` (Hu et al. 2022)."""

    def __init__(self, outputs: int, inputs: int, rank: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))
        self.dropout = nn.Dropout(dropout)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * (self.b @ self.dropout(self.a)).view_as(weight)


class TurnedLora(Lora):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(inputs, outputs)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).mT


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return Rounded.apply(weight)  # type: ignore[no-any-return]


class Detached(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((8 * weight).round() / 8 - weight).detach()


class FakeQuantized(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(weight, 0.1, 0, -3, 3)


class Column(nn.Module):
    """Each input's weights over their length."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm(dim=0, keepdim=True)


class LoraLinear(nn.Linear):
    """As adapters are written by hand."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) + 0.3 * (x @ self.a.T @ self.b.T)


class Turned(nn.Linear):
    """An adapter whose matrices are held `[i o]`, one of them scaled."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(inputs, rank)), nn.Parameter(torch.randn(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) + x @ self.a @ (0.3 * self.b)


class Dora(nn.Linear):
    """`m (W + B A) / |W + B A|`, the norm without gradients (Liu et al. 2024)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora, self.magnitude = Lora(outputs, inputs), nn.Parameter(torch.rand(outputs) + 0.5)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        direction = self.lora(self.weight)
        length = direction.norm(dim=1, keepdim=True).detach()
        return functional.linear(x, self.magnitude[:, None] * direction / length, self.bias)


class Equalized(nn.Linear):
    """`W` and `b` times constants (StyleGAN)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, 0.2 * self.weight, 0.1 * self.bias)


class InputScaled(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.rand(inputs) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.scale) + self.bias


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = (f(self.weight, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        weight = (self.weight - mean) / (deviation + 1e-5)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByBatchNorm(nn.Conv2d):
    """Standardized with a gain, as in normalizer-free networks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = 0.3 * self.gain.view(-1)
        weight = functional.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Part(nn.Linear):
    """Slimmed: of some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x[..., :3], self.weight[:, :3], self.bias)


class Twice(nn.Conv1d):
    """Two calls of one weight, a bias that is added."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, self.weight) + functional.conv1d(x.flip(-1), 2 * self.weight, self.bias)


def with_weight(layer: nn.Module, steps: nn.Module) -> nn.Module:
    register_parametrization(layer, "weight", steps, unsafe=True)
    return layer


def linear() -> nn.Module:
    return nn.Linear(4, 3)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lora": (lambda: with_weight(linear(), Lora(3, 4)), (2, 4)),
    "lora, square": (lambda: with_weight(nn.Linear(2, 2), Lora(2, 2)), (2,)),
    "lora, rank one": (lambda: with_weight(linear(), Lora(3, 4, 1)), (4,)),
    "lora by a convolution": (lambda: with_weight(nn.Conv2d(4, 6, 2, padding=1), Lora(6, 16)), (4, 3, 3)),
    "lora by hand": (lambda: LoraLinear(4, 3), (2, 4)),
    "lora, turned": (lambda: Turned(5, 3), (2, 5)),
    "lora, turned by a parametrization": (lambda: with_weight(nn.Linear(5, 3), TurnedLora(3, 5)), (2, 5)),
    "dora": (lambda: Dora(4, 3), (4,)),
    "straight-through": (lambda: with_weight(linear(), StraightThrough()), (4,)),
    "straight-through by a convolution": (lambda: with_weight(nn.Conv2d(4, 6, 2, groups=2), Detached()), (4, 3, 3)),
    "fake-quantized": (lambda: with_weight(linear(), FakeQuantized()), (2, 4)),
    "equalized": (lambda: Equalized(4, 3), (2, 4)),
    "scaled inputs": (lambda: InputScaled(4, 3), (2, 4)),
    "a part": (lambda: Part(4, 3), (4,)),
    "each input's norm": (lambda: with_weight(linear(), Column()), (4,)),
    "weight norm of inputs": (lambda: parametrizations.weight_norm(linear(), dim=1), (4,)),
    "two norms": (lambda: with_weight(parametrizations.spectral_norm(linear()), Column()), (4,)),
    "standardized": (lambda: Standardized(4, 6, 2, groups=2), (4, 3, 3)),
    "by a batch norm": (lambda: ByBatchNorm(4, 6, 2, padding=1, padding_mode="circular"), (4, 3, 3)),
    "twice": (lambda: Twice(4, 3, 2), (4, 5)),
    "pruned bias": (lambda: prune.l1_unstructured(linear(), "bias", 0.5), (4,)),
}


def made(kind: str, data: int = 5) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    layer = build().double()
    with torch.no_grad():
        layer(torch.ones(1, *shape, dtype=torch.float64))
    return layer, torch.randn(data, *shape, dtype=torch.float64)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_the_gradient(kind: str, below: bool) -> None:
    """But for projections; of every parameter that trains."""
    layer, x = made(kind)
    handler = handler_for(layer)
    assert handler is not None
    check_handler(handler, layer, x.requires_grad_(below))


def gradients(outputs: Tensor, parameter: Tensor) -> Tensor:
    """The Jacobian `[outputs parameters]` as the backward has it, straight through what it skips."""
    each = [torch.autograd.grad(one, parameter, retain_graph=True)[0].flatten() for one in outputs.flatten()]
    return torch.stack(each)


EXACT = ("lora", "lora, turned", "lora by hand", "dora", "straight-through", "equalized", "scaled inputs", "a part")


@pytest.mark.parametrize("kind", EXACT)
def test_of_one_place_the_block_is_the_ggn(kind: str) -> None:
    """One datum, one place: `G ⊗ A` of each matrix is the Gauss-Newton block of it, each scale has its diagonal."""
    layer, _ = made(kind)
    x = torch.randn(1, layer.in_features, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(layer.out_features, 2).double())
    y = torch.randn(1, 2, dtype=torch.float64)
    optimizer = kfacopt.KFAC(model, MSE, **still())
    train_step(optimizer, model, MSE, x, y)
    assert optimizer.health()["unseen_layers"] == 0.0
    hessian = reference.loss_hessian(MSE, model(x), y)
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            continue
        own = next(held for held in optimizer._layers if held.name == f"0.{name}")
        rows = gradients(model(x), parameter).unflatten(1, parameter.shape)
        jacobian = torch.stack([own.pack({"weight": row}).flatten() for row in rows])
        truth = jacobian.T @ hessian @ jacobian
        block = optimizer.backend.blocks[f"0.{name}"]
        if hasattr(block, "factors"):
            torch.testing.assert_close(torch.kron(*block.factors()), truth, rtol=1e-9, atol=1e-12)
        else:
            torch.testing.assert_close(block.diagonal.value.flatten(), truth.diagonal(), rtol=1e-9, atol=1e-12)


class AsLayers(nn.Module):
    """An adapter as two linear layers beside a frozen one."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, len(layer.a), bias=False), nn.Linear(len(layer.a), outputs, bias=False)
        self.base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        self.down.weight.data.copy_(layer.a)
        self.up.weight.data.copy_(layer.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.3 * self.up(self.down(x))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, exact_ekfac])
def test_steps_of_an_adapter_are_those_of_its_linear_layers(optimizer: Any, approx: str) -> None:
    """On sequences, the weight frozen; three steps in float64."""
    torch.manual_seed(0)
    layer = LoraLinear(4, 3)
    layer.weight.requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Flatten(), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(model)
    twin[2] = AsLayers(layer).double()
    twin[2].base.weight.requires_grad_(False)
    x, y = torch.randn(16, 2, 4, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    options = {"curvature": "ggn", "factor_every": 1, "refresh_every": 1, "kfac_approx": approx}
    for one in (model, twin):
        stepped = optimizer(one, MSE, **options)
        for _ in range(3):
            train_step(stepped, one, MSE, x, y)
        assert stepped.health()["unseen_layers"] == 0.0
    torch.testing.assert_close(layer.a, twin[2].down.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.b, twin[2].up.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(layer.bias, twin[2].base.bias, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["standardized", "by a batch norm"])
def test_a_standardized_weight_has_the_plain_ones_factors_over_its_deviation(kind: str) -> None:
    layer, x = made(kind)
    groups = layer.groups
    rows = layer.weight.detach().flatten(1)
    # Of the outputs, what is left when the directions are taken out that standardizing takes out.
    each = 1.0 / rows.std(1, correction=1 if kind == "standardized" else 0)
    if kind == "by a batch norm":
        each = each * 0.3 * layer.gain.detach().flatten()
    plain = nn.Conv2d(4, 6, 2, padding=layer.padding, padding_mode=layer.padding_mode, groups=groups).double()
    plain.bias.data.copy_(layer.bias)
    plain.weight.data.copy_(_used(layer, x))
    torch.testing.assert_close(layer(x), plain(x))
    factors = []
    for one in (layer, plain):
        model = nn.Sequential(one, nn.Flatten())
        y = torch.zeros_like(model(x))
        optimizer = kfacopt.KFAC(model, MSE, **still(separate_weight_and_bias=True))
        train_step(optimizer, model, MSE, x, y)
        factors.append(optimizer.backend.blocks["0.weight"].factors())
    (left, right), (truth_left, truth_right) = factors
    scales = each.reshape(truth_left.shape[:-1])
    torch.testing.assert_close(right, truth_right, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(left, scales.unsqueeze(-1) * truth_left * scales.unsqueeze(-2), rtol=1e-3, atol=1e-9)


def _used(layer: nn.Module, x: Tensor) -> Tensor:
    node: Any = layer(x).grad_fn
    return node._saved_weight.detach()  # type: ignore[no-any-return]


OTHER_USES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "from the left": lambda layer, x: (layer.weight @ x.mT).mT,
    "elementwise, too": lambda layer, x: functional.linear(x, layer.weight) + layer.weight[0],
    "a norm of it, too": lambda layer, x: functional.linear(x, 2 * layer.weight) * (2 * layer.weight).norm(),
    "a power": lambda layer, x: functional.linear(x, layer.weight.matrix_exp()),
    "of the data": lambda layer, x: functional.linear(x, x[:3] @ layer.weight),
    "elementwise": lambda layer, x: x * layer.weight.sum(0),
    "square, from the right": lambda layer, x: x @ layer.weight,
    "square, from the right, scaled": lambda layer, x: x @ (2 * layer.weight),
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_other_uses_train_without_curvature_and_are_said(use: str) -> None:
    """Without a warning: nothing is wrong with the user's loop."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return OTHER_USES[use](self, x) + self.bias

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Own(3, 3), nn.Linear(3, 2))
    optimizer = kfacopt.KFAC(model, MSE, factor_every=1, refresh_every=1, kl_clip=0.03)
    before = model[1].weight.detach().clone()
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    train_step(optimizer, model, MSE, x, y)
    rows = {row.module: row for row in optimizer.coverage().rows}
    assert rows["1.weight"].treatment == "AdamW"
    assert "no backward has shown" in rows["1.weight"].why
    assert rows["1.bias"].treatment == rows["0"].treatment == "KFAC"
    assert optimizer.health()["unseen_layers"] == 1.0
    assert not torch.equal(before, model[1].weight)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent])
@pytest.mark.parametrize("kind", ["lora", "lora by hand", "dora", "straight-through", "standardized", "equalized"])
def test_they_train(kind: str, optimizer: Any) -> None:
    layer, x = made(kind, 16)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(x)[0].numel(), 2)).float()
    x, y = x.float(), torch.randn(16, 2)
    stepped = optimizer(model, MSE)
    losses = [train_step(stepped, model, MSE, x, y).item() for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    assert stepped.health()["unseen_layers"] == 0.0


def test_half_precision_and_dropout_in_the_adapter() -> None:
    model = nn.Sequential(with_weight(nn.Linear(4, 3), Lora(3, 4, dropout=0.5)), nn.Tanh(), nn.Linear(3, 2))
    optimizer = kfacopt.EKFAC(model, MSE, factor_every=1, refresh_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(8, 4))
        MSE(output.float(), torch.randn(8, 2)).backward()
        optimizer.step()
    assert optimizer.health()["unseen_layers"] == 0.0
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_users_hooks_and_random_numbers_are_left_alone() -> None:
    model = nn.Sequential(with_weight(nn.Linear(4, 3), Lora(3, 4)), nn.Linear(3, 2))
    seen: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_hook(seen.append)
    optimizer = kfacopt.KFAC(model, MSE, factor_every=1, refresh_every=1)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    state = torch.get_rng_state()
    output = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    MSE(output, y).backward()
    assert len(seen) == len(list(model.parameters()))
    optimizer.step()
    assert optimizer.health()["unseen_layers"] == 0.0


def test_a_state_goes_on_bit_for_bit() -> None:
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(LoraLinear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        return model, kfacopt.EKFAC(model, MSE, factor_every=1, refresh_every=2)

    (model, one), (twin, two), (x, y) = build(), build(), (torch.randn(8, 4), torch.randn(8, 2))
    train_step(one, model, MSE, x, y)
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        train_step(one, model, MSE, x, y)
        train_step(two, twin, MSE, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_operator_has_the_blocks_or_says_what_it_lacks() -> None:
    layer, _ = made("lora by hand")
    model, x, y = layer, torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    operator = KFACLinearOperator(model, MSE, [layer.a, layer.b], [(x, y)], fisher_type="type-2")
    hessian = reference.loss_hessian(MSE, model(x), y)
    truths = [gradients(model(x), p) for p in (layer.a, layer.b)]
    truth = torch.block_diag(*(j.T @ hessian @ j for j in truths))
    torch.testing.assert_close(operator @ torch.eye(len(truth), dtype=torch.float64), truth, rtol=1e-9, atol=1e-12)

    class Exponential(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight.matrix_exp(), self.bias)

    odd = Exponential(3, 3).double()
    data = [(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))]
    with pytest.raises(NotImplementedError, match="forward of Exponential makes no product"):
        KFACLinearOperator(odd, MSE, list(odd.parameters()), data, check_deterministic=False).compute()
    diagonal = KFACLinearOperator(odd, MSE, [odd.weight], data, uncovered="diagonal")
    assert (diagonal @ torch.ones(9, dtype=torch.float64)).abs().min() > 0
