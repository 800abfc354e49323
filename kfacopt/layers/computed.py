"""Layers whose weight is computed from what trains: by a weight norm, a spectral norm or a pruning mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kfacopt.fsdp import class_of, whole_copy
from kfacopt.layers.base import LayerHandler, OneHot
from kfacopt.layers.compound import CompoundHandler, ModuleCall, Part, PartCall
from kfacopt.layers.convolution import ConvolutionHandler
from kfacopt.layers.linear import LinearHandler
from kfacopt.likelihoods import KFACType

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NEW = ("parametrizations.weight.original1", "parametrizations.weight.original0")
_OLD = ("weight_v", "weight_g")
_WITHIN = "parametrizations.weight"
_NEW_SPECTRAL = (f"{_WITHIN}.original", f"{_WITHIN}.0._u", f"{_WITHIN}.0._v")
_OLD_SPECTRAL = ("weight_orig", "weight_u", "weight_v")


def handler_of_computed(module: nn.Module, handler: LayerHandler) -> LayerHandler:
    """The handler of a module whose weight is computed, where such a one is known; else `handler`.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> type(handler_of_computed(layer, LinearHandler())).__name__
    'WeightNormHandler'
    >>> type(handler_of_computed(nn.Linear(3, 2), LinearHandler())).__name__
    'LinearHandler'
    """
    kind = class_of(module).__mro__[1] if is_parametrized(module) else class_of(module)
    if kind not in _KINDS or type(handler) not in (LinearHandler, ConvolutionHandler):
        return handler
    if is_parametrized(module):
        computed = module.parametrizations
        assert isinstance(computed, nn.ModuleDict)
        steps = computed["weight"] if set(computed) == {"weight"} else None
        if not isinstance(steps, ParametrizationList) or len(steps) > 1 or getattr(steps[0], "dim", None) != 0:
            return handler
        if isinstance(steps[0], _WeightNorm):
            return WeightNormHandler(handler, *_NEW)
        return SpectralNormHandler(handler, *_NEW_SPECTRAL) if isinstance(steps[0], _SpectralNorm) else handler
    norms = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)]
    if [(hook.name, hook.dim) for hook in norms] == [("weight", 0)]:
        is_spectral = isinstance(norms[0], SpectralNorm)
        return SpectralNormHandler(handler, *_OLD_SPECTRAL) if is_spectral else WeightNormHandler(handler, *_OLD)
    is_pruned = "weight_orig" in module._parameters and "weight_mask" in module._buffers
    return PrunedHandler(handler) if is_pruned and "bias_orig" not in module._parameters else handler


class _ComputedHandler(CompoundHandler):
    """What modules with a computed weight share: each part sees the module's own calls.

    Args:
        handler: Of the same module with a weight of its own.
    """

    def __init__(self, handler: LayerHandler) -> None:
        super().__init__("treated by what its weight is computed from")
        self._handler = handler

    @abstractmethod
    def parts(self, module: nn.Module) -> tuple[Part, ...]: ...

    def calls(self, module: nn.Module, call: ModuleCall) -> dict[str, PartCall]:
        inputs = call.inputs or (call.kwargs["input"],)
        seen = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
        edges = (get_gradient_edge(call.output),)
        return {part.name: PartCall(seen, call.output.shape, edges, _only) for part in self.parts(module)}

    def _shift(self, module: nn.Module) -> tuple[Part, ...]:
        """The bias, if there is one."""
        shift = Part("shift", "bias", self, self._handler, {"bias": "bias"}, needs_weight=False)
        return () if module._parameters.get("bias") is None else (shift,)


class _NormHandler(_ComputedHandler):
    """Rows are scaled by numbers that the parameters are asked for."""

    reads_parameters = True

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        return (*self._own_parts(module), *self._shift(module))

    @abstractmethod
    def _own_parts(self, module: nn.Module) -> tuple[Part, ...]:
        """All but the bias."""


class WeightNormHandler(_NormHandler):
    """A linear layer or convolution with `W_o = g_o v_o / |v_o|` (Salimans & Kingma 2016), old style or parametrized.

    The lengths g scale each output: their curvature is the GGN's diagonal, exactly. The directions v get the Kronecker
    factors of the weight, those of the outputs with each gradient times `g_o / |v_o|`: the curvature of v but for the
    projection that takes each `v_o` out, another for each output, which no Kronecker product has. The gradient has no
    component there. The bias is a layer of its own.

    Args:
        handler: Of the same module with a weight of its own.
        direction: Where v is held.
        length: Where g is held.
    """

    def __init__(self, handler: LayerHandler, direction: str, length: str) -> None:
        super().__init__(handler)
        self._direction, self._length = direction, length

    def _own_parts(self, module: nn.Module) -> tuple[Part, ...]:
        direction = ScaledHandler(self._handler, self._scales)
        length = LengthHandler(self._handler, self._direction, self._length)
        whats = ("direction of the weight norm, but for the projection", "length of the weight norm")
        return (
            Part("direction", whats[0], self, direction, {"weight": self._direction}, held="the norm"),
            Part("length", whats[1], self, length, {"weight": self._length}),
        )

    def _scales(self, module: nn.Module) -> Tensor:
        v, g = (whole_copy(module.get_parameter(path)) for path in (self._direction, self._length))
        scales: Tensor = g.flatten() / v.flatten(1).norm(dim=1)
        return scales


class SpectralNormHandler(_NormHandler):
    """A linear layer or convolution with `W = V / σ`, σ = uᵀ V v (Miyato et al. 2018), old style or parametrized.

    V gets the Kronecker factors of the weight, that of the outputs with each gradient over σ: its curvature with σ
    held, whose own change with V is in no Kronecker product. The bias is a layer of its own.

    Args:
        handler: Of the same module with a weight of its own.
        weight: Where V is held.
        left: Where the buffer u is.
        right: Where the buffer v is.
    """

    def __init__(self, handler: LayerHandler, weight: str, left: str, right: str) -> None:
        super().__init__(handler)
        self._weight, self._left, self._right = weight, left, right

    def _own_parts(self, module: nn.Module) -> tuple[Part, ...]:
        weight = ScaledHandler(self._handler, self._scales)
        what = "weight over its spectral norm, with that held"
        return (Part("weight", what, self, weight, {"weight": self._weight}, held="the spectral norm"),)

    def _scales(self, module: nn.Module) -> Tensor:
        weight = whole_copy(module.get_parameter(self._weight)).flatten(1)
        sigma: Tensor = module.get_buffer(self._left) @ weight @ module.get_buffer(self._right)
        return (1.0 / sigma).expand(len(weight))


class PrunedHandler(_ComputedHandler):
    """A linear layer or convolution whose weight is multiplied by a mask (`torch.nn.utils.prune`).

    What trains has the Kronecker factors of the masked weight; entries that the mask takes out are not moved.
    """

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        paths = {"weight": "weight_orig", "bias": "bias"}
        if module._parameters.get("bias") is None:
            del paths["bias"]
        masked = MaskedHandler(self._handler)
        return (Part("", "factors of the pruned weight", self, masked, paths, held="entries that the mask takes out"),)


class _WrappedHandler(LayerHandler):
    """Another handler's rows and matrix, until a subclass changes them."""

    def __init__(self, handler: LayerHandler) -> None:
        self._handler = handler

    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor | OneHot:
        return self._handler.input_rows(module, inputs, kwargs, roles, approx)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        return self._handler.gradient_rows(module, gradient, approx)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return self._handler.pack(module, parts)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return self._handler.unpack(module, matrix, roles)


class MaskedHandler(_WrappedHandler):
    """Rows of the masked weight; a matrix's parts are masked as the weight is."""

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        parts = super().unpack(module, matrix, roles)
        if "weight" in parts:
            parts["weight"] = parts["weight"] * module.get_buffer("weight_mask").to(matrix)
        return parts


class ScaledHandler(_WrappedHandler):
    """Rows of what is multiplied by a number for each output to be the weight: gradients times that.

    Args:
        handler: Of the weight.
        scales: The numbers of a module, `[o]`.
    """

    def __init__(self, handler: LayerHandler, scales: Callable[[nn.Module], Tensor]) -> None:
        super().__init__(handler)
        self._scales = scales

    @torch.no_grad()
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        rows = super().gradient_rows(module, gradient, approx)
        scales = self._scales(module).to(rows)
        scaled: Tensor = rows * (rearrange(scales, "(k o) -> k 1 1 o", k=rows.shape[1]) if rows.ndim == 5 else scales)
        return scaled


class LengthHandler(_WrappedHandler):
    """Rows of a weight norm's g: each output's product with its own direction, elementwise."""

    structure = "elementwise"
    parameter_names = ("weight",)

    def __init__(self, handler: LayerHandler, direction: str, length: str) -> None:
        super().__init__(handler)
        self._direction, self._length = direction, length

    @torch.no_grad()
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor:
        rows = super().input_rows(module, inputs, kwargs, ("weight",), approx)
        assert isinstance(rows, Tensor)
        v = self._handler.pack(module, {"weight": whole_copy(module.get_parameter(self._direction))}).to(rows)
        products = rows @ (v / v.norm(dim=-1, keepdim=True)).mT.unsqueeze(-3)
        joined: Tensor = rearrange(products, "k n s o -> n s (k o)") if products.ndim == 4 else products
        return joined.unsqueeze(-1)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        rows = super().gradient_rows(module, gradient, approx)
        joined: Tensor = rearrange(rows, "v k n s o -> v n s (k o)") if rows.ndim == 5 else rows
        return joined

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight"].reshape(-1, 1)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        return {"weight": matrix.reshape(module.get_parameter(self._length).shape)}


def _only(arrived: Sequence[Tensor | None]) -> Tensor:
    (gradient,) = arrived
    assert gradient is not None
    return gradient
