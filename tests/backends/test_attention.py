"""Attention is trained as though it had been written with four linear layers, whatever it is asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfacopt
from kfacopt.layers.layer import Layer
from kfacopt.linalg.polar import exact_polar
from kfacopt.optim.step import Spectral
from tests.cases import exact_ekfac, natural_direction, still
from tests.explicit import explicit_model

MSE = nn.MSELoss()


class Asked(nn.Module):
    """Attention that is asked in some way, between a linear layer and a head; inputs `[n t 4]`."""

    def __init__(self, inputs: int = 1, calls: int = 1, how: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.inputs, self.calls, self.how = inputs, calls, how or {}
        self.swap, self.widths = not options.get("batch_first", False), (options.get("kdim"), options.get("vdim"))
        self.below = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.below(x).tanh()
        key, value = (h[:, 1:, :width] for width in self.widths)
        key, value, h = (t.transpose(0, 1) if self.swap else t for t in (key, value, h))
        for _ in range(self.calls):
            given = {1: (h, h, h), 2: (h, key, key), 3: (h, key, value)}[self.inputs]
            h = h + self.attention(*given, **self.how)[0]
        return self.head(h).mean(0 if self.swap else 1)


BOOLEAN = torch.ones(5, 5, dtype=torch.bool).triu(2)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
PADDING = torch.arange(5) >= torch.tensor([[5], [4], [3], [2]])
FORMS: dict[str, Callable[..., nn.Module]] = {
    "self": lambda **o: Asked(**o),
    "self, without weights": lambda **o: Asked(how={"need_weights": False}, **o),
    "self, no bias": lambda **o: Asked(bias=False, **o),
    "self, bias_k and zero": lambda **o: Asked(add_bias_kv=True, add_zero_attn=True, **o),
    "self, twice": lambda **o: Asked(calls=2, **o),
    "boolean mask": lambda **o: Asked(how={"attn_mask": BOOLEAN}, **o),
    "causal": lambda **o: Asked(how={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, **o),
    "key padding": lambda **o: Asked(how={"key_padding_mask": PADDING}, **o),
    "key padding, without weights": lambda **o: Asked(how={"key_padding_mask": PADDING, "need_weights": False}, **o),
    "cross": lambda **o: Asked(inputs=2, **o),
    "cross, no bias": lambda **o: Asked(inputs=2, bias=False, how={"need_weights": False}, **o),
    "three inputs": lambda **o: Asked(inputs=3, **o),
    "three inputs, twice": lambda **o: Asked(inputs=3, calls=2, **o),
    "separate weights": lambda **o: Asked(inputs=3, kdim=3, vdim=2, **o),
    "separate weights, no bias": lambda **o: Asked(inputs=3, kdim=3, vdim=2, bias=False, **o),
}


def spectral(model: nn.Module, loss: nn.Module, **options: Any) -> Any:
    """Without clipped gradients: packed parameters have one norm together, four layers have one each."""
    return kfacopt.SpectralDescent(model, loss, direction=Spectral(0.9), **options)


def spectral_kfac(model: nn.Module, loss: nn.Module, factor_every: int, refresh_every: int, **options: Any) -> Any:
    return spectral(model, loss, backend=kfacopt.KFACBackend(factor_every, refresh_every, exponent=0.5), **options)


def natural(optimizer: Any) -> Any:
    return lambda *args, **options: optimizer(*args, direction=natural_direction(), **options)


OPTIMIZERS = {
    "kfac": natural(kfacopt.KFAC),
    "ekfac": natural(kfacopt.EKFAC),
    "exact-ekfac": exact_ekfac,
    "spectral": spectral,
    "spectral-kfac": spectral_kfac,
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)


def trained(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = 3) -> Any:
    made = optimizer(model, MSE, curvature="ggn", factor_every=1, refresh_every=1)
    for _ in range(steps):
        made.zero_grad()
        MSE(model(x), y).backward()
        made.step()
    return made


# What comes first, batch or positions, is dealt with where rows are made, which no optimizer knows of: one that needs
# all of them, each datum's, is asked.
@pytest.mark.parametrize(
    ("optimizer", "batch_first"), [*((optimizer, True) for optimizer in OPTIMIZERS), ("exact-ekfac", False)]
)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_four_linear_layers(optimizer: str, form: str, batch_first: bool) -> None:
    """Momentum, clipping and the second step's curvature included; float64, three steps: rounding is about 1e-12."""
    torch.manual_seed(0)
    model = FORMS[form](batch_first=batch_first).double()
    written, (x, y) = explicit_model(model), batch()
    torch.testing.assert_close(model(x), written(x), rtol=1e-12, atol=1e-12)
    before = written.attention.k_proj.weight.detach().clone()
    made, other = (trained(m, OPTIMIZERS[optimizer], x, y) for m in (model, written))
    for name, block in other.backend.blocks.items():
        for ours, theirs in zip(made.backend.blocks[name].averages().values(), block.averages().values(), strict=True):
            torch.testing.assert_close(ours.value, theirs.value, rtol=1e-8, atol=1e-10)
    found = explicit_model(model).state_dict()
    for name, value in written.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)
    assert not torch.equal(before, written.attention.k_proj.weight)
    assert made.health()["unseen_layers"] == 0.0
    treated = {row.module: row.treatment for row in made.coverage().rows}
    assert {m for m, how in treated.items() if how == "AdamW"} == ({"attention"} if "bias_k" in form else set())


def test_a_part_that_is_not_ready_takes_the_spectral_step_of_no_curvature() -> None:
    """Of the packed weight only the values' and the queries' share is in the curvature's metric."""

    class Unready(kfacopt.OneSidedKFACBackend):
        def ready(self, layer: Layer) -> bool:
            return not layer.name.endswith("k_proj") and super().ready(layer)

    torch.manual_seed(0)
    model, (x, y) = Asked(batch_first=True, bias=False).double(), batch()
    start = model.attention.in_proj_weight.detach().clone()
    steps = {}
    for name, backend in {"all": kfacopt.OneSidedKFACBackend, "two": Unready}.items():
        twin = copy.deepcopy(model)
        direction = Spectral(0.0, exact_polar, row_decay=None, margin=None)
        made = kfacopt.SpectralDescent(twin, MSE, lr=1.0, backend=backend(1, 1), direction=direction)
        MSE(twin(x), y).backward()
        made.step()
        steps[name] = start - twin.attention.in_proj_weight.detach()
    assert twin.attention.in_proj_weight.grad is not None
    plain = exact_polar(twin.attention.in_proj_weight.grad[4:8])
    torch.testing.assert_close(steps["two"][4:8], 2.0 * plain / plain.norm())
    torch.testing.assert_close(steps["two"][:4], steps["all"][:4])
    torch.testing.assert_close(steps["two"][8:], steps["all"][8:])
    assert not torch.allclose(steps["two"][4:8], steps["all"][4:8])


def test_each_part_remembers_its_rows() -> None:
    torch.manual_seed(0)
    model, (x, y) = Asked(batch_first=True).double(), batch()
    made = trained(model, spectral, x, y, steps=3)
    weight = model.attention.in_proj_weight
    for rows in ("[0:4]", "[4:8]", "[8:12]"):
        assert made.state[weight][f"row_squares{rows}"].shape == (4,)
        assert made.state[weight][f"row_weight{rows}"] == pytest.approx(1.0 - 0.95**3)
    twin = copy.deepcopy(model)
    again = spectral(twin, MSE, curvature="ggn", factor_every=1, refresh_every=1)
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for one, held in ((made, model), (again, twin)):
        one.zero_grad()
        MSE(held(x), y).backward()
        one.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_refused_part_takes_its_partners_along() -> None:
    """The bias is packed though the weights are not: no row of it can train apart, and the table says so of each."""
    torch.manual_seed(0)
    model, (x, y) = FORMS["separate weights"](batch_first=True).double(), batch()
    direction = Spectral(0.0, layers=lambda layer: layer.name != "attention.q_proj")
    made = kfacopt.SpectralDescent(model, MSE, lr=1.0, adamw_lr=0.0, direction=direction)
    rows = {row.module: row for row in made.coverage().rows}
    before = copy.deepcopy(model.state_dict())
    MSE(model(x), y).backward()
    made.step()
    for letter in ("q", "k", "v"):
        assert rows[f"attention.{letter}_proj"].treatment == "AdamW"
        assert torch.equal(
            before[f"attention.{letter}_proj_weight"], model.state_dict()[f"attention.{letter}_proj_weight"]
        )
    assert rows["attention.out_proj"].treatment == "K-FAC's G"
    assert not torch.equal(before["attention.out_proj.weight"], model.attention.out_proj.weight)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_in_other_layouts(approx: str, separate: bool) -> None:
    torch.manual_seed(0)
    model = FORMS["three inputs"](batch_first=False).double()
    written, (x, y) = explicit_model(model), batch()
    options = {"kfac_approx": approx, "separate_weight_and_bias": separate}
    blocks = []
    for m in (model, written):
        made = kfacopt.KFAC(m, MSE, **still(**options))
        MSE(m(x), y).backward()
        made.step()
        blocks.append({name: block.factors() for name, block in made.backend.blocks.items()})
    assert blocks[0].keys() == blocks[1].keys()
    for name, factors in blocks[1].items():
        for ours, theirs in zip(blocks[0][name], factors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def padded_encoder() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    return encoder.eval(), torch.randn(4, 5, 8), PADDING


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_fast_path_stays_what_it_is() -> None:
    """Nested tensors in evaluation, which make padded places zero, with and without an optimizer that watches."""
    encoder, x, padding = padded_encoder()
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=padding)
        assert bool((before[padding] == 0).all())
        made = kfacopt.EKFAC(encoder, MSE)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), before, rtol=1e-5, atol=1e-6)
        made.close()
        assert torch.equal(encoder(x, src_key_padding_mask=padding), before)


def test_in_evaluation_mode_curvature_is_captured_too() -> None:
    encoder, x, padding = padded_encoder()
    made = kfacopt.KFAC(encoder, MSE, refresh_every=1)
    MSE(encoder(x, src_key_padding_mask=padding), torch.zeros(4, 5, 8)).backward()
    made.step()
    assert all(made.backend.ready(layer) for layer in made._layers)
    assert made.health()["unseen_layers"] == 0.0


class Checkpointed(Asked):
    """The attention is run again in the backward."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        attended = checkpoint(self.attend, self.below(x), use_reentrant=False)
        return self.head(attended).mean(1)

    def attend(self, h: Tensor) -> Tensor:
        self.runs += 1
        return self.attention(h, h, h)[0]


def test_a_checkpointed_attention_is_said_to_train_by_adamw() -> None:
    """To read what the product saved would run the forward again in the middle of it."""
    torch.manual_seed(0)
    model, (x, y) = Checkpointed(batch_first=True).double(), batch()
    with pytest.warns(UserWarning, match=r"no backward shows the curvature of .*attention.k_proj"):
        made = trained(model, OPTIMIZERS["kfac"], x, y, steps=1)
    assert model.runs <= 3  # the forward, and again for either backward
    unseen = {row.module for row in made.coverage().rows if row.treatment == "AdamW"}
    assert unseen == {f"attention.{letter}_proj" for letter in ("q", "k", "v", "out")}


def test_a_use_outside_the_module_is_noticed() -> None:
    """The packed weight is read once by the call, however many layers are made of it."""

    class Twice(Asked):
        def forward(self, x: Tensor) -> Tensor:
            return (
                super().forward(x)
                + nn.functional.linear(x, self.attention.in_proj_weight).mean((1, 2), keepdim=True)[:, 0]
            )

    torch.manual_seed(0)
    model, (x, y) = Twice(batch_first=True).double(), batch()
    with pytest.warns(UserWarning, match=r"attention.k_proj.*used outside its module"):
        made = trained(model, kfacopt.KFAC, x, y, steps=1)
    rows = {row.module: row.treatment for row in made.coverage().rows}
    assert rows["attention"] == "AdamW"
    assert rows["attention.out_proj"] == "KFAC"


def test_an_empty_batch_passes() -> None:
    model, (x, y) = Asked(batch_first=True).double(), batch()
    made = trained(model, kfacopt.EKFAC, x, y, steps=1)
    before = {name: block.factors()[1].clone() for name, block in made.backend.blocks.items()}
    made.zero_grad()
    model(x[:0]).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.step()
    for name, block in made.backend.blocks.items():
        assert torch.equal(block.factors()[1], before[name])


def test_half_precision_and_resuming() -> None:
    """Under autocast rows are of the cast weights' products; a state goes on bit for bit."""

    def run(steps: int, state: Any = None, start: Any = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = Asked(inputs=2, batch_first=True)
        if start is not None:
            model.load_state_dict(start)
        made = kfacopt.EKFAC(model, MSE, curvature="ggn", factor_every=1, refresh_every=2)
        if state is not None:
            made.load_state_dict(state)
        x, y = (t.float() for t in batch())
        for _ in range(steps):
            made.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            MSE(output.float(), y).backward()
            made.step()
        return model, made

    whole, _ = run(4)
    half, made = run(2)
    resumed, again = run(2, made.state_dict(), half.state_dict())
    assert again.health()["unseen_layers"] == 0.0
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
