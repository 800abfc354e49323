"""What the hooks see, and what they leave alone: the user's gradients, graphs, modules and copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kfacopt
from tests.cases import CASES, Case, backward, mlp, parameters_of, still, train_step

NAMED = [pytest.param(case, id=case.name) for case in CASES]
FISHERS = ("type-2", "mc", "empirical")


def batch(seed: int = 0, data: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(data, 4, dtype=torch.float64, generator=generator),
        torch.randint(3, (data,), generator=generator),
    )


def fresh(build: Callable[[], nn.Module] = mlp) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def attached(model: nn.Module, loss: Any = None, **options: Any) -> kfacopt.SecondOrderOptimizer:
    return kfacopt.KFAC(model, loss or nn.CrossEntropyLoss(), **still(**options))


def factors(optimizer: kfacopt.SecondOrderOptimizer) -> dict[str, tuple[Tensor, ...]]:
    return {
        name: tuple(a.value.clone() for a in block.averages().values() if a.value is not None)
        for name, block in optimizer.backend.blocks.items()
        if block.estimated
    }


def assert_same_factors(
    one: kfacopt.SecondOrderOptimizer, other: kfacopt.SecondOrderOptimizer, names: dict[str, str]
) -> None:
    """Equal factors of the layers `names`: those of `one` by those of `other`."""
    a, b = factors(one), factors(other)
    assert set(a) == set(names)
    assert set(b) == set(names.values())
    for name, counterpart in names.items():
        for mine, theirs in zip(a[name], b[counterpart], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def pending(optimizer: kfacopt.SecondOrderOptimizer) -> list[str]:
    """Layers whose statistics wait for a step."""
    return [
        name
        for name, block in optimizer.backend.blocks.items()
        if any(average.pending is not None for average in block.averages().values())
    ]


def hooks_on(model: nn.Module) -> int:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


# -- the user's gradients --------------------------------------------------------------------------


def gradients(case: Case, attach: Callable[[nn.Module, nn.Module], Any]) -> list[Tensor]:
    """Of parameters and inputs: two accumulated backwards, the second through a retained graph twice."""
    model, loss, x, y = case.make()
    held = attach(model, loss)
    if x.is_floating_point():
        x.requires_grad_()
    backward(model, loss, x, y)
    value = loss(model(x), y)
    value.backward(retain_graph=True)
    value.backward()
    del held
    tensors = [p for p in model.parameters() if p.grad is not None]
    return [t.grad for t in [*tensors, *([x] if x.requires_grad else [])] if t.grad is not None]


@pytest.mark.parametrize("case", NAMED)
@pytest.mark.parametrize("fisher_type", FISHERS)
def test_gradients_are_bit_identical(case: Case, fisher_type: str) -> None:
    bare = gradients(case, lambda model, loss: None)
    for optimizer in (kfacopt.KFAC, kfacopt.EKFAC):

        def attach(model: nn.Module, loss: nn.Module, kind: Any = optimizer) -> Any:
            return kind(model, loss, **still(curvature=fisher_type))

        watched = gradients(case, attach)
        assert len(bare) == len(watched)
        assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fisher_type", FISHERS)
def test_activation_checkpointing(reentrant: bool, fisher_type: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, active: bool) -> None:
            super().__init__()
            self.net, self.head, self.active = mlp(4), nn.Linear(4, 3), active

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.net, x, use_reentrant=reentrant) if self.active else self.net(x)
            return self.head(h)

    x, y = batch()
    results = []
    for active in (False, True):
        for watched in (False, True):
            model = fresh(lambda active=active: Checkpointed(active))
            optimizer = attached(model, curvature=fisher_type) if watched else None
            inputs = x.clone().requires_grad_()
            backward(model, nn.CrossEntropyLoss(), inputs, y)
            results.append([p.grad for p in [*model.parameters(), inputs]])
            if optimizer is not None and active and not reentrant:
                plain = fresh(lambda: Checkpointed(False))
                twin = attached(plain, curvature=fisher_type)
                backward(plain, nn.CrossEntropyLoss(), x, y)
                optimizer.step()
                twin.step()
                assert_same_factors(optimizer, twin, {n: n for n in ("net.0", "net.2", "head")})
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("fisher_type", FISHERS)
def test_retained_gradients_of_activations(fisher_type: str) -> None:
    """`h.retain_grad()` of a module's output shows the user's gradient, not the curvature pass's on top."""

    def retained(watch: bool) -> list[Tensor]:
        model, kept = fresh(), []
        held = attached(model, curvature=fisher_type) if watch else None

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept.append(output)

        for module in model:
            module.register_forward_hook(keep)
        x, y = batch()
        backward(model, nn.CrossEntropyLoss(), x, y)
        del held
        return [h.grad.clone() for h in kept]

    for bare, watched in zip(retained(False), retained(True), strict=True):
        assert torch.equal(bare, watched)


def test_retained_gradients_of_several_roots() -> None:
    """Also of an encoder that was called before its decoder, and of an earlier forward."""

    def retained(watch: bool) -> list[Tensor]:
        model, (x, y) = fresh(), batch()
        held = attached(model) if watch else None
        hidden = model[0](x)
        first = model[2](model[1](hidden))
        second = model(x)
        for tensor in (hidden, first, second):
            tensor.retain_grad()
        (F.cross_entropy(first, y) + F.cross_entropy(second, y)).backward()
        del held
        return [tensor.grad.clone() for tensor in (hidden, first, second)]

    for bare, watched in zip(retained(False), retained(True), strict=True):
        assert torch.equal(bare, watched)


def test_gradient_penalties() -> None:
    """A double backward (`create_graph`) through a watched model is the user's own affair."""
    results = []
    for watch in (False, True):
        model = fresh()
        optimizer = attached(model, nn.MSELoss()) if watch else None
        x = batch()[0].requires_grad_()
        prediction = model(x)
        (slope,) = torch.autograd.grad(prediction.sum(), x, create_graph=True)
        (prediction.square().mean() + slope.square().sum()).backward()
        results.append([p.grad for p in model.parameters()])
        if optimizer is not None:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_functional_transforms_of_a_watched_model() -> None:
    """torch.func differentiates a watched model (per-example gradients for a plot, say) as an unwatched one."""
    x, y = batch()
    results = []
    for watch in (False, True):
        model = fresh()
        optimizer = attached(model) if watch else None

        def loss(parameters: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

        detached = {name: p.detach() for name, p in model.named_parameters()}
        results.append(torch.func.grad(loss)(detached))
        if optimizer is not None:
            train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


# -- nothing is left -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NAMED)
def test_close_removes_every_hook(case: Case) -> None:
    model, loss, x, y = case.make()
    own = next(model.modules()).register_forward_hook(lambda module, args, output: None)
    before = hooks_on(model)
    optimizer = kfacopt.EKFAC(model, loss, **still())
    assert hooks_on(model) > before
    train_step(optimizer, model, loss, x, y)
    loss(model(x), y)  # a forward whose backward has not come
    optimizer.close()
    optimizer.close()
    assert hooks_on(model) == before
    own.remove()
    assert hooks_on(model) == 0


def test_a_refused_optimizer_leaves_no_hook() -> None:
    model = fresh()
    for arguments in (
        {"loss_func": nn.NLLLoss()},
        {"loss_func": nn.CrossEntropyLoss(), "curvature": "type-3"},
        {"loss_func": nn.CrossEntropyLoss(), "lr": -1.0},
        {"loss_func": nn.CrossEntropyLoss(), "factor_every": 0},
    ):
        with pytest.raises((TypeError, ValueError)):
            kfacopt.KFAC(model, **arguments)
        assert hooks_on(model) == 0


def test_an_optimizer_that_is_gone_stops_watching() -> None:
    model, (x, y) = fresh(), batch()
    optimizer = attached(model)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    backward(model, nn.CrossEntropyLoss(), x, y)
    second = attached(model)
    own = 2 * len(list(model.modules()))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == own
    second.close()
    assert hooks_on(model) == 0


class Failing(nn.Module):
    """Raises in the middle of the model when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.error is not None:
            raise self.error("as told")
        return self.head(h.tanh())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("nested", [False, True])
def test_an_exception_inside_forward(error: type[BaseException], nested: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Failing()) if nested else Failing()

    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model, twin = fresh(build), fresh(build)
    optimizer, undisturbed = attached(model, lr=0.1), attached(twin, lr=0.1)
    inner = model[0] if nested else model
    for _ in range(2):
        inner.error = error
        with pytest.raises(error, match="as told"):
            model(x)
        inner.error = None
        assert pending(optimizer) == []
        train_step(optimizer, model, loss, x, y)
        train_step(undisturbed, twin, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), parameters_of(twin), strict=True))
    optimizer.close()
    assert hooks_on(model) == 0


def test_an_exception_that_the_model_catches_itself() -> None:
    class Careful(Failing):
        def __init__(self) -> None:
            super().__init__()
            self.risky = Failing()

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.risky(x)
            except RuntimeError:
                return super().forward(x)
            raise AssertionError

    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model, twin = fresh(Careful), fresh(Failing)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "risky" not in k})
    model.risky.error = RuntimeError
    optimizer, other = attached(model), attached(twin)
    for made, of in ((optimizer, model), (other, twin)):
        train_step(made, of, loss, x, y)
    assert_same_factors(optimizer, other, {"inner": "inner", "head": "head"})


class Marked(torch.autograd.Function):
    """An identity whose node can be watched: its marker dies with it."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.marker = _Marker()
        Marked.alive.add(ctx.marker)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Marker:
    pass


class Watched(nn.Module):
    """A model whose graph can be watched, with outputs of several kinds."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.net, self.aux, self.output = mlp(), nn.Linear(3, 2), output

    def forward(self, x: Tensor) -> Any:
        logits = self.net(Marked.apply(x))
        if self.output == "plain":
            return logits
        if self.output == "aux":  # a head on top of the prediction: the graph goes on behind it
            return {"logits": logits, "aux": self.aux(logits)}
        return logits, self.aux(logits)


RULES = pytest.mark.parametrize("rule", [None, kfacopt.LevenbergMarquardt(every=1)], ids=["", "damping-rule"])


@RULES
@pytest.mark.parametrize("output", ["plain", "aux", "ambiguous"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_forward_without_backward_keeps_no_graph(output: str, wanted: bool, rule: Any) -> None:
    model = fresh(lambda: Watched(output))
    x, y = batch()
    x.requires_grad_()
    choose = (lambda out: out[0]) if output == "ambiguous" and wanted else None
    optimizer = attached(model, prediction=choose, damping_rule=rule)
    gc.collect()
    Marked.alive.clear()
    for _ in range(3):
        model(x)
    gc.collect()
    assert len(Marked.alive) == 0
    del optimizer, y


@RULES
@pytest.mark.parametrize("output", ["plain", "aux"])
def test_a_trained_step_keeps_no_graph(output: str, rule: Any) -> None:
    model = fresh(lambda: Watched(output))
    x, y = batch()
    x.requires_grad_()
    optimizer = attached(model, lr=0.1, damping_rule=rule)
    for _ in range(3):
        optimizer.zero_grad()
        result = model(x)
        F.cross_entropy(result["logits"] if output == "aux" else result, y).backward()
        optimizer.step()
        del result
    gc.collect()
    Marked.alive.clear()
    optimizer.zero_grad()
    result = model(x)
    F.cross_entropy(result["logits"] if output == "aux" else result, y).backward()
    optimizer.step()
    assert len(Marked.alive) == 1
    del result
    gc.collect()
    assert len(Marked.alive) == 0


def test_forwards_without_backward_change_nothing() -> None:
    """Validation that forgot no_grad, in either mode, between any two calls of the loop."""
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model, twin = fresh(), fresh()
    optimizer, plain = attached(model, lr=0.1), attached(twin, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(model(x), y)
        model.eval()
        model(x[:3])
        model.train()
        value.backward()
        model(x[:2])
        optimizer.step()
        train_step(plain, twin, loss, x, y)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(model), parameters_of(twin), strict=True))


# -- which tensor is the prediction ----------------------------------------------------------------


@dataclass
class Output:
    """As Hugging Face's models return it."""

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class Various(nn.Module):
    """Returns its logits in many ways, and takes its input by position or keyword."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = mlp(), kind

    def forward(self, x: Tensor | None = None, *, features: Tensor | None = None, scale: float = 1.0) -> Any:
        given = features if x is None else x
        assert given is not None
        hidden = self.net[1](self.net[0](given * scale))
        logits = self.net[2](hidden)
        kinds: dict[str, Any] = {
            "tensor": logits,
            "tuple": (logits, hidden.detach()),
            "list": [None, logits],
            "dict": {"logits": logits, "hidden": hidden},
            "one-of-dict": {"scores": logits, "indices": logits.argmax(1)},
            "object": Output(logits, hidden),
            "chosen": {"a": hidden, "b": (hidden, logits)},
            "with-loss": Output(logits, hidden, F.cross_entropy(logits, batch()[1])),
        }
        return kinds[self.kind]


def logits_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Output):
        return output.logits
    if isinstance(output, dict):
        return output["b"][1] if "b" in output else output.get("logits", output.get("scores"))
    return next(t for t in output if t is not None and t.requires_grad)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "one-of-dict", "object", "chosen", "with-loss"])
@pytest.mark.parametrize("keyword", [False, True])
def test_outputs_and_inputs_of_many_kinds(kind: str, keyword: bool) -> None:
    x, y = batch()
    model, plain = fresh(lambda: Various(kind)), fresh()
    choose = (lambda output: output["b"][1]) if kind == "chosen" else None
    optimizer, other = attached(model, prediction=choose), attached(plain)
    output = model(features=x, scale=1.0) if keyword else model(x)
    value = output.loss if kind == "with-loss" else F.cross_entropy(logits_of(output), y)
    value.backward()
    optimizer.step()
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"net.0": "0", "net.2": "2"})


def test_an_ambiguous_output_is_an_error_that_says_what_to_pass() -> None:
    model = fresh(lambda: Various("chosen"))
    optimizer = attached(model)
    x, y = batch()
    with pytest.raises(ValueError, match=r"Various.*prediction="):
        F.cross_entropy(model(x)["b"][1], y).backward()
    assert pending(optimizer) == []


def test_a_prediction_function_must_return_a_tensor() -> None:
    model = fresh()
    held = attached(model, prediction=lambda output: [output])
    with pytest.raises(TypeError, match="prediction="):
        model(batch()[0]).sum().backward()
    held.close()


def test_a_prediction_changed_in_place_is_an_error() -> None:
    model = fresh(lambda: nn.Linear(4, 3))
    held = attached(model)
    x, y = batch()
    prediction = model(x)
    prediction *= 0.5
    with pytest.raises(RuntimeError, match="in place"):
        F.cross_entropy(prediction, y).backward()
    held.close()


# -- roots -----------------------------------------------------------------------------------------


class Parts(nn.Module):
    """As a LightningModule: its own forward is never called, and the loss is one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        net = mlp()
        self.encoder, self.act, self.decoder = net[0], net[1], net[2]
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("never called")


def separately(model: Parts, x: Tensor) -> Tensor:
    result: Tensor = model.decoder(model.act(model.encoder(x)))
    return result


@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor_every", [1, 3])
def test_several_roots_are_one_model(fisher_type: str, reduction: str, factor_every: int) -> None:
    x, y = batch()
    model, plain = fresh(Parts), fresh()
    loss = nn.CrossEntropyLoss(reduction=reduction)
    options = {"curvature": fisher_type, "lr": 0.1, "factor_every": factor_every}
    optimizer, other = attached(model, loss, **options), attached(plain, loss, **options)
    for _ in range(4):
        optimizer.zero_grad()
        loss(separately(model, x), y).backward()
        optimizer.step()
        train_step(other, plain, loss, x, y)
    assert_same_factors(optimizer, other, {"encoder": "0", "decoder": "2"})
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_a_loss_that_is_a_module_of_the_model(kind: type[nn.Module]) -> None:
    x, y = batch()
    target = y if kind is nn.CrossEntropyLoss else F.one_hot(y, 3).double()
    model, plain = fresh(Parts), fresh()
    model.criterion = kind()
    optimizer, other = attached(model, model.criterion), attached(plain, kind())
    model.criterion(separately(model, x), target).backward()
    optimizer.step()
    train_step(other, plain, kind(), x, target)
    assert_same_factors(optimizer, other, {"encoder": "0", "decoder": "2"})


def test_an_encoder_without_covered_layers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.GRUCell(4, 5), nn.Linear(5, 3)

    (x, y), model = batch(), fresh(Recurrent)
    optimizer = attached(model, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.decoder(model.encoder(x)), y).backward()
        assert pending(optimizer) == ["decoder"]
        optimizer.step()


def test_a_module_called_in_several_forwards() -> None:
    """Two forwards, two losses, one backward: two micro-batches."""
    x, y = batch()
    model, plain = fresh(), fresh()
    optimizer, other = attached(model), attached(plain)
    loss = F.cross_entropy(model(x[:3]), y[:3], reduction="sum")
    loss = loss + F.cross_entropy(model(x[3:]), y[3:], reduction="sum")
    (loss / len(x)).backward()
    optimizer.step()
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"0": "0", "2": "2"})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
@pytest.mark.parametrize("sizes", [(4, 4), (2, 5, 1)])
def test_accumulation_is_the_big_batch(reduction: str, optimizer: Any, sizes: tuple[int, ...]) -> None:
    x, y = batch(data=sum(sizes))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    made = []
    for parts in (sizes, (sum(sizes),)):
        model = fresh()
        options = still(lr=0.1, kl_clip=1e-2, refresh_every=2, ema_decay=0.9)
        used = optimizer(model, loss, **options)
        for _ in range(3):
            used.zero_grad()
            for some_x, some_y in zip(x.split(list(parts)), y.split(list(parts)), strict=True):
                share = len(some_x) / len(x) if reduction == "mean" else 1.0
                (share * loss(model(some_x), some_y)).backward()
            used.step()
        made.append((model, used))
    for a, b in zip(made[0][0].parameters(), made[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_micro_batches_of_different_length() -> None:
    """The input factor is the mean over all rows, however many cotangents a micro-batch needs."""
    model = fresh(lambda: nn.Linear(3, 8))
    optimizer = attached(model, nn.MSELoss())
    batches = [torch.randn(2, t, 3, dtype=torch.float64) for t in (4, 16)]
    for x in batches:
        backward(model, nn.MSELoss(), x, torch.zeros(2, x.shape[1], 8, dtype=torch.float64))
    optimizer.step()
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    gradient_factor, input_factor = optimizer.backend.blocks[""].factors()
    torch.testing.assert_close(input_factor, rows.mT @ rows / len(rows), rtol=1e-10, atol=1e-12)
    expected = torch.eye(8, dtype=torch.float64) * 2 / 8
    torch.testing.assert_close(gradient_factor, expected, rtol=1e-10, atol=1e-12)


class TwiceCalled(nn.Module):
    """A layer that is called a second time, on other data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh() + self.inner(x[:1]))


def test_a_layer_called_with_different_batch_sizes() -> None:
    """An error that names the module and the way out; nothing of the batch is left; the way out works."""
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model = fresh(TwiceCalled)
    optimizer = attached(model)
    with pytest.raises(ValueError, match=r"'inner'.*curvature.*False"):
        backward(model, loss, x, y)
    assert pending(optimizer) == []
    optimizer.close()
    groups = [
        {"params": model.head.parameters()},
        {"params": model.inner.parameters(), "curvature": False},
    ]
    optimizer = kfacopt.KFAC(model, loss, groups, factor_every=1)
    train_step(optimizer, model, loss, x, y)
    optimizer.close()


def test_an_unbatched_input_is_a_batch_of_one() -> None:
    x, y = batch()
    one, many = fresh(), fresh()
    single, batched = attached(one), attached(many)
    backward(one, nn.CrossEntropyLoss(), x[0], y[0])
    backward(many, nn.CrossEntropyLoss(), x[:1], y[:1])
    single.step()
    batched.step()
    assert_same_factors(single, batched, {"0": "0", "2": "2"})


class Recursive(nn.Module):
    """A root that calls itself, as tree-structured networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self.inner(x).tanh()
        if depth == 0:
            return h
        h = h + self(h, depth - 1)
        return 2 * self.head(h) if depth == 2 else h


def test_a_root_that_calls_itself() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            first = self.inner(x).tanh()
            second = self.inner(first).tanh()
            third = self.inner(second).tanh()
            return 2 * self.head(first + (second + third))

    x, y = batch()
    model, plain = fresh(Recursive), fresh(Unrolled)
    optimizer, other = attached(model), attached(plain)
    train_step(optimizer, model, nn.CrossEntropyLoss(), x, y)
    train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"inner": "inner", "head": "head"})


def test_a_step_that_reaches_only_uncovered_parameters() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.cell = nn.Linear(4, 3), nn.Bilinear(4, 4, 3)

    model, (x, y) = fresh(Alternating), batch()
    optimizer = attached(model, lr=0.1, adamw_lr=0.1)
    before = parameters_of(model)
    for part, inputs in ((model.cell, (x, x)), (model.linear, (x,))):
        optimizer.zero_grad()
        F.cross_entropy(part(*inputs), y).backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_model() -> None:
    """Compiled before the optimizer is made: the same statistics. (After: a RuntimeError says what to do.)"""
    x, y = batch()
    model, plain = fresh(), fresh()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = attached(compiled), attached(plain)
    for _ in range(2):
        train_step(optimizer, compiled, nn.CrossEntropyLoss(), x, y)
        train_step(other, plain, nn.CrossEntropyLoss(), x, y)
    assert_same_factors(optimizer, other, {"_orig_mod.0": "0", "_orig_mod.2": "2"})


# -- other watchers and copies ---------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_two_optimizers_on_one_model(fisher_type: str) -> None:
    x, y = batch()
    both, alone = fresh(), fresh()
    first = attached(both, curvature=fisher_type)
    second = kfacopt.EKFAC(both, nn.CrossEntropyLoss(), **still(curvature=fisher_type))
    one = attached(alone, curvature=fisher_type)
    two = kfacopt.EKFAC(alone, nn.CrossEntropyLoss(), **still(curvature=fisher_type))
    assert two is not None
    backward(both, nn.CrossEntropyLoss(), x, y)
    backward(alone, nn.CrossEntropyLoss(), x, y)
    first.step()
    second.step()
    one.step()
    assert_same_factors(first, one, {"0": "0", "2": "2"})
    for name, block in second.backend.blocks.items():
        for a, b in zip(factors(first)[name], factors(second)[name], strict=False):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert block.ready


def test_one_optimizer_for_each_half_of_the_parameters() -> None:
    x, y = batch()
    model = fresh()
    optimizers = [
        kfacopt.KFAC(model, nn.CrossEntropyLoss(), model[i].parameters(), factor_every=1, lr=0.1) for i in (0, 2)
    ]
    losses = []
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(float(backward(model, nn.CrossEntropyLoss(), x, y)))
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]
    assert [list(o.backend.blocks) for o in optimizers] == [["0"], ["2"]]


def test_copies_of_a_watched_model_are_free() -> None:
    """An EMA copy, a pickle and torch.save of the model: no hook of ours acts there."""
    (x, y), loss = batch(), nn.CrossEntropyLoss()
    model = fresh()
    optimizer = attached(model, lr=0.1)
    train_step(optimizer, model, loss, x, y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        average.module,
    ]
    before = factors(optimizer)
    for copied in copies:
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
        backward(copied, loss, x, y)
        assert pending(optimizer) == []
        pickle.loads(pickle.dumps(copied))
        own = attached(copied, lr=0.1)
        train_step(own, copied, loss, x, y)
        assert pending(optimizer) == []
        own.close()
        assert hooks_on(copied) == 0
    for name, values in factors(optimizer).items():
        assert all(torch.equal(a, b) for a, b in zip(values, before[name], strict=True))
    average.update_parameters(model)
    train_step(optimizer, model, loss, x, y)


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("optimizer", [kfacopt.KFAC, kfacopt.EKFAC])
def test_statistics_are_float32_under_autocast(optimizer: Any, inside: bool) -> None:
    """Also where backward and step are called within the autocast block."""
    torch.manual_seed(0)
    model, loss = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    x = x.float()
    made = optimizer(model, loss, factor_every=1, refresh_every=2, lr=0.1)
    for _ in range(4):
        made.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(x), y)
            if inside:
                value.backward()
                made.step()
        if not inside:
            value.backward()
            made.step()
    for block in made.backend.blocks.values():
        for average in block.averages().values():
            assert average.value is not None
            assert average.value.dtype == torch.float32
        for tensor in block.cache().values():
            assert tensor is None or tensor.dtype == torch.float32


def test_statistics_are_computed_in_float32_inside_autocast() -> None:
    """Not only stored: the covariance of an input is no bfloat16 product."""
    results = []
    x, y = batch(data=64)
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = attached(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            backward(model, nn.CrossEntropyLoss(), x.float(), y)
            optimizer.step()
        results.append(optimizer.backend.blocks[""].factors()[1])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fisher_type", FISHERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_statistics(dtype: torch.dtype, fisher_type: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 3)).to(dtype)
    x, y = batch()
    loss = nn.CrossEntropyLoss()
    optimizer = kfacopt.EKFAC(model, loss, factor_every=1, refresh_every=2, lr=0.1, curvature=fisher_type)
    for _ in range(4):
        value = train_step(optimizer, model, loss, x.to(dtype), y)
    assert value.isfinite()
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    for block in optimizer.backend.blocks.values():
        assert {a.value.dtype for a in block.averages().values()} == {torch.float32}


def test_importing_kfacopt_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kfacopt; heavy = ['pytorch_lightning', 'lightning', 'hydra', 'wandb', 'matplotlib', 'sklearn', "
        "'mlxtend', 'pandas', 'torchvision', 'curvlinops', 'rich']; "
        "found = [m for m in heavy if m in sys.modules]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
