"""The Trainer of `transformers` with our optimizer: a tiny random GPT-2 and BERT, made from configs (no download).

The Trainer takes the pair `optimizers=(optimizer, scheduler)`. Gradient accumulation, checkpoints and resuming are its
own and need nothing of ours. Needs `transformers` and `accelerate`, which no extra of kfacopt brings.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import kfacopt

STEPS = 20 if os.environ.get("KFACOPT_SHORT") else 100
WORDS, LENGTH = 40, 12


def language_model() -> tuple[Any, list[dict[str, Tensor]]]:
    """GPT-2, and sequences in which each word decides the next; the last two words are padding."""
    transformers = importlib.import_module("transformers")
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    words = [torch.randint(WORDS, (512,))]
    for _ in range(LENGTH - 1):
        words.append((3 * words[-1] + 1) % WORDS)
    whole = torch.stack(words, 1)
    labels = whole.masked_fill(torch.arange(LENGTH) >= LENGTH - 2, -100)
    return model, [{"input_ids": x, "labels": y} for x, y in zip(whole, labels, strict=True)]


def classifier() -> tuple[Any, list[dict[str, Tensor]]]:
    """BERT, and sequences whose class is the first word's remainder."""
    transformers = importlib.import_module("transformers")
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 64, "max_position_embeddings": LENGTH, "num_labels": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **more))
    return model, [{"input_ids": x, "labels": x[0] % 3} for x in torch.randint(WORDS, (512, LENGTH))]


def train(name: str, make: Any, folder: str, ours: bool) -> float:
    transformers = importlib.import_module("transformers")
    transformers.set_seed(0)
    model, rows = make()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if ours:
        optimizer = kfacopt.SpectralDescent(model, nn.CrossEntropyLoss(ignore_index=-100))  # what the forward computes
        print(optimizer.coverage())
    scheduler = kfacopt.schedules.to_zero(optimizer, STEPS)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=STEPS // 4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
    trainer.train()
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    if ours:
        assert optimizer.health()["unseen_layers"] == 0.0, "a layer trains without curvature: see coverage()"
        optimizer.close()
    print(
        f"{name} with {type(optimizer).__name__}: loss of the first quarter {losses[0]:.3f}, the last {losses[-1]:.3f}"
    )
    return losses[-1]


if __name__ == "__main__":
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        sys.exit(f"this example needs {' and '.join(missing)}: pip install transformers accelerate")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("GPT-2", language_model), ("BERT", classifier)):
            for ours in (False, True):
                train(name, make, folder, ours)
