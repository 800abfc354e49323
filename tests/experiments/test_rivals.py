"""The rivals: torch's own optimizers, and Muon with AdamW as one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfacopt.experiments.models import CharacterTransformer, DeepAutoencoder, SmallResNet
from kfacopt.experiments.muon import Muon, MuonAdamW, orthogonalize
from kfacopt.experiments.rivals import adamw, hidden_matrices, muon, sgd, soap
from kfacopt.experiments.soap import SOAP

factories = pytest.mark.parametrize(
    "factory",
    [adamw, sgd, muon, partial(muon, weight_decay=0.1, adamw_weight_decay=0.1), soap, partial(soap, frequency=2)],
    ids=["adamw", "sgd", "muon", "muon-decay", "soap", "soap-often"],
)
Factory = Callable[[nn.Module], Optimizer]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> Tensor:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :2]).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@factories
def test_state_dict_resumes_exactly(factory: Factory) -> None:
    straight, cut = network(), network()
    train(straight, factory(straight), 6)
    optimizer = factory(cut)
    train(cut, optimizer, 3)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), cut.state_dict()), file)
    file.seek(0)
    optimizer_state, model_state = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(model_state)
    optimizer = factory(resumed)
    optimizer.load_state_dict(optimizer_state)
    assert torch.equal(train(resumed, optimizer, 3, first=3), train(straight, factory(straight), 0))


@factories
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_on_as_the_original(factory: Factory, copied: Callable) -> None:
    model = network()
    optimizer = factory(model)
    train(model, optimizer, 2)
    other_model, other = copied((model, optimizer))
    ours, theirs = train(model, optimizer, 2, first=2), train(other_model, other, 2, first=2)
    assert torch.equal(ours, theirs)


@factories
def test_schedulers_drive_every_group(factory: Factory) -> None:
    model = network()
    optimizer = factory(model)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(model, optimizer, 1)
    scheduler.step()
    assert all(before)
    stopped = train(model, optimizer, 0)
    assert torch.equal(train(model, optimizer, 2), stopped)


def test_muon_and_adamw_do_what_torch_does_for_each() -> None:
    ours, theirs = network(), network()
    optimizer = muon(ours, lr=0.05, weight_decay=0.1, adamw_lr=0.01, adamw_weight_decay=0.2)
    matrices = [theirs[0].weight, theirs[2].weight]
    rest = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    separate = [
        Muon(matrices, lr=0.05, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.2, fused=True),
    ]
    for step in range(4):
        weights = train(ours, optimizer, 1, first=step)
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        (theirs(inputs) - inputs[:, :2]).square().mean().backward()
        for part in separate:
            part.step()
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in theirs.parameters()]))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"weight_decay": 0.0}],
)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 5)])
def test_muon_is_torchs_up_to_bfloat16(shape: tuple[int, int], arguments: dict) -> None:
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    weights = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
    for weight, muon_type in zip(weights, (Muon, torch.optim.Muon), strict=True):
        optimizer = muon_type([weight], lr=0.1, **arguments)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
    # bfloat16 keeps 8 bits, and five iterations pass its rounding on.
    moved = (weights[1] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.05 * moved


def test_orthogonalize_brings_singular_values_near_one() -> None:
    coefficients, steps, eps = (3.4445, -4.775, 2.0315), 5, 1e-7
    result = orthogonalize(torch.randn(9, 30), coefficients, steps, eps)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert not orthogonalize(torch.zeros(3, 4), coefficients, steps, eps).any()


def test_muon_is_for_hidden_matrices_only() -> None:
    model = CharacterTransformer(context=8, width=16, layers=2, heads=2)
    names = dict(model.named_parameters())
    hidden = hidden_matrices(model)
    chosen = {name for name, p in names.items() if any(p is matrix for matrix in hidden)}
    assert len(chosen) == 12
    assert all(name.startswith("blocks") and name.endswith("weight") for name in chosen)
    assert len(hidden_matrices(DeepAutoencoder(hidden=(8,), code=3))) == 3
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    tied[2].weight = tied[0].weight
    assert hidden_matrices(tied) == [tied[1].weight]


def test_muon_without_matrices_is_adamw() -> None:
    model = SmallResNet(widths=(4, 4))
    (group,) = muon(model).param_groups
    assert group["algorithm"] == "adamw"
    assert len(group["params"]) == len(list(model.parameters()))


def test_muon_takes_kernels_as_matrices_where_asked() -> None:
    model = SmallResNet(widths=(4, 4))
    first, second = muon(model, kernels=True).param_groups
    assert first["algorithm"] == "muon"
    assert {p.ndim for p in first["params"]} == {4}
    assert any(p is model.classifier.weight for p in second["params"])
    kernel, matrix = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.zeros(4, 12))
    matrix.data.copy_(kernel.detach().flatten(1))
    for parameter in (kernel, matrix):
        parameter.grad = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).reshape(parameter.shape)
        Muon([parameter], lr=0.1).step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_soap_is_adam_in_its_eigenbasis() -> None:
    """In the basis of the first gradient, and before that turns; the first gradient moves no matrix."""
    weight, gradients = nn.Parameter(torch.zeros(4, 4)), torch.randn(4, 4, 4)
    left = torch.linalg.eigh(gradients[0] @ gradients[0].mT)[1].flip(-1)
    right = torch.linalg.eigh(gradients[0].mT @ gradients[0])[1].flip(-1)
    turned = nn.Parameter(torch.zeros(4, 4))
    ours = SOAP([weight], lr=0.1, betas=(0.9, 0.99), frequency=10)
    adam = torch.optim.Adam([turned], lr=0.1, betas=(0.9, 0.99))
    weight.grad = gradients[0]
    ours.step()
    assert not weight.any()
    for gradient in gradients[1:]:
        weight.grad, turned.grad = gradient, left.mT @ gradient @ right
        ours.step()
        adam.step()
    torch.testing.assert_close(weight.detach(), (left @ turned @ right.mT).detach(), rtol=1e-3, atol=1e-5)


def test_soap_turns_its_basis_towards_the_statistics() -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = SOAP([weight], lr=0.0, shampoo_beta=0.9, frequency=2)
    spread = torch.tensor([8.0, 4.0, 2.0, 1.0])[:, None]
    for _ in range(200):
        weight.grad = spread * torch.randn(4, 6)
        optimizer.step()
    state = optimizer.state[weight]
    for statistic, basis in zip(state["statistics"], state["bases"], strict=True):
        inside = basis.mT @ statistic @ basis
        assert (inside - inside.diagonal().diag()).norm() < 0.2 * inside.norm()
        torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis)), rtol=0, atol=1e-5)


def test_soap_keeps_the_basis_of_a_long_side() -> None:
    weight = nn.Parameter(torch.zeros(3, 5))
    optimizer = SOAP([weight], largest=4)
    for _ in range(3):
        weight.grad = torch.randn(3, 5)
        optimizer.step()
    assert optimizer.state[weight]["bases"][1] is None
    assert weight.any()


@factories
def test_frozen_parameters_are_left_alone(factory: Factory) -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    train(model, factory(model), 2)
    assert torch.equal(model[2].weight, frozen)


def test_groups_are_checked_and_completed() -> None:
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="algorithm='muon' or 'adamw', got None"):
        MuonAdamW([{"params": [weight]}])
    with pytest.raises(ValueError, match=r"matrices and kernels.*\(2,\)"):
        MuonAdamW([{"params": [bias], "algorithm": "muon"}])
    optimizer = MuonAdamW([{"params": [weight], "algorithm": "muon"}])
    optimizer.add_param_group({"params": [bias], "algorithm": "adamw", "lr": 0.5})
    assert optimizer.param_groups[0]["momentum"] == 0.95
    assert optimizer.param_groups[1]["lr"] == 0.5
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [bias], "algorithm": "adamw"})


def test_a_closure_is_called_with_gradients_on() -> None:
    model = network()
    optimizer = muon(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before
