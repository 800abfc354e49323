"""`check_handler`, and what a run says of a handler that is wrong: every built-in is right, every mistake is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfacopt
from kfacopt.layers import _REGISTRY, check_handler, handler_for, register_handler
from kfacopt.layers.linear import LinearHandler
from kfacopt.layers.registry import RefusedHandler
from kfacopt.layers.transposed_linear import TransposedLinearHandler
from kfacopt.likelihoods import KFACType

Case = tuple[nn.Module, tuple[Any, ...]]

BUILT_IN: dict[str, Callable[[], Case]] = {
    "linear": lambda: (nn.Linear(3, 2), (torch.randn(5, 4, 3),)),
    "bilinear": lambda: (nn.Bilinear(3, 2, 4), (torch.randn(5, 3), torch.randn(5, 2))),
    "conv 1d": lambda: (nn.Conv1d(3, 2, 3, dilation=2), (torch.randn(2, 3, 8),)),
    "conv 2d, groups": lambda: (nn.Conv2d(4, 6, 3, groups=2), (torch.randn(3, 4, 6, 5),)),
    "conv 3d": lambda: (nn.Conv3d(2, 3, 2, stride=2), (torch.randn(2, 2, 4, 5, 3),)),
    "transposed 1d": lambda: (nn.ConvTranspose1d(3, 2, 3), (torch.randn(2, 3, 5),)),
    "transposed 2d": lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2), (torch.randn(3, 4, 4, 5),)),
    "transposed 3d": lambda: (nn.ConvTranspose3d(2, 3, 2), (torch.randn(2, 2, 3, 4, 3),)),
    "embedding": lambda: (nn.Embedding(7, 2, padding_idx=1), (torch.tensor([[1, 2, 0], [3, 3, 1]]),)),
    "bag, ragged": lambda: (nn.EmbeddingBag(7, 2), (torch.tensor([1, 2, 0, 3, 3]), torch.tensor([0, 2, 2]))),
    "layer norm": lambda: (nn.LayerNorm(3), (torch.randn(5, 4, 3),)),
    "rms norm": lambda: (nn.RMSNorm(3), (torch.randn(5, 4, 3),)),
    "batch norm 1d": lambda: (nn.BatchNorm1d(3), (torch.randn(5, 3),)),
    "batch norm 2d": lambda: (nn.BatchNorm2d(3), (torch.randn(4, 3, 2, 5),)),
    "batch norm 3d": lambda: (nn.BatchNorm3d(3).eval(), (torch.randn(4, 3, 2, 2, 3),)),
    "group norm": lambda: (nn.GroupNorm(2, 4), (torch.randn(3, 4, 5),)),
    "instance norm 1d": lambda: (nn.InstanceNorm1d(3, affine=True), (torch.randn(4, 3, 5),)),
    "instance norm 2d": lambda: (nn.InstanceNorm2d(3, affine=True), (torch.randn(4, 3, 2, 5),)),
    "instance norm 3d": lambda: (nn.InstanceNorm3d(3, affine=True), (torch.randn(4, 3, 2, 2, 3),)),
    "rnn": lambda: (nn.RNN(3, 2), (torch.randn(5, 4, 3),)),
    "lstm": lambda: (nn.LSTM(3, 2, 2, bidirectional=True), (torch.randn(5, 4, 3),)),
    "gru": lambda: (nn.GRU(3, 2, batch_first=True), (torch.randn(4, 5, 3),)),
    "rnn cell": lambda: (nn.RNNCell(3, 2), (torch.randn(4, 3),)),
    "lstm cell": lambda: (nn.LSTMCell(3, 2), (torch.randn(4, 3),)),
    "gru cell": lambda: (nn.GRUCell(3, 2), (torch.randn(4, 3),)),
    "attention": lambda: (nn.MultiheadAttention(4, 2), (torch.randn(3, 2, 4),) * 3),
}


@pytest.mark.parametrize("kind", BUILT_IN)
def test_built_in_handlers_are_right(kind: str) -> None:
    module, inputs = BUILT_IN[kind]()
    handler = handler_for(module)
    assert handler is not None
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    check_handler(handler, module, *inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_no_built_in_handler_is_left_out() -> None:
    """But the one that always refuses, and the one of a type that is not ours to import."""
    kinds = {type(make()[0]) for make in BUILT_IN.values()}
    # What another test registered and took back leaves its kind with none.
    last = {kind: held[-1] for kind, held in _REGISTRY._entries.items() if held}
    built_in = {kind: h for kind, h in last.items() if type(h).__module__.startswith("kfacopt.")}
    assert {kind for kind, handler in built_in.items() if type(handler) is not RefusedHandler} == kinds


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "pruned": lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.4),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_handlers_of_computed_weights_are_right(kind: str) -> None:
    """But for what their rows hold constant: the direction's projection, the norm that moves with the weight."""
    for plain, x in ((nn.Linear(3, 2), torch.randn(5, 4, 3)), (nn.Conv2d(4, 2, 2), torch.randn(3, 4, 3, 3))):
        module = COMPUTED[kind](plain)
        with torch.no_grad():
            module(x)
        handler = handler_for(module)
        assert handler is not None
        check_handler(handler, module, x)


class Turned(nn.Module):
    """A linear layer whose weight is `[i o]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class NoPlaces(TransposedLinearHandler):
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return gradient


class NoPlacesOfInputs(TransposedLinearHandler):
    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: KFACType) -> Tensor:
        return super().input_rows(module, inputs, kwargs, roles, approx).squeeze(1)


class NoOnes(TransposedLinearHandler):
    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: KFACType) -> Tensor:
        return inputs[0].detach().unsqueeze(1)


class Untransposed(TransposedLinearHandler):
    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return super().pack(module, parts).mT


class Nothing(TransposedLinearHandler):
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Any:
        return None


class FewerData(TransposedLinearHandler):
    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: KFACType) -> Tensor:
        return super().input_rows(module, inputs, kwargs, roles, approx)[:-1]


MISSHAPEN: dict[str, tuple[kfacopt.LayerHandler, type[Exception], str]] = {
    "no axis s": (NoPlaces(), ValueError, r"NoPlaces.gradient_rows gave rows of shape \[\d, 5, 2\]"),
    "no axis s of inputs": (NoPlacesOfInputs(), ValueError, r"wanted \[n s i\] with i = "),
    "no ones": (NoOnes(), ValueError, r"NoOnes.input_rows gave rows of shape \[5, 1, 3\]"),
    "matrix turned": (Untransposed(), ValueError, r"Untransposed.* pack gives a matrix \["),
    "no tensor": (Nothing(), TypeError, "gave NoneType, no tensor"),
    "fewer data": (FewerData(), ValueError, r"rows of n, s = \[4, 1\], gradient_rows of \[5, 1\]"),
}


@pytest.mark.parametrize(("handler", "kind", "words"), MISSHAPEN.values(), ids=MISSHAPEN)
def test_misshapen_rows_are_named_by_the_check(
    handler: kfacopt.LayerHandler, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        check_handler(handler, Turned(), torch.randn(5, 3))


@pytest.mark.parametrize(("handler", "kind", "words"), MISSHAPEN.values(), ids=MISSHAPEN)
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_misshapen_rows_are_named_in_a_run(
    optimizer: Any, handler: kfacopt.LayerHandler, kind: type[Exception], words: str
) -> None:
    """With the module's path, and nothing is lost: parameters are as they were, and AdamW may have the layer."""
    model = nn.Sequential(nn.Linear(3, 3), Turned())
    before = [p.detach().clone() for p in model.parameters()]
    with register_handler(Turned, handler):
        made = optimizer(model, nn.MSELoss())
        with pytest.raises(kind, match=words) as error:
            nn.functional.mse_loss(model(torch.randn(5, 3)), torch.zeros(5, 2)).backward()
    for said in ("module '1' (Turned)", "kfacopt.layers.check_handler", "'curvature': False"):
        assert said in str(error.value)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    made.close()
    nn.functional.mse_loss(model(torch.randn(5, 3)), torch.zeros(5, 2)).backward()


class Doubled(TransposedLinearHandler):
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return 2 * super().gradient_rows(module, gradient, approx)


class Shuffled(TransposedLinearHandler):
    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: KFACType) -> Tensor:
        return super().input_rows(module, inputs, kwargs, roles, approx).flip(0)


class PlacesAsData(LinearHandler):
    """The sum over all rows is the gradient, but no row knows its datum."""

    batched = False

    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: KFACType) -> Tensor:
        return super().input_rows(module, (inputs[0].transpose(0, 1),), kwargs, roles, approx)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return super().gradient_rows(module, gradient.transpose(1, 2), approx)


class NeverReduces(LinearHandler):
    batched = False

    def input_rows(self, module: nn.Module, inputs: Any, kwargs: Any, roles: Any, approx: KFACType) -> Tensor:
        return super().input_rows(module, inputs, kwargs, roles, KFACType.EXPAND)


class OneWay(TransposedLinearHandler):
    batched = False

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {role: -part for role, part in super().unpack(module, matrix, roles).items()}


class NotBatched(LinearHandler):
    batched = True

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        packed = super().pack(module, parts)
        return packed if packed.ndim == 2 else packed.flip(0)


WRONG: dict[str, tuple[kfacopt.LayerHandler, nn.Module, tuple[int, ...], str]] = {
    "a factor": (Doubled(), Turned(), (5, 3), "a constant factor of 2: it belongs into gradient_rows"),
    "other data": (Shuffled(), Turned(), (5, 3), "is not autograd's gradient: off by"),
    "places as data": (PlacesAsData(), nn.Linear(3, 2), (5, 4, 3), "axis n has size 4, the output has 5 data"),
    "never reduces": (NeverReduces(), nn.Linear(3, 2), (5, 4, 3), r"n, s = \[5, 4\], gradient_rows of \[5, 1\]"),
    "unpack": (OneWay(), Turned(), (5, 3), "unpack does not undo pack for 'weight'"),
    "batched": (NotBatched(), nn.Linear(3, 2), (5, 3), "it is batched, but packs"),
    "no parameters": (LinearHandler(), nn.PReLU(), (5, 3), r"LinearHandler.pack gave a tensor of shape \[1\]"),
    "other parameters": (LinearHandler(), nn.Identity(), (5, 3), "names no parameter of this Identity"),
    "refused": (RefusedHandler("it is Tuesday"), nn.Linear(3, 2), (5, 3), "refuses this Linear: it is Tuesday"),
}


@pytest.mark.parametrize(("handler", "module", "shape", "words"), WRONG.values(), ids=WRONG)
def test_wrong_handlers_are_found(
    handler: kfacopt.LayerHandler, module: nn.Module, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_handler(handler, module, torch.randn(shape))


def test_what_is_no_handler_is_said() -> None:
    with pytest.raises(TypeError, match="did you call it"):
        check_handler(LinearHandler, nn.Linear(3, 2), torch.randn(5, 3))  # type: ignore[arg-type]
