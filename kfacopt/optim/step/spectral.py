"""The steepest descent step under a spectral norm in the curvature's own coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfacopt.layers.layer import Layer
from kfacopt.linalg.fast_dtype import fast_dtype
from kfacopt.linalg.polar import NewtonSchulz, PolarFactor, polar_factors
from kfacopt.optim.checks import check_number
from kfacopt.optim.step.base import ByParameter, Direction, Step, Updates
from kfacopt.optim.step.lengths import layer_length, with_length
from kfacopt.sharding import Processes

# From this length of the shorter side on, products in half precision repay the conversions; shorter ones are slower.
_LONG = 128


def dense_layers(layer: Layer) -> bool:
    """Linear layers and convolutions: those that multiply all kinds of inputs by a matrix."""
    return layer.handler.structure == "outer"


def matrix_layers(layer: Layer) -> bool:
    """Those and embeddings, whose inputs are columns of the identity: all that are not elementwise."""
    return layer.handler.structure != "elementwise"


class Spectral(Direction):
    r"""`U = S · polar(Sᵀ M)` for each layer, where the damped curvature is `(S Sᵀ)⁻¹` and M the momentum.

    With the Kronecker factors' roots `L Lᵀ = (G + ..)⁻¹`, `R Rᵀ = (A + ..)⁻¹` that is

    .. code-block:: text

        m ← momentum · m + (1 - momentum) g           bias-corrected, with Nesterov's look-ahead
        U ← L polar(Lᵀ M R) Rᵀ                        M the layer's m as a matrix [*k o i]
        u ← sqrt(outputs) U / ‖U‖_F                   for each layer

    **In which norm it descends steepest.** Measure a step D by the largest singular value of its whitened form, `‖S⁻¹
    D‖₂`. Of all D = S Z with `‖Z‖₂ ≤ 1`, U takes the most off the loss's linear part: `⟨M, S Z⟩ = ⟨Sᵀ M, Z⟩`, which is
    at most the sum of the singular values of `Sᵀ M`, the spectral norm's dual, and is that at `Z = polar(Sᵀ M)`. The
    other cases differ in the norm alone:

    - the Frobenius norm of `S⁻¹ D`: `Z ∝ Sᵀ M`, so that `U ∝ S Sᵀ M` is the natural gradient (`Preconditioned`),
    - the spectral norm without curvature, S = I: Muon (Jordan et al. 2024; Carlson et al. 2015),
    - curvature to a half power (`exponent=0.5` of a backend): Shampoo's metric (Gupta et al. 2018).

    Which root S is taken does not matter: another one is `S Q` with Q orthogonal, and `polar(Qᵀ X) = Qᵀ polar(X)`.
    (EKFAC's curvature is no Kronecker product: there S is the symmetric root, diagonal in the eigenbasis.) What F⁻¹
    amplifies in flat directions, the noise of small batches, has the length of all others here.

    **How the learning rate reads.** Every layer's step has the Frobenius norm `sqrt(outputs)`, whatever its gradient:
    inputs that are white and of size one move each output by `lr` (root of the mean square), at every width. That is
    the size of Muon's step, and a rate found at one width is right at another (Yang et al. 2023,
    arXiv:2310.17813). The direction of a layer is steepest in the norm above, its length is grafted (Agarwal et al.
    2020): together the steepest in the largest over layers of these norms, in a unit for each layer and step.

    It asks for a length without a KL clip and rates near 0.05 (`kfacopt.SpectralDescent` has them for defaults).
    Layers of equal shape, up to transposition, take one batched iteration; roots are the backend's, renewed when it
    refreshes. Elementwise layers have nothing to orthogonalize and train by AdamW; so do layers that `layers` leaves
    out: no statistics are taken of them then, and `coverage()` says so.

    Args:
        momentum: Decay of the running average, a param group's `momentum` from then on.
        polar: The polar factor of a batch of matrices: `kfacopt.linalg.polar.NewtonSchulz(...)`, `exact_polar`.
        dtype: In which the products of layers with sides of at least 128 are taken: `"fastest"`, bfloat16 where the
            machine is quicker at it (measured once, in a process or in the one that a checkpoint is from), else
            float32; or a dtype. The statistics, their roots and the parameters keep theirs, and float64 stays.
        layers: Which layers it steps: `dense_layers`, `matrix_layers` (embeddings too), or a function of the layer of
            one's own.

    Raises:
        ValueError: If the momentum is out of range.

    >>> Spectral(momentum=0.9).defaults()
    {'momentum': 0.9}
    """

    def __init__(
        self,
        momentum: float = 0.95,
        polar: PolarFactor | None = None,
        dtype: torch.dtype | Literal["fastest"] = "fastest",
        layers: Callable[[Layer], bool] = dense_layers,
    ) -> None:
        check_number("momentum", momentum)
        self._momentum, self._layers = momentum, layers
        self._polar = NewtonSchulz() if polar is None else polar
        self._dtype = dtype
        self._measured: dict[str, torch.dtype] = {}

    def __repr__(self) -> str:
        return f"Spectral(momentum={self._momentum}, polar={self._polar}, layers={self._layers.__name__})"

    def defaults(self) -> dict[str, float]:
        return {"momentum": self._momentum}

    def refusal(self, layer: Layer) -> str | None:
        if layer.handler.structure == "elementwise":
            return "elementwise: no matrix for the spectral step"
        return None if self._layers(layer) else f"left out of the spectral step by {self._layers.__name__}"

    def updates(self, step: Step) -> Updates:
        averaged = step.averaged()
        short: dict[nn.Parameter, Tensor] = {}
        long: dict[nn.Parameter, Tensor] = {}
        for layer, parts in step.by_layer(averaged).items():
            sides = layer.pack(parts).shape[-2:]
            chosen = long if min(sides) >= _LONG else short
            chosen.update({p: averaged[p] for p in layer.parameters.values()})
        updates = self._orthogonalized(step, short)
        if long:
            device = next(iter(long)).device.type
            dtype = self._products(device, step.processes)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                updates |= self._orthogonalized(step, long)
        return Updates(updates)

    def _orthogonalized(self, step: Step, momentum: ByParameter) -> dict[nn.Parameter, Tensor]:
        whitened = step.whiten(momentum)
        factors = polar_factors([layer.pack(parts) for layer, parts in whitened.items()], self._polar)
        unpacked = {layer: layer.unpack(factor) for layer, factor in zip(whitened, factors, strict=True)}
        steps = {
            layer: {role: tensor.to(momentum[layer.parameters[role]].dtype) for role, tensor in parts.items()}
            for layer, parts in step.unwhiten(unpacked).items()
        }
        return with_length(steps, {layer: layer_length(layer) for layer in steps})

    def _products(self, device: str, processes: Processes) -> torch.dtype:
        """The dtype of long products; once measured it stays, for a resumed run, too. Of several processes one says."""
        if self._dtype != "fastest":
            return self._dtype
        if device not in self._measured:
            self._measured[device] = processes.gathered(fast_dtype(device))[0]
        return self._measured[device]

    def state_dict(self) -> dict[str, Any]:
        return {"measured": {device: str(dtype).removeprefix("torch.") for device, dtype in self._measured.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._measured = {device: getattr(torch, name) for device, name in state.get("measured", {}).items()}
