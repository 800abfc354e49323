"""Dense float64 truth, from `torch.func` alone: nothing here knows of kfacopt's rows, blocks or likelihoods.

Axes: `p` all numbers of the prediction (data first), `n` data, `s` places that share a layer's weights (over all its
calls), `k` groups of a convolution, `o i` the layer's matrix, `v` cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfacopt.layers.layer import Layer
from tests.explicit import counterpart, explicit_model, untied

Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *Transposed)


def term_count(loss: nn.Module, prediction: Tensor, y: Tensor) -> float:
    """M, what the mean loss divides by."""
    if isinstance(loss, nn.KLDivLoss):
        return float(len(prediction))
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        kept = y[y != loss.ignore_index]
        return float(len(kept)) if loss.weight is None else float(loss.weight[kept].sum())
    if loss.reduction == "sum":
        return float(prediction.shape[0])
    return float(prediction.shape[:-1].numel())


def mean_loss(loss: nn.Module, prediction: Tensor, y: Tensor) -> Tensor:
    """The loss as a mean over its terms, whatever its reduction."""
    value: Tensor = loss(prediction, y)
    return value / term_count(loss, prediction, y) if loss.reduction == "sum" else value


class Bent(nn.Module):
    """What has as its Hessian the Fisher information that stands for a loss': the loss' potential, without its slope.

    The likelihoods' own formulas are not used: of log-probabilities it is the logarithm of their sum (the logits'),
    of a rate `f log f - f`, of an absolute error half a square.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.reduction = loss, loss.reduction

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.loss, nn.NLLLoss):
            own = nn.CrossEntropyLoss(self.loss.weight, ignore_index=self.loss.ignore_index, reduction=self.reduction)
            result: Tensor = own(prediction, y)
            return result
        if isinstance(self.loss, nn.KLDivLoss):
            total = prediction.logsumexp(-1).sum()
            return total / len(prediction) if self.reduction == "batchmean" else total
        each = prediction * prediction.log() - prediction
        if isinstance(self.loss, nn.BCELoss):
            each = prediction.xlogy(prediction) + (1.0 - prediction).xlogy(1.0 - prediction)
        if isinstance(self.loss, nn.L1Loss):
            each = 0.5 * prediction.square()
        return each.sum() if self.reduction == "sum" else each.mean()


def bent(loss: nn.Module) -> nn.Module:
    """A loss with the Hessian that stands for that of `loss`."""
    rate = isinstance(loss, nn.PoissonNLLLoss) and not loss.log_input
    return Bent(loss) if rate or isinstance(loss, (nn.NLLLoss, nn.KLDivLoss, nn.L1Loss, nn.BCELoss)) else loss


def loss_hessian(loss: nn.Module, prediction: Tensor, y: Tensor) -> Tensor:
    """Hessian of the mean loss with respect to the prediction, or what stands for it (`bent`), `[p p]`."""
    shape, count, loss = prediction.shape, term_count(loss, prediction, y), bent(loss)
    scale = 1.0 / count if loss.reduction == "sum" else 1.0
    flat = prediction.detach().flatten()
    # Reverse over reverse: torch 2.13's forward mode uses torch.jit, which it deprecates itself.
    result: Tensor = jacrev(grad(lambda f: scale * loss(f.reshape(shape), y)))(flat)
    return result


def term_gradients(loss: nn.Module, prediction: Tensor, y: Tensor) -> Tensor:
    """Gradients of the loss terms (not divided by their number), `[1 p]`: the empirical Fisher's cotangent."""
    shape = prediction.shape
    flat = prediction.detach().flatten()
    gradient = grad(lambda f: mean_loss(loss, f.reshape(shape), y))(flat)
    return term_count(loss, prediction, y) * gradient.unsqueeze(0)


def as_matrices(layer: Layer, parts: dict[str, Tensor]) -> Tensor:
    """Tensors `[b, *parameter]` as matrices `[b k o i]`."""
    module = layer.modules[0]
    parts = {role: p if (rows := layer.rows(role)) is None else p[:, rows] for role, p in parts.items()}
    some = next(iter(parts.values()))
    if layer.handler.structure == "elementwise":
        return torch.stack([p.flatten(1) for p in parts.values()], dim=-1).unsqueeze(1)
    if isinstance(module, nn.Embedding):
        return parts["weight"].mT.unsqueeze(1)
    groups = module.groups if isinstance(module, Convolution) else 1
    if isinstance(module, Transposed) and "weight" in parts:
        # [b (k c) o ...], and an output sees each channel through each entry of the kernel.
        apart = parts["weight"].flatten(3).unflatten(1, (groups, -1)).transpose(2, 3)
        parts = parts | {"weight": apart.flatten(1, 2)}
        some = parts["weight"]
    outputs = some.shape[1] // groups
    columns = [p.reshape(len(p), groups, outputs, -1) for p in parts.values()]
    return torch.cat(columns, dim=-1)


def _differentiable(model: nn.Module, layer: Layer) -> tuple[nn.Module, Layer]:
    """A model whose layers are modules and that torch.func can differentiate, which it cannot with bags."""
    return counterpart(model, layer) if layer.part is not None or _without_bags(model) is not model else (model, layer)


def _without_bags(model: nn.Module) -> nn.Module:
    """The model, or a copy with its parameters in the same order."""
    return explicit_model(model) if any(isinstance(m, nn.EmbeddingBag) for m in model.modules()) else model


@sdpa_kernel(SDPBackend.MATH)  # the flash kernel has no batching rule
def jacobian(model: nn.Module, layer: Layer, x: Any) -> Tensor:
    """Jacobian of the prediction with respect to a layer's matrix, `[p k o i]`."""
    model, layer = _differentiable(model, layer)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    chosen = {names[id(p)]: p.detach() for p in layer.parameters.values()}
    roles = {names[id(p)]: role for role, p in layer.parameters.items()}
    result = jacrev(lambda own: functional_call(model, own, (x,)).flatten())(chosen)
    return as_matrices(layer, {roles[name]: value for name, value in result.items()})


def ggn(model: nn.Module, loss: nn.Module, layer: Layer, x: Any, y: Tensor) -> Tensor:
    """The layer's block of the GGN of the mean loss, `[k (o i) (o i)]`; groups apart."""
    flat = jacobian(model, layer, x).flatten(2)
    return torch.einsum("pka,pq,qkb->kab", flat, loss_hessian(loss, model(x), y), flat)


def fisher(model: nn.Module, layer: Layer, x: Any, cotangents: Tensor, terms: float) -> Tensor:
    """`(1/M) Σ_vn` of outer products of per-datum gradients, `[k (o i) (o i)]`; cotangents `[v p]`."""
    flat = jacobian(model, layer, x).flatten(2)
    data = len(x)
    per_datum = torch.einsum(
        "vnq,nqka->vnka",
        cotangents.unflatten(1, (data, -1)),
        flat.unflatten(0, (data, -1)),
    )
    return torch.einsum("vnka,vnkb->kab", per_datum, per_datum) / terms


@sdpa_kernel(SDPBackend.MATH)
def whole_jacobian(model: nn.Module, x: Any, of: Callable[[Tensor], Tensor] = torch.flatten) -> Tensor:
    """Jacobian of `of(prediction)` (one axis) with respect to all parameters, each tied one once, `[p d]`."""
    model = _without_bags(model)
    own = {name: p.detach() for name, p in model.named_parameters()}
    result = jacrev(lambda values: of(functional_call(model, values, (x,))))(own)
    return torch.cat([part.flatten(1) for part in result.values()], dim=1)


@sdpa_kernel(SDPBackend.MATH)
def whole_hessian(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """Hessian of the loss, as its reduction has it, with respect to all parameters, `[d d]`."""
    model = _without_bags(model)
    own = {name: p.detach() for name, p in model.named_parameters()}
    shapes, sizes = [p.shape for p in own.values()], [p.numel() for p in own.values()]

    def value(flat: Tensor) -> Tensor:
        parts = [part.reshape(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
        result: Tensor = loss(functional_call(model, dict(zip(own, parts, strict=True)), (x,)), y)
        return result

    result: Tensor = jacrev(grad(value))(torch.cat([p.flatten() for p in own.values()]))
    return result


def whole_ggn(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """GGN of the loss, as its reduction has it, with respect to all parameters, `[d d]`."""
    prediction = model(x).detach()
    flat, shape = prediction.flatten(), prediction.shape
    middle: Tensor = jacrev(grad(lambda f: loss(f.reshape(shape), y)))(flat)
    outer = whole_jacobian(model, x)
    return outer.T @ middle @ outer


def whole_empirical_fisher(model: nn.Module, loss: nn.Module, x: Any, y: Tensor) -> Tensor:
    """`c Σ_m ∇ℓ_m ∇ℓ_mᵀ` for a loss `c Σ_m ℓ_m`; a term m is a datum or place, with all its outputs, `[d d]`."""
    apart = copy(loss)
    apart.reduction = "none"

    def terms(prediction: Tensor) -> Tensor:
        values: Tensor = apart(prediction, y)
        whole = isinstance(loss, nn.CrossEntropyLoss) or values.ndim == 1
        return values.flatten() if whole else values.flatten(0, -2).sum(-1)

    with torch.no_grad():
        prediction = model(x)
        factor = loss(prediction, y) / terms(prediction).sum()
    gradients = whole_jacobian(model, x, terms)
    return factor * gradients.T @ gradients


@dataclass(frozen=True)
class DenseRows:
    """A layer's inputs and the prediction's Jacobian with respect to its outputs.

    Attributes:
        inputs: `[n s k i]`.
        outputs: `[p n s k o]`.
    """

    inputs: Tensor
    outputs: Tensor


@sdpa_kernel(SDPBackend.MATH)
def dense_rows(model: nn.Module, layer: Layer, x: Any, approx: str) -> DenseRows:
    """A layer's rows, found by differentiating: the layer with respect to its matrix, the model with respect to the
    layer's outputs; of a part of attention, those of the layer that it is in attention written out."""
    model, layer = _differentiable(model, layer)
    calls = _calls(model, layer, x)
    inputs = torch.cat([_input_rows(layer, module, args) for module, args, _ in calls], dim=1)
    perturbed = _jacobian_of_outputs(model, layer, x, [out for _, _, out in calls])
    modules = [module for module, _, _ in calls]
    outputs = torch.cat([_places(m, j, 1) for m, j in zip(modules, perturbed, strict=True)], dim=2)
    if isinstance(layer.modules[0], nn.Embedding):
        # A row of zeros is padding: torch gives the weight no gradient there.
        outputs = outputs * (inputs != 0).any(-1, keepdim=True)
    elif approx == "reduce":
        return DenseRows(inputs.mean(1, keepdim=True), outputs.sum(2, keepdim=True))
    return DenseRows(inputs, outputs)


def input_factor(rows: DenseRows) -> Tensor:
    """A, `[k i i]`: the mean over all rows of a aᵀ."""
    data, places = rows.inputs.shape[:2]
    return torch.einsum("nski,nskj->kij", rows.inputs, rows.inputs) / (data * places)


def gradient_factor(rows: DenseRows, hessian_of_mean: Tensor) -> Tensor:
    """G of the type-2 Fisher, `[k o o]`; the Hessian is that of the mean loss, `[p p]`."""
    return torch.einsum("pnsko,pq,qnskr->kor", rows.outputs, hessian_of_mean, rows.outputs)


def sampled_gradient_factor(rows: DenseRows, cotangents: Tensor, terms: float) -> Tensor:
    """G of given cotangents `[v p]`, `[k o o]`."""
    g = torch.einsum("vp,pnsko->vnsko", cotangents, rows.outputs)
    return torch.einsum("vnsko,vnskr->kor", g, g) / terms


def factors(
    model: nn.Module, layer: Layer, x: Any, approx: str, gradients: Callable[[DenseRows], Tensor]
) -> tuple[Tensor, Tensor]:
    """G `[k o o]` and A `[k i i]`, with `gradients` for the former; of a tied weight those of both uses together.

    These have the partial traces of the dense sum of both uses' curvature.
    """
    if layer.handler.structure != "tied":
        rows = dense_rows(model, layer, x, approx)
        return gradients(rows), input_factor(rows)
    apart, words, head = untied(model, layer)
    looked_up, multiplied = dense_rows(apart, words, x, approx), dense_rows(apart, head, x, approx)
    pairs = [(gradients(looked_up), input_factor(looked_up)), (input_factor(multiplied), gradients(multiplied))]
    whole = sum(torch.einsum("kor,kij->oirj", left, right) for left, right in pairs)
    assert isinstance(whole, Tensor)
    root = torch.einsum("oioi->", whole).sqrt()
    left, right = torch.einsum("oiri->or", whole) / root, torch.einsum("oioj->ij", whole) / root
    return left.unsqueeze(0), right.unsqueeze(0)


def _calls(model: nn.Module, layer: Layer, x: Any) -> list[tuple[nn.Module, tuple[Any, ...], Tensor]]:
    calls: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        calls.append((module, kept, output.detach().clone()))

    handles = [module.register_forward_hook(note) for module in layer.modules]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _input_rows(layer: Layer, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """`[n s k i]`: how output o of row (n, s) depends on row o of the matrix, the same for every o."""
    own = {role: module.get_parameter(role).detach() for role in layer.roles}
    output = functional_call(module, own, args)
    jacobians = jacrev(lambda p: functional_call(module, p, args).flatten())(own)
    matrices = as_matrices(layer, {role: jacobians[role] for role in layer.roles})
    matrices = matrices.unflatten(0, output.shape).movedim((-3, -2, -1), (0, 1, 2))
    rows = _places(module, matrices, 3)  # [k o i n s k o]
    return rows.diagonal(dim1=0, dim2=5)[0, :, :, :, 0].movedim(0, -1)


def _jacobian_of_outputs(model: nn.Module, layer: Layer, x: Any, outputs: Sequence[Tensor]) -> list[Tensor]:
    """`[p, *output]` for each of the layer's calls."""

    def perturbed(shifts: list[Tensor]) -> Tensor:
        left = list(shifts)
        handles = [module.register_forward_hook(lambda m, a, out: out + left.pop(0)) for module in layer.modules]
        try:
            result: Tensor = model(x)
            return result.flatten()
        finally:
            for handle in handles:
                handle.remove()

    result: list[Tensor] = jacrev(perturbed)([torch.zeros_like(out) for out in outputs])
    return result


def _places(module: nn.Module, tensor: Tensor, leading: int) -> Tensor:
    """A tensor `[*leading, *output]` as `[*leading n s k o]`."""
    if isinstance(module, Convolution):
        n, c = tensor.shape[leading : leading + 2]
        flat = tensor.reshape(*tensor.shape[:leading], n, module.groups, c // module.groups, -1)
        return flat.movedim(-1, leading + 1)
    n, o = tensor.shape[leading], tensor.shape[-1]
    return tensor.reshape(*tensor.shape[:leading], n, -1, 1, o)
