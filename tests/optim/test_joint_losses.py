"""A loss of several outputs of which only gradients are known: actor and critic, one function of a tuple."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfacopt
from tests.cases import exact_ekfac, still

DATA = 6


class ActorCritic(nn.Module):
    """Returns a hidden state, too, of which the loss is not taken itself."""

    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)
        self.named = named

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).tanh()
        logits, value = self.actor(hidden), self.critic(hidden).squeeze(-1)
        return {"logit": logits, "value": value} if self.named else (hidden, logits, value)


def ppo(logits: Tensor, value: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    actions, old, advantages, returns = batch
    chosen = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    ratio = (chosen - old).exp()
    clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return -clipped.mean() + 0.5 * functional.mse_loss(value, returns) - 0.01 * entropy.mean()


def made_batch(data: int = DATA) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(1)
    actions = torch.randint(3, (data,))
    rest = [torch.randn(data, dtype=torch.float64) for _ in range(3)]
    return torch.randn(data, 4, dtype=torch.float64), (actions, rest[0] / 9 - 1.1, rest[1], rest[2])


def of_output(output: Any) -> tuple[Tensor, Tensor]:
    return (output["logit"], output["value"]) if isinstance(output, dict) else output[1:]


def dense(model: ActorCritic, x: Tensor, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Squared gradients of each datum by what one output makes of it, summed over the outputs; means over the data."""
    logits, value = of_output(model(x))
    gradients = torch.autograd.grad(ppo(logits, value, batch), (logits, value), retain_graph=True)
    result = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for output, gradient in zip((logits, value), gradients, strict=True):
        for datum in range(len(x)):
            own = len(x) * (output[datum] * gradient[datum]).sum()
            found = torch.autograd.grad(own, list(model.parameters()), retain_graph=True, materialize_grads=True)
            for (name, _), one in zip(model.named_parameters(), found, strict=True):
                result[name] += one.square() / len(x)
    return result


LOSSES: dict[str, Any] = {
    "one function": ppo,
    "one for each": (None, ppo, nn.MSELoss()),
    "by name": {"logit": ppo, "value": (0.5, nn.MSELoss())},
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_every_output_has_its_share(kind: str, micro_batches: int) -> None:
    """Of layers below one output or both, in one backward or two; the hidden state is no output of the loss."""
    torch.manual_seed(0)
    model = ActorCritic(named=kind == "by name").double()
    x, batch = made_batch()
    losses = LOSSES[kind]
    if kind == "one for each":
        model.forward = lambda x, whole=model.forward: whole(x)[1:]  # type: ignore[method-assign]
        losses = losses[1:]
    made = exact_ekfac(model, losses, **still(curvature="empirical", separate_weight_and_bias=True))
    size = DATA // micro_batches
    for _ in range(2):  # the first step finds the eigenbases
        for start in range(0, DATA, size):
            own = slice(start, start + size)
            output = model(x[own])
            logits, value = output if kind == "one for each" else of_output(output)
            (ppo(logits, value, tuple(part[own] for part in batch)) / micro_batches).backward()
        made.step()
        made.zero_grad()
    assert made.health()["unseen_layers"] == 0.0
    if kind == "one for each":
        del model.forward
    truth = dense(model, x, batch)
    for name in ("body", "actor", "critic"):
        for role in ("weight", "bias"):
            trace = made.backend.blocks[f"{name}.{role}"].corrected.value.sum()
            torch.testing.assert_close(trace, truth[f"{name}.{role}"].sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC, kfacopt.SpectralDescent])
def test_actor_and_critic_learn(optimizer: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = ActorCritic()
    x, best = torch.randn(256, 4), torch.randint(3, (256,))
    best = (x @ torch.randn(4, 3)).argmax(1)
    made = optimizer(model, ppo, curvature="empirical")
    rewards = []
    for _ in range(15):
        with torch.no_grad():
            _, logits, value = model(x)
            actions = torch.distributions.Categorical(logits=logits).sample()
            old = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
            returns = (actions == best).float()
            rewards.append(returns.mean().item())
        for _ in range(4):
            made.zero_grad()
            _, logits, value = model(x)
            ppo(logits, value, (actions, old, returns - value.detach(), returns)).backward()
            made.step()
    assert rewards[-1] > 0.85 > rewards[0] + 0.3
    assert made.health()["unseen_layers"] == 0.0


def test_a_known_loss_of_several_outputs_still_asks_which() -> None:
    model = ActorCritic()
    made = kfacopt.KFAC(model, nn.MSELoss())
    _, logits, value = model(torch.randn(4, 4))
    with pytest.raises(ValueError, match="The loss is taken of 2 of them"):
        (logits.square().mean() + value.square().mean()).backward()
    made.zero_grad()


@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.SpectralDescent])
def test_an_actor_learns_through_its_critic(optimizer: Callable[..., Any]) -> None:
    """The critic's optimizer is paused meanwhile; where it is not, its error names that."""
    torch.manual_seed(0)
    actor = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

    class Value(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = actor, critic

        def forward(self, x: Tensor) -> Tensor:
            return self.critic(torch.cat([x, self.actor(x)], dim=1))

    def negative(value: Tensor) -> Tensor:
        return -value.mean()

    value = Value()
    of_critic = optimizer(critic, nn.MSELoss())
    of_actor = optimizer(value, negative, params=list(actor.parameters()), curvature="empirical")
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match=r"goes within optimizer\.paused\(\)"):
        negative(value(x)).backward()
    of_actor.zero_grad()
    of_critic.zero_grad()
    for _ in range(80):
        x = torch.randn(64, 3)
        action = (actor(x).detach() + 0.3 * torch.randn(64, 1)).clamp(-1.0, 1.0)
        reward = -((action - x[:, :1].tanh()) ** 2)
        of_critic.zero_grad()
        nn.functional.mse_loss(critic(torch.cat([x, action], dim=1)), reward).backward()
        of_critic.step()
        with of_critic.paused():
            of_actor.zero_grad()
            negative(value(x)).backward()
        of_actor.step()
    assert of_actor.health()["unseen_layers"] == of_critic.health()["unseen_layers"] == 0.0
    with torch.no_grad():
        assert ((actor(x) - x[:, :1].tanh()) ** 2).mean() < 0.1
