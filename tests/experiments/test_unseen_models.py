"""The networks of the suite `unseen`, and a step of every optimizer in each of its tasks."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from train import build_data, build_task, compose

from kfacopt.experiments.rivals import adamw
from kfacopt.experiments.tasks import Supervised, VariationalAutoencoding
from kfacopt.experiments.unseen_models import (
    GraphNetwork,
    PointSets,
    SmallUNet,
    TiedTransformer,
    VariationalAutoencoder,
    VisionTransformer,
    Waves,
)

SUITE = compose("suite", ["suite=unseen"])


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("name", SUITE.tasks)
def test_every_optimizer_takes_a_step_in_every_task(name: str) -> None:
    spec = OmegaConf.create({"seed": 0, **SUITE.tasks[name]})
    spec.data.batch_size = 8
    if "rows" in spec.data:
        spec.data.rows = spec.data.validation_rows = 100
    if name == "few rows":  # of thousands of columns, whose factor takes seconds
        spec.data.columns = spec.model.sizes[0] = 40
    data = build_data(OmegaConf.merge(spec, {"data": {"seed": 0}}))
    batch = next(iter(data.train_dataloader()))
    for optimizer in SUITE.optimizers.values():
        task = build_task(OmegaConf.merge(spec, {"optimizer": optimizer}))
        stepped = task.optimizer_factory(task.model, loss_func=task.loss_func)
        before = nn.utils.parameters_to_vector(task.model.parameters()).detach().clone()
        task.loss(batch).backward()
        stepped.step()
        after = nn.utils.parameters_to_vector(task.model.parameters())
        assert after.isfinite().all()
        assert task.loss(batch).isfinite()
        # SOAP's first step only begins its statistics.
        assert "soap" in optimizer["_target_"] or not torch.equal(before, after)
        if hasattr(stepped, "close"):
            stepped.close()


def test_images_are_cut_into_patches_that_have_places() -> None:
    model = VisionTransformer(side=8, patch=4, width=8, heads=2)
    images = torch.randn(3, 1, 8, 8)
    swapped = torch.cat([images[..., 4:], images[..., :4]], dim=3)
    assert not torch.allclose(model(images), model(swapped))
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(images), model(swapped))


def test_a_tied_head_is_counted_once() -> None:
    tied = TiedTransformer(vocabulary_size=11, context=8, width=8, layers=1, heads=2)
    names = {name for name, _ in tied.named_parameters()}
    assert "characters.weight" in names
    assert "head.weight" not in names


def test_the_evidence_bound_counts_codes() -> None:
    model = VariationalAutoencoder(pixels=6, hidden=4, code=2)
    task = VariationalAutoencoding(model, adamw)
    images = torch.rand(5, 6)
    nn.init.zeros_(model.encoder[-1].weight)
    with torch.no_grad():
        model.encoder[-1].bias.copy_(torch.tensor([1.0, -1.0, 0.0, 0.0]))
    torch.manual_seed(0)
    bound = task.loss((images,))
    torch.testing.assert_close(model.divergence, torch.tensor(1.0))
    torch.manual_seed(0)
    pixels = nn.functional.binary_cross_entropy_with_logits(model(images), images) * 6
    torch.testing.assert_close(bound, pixels + 1.0)
    assert not torch.equal(model(images), model(images))


def test_sines_keep_their_distribution_over_the_layers() -> None:
    model = Waves(width=256, layers=4)
    places = 2 * torch.rand(500, 2) - 1
    deviations = []
    for linear in model.hidden:
        linear.register_forward_hook(lambda _, __, output: deviations.append(torch.sin(30 * output).std().item()))
    model(places)
    assert deviations == pytest.approx([0.7] * 4, abs=0.05)


def test_the_order_of_points_and_of_nodes_does_not_matter() -> None:
    order = torch.randperm(12)
    points, sets = torch.randn(4, 12, 3), PointSets()
    torch.testing.assert_close(sets(points), sets(points[:, order]))
    graph, network = torch.rand(4, 12, 12 + 5), GraphNetwork(features=5)
    adjacency, features = graph[..., :12], graph[..., 12:]
    turned = torch.cat([adjacency[:, order][:, :, order], features[:, order]], dim=2)
    torch.testing.assert_close(network(graph)[:, order], network(turned))


def test_an_image_comes_back_in_its_size() -> None:
    assert SmallUNet(width=4)(torch.zeros(2, 1, 12, 20)).shape == (2, 1, 12, 20)


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.HuberLoss(), torch.randn(6, 3)),
        (nn.BCEWithLogitsLoss(), torch.ones(6, 3)),
        (nn.CrossEntropyLoss(), torch.randn(6, 3).softmax(1)),
    ],
)
def test_any_loss_of_torchs(criterion: nn.Module, targets: torch.Tensor) -> None:
    model, inputs = nn.Linear(4, 3), torch.randn(6, 4)
    task = Supervised(model, adamw, criterion)
    assert task.loss_func is criterion
    torch.testing.assert_close(task.loss((inputs, targets)), criterion(model(inputs), targets))
