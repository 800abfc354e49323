"""The networks of the training runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfacopt.experiments.models import CharacterTransformer, DeepAutoencoder, SmallResNet, TabularMLP


def test_autoencoder_is_that_of_the_literature() -> None:
    model = DeepAutoencoder()
    linears = [module for module in model if isinstance(module, nn.Linear)]
    sizes = [linears[0].in_features, *(linear.out_features for linear in linears)]
    assert sizes == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    code = next(place for place, module in enumerate(model) if module is linears[3])
    assert isinstance(model[code + 1], nn.Linear)
    assert isinstance(model[-1], nn.Linear)
    assert sum(isinstance(module, nn.Tanh) for module in model) == 6
    deviation = (2 / (784 + 1000)) ** 0.5
    assert linears[0].weight.std().item() == pytest.approx(deviation, rel=0.01)
    assert not linears[0].bias.any()


def test_transformer_sees_no_character_ahead() -> None:
    model = CharacterTransformer(vocabulary_size=11, context=8, width=16, layers=2, heads=2).eval()
    characters = torch.randint(0, 11, (3, 8))
    changed = characters.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(characters), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_transformer_knows_places_and_takes_shorter_sequences() -> None:
    model = CharacterTransformer(vocabulary_size=5, context=8, width=16, layers=1, heads=2)
    logits = model(torch.zeros(1, 4, dtype=torch.long))
    assert logits.shape == (1, 4, 5)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
    with pytest.raises(ValueError, match=r"9 characters.*context=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"width.*heads, got 10 and 4"):
        CharacterTransformer(width=10, heads=4)


def test_transformer_weights_begin_as_documented() -> None:
    model = CharacterTransformer(layers=2)
    block = model.blocks[0]
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.positions.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for writer in (block.attention_output, block.perceptron_output):
        assert writer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert torch.equal(model.norm.weight, torch.ones(128))
    logits = model(torch.randint(0, 256, (2, 16)))
    assert logits.std() < 1.0


def test_transformer_drops_in_training_only() -> None:
    model = CharacterTransformer(context=8, width=16, layers=1, heads=2, dropout=0.5)
    characters = torch.zeros(1, 8, dtype=torch.long)
    assert not torch.equal(model(characters), model(characters))
    model.eval()
    assert torch.equal(model(characters), model(characters))


def test_resnet_halves_the_image_between_stages() -> None:
    model = SmallResNet(channels=3, classes=7, widths=(4, 8, 8), blocks=2)
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 7)
    assert shapes == [(2, 4, 28, 28)] * 2 + [(2, 8, 14, 14)] * 2 + [(2, 8, 7, 7)] * 2
    assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Conv2d))


def test_mlp_has_no_activation_at_its_end() -> None:
    model = TabularMLP(input_size=3, hidden=(4, 5), output_size=2)
    assert [type(module).__name__ for module in model] == ["Linear", "Tanh"] * 2 + ["Linear"]
    assert model(torch.randn(6, 3)).shape == (6, 2)
