"""A model in the manner of Hugging Face: keyword inputs, an object with `.logits`, padded labels.

The loss is computed inside the model's forward, the logits are shifted by one token, and padding is labelled -100. None
of it needs to be explained to the optimizer: it finds `.logits`, and which positions count it reads from the gradient
that reaches them. (No transformers package needed.)
"""

import os
import pydoc_data.topics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kfacopt

STEPS = 30 if os.environ.get("KFACOPT_SHORT") else 200
LENGTH, WIDTH = 64, 64


@dataclass
class Output:
    """What the model returns; transformers' ModelOutput is such an object too."""

    logits: Tensor
    loss: Tensor | None = None


class TinyLanguageModel(nn.Module):
    """One block of causal attention and one of features."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.normalize = nn.LayerNorm(WIDTH)
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.features = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, *, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.tokens(input_ids) + self.places(places)
        q, k, v = self.attend(self.normalize(x)).chunk(3, dim=-1)
        x = x + self.project(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        logits = self.head(x + self.features(x))
        if labels is None:
            return Output(logits)
        shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return Output(logits, nn.functional.cross_entropy(*shifted, ignore_index=-100))


def sentences() -> tuple[Tensor, Tensor, int]:
    """Lines of Python's manual as characters, padded at the end: inputs, labels, vocabulary."""
    text = "\n".join(pydoc_data.topics.topics.values())
    lines = [line.strip()[:LENGTH] for line in text.splitlines() if len(line.strip()) > 20]
    alphabet = {character: i for i, character in enumerate(sorted(set("".join(lines))))}
    input_ids = torch.zeros(len(lines), LENGTH, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, line in enumerate(lines):
        input_ids[row, : len(line)] = labels[row, : len(line)] = torch.tensor(
            [alphabet[character] for character in line]
        )
    return input_ids, labels, len(alphabet)


def train(name: str) -> None:
    input_ids, labels, vocabulary = sentences()
    torch.manual_seed(0)
    model = TinyLanguageModel(vocabulary)
    optimizer: torch.optim.Optimizer
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        loss_func = nn.CrossEntropyLoss(ignore_index=-100)  # what the forward computes
        optimizer = kfacopt.EKFAC(model, loss_func=loss_func, kl_clip=0.01)
        print(optimizer.coverage())
    recent: list[float] = []
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(input_ids), (32,))
        loss = model(input_ids=input_ids[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent = [*recent[-9:], loss.item()]
        if step % (STEPS // 3) == 0:
            print(f"{name:5}  step {step:3d}  loss {sum(recent) / len(recent):.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train("AdamW")
    train("EKFAC")
