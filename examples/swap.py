"""The swap: one plain PyTorch loop on scikit-learn's digits, once with AdamW and once with EKFAC.

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)     # before
    optimizer = kfacopt.EKFAC(model, loss_func=criterion)          # after

Nothing else in the loop changes: no special forward, no second optimizer, no hooks to call.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfacopt

EPOCHS = 8  # from then on both fit the training data by heart


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 handwritten digits of 8 x 8 pixels, 1,500 of them to train on."""
    data, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data).float()[order] / 16, torch.tensor(data.target)[order]
    return TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])


def train(name: str) -> float:
    """The loop as you have it; returns the test loss at its end."""
    training, test = digits()
    torch.manual_seed(0)
    loader = DataLoader(training, batch_size=100, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()

    optimizer: torch.optim.Optimizer
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)  # the best of a grid
    else:
        optimizer = kfacopt.EKFAC(model, loss_func=criterion)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)

    print(f"{name}\n  epoch  seconds  training loss  test loss  test accuracy")
    start, loss = time.perf_counter(), float("nan")
    for epoch in range(1, EPOCHS + 1):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        scheduler.step()
        if epoch % 2 == 0:
            seconds = time.perf_counter() - start
            with torch.no_grad():
                (x, y), (x_test, y_test) = training.tensors, test.tensors
                trained, loss = criterion(model(x), y).item(), criterion(model(x_test), y_test).item()
                accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
            print(f"  {epoch:5d}  {seconds:7.2f}  {trained:13.5f}  {loss:9.4f}  {accuracy:13.1%}")
    return loss


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    adamw, ekfac = train("AdamW"), train("EKFAC")
    print(f"test loss at the end: AdamW {adamw:.4f}, EKFAC {ekfac:.4f}")
