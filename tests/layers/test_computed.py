"""Weights that are computed: by a weight norm, old and new, and by a pruning mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parametrizations, prune

import kfacopt
from tests import reference
from tests.cases import still, train_step

CE = nn.CrossEntropyLoss()


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def of_layers(norm: Callable[[nn.Module], nn.Module], bias: bool = True) -> nn.Module:
    """A convolution with groups, one without, and a linear layer."""
    layers = nn.Conv2d(2, 4, 2, groups=2, bias=bias), nn.Conv2d(4, 2, 2, bias=bias), nn.Linear(8, 3, bias=bias)
    first, second, last = (norm(layer) for layer in layers)
    return nn.Sequential(first, nn.Tanh(), second, nn.Flatten(), last).double()


def plain_twin(model: nn.Module) -> nn.Module:
    """The same model, its weights held where they are used."""
    twin = of_layers(lambda layer: layer, bias=model[0].bias is not None)
    for layer, computed in zip(twin, model, strict=True):
        if hasattr(layer, "weight"):
            layer.weight.data.copy_(computed.weight)
            if layer.bias is not None:
                layer.bias.data.copy_(computed.bias)
    return twin


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 4, 4, dtype=torch.float64), torch.randint(3, (count,))


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": parametrizations.weight_norm,
    "hook": old_weight_norm,
}
PATHS = {
    "parametrization": ("parametrizations.weight.original1", "parametrizations.weight.original0"),
    "hook": ("weight_v", "weight_g"),
}


def estimated(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, **options: Any) -> Any:
    made = optimizer(model, CE, **still(**options))
    train_step(made, model, CE, x, y)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_of_a_weight_norm_has_curvature(norm: str, bias: bool) -> None:
    """A is the weight's, G the weight's with each output times g/|v|; the lengths have the GGN's diagonal."""
    model, (x, y) = of_layers(NORMS[norm], bias), batch()
    for name, parameter in model.named_parameters():
        if name.endswith(PATHS[norm][1]):
            parameter.data.uniform_(0.5, 2.0)
    made = estimated(model, kfacopt.KFAC, x, y)
    assert all(row.treatment != "AdamW" for row in made.coverage().rows)
    assert made.health()["unseen_layers"] == 0.0
    twin = plain_twin(model)
    torch.testing.assert_close(model(x), twin(x))
    other = estimated(twin, kfacopt.KFAC, x, y, separate_weight_and_bias=True)
    own, theirs = made.backend.blocks, other.backend.blocks
    hessian = reference.loss_hessian(CE, model(x), y)
    for number in ("0", "2", "4"):
        v, g = (model.get_parameter(f"{number}.{path}") for path in PATHS[norm])
        left, right = own[f"{number}.direction"].factors()
        name = f"{number}.weight" if bias else number
        truth_left, truth_right = theirs[name].factors()
        scales = (g.flatten() / v.flatten(1).norm(dim=1)).reshape(truth_left.shape[:-1])
        torch.testing.assert_close(right, truth_right, rtol=1e-10, atol=1e-12)
        scaled = scales.unsqueeze(-1) * truth_left * scales.unsqueeze(-2)
        torch.testing.assert_close(left, scaled.detach(), rtol=1e-10, atol=1e-12)
        if bias:
            torch.testing.assert_close(own[f"{number}.shift"].factors()[0], theirs[f"{number}.bias"].factors()[0])
        path = f"{number}.{PATHS[norm][1]}"
        jacobian = jacrev(lambda t, path=path: functional_call(model, {path: t}, (x,)).flatten())(g.detach()).flatten(1)
        diagonal = (jacobian.T @ hessian @ jacobian).diagonal()
        found = own[f"{number}.length"].diagonal.value
        torch.testing.assert_close(found.flatten(), diagonal, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent])
def test_a_weight_norm_trains(norm: str, optimizer: Any) -> None:
    model, (x, y) = of_layers(NORMS[norm]).float(), batch(16)
    x, losses = x.float(), []
    made = optimizer(model, CE, factor_every=1, refresh_every=5)
    for _ in range(40):
        losses.append(train_step(made, model, CE, x, y).item())
    assert losses[-1] < 0.7 * losses[0]
    assert made.health()["unseen_layers"] == 0.0


SPECTRAL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("norm", SPECTRAL)
def test_a_spectral_norm_has_the_weights_factors(norm: str) -> None:
    """A is the weight's, G the weight's over σ²; the buffers are those of the user's own forwards."""
    model, (x, y) = of_layers(SPECTRAL[norm]).eval(), batch()
    made = estimated(model, kfacopt.KFAC, x, y)
    assert all(row.treatment == "KFAC" for row in made.coverage().rows)
    assert made.health()["unseen_layers"] == 0.0
    other = estimated(plain_twin(model), kfacopt.KFAC, x, y, separate_weight_and_bias=True)
    own, theirs = made.backend.blocks, other.backend.blocks
    path = "parametrizations.weight.original" if norm == "parametrization" else "weight_orig"
    for number in ("0", "2", "4"):
        sigma = model.get_parameter(f"{number}.{path}").norm() / model[int(number)].weight.norm()
        left, right = own[f"{number}.weight"].factors()
        truth_left, truth_right = theirs[f"{number}.weight"].factors()
        torch.testing.assert_close(right, truth_right, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(left * sigma.detach() ** 2, truth_left, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", SPECTRAL)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_a_spectral_norm_trains_and_its_power_iteration_is_the_users(norm: str, optimizer: Any) -> None:
    model, (x, y) = of_layers(SPECTRAL[norm]), batch(16)
    made, losses = optimizer(model, CE, factor_every=1, refresh_every=5), []
    for _ in range(30):
        made.zero_grad()
        loss = CE(model(x), y)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        loss.backward()
        made.step()
        assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.4)
    return layer


def test_a_pruned_layer_has_the_factors_of_the_masked_weight() -> None:
    model, (x, y) = of_layers(pruned), batch()
    made = estimated(model, kfacopt.KFAC, x, y)
    assert all(row.treatment == "KFAC" for row in made.coverage().rows)
    other = estimated(plain_twin(model), kfacopt.KFAC, x, y)
    for name, block in other.backend.blocks.items():
        for ours, theirs in zip(made.backend.blocks[name].factors(), block.factors(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_what_is_pruned_is_not_moved(optimizer: Any) -> None:
    model, (x, y) = of_layers(pruned), batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = optimizer(model, CE, factor_every=1, refresh_every=1)
    first = train_step(made, model, CE, x, y)
    for _ in range(5):
        last = train_step(made, model, CE, x, y)
    assert last < first
    for name, p in model.named_parameters():
        if name.endswith("weight_orig"):
            kept = model.get_buffer(name.replace("orig", "mask")).bool()
            assert torch.equal(before[name][~kept], p[~kept])
            assert not torch.equal(before[name][kept], p[kept])


def test_a_state_goes_on_bit_for_bit() -> None:
    def made(model: nn.Module) -> Any:
        return kfacopt.EKFAC(model, CE, factor_every=1, refresh_every=2)

    model, (x, y) = of_layers(parametrizations.weight_norm), batch()
    twin = of_layers(parametrizations.weight_norm)
    one, two = made(model), made(twin)
    train_step(one, model, CE, x, y)
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        train_step(one, model, CE, x, y)
        train_step(two, twin, CE, x, y)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "a mask comes": (lambda layer: None, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "a mask goes": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "a spectral norm comes": (lambda layer: None, parametrizations.spectral_norm),
    "a spectral norm goes": (
        parametrizations.spectral_norm,
        lambda layer: nn.utils.parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("before_the_step", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_weight_is_to_its_module_may_change_in_training(change: str, before_the_step: bool) -> None:
    """The factors are those of an optimizer that is made after the change; in between a step is taken."""
    first, then = CHANGES[change]
    torch.manual_seed(0)
    model, (x, y) = of_layers(lambda layer: layer), batch()
    first(model[4])
    optimizer = kfacopt.KFAC(model, CE, **still(lr=0.01, curvature="ggn"))
    train_step(optimizer, model, CE, x, y)
    if before_the_step:
        optimizer.zero_grad()
        CE(model(x), y).backward()
    then(model[4])
    if before_the_step:
        optimizer.step()
    train_step(optimizer, model, CE, x, y)
    with torch.no_grad():
        model(x)  # a weight that was computed with its graph cannot be copied
    fresh = kfacopt.KFAC(copy.deepcopy(model), CE, **still())
    for one in (optimizer, fresh):
        train_step(one, one.model, CE, x, y)
    assert optimizer.health()["unseen_layers"] == 0.0
    assert set(optimizer.backend.blocks) == set(fresh.backend.blocks)
    for name, block in fresh.backend.blocks.items():
        for mine, theirs in zip(optimizer.backend.blocks[name].factors(), block.factors(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
