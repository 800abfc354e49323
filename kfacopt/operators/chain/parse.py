"""From an `nn.Sequential` to the elements of a chain; what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kfacopt.operators.chain.elements import Affine, Element, Merge, Pointwise, Reshape, Split
from kfacopt.operators.chain.per_datum import PerDatum


class Residual(nn.Sequential):
    """A residual block `z + f(z)`, f the layers in their order; `ChainHessian` knows it among the layers of a chain.

    >>> block = Residual(nn.Linear(3, 3), nn.Tanh())
    >>> block(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        """`z + f(z)`."""
        z = input
        for layer in self:
            z = layer(z)
        return input + z


# Twice differentiable almost everywhere, elementwise, without parameters.
_POINTWISE: tuple[type[nn.Module], ...] = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
# Affine in their parameters, each datum alone.
_PER_DATUM: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.RMSNorm,
)
_BATCH_NORM: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ARRANGING: tuple[type[nn.Module], ...] = (nn.Flatten, nn.Identity, nn.Unflatten)
_DROPOUT: tuple[type[nn.Module], ...] = (
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
)


def elements_of(model: nn.Module, dtype: torch.dtype) -> list[Element]:
    """The elements of a chain of layers, in the order in which they are applied.

    Args:
        model: An `nn.Sequential` (nested or not) or a single layer.
        dtype: In which the elements compute.

    Raises:
        TypeError: If a layer does not fit the recursion; it is named.
        ValueError: If two layers share a parameter, dropout is on, or nothing is trainable.
    """
    owners: dict[int, str] = {}
    elements: list[Element] = []
    for name, module in _flattened(model, ""):
        for role, parameter in module._parameters.items():  # of a leaf; named_parameters takes ten times as long
            if parameter is None:
                continue
            path = f"{name}.{role}" if name else role
            if id(parameter) in owners:
                raise ValueError(
                    f"{path!r} is the same parameter as {owners[id(parameter)]!r}: a chain's recursion eliminates each "
                    f"layer's parameters once, so layers cannot share them"
                )
            owners[id(parameter)] = path
        elements.append(_element(name, module, dtype))
    if not any(element.parameters for element in elements):
        raise ValueError(f"the model {type(model).__name__} has no trainable parameter, so its Hessian is empty")
    return elements


class _Entrance(nn.Identity):
    pass


class _Exit(nn.Identity):
    pass


def _flattened(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module) not in (nn.Sequential, Residual):
        yield name, module
        return
    own = [f"{name}.{key}" if name else key for key, _ in module.named_children()]
    if type(module) is Residual:
        yield name, _Entrance()
    for path, child in zip(own, module.children(), strict=True):
        yield from _flattened(child, path)
    if type(module) is Residual:
        yield name, _Exit()


def _element(name: str, module: nn.Module, dtype: torch.dtype) -> Element:
    kind = type(module)
    if kind is _Entrance:
        return Split()
    if kind is _Exit:
        return Merge(name)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        return Affine(module, dtype)
    if kind in _POINTWISE:
        return Pointwise(module.forward)  # not its call: a hook would run
    if kind in _PER_DATUM:
        return PerDatum(name, module, dtype)
    if kind in _BATCH_NORM and not module.training and module.running_mean is not None:
        return PerDatum(name, module, dtype)
    if kind in _ARRANGING:
        return Reshape(module)
    if kind in _DROPOUT:
        if module.training and getattr(module, "p", 1.0) > 0.0:
            raise ValueError(
                f"the layer {name!r} ({kind.__name__}) drops at random, so the Hessian is another at every call: put "
                f"the model in evaluation mode, or set p=0"
            )
        return Reshape(nn.Identity())
    raise TypeError(f"the layer {name or '(model)'!r} is {kind.__name__}, {_reason(module)}")


def _reason(module: nn.Module) -> str:
    if isinstance(module, _BATCH_NORM) and type(module) in _BATCH_NORM:
        return (
            "which in training mode makes each datum depend on all others: use LayerNorm or GroupNorm, or put the "
            "model in evaluation mode"
        )
    if isinstance(module, nn.Sequential):
        return (
            "a subclass of nn.Sequential whose forward the chain's recursion cannot know: use nn.Sequential, or "
            "kfacopt.operators.Residual for z + f(z)"
        )
    return (
        "which does not fit the chain's recursion: it takes an nn.Sequential of Linear, convolutions, elementwise "
        "activations, LayerNorm, GroupNorm, RMSNorm, pooling, Flatten, nested nn.Sequential and "
        "kfacopt.operators.Residual; for other models use the matrix-free operators"
    )
