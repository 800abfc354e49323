"""The Trainer of `transformers` trains with ours: tiny GPT-2 and BERT from configs. Skipped where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

WORDS, LENGTH, STEPS = 40, 12, 10
OURS = {"SpectralDescent": kfacopt.SpectralDescent, "KFAC": kfacopt.KFAC, "EKFAC": kfacopt.EKFAC}
Rows = list[dict[str, Tensor]]


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **ends, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    )


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "max_position_embeddings": LENGTH, "num_labels": 3}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **more, **drop))


def following() -> Rows:
    """Sequences in which each word decides the next; the last two are padding."""
    torch.manual_seed(1)
    words = [torch.randint(WORDS, (64,))]
    for _ in range(LENGTH - 1):
        words.append((3 * words[-1] + 1) % WORDS)
    whole = torch.stack(words, 1)
    labels = whole.masked_fill(torch.arange(LENGTH) >= LENGTH - 2, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(whole, labels, strict=True)]


def first_words() -> Rows:
    """The first word's remainder is the class."""
    torch.manual_seed(1)
    return [{"input_ids": x, "labels": x[0] % 3} for x in torch.randint(WORDS, (64, LENGTH))]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Rows]]] = {
    "GPT-2": (gpt2, following),
    "BERT": (bert, first_words),
}
models = pytest.mark.parametrize("kind", MODELS)


def trained(
    folder: Path, kind: str, make: Callable[..., Any], start: str | None = None, **options: Any
) -> tuple[Any, list[float]]:
    """A model after the Trainer's run, and the losses it logged."""
    build, rows = MODELS[kind]
    model = build()
    smoothing = options.get("label_smoothing_factor", 0.0)
    fixed = {"curvature": options.pop("curvature")} if "curvature" in options else {}
    optimizer = make(model, nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=smoothing), **fixed)
    losses = run(model, optimizer, rows(), folder, start, **options)
    assert optimizer.health()["skipped_steps"] == 0.0
    assert optimizer.health()["unseen_layers"] == 0.0
    optimizer.close()
    return model, losses


def run(
    model: Any,
    optimizer: Any,
    rows: Rows,
    folder: Path,
    start: str | None = None,
    loss: Callable[..., Tensor] | None = None,
    **options: Any,
) -> list[float]:
    """The Trainer's own loop; the losses it logged. `loss`: taken by the Trainer, not within the model."""
    scheduler = kfacopt.schedules.to_zero(optimizer, 2 * STEPS)
    fixed = {"per_device_train_batch_size": 8, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "seed": 3}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(fixed | quiet | options))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler), compute_loss_func=loss
    )
    trainer.train(resume_from_checkpoint=start)
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


@models
@pytest.mark.parametrize("name", OURS)
def test_it_trains(name: str, kind: str, tmp_path: Path) -> None:
    _, losses = trained(tmp_path, kind, OURS[name], max_steps=2 * STEPS)
    assert len(losses) == 2 * STEPS
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])


@models
@pytest.mark.parametrize("name", OURS)
def test_it_resumes_bit_for_bit(name: str, kind: str, tmp_path: Path) -> None:
    whole, losses = trained(tmp_path, kind, OURS[name], save_strategy="steps", save_steps=6)
    resumed, again = trained(tmp_path, kind, OURS[name], start=str(tmp_path / "checkpoint-6"))
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """The labels of a type-2 Fisher are not drawn; in float32 ten steps of curvature multiply what rounding leaves.

    Of GPT-2 alone: a classifier's loss the Trainer (5.24) adds up over micro-batches without dividing by their number.
    """

    def make(model: nn.Module, loss: nn.Module) -> Any:
        return kfacopt.KFAC(model, loss, curvature="ggn", factor_every=1, refresh_every=2)

    _, large = trained(tmp_path, "GPT-2", make, per_device_train_batch_size=8)
    _, small = trained(tmp_path, "GPT-2", make, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert small == pytest.approx(large, rel=2e-2)


@models
def test_label_smoothing_by_the_trainer_is_that_of_the_loss(kind: str, tmp_path: Path) -> None:
    """It computes the loss from the logits itself; the gradient there is checked against the announced loss."""
    _, losses = trained(tmp_path, kind, kfacopt.EKFAC, label_smoothing_factor=0.1)
    assert losses[-1] < losses[0] + 0.1


@models
@pytest.mark.parametrize("name", OURS)
def test_it_trains_under_the_trainers_autocast(name: str, kind: str, tmp_path: Path) -> None:
    """accelerate returns copies of the logits in float32, and the loss within the model is of the logits themselves."""
    _, losses = trained(tmp_path, kind, OURS[name], bf16=True, max_steps=2 * STEPS)
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])


@models
def test_activation_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    """What is recomputed runs code of the model's in our pass; what that can reach is as it was afterwards."""
    losses = [
        trained(tmp_path, kind, kfacopt.KFAC, curvature="ggn", gradient_checkpointing=active)[1]
        for active in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert transformers.activations.ACT2FN["gelu"] is not transformers.activations.ACT2FN["gelu"]


def test_the_trainers_autocast_shows_the_curvature_of_the_loss(tmp_path: Path) -> None:
    """To bfloat16's rounding it is that without autocast."""
    found = []
    for bf16 in (False, True):
        model = gpt2()
        optimizer = kfacopt.KFAC(model, nn.CrossEntropyLoss(ignore_index=-100), curvature="ggn", factor_every=1)
        run(model, optimizer, following(), tmp_path, bf16=bf16, max_steps=1)
        averages = optimizer.backend.blocks["transformer.h.0.mlp.c_fc"].averages()
        found.append([average.value for average in averages.values() if average.value is not None])
    assert found[0]
    for plain, half in zip(*found, strict=True):
        assert float((half - plain).norm()) < 0.05 * float(plain.norm())


def test_a_loss_of_what_the_model_returns_has_curvature_under_the_trainers_autocast(tmp_path: Path) -> None:
    def following_words(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        ahead = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(*ahead, ignore_index=-100)

    model = gpt2()
    optimizer = kfacopt.EKFAC(model, nn.CrossEntropyLoss(ignore_index=-100))
    losses = run(model, optimizer, following(), tmp_path, loss=following_words, bf16=True, max_steps=2 * STEPS)
    assert optimizer.health()["unseen_layers"] == optimizer.health()["skipped_steps"] == 0.0
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])
