"""PyTorch Lightning, both ways, with automatic optimization, validation, clipping and accumulation.

1. The LightningModule returns `kfacopt.EKFAC` from `configure_optimizers`.
2. The LightningModule knows nothing of kfacopt: the callback swaps its optimizer.

`CurvatureCallback` puts the curvature's health into the logs of whatever logger there is.
"""

import csv
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import kfacopt
from kfacopt.lightning import CurvatureCallback

EPOCHS = 3 if os.environ.get("KFACOPT_SHORT") else 10
ekfac = partial(
    kfacopt.EKFAC, loss_func=nn.CrossEntropyLoss(), lr=0.3, damping=0.01, kl_clip=0.03, factor_every=5, refresh_every=20
)


class Digits(LightningModule):
    """A LightningModule as anybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.network(x), y), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


class DigitsWithEKFAC(Digits):
    """The first way: one line of the LightningModule changes."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ekfac(self)


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data).float() / 16, torch.tensor(digits.target))
    training, validation = random_split(data, [1500, 297], torch.Generator().manual_seed(0))
    return DataLoader(training, batch_size=50, shuffle=True), DataLoader(validation, batch_size=297)


def fit(name: str, module: LightningModule, callbacks: list[CurvatureCallback]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[*callbacks],
            logger=CSVLogger(folder),
            log_every_n_steps=5,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            enable_progress_bar=False,  # with it, damping, KL and overhead stand in the bar
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(module, *loaders())
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            rows = list(csv.DictReader(file))
    curve = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    print(f"{name:34} validation loss {curve[0]:.4f} -> {curve[-1]:.4f}")
    logged = sorted(key for key in rows[0] if key.startswith("curvature/"))
    if logged:
        print("  logged: " + ", ".join(logged))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, module_type, callbacks in [
        ("AdamW", Digits, []),
        ("1. EKFAC in configure_optimizers", DigitsWithEKFAC, [CurvatureCallback()]),
        ("2. EKFAC by the callback", Digits, [CurvatureCallback(optimizer=ekfac)]),
    ]:
        seed_everything(0, verbose=False)
        fit(name, module_type(), callbacks)
