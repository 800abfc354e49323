"""Prints what each optimizer holds between two steps, as a multiple of the parameters' bytes; AdamW's is 2.

    scripts/bench memory [--widths 128 512] [--words 1000 8000 50000]

Perceptrons with three square layers, and an embedding of 64 features whose words a linear head predicts again. All
tensors that are alive after two steps are counted, each storage once, but for the model's, its gradients and the data.
Two steps have all statistics and caches. From 5,121 words on the factor of the words is its diagonal.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

import kfacopt
from kfacopt.blocks import Storage
from kfacopt.experiments import rivals

Factory = Callable[..., Optimizer]


def stored(optimizer: Factory, backend: Callable[..., Any], storage: Storage | None) -> Factory:
    """An optimizer whose backend keeps its factors so."""
    return lambda model, loss_func: optimizer(model, loss_func=loss_func, backend=backend(storage=storage))


OPTIMIZERS: dict[str, Factory] = {
    "AdamW": rivals.adamw,
    "Muon": rivals.muon,
    "SpectralDescent": kfacopt.SpectralDescent,
    "KFAC": kfacopt.KFAC,
    "EKFAC": kfacopt.EKFAC,
}
# With a backend of one's own the step is the natural gradient's, which is cheaper: so these are against that.
OPTIMIZERS |= {
    f"{name}, natural{told}": stored(optimizer, backend, storage)
    for name, optimizer, backend in (
        ("KFAC", kfacopt.KFAC, kfacopt.KFACBackend),
        ("EKFAC", kfacopt.EKFAC, kfacopt.EKFACBackend),
    )
    for told, storage in {"": None, ", packed": Storage(), ", packed bf16": Storage(dtype=torch.bfloat16)}.items()
}


def alive() -> dict[int, int]:
    """Bytes of the storages of all tensors that are alive, by address."""
    gc.collect()
    # Plain tensors only: a lazy parameter or one that a compiler traced with has no storage.
    plain = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
    grads = [tensor.grad for tensor in plain if tensor.is_leaf]
    tensors = plain + [grad for grad in grads if type(grad) is Tensor]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def held(factory: Factory, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """What an optimizer holds after two steps, over the bytes of the parameters."""
    loss_func = nn.CrossEntropyLoss()
    optimizer = factory(model, loss_func=loss_func)
    for _ in range(2):
        optimizer.zero_grad()
        loss_func(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    now = alive()
    parameters = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    others = parameters.keys() | {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
    del optimizer
    before = alive()
    kept = sum(size for place, size in now.items() if place not in others and place not in before)
    return kept / sum(parameters.values())


def perceptron(width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Three square layers and a batch."""
    model = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )
    return model, torch.randn(64, width), torch.randint(width, (64,))


def words(number: int) -> tuple[nn.Module, Tensor, Tensor]:
    """An embedding and a head over as many words, and a batch."""
    return (
        nn.Sequential(nn.Embedding(number, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, number)),
        torch.randint(number, (64,)),
        torch.randint(number, (64,)),
    )


def table(widths: list[int], vocabularies: list[int]) -> Table:
    """An optimizer a row, a model a column."""
    models: dict[str, tuple[Callable[[int], Any], int]] = {f"width {n:,}": (perceptron, n) for n in widths}
    models |= {f"{n:,} words": (words, n) for n in vocabularies}
    made = Table(title="Held beside the parameters, in their bytes")
    for heading in ("optimizer", *models):
        made.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, factory in OPTIMIZERS.items():
        cells = []
        for build, size in models.values():
            torch.manual_seed(0)
            cells.append(f"{held(factory, *build(size)):.1f}")
        made.add_row(name, *cells)
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--words", type=int, nargs="*", default=[1000, 8000, 50000])
    arguments = parser.parse_args()
    Console().print(table(arguments.widths, arguments.words))


if __name__ == "__main__":
    main()
