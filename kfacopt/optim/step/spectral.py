"""The steepest descent step under a spectral norm in the curvature's own coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kfacopt.layers.layer import Layer
from kfacopt.layers.plain import PlainMatrix
from kfacopt.linalg.fast_dtype import fast_dtype
from kfacopt.linalg.polar import NewtonSchulz, PolarFactor
from kfacopt.optim import memory
from kfacopt.optim.checks import check_number
from kfacopt.optim.step.base import Direction, Remembered, Step, Updates
from kfacopt.optim.step.gradient_metric import steepest_by_gradients
from kfacopt.optim.step.inputs import input_scales
from kfacopt.optim.step.lengths import FULL_STEPS, check_full_steps, shrunk
from kfacopt.optim.step.prospect import MARGIN, prospect_of
from kfacopt.optim.step.rows import Evening
from kfacopt.optim.step.stacks import Holder, Stack, Unstacked, inputs_axis, key_of, stacks, structure_of
from kfacopt.optim.step.turns import LONGEST, Turns
from kfacopt.sharding import Processes

# From this length of the shorter side on, products in half precision repay the conversions; shorter ones are slower.
_LONG = 128
# By how many times more a new gradient weighs in the first step: a momentum of 0.95 is one of 0.85 then. With 0.95
# throughout a character model ended at 1.514, with 0.9 at 1.495, growing at 1.482; a deep chain at 0.484, 0.464, 0.426.
_FRESH = 2.0
# Weight decay is small and signs change slowly: taken every so many steps, so many times as much, it costs nothing.
_DECAY_EVERY = 8
DECAY = 0.2
"""Default `decay`."""
# It is whole for so many times as many steps as a step's length, where classes are told apart: their loss falls for
# ever as weights grow, and who trains longer fits more of the noise.
_DECAY_LONGER = 16


def dense_layers(layer: Layer) -> bool:
    """Linear layers (a tied embedding is one, too) and convolutions: they multiply all kinds of inputs by a matrix."""
    return layer.handler.structure in ("outer", "tied")


def matrix_layers(layer: Layer) -> bool:
    """Those and embeddings, whose inputs are columns of the identity: all that are not elementwise."""
    return layer.handler.structure != "elementwise"


class Spectral(Direction):
    r"""`U = S · polar(Sᵀ M)` for each layer, where the damped curvature is `(S Sᵀ)⁻¹` and M the momentum.

    With the Kronecker factors' roots `L Lᵀ = (G + ..)⁻¹`, `R Rᵀ = (A + ..)⁻¹` that is

    .. code-block:: text

        m ← momentum · m + (1 - momentum) g           bias-corrected, with Nesterov's look-ahead
        U ← L polar(Lᵀ M R) Rᵀ                        M the layer's m as a matrix [*k o i]
        v ← row_decay · v + (1 - row_decay) (mean of squares of each row of U, over that of all of U)
        U ← U / sqrt(v)                               row by row
        u ← sqrt(outputs) U / ‖U‖_F                   for each layer, times sqrt(full_steps / t) once that is below one

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

    **Large inputs**, raw features in units of their own, would be thrown far off by such a length: those of more than 8
    (root of the mean square, of linear layers and convolutions) count as 8 (`kfacopt.optim.step.inputs`).

    **Steps that are too long all the same** are shortened: where the slope along a step is less than three times what
    its curvature takes off it, only so much of it is taken (`kfacopt.optim.step.prospect`). Outputs that go through a
    steep function next, sines of thirty times their inputs, are the case; ordinary networks take whole steps.

    **Why rows are evened.** The rows of a polar factor, and more so those of U, differ in length, by a lot where a
    layer has more outputs than inputs or outputs of very different curvature. Divided by the root of their running mean
    squares each output moves as much as any other (NorMuon, Li et al. 2025, arXiv:2510.05491); what the curvature says
    of how outputs go together stays.

    **Who moves when.** A layer whose step takes long beside its gradients, as its sides are long for a batch's rows,
    moves every second, third or sixth step only, and as much further (`kfacopt.optim.step.turns`); its momentum misses
    no gradient. Products with a metric of the inputs, as KFAC's and EKFAC's is, are part of that time.

    It asks for a length without a KL clip and rates near 0.05 (`kfacopt.SpectralDescent` has them for defaults). Layers
    of equal shape, up to transposition, take one batched iteration; roots are the backend's, renewed when it refreshes.
    A matrix that has no curvature, or none yet, is stepped with S = I: recurrent layers with dropout, layers whose use
    the hooks do not see. Where the forward takes derivatives of the model, as a physics-informed network's does, the
    metric is that of the matrix's own gradients (`gradient_metric.py`). Of packed parameters (attention's) each
    projection is a matrix; of a weight that an embedding shares with the output layer the words are the outputs.
    Elementwise layers have nothing to orthogonalize and train by AdamW, as biases of layers without curvature do; so do
    layers that `layers` leaves out: no statistics are taken of them then, and `coverage()` says so.

    Args:
        momentum: Decay of the running average, a param group's `momentum` from then on.
        polar: The polar factor of a batch of matrices: `kfacopt.linalg.polar.NewtonSchulz(...)`, `exact_polar`.
            Default: three iterations, which leave singular values within a third of one. On seven tasks they trained as
            four did but for the deep autoencoder (81 against 79), at three quarters of the products.
        dtype: In which the products of layers with sides of at least 128 are taken: `"fastest"`, bfloat16 where the
            machine is quicker at it (measured once, in a process or in the one that a checkpoint is from), else
            float32; or a dtype. The statistics, their roots and the parameters keep theirs, and float64 stays.
        layers: Which layers it steps: `dense_layers`, `matrix_layers` (embeddings too), or a function of the layer of
            one's own.
        row_decay: Decay of the running mean square of each row; None: rows stay as they are.
        warmup: Steps over which the momentum grows: a new gradient weighs three times as much in the first of them, as
            old ones are soon of another place then. 0: none. Where the model is differentiated in its own forward it
            grows from itself to its root (0.95 to 0.975): such losses have little noise, but valleys.
        full_steps: For so many steps the length is whole, after them it falls as `sqrt(full_steps / number of steps)`
            (see `kfacopt.optim.step.lengths.shrunk`); None: it stays.
        decay: Cautious weight decay of matrices, a param group's `cautious_decay` from then on: `lr · decay` of the
            entries that the step makes smaller anyway is taken off as well, and less as steps grow shorter
            (`full_steps`); of a loss that tells classes apart (`Likelihood.is_separable`) only from sixteen times as
            many steps on. Not of biases, and not where the model is differentiated in its own forward: such a network
            solves an equation, and a smaller weight is no better there.
        turns: A layer whose step takes long beside its gradients, as its sides are long for the rows that a batch has,
            moves at least every so many steps: 1, 2, 3 or 6. 1: all layers in each step.
        embedding_factor: Embeddings, which AdamW trains, take so many times its rate, a param group's
            `embedding_factor` from then on: a row moves only where its word occurs.
        margin: A step is shortened where its slope is less than so many times what its curvature takes off it; None:
            it never is.

    Raises:
        ValueError: If a number is out of range.

    >>> Spectral(momentum=0.9).defaults()
    {'momentum': 0.9, 'cautious_decay': 0.2, 'embedding_factor': 4.0}
    """

    plain_treatment = "spectral step, no curvature"
    reads_inputs = True

    def __init__(
        self,
        momentum: float = 0.95,
        polar: PolarFactor | None = None,
        dtype: torch.dtype | Literal["fastest"] = "fastest",
        layers: Callable[[Layer], bool] = dense_layers,
        row_decay: float | None = 0.95,
        warmup: int = 300,
        full_steps: int | None = FULL_STEPS,
        decay: float = DECAY,
        turns: int = LONGEST,
        embedding_factor: float = 4.0,
        margin: float | None = MARGIN,
    ) -> None:
        check_number("momentum", momentum)
        check_number("cautious_decay", decay)
        check_number("embedding_factor", embedding_factor)
        if warmup < 0:
            raise ValueError(f"warmup must be a number of steps, 0 for none, got {warmup}")
        if row_decay is not None and not 0.0 <= row_decay < 1.0:
            raise ValueError(f"row_decay must be at least 0 and below 1, or None, got {row_decay}")
        if margin is not None and not margin > 0.0:
            raise ValueError(f"margin must be above 0, or None for whole steps, got {margin}")
        check_full_steps(full_steps)
        self._row_decay, self._warmup, self._full_steps = row_decay, warmup, full_steps
        self._evening, self._turns = Evening(row_decay), Turns(turns)
        self._momentum, self._decay, self._layers = momentum, decay, layers
        self._embedding_factor, self._margin = embedding_factor, margin
        self._polar = NewtonSchulz(iterations=3) if polar is None else polar
        self._dtype = dtype
        self._measured: dict[str, torch.dtype] = {}

    def __repr__(self) -> str:
        return f"Spectral(momentum={self._momentum}, polar={self._polar}, layers={self._layers.__name__})"

    def defaults(self) -> dict[str, float]:
        own = {"cautious_decay": self._decay, "embedding_factor": self._embedding_factor}
        return {"momentum": self._momentum, **own}

    def refusal(self, layer: Layer) -> str | None:
        if layer.handler.structure == "elementwise":
            return "elementwise: no matrix for the spectral step"
        return None if self._layers(layer) else f"left out of the spectral step by {self._layers.__name__}"

    def remembered(self, layers: Sequence[Layer], plain: Mapping[nn.Parameter, PlainMatrix]) -> Remembered:
        result: Remembered = {}
        shapes: list[tuple[Holder, Sequence[int]]] = [(layer, layer.shape) for layer in layers]
        shapes += [(parameter, matrix.shape) for parameter, matrix in plain.items()]
        for holder, shape in shapes if self._row_decay is not None else []:
            rows = [size for axis, size in enumerate(shape, -len(shape)) if axis != inputs_axis(structure_of(holder))]
            key = key_of(holder)
            result[key[0]] = result.get(key[0], {}) | memory.blank_row_squares(key, rows)
        return result

    def by_layers(self, step: Step) -> bool:
        # The metric of a matrix's own gradients is of whole ones.
        return not _differentiated(step)

    def updates(self, step: Step) -> Updates:
        self._measure(step)
        of_inputs = step.backend is not None and step.backend.needs_inputs
        strides = self._turns.strides(step.number, step.layers, step.rows, of_inputs)
        resting = frozenset(p for layer, stride in strides.items() if not stride for p in layer.parameters.values())
        averaged = step.averaged(self._freshness(step), resting)
        updates, found, stacked = Unstacked(averaged), [], stacks(step, averaged, strides)
        scales = [input_scales(step, stack) for stack in stacked]
        stacked = [
            s if d is None else replace(s, matrices=s.matrices * d) for s, d in zip(stacked, scales, strict=True)
        ]
        for stack in stacked:
            with self._precision(stack.matrices, step.processes):
                found.append(self._orthogonalized(step, stack).to(stack.matrices.dtype))
        length = shrunk(step.number, self._full_steps)
        factors, norms = self._evening.factors(step.state, stacked, found, length)
        moved = [matrices * factor for matrices, factor in zip(found, factors, strict=True)]
        for stack, matrices, scale in zip(stacked, moved, scales, strict=True):
            updates.add(stack, matrices if scale is None else matrices * scale)
        # Whoever rests as it is due decays as it moves next.
        since = (step.number + 1) % _DECAY_EVERY
        weights = [p for s in stacked if since < s.stride and not s.differentiated for p in s.weights]
        check = torch.cat(norms).sum() if norms else None
        return Updates(
            updates.by_parameter(),
            check=check,
            decays=self._decays(step, weights),
            resting=resting,
            prospect=None if self._margin is None else prospect_of(step, stacked, moved, length, self._margin),
        )

    def _freshness(self, step: Step) -> float:
        """What a new gradient weighs in the momentum, in units of `1 - momentum`."""
        grown = min(1.0, step.number / self._warmup) if self._warmup else 1.0
        if not _differentiated(step):
            return 1.0 + _FRESH * (1.0 - grown)
        # The heat equation, 1,550 steps, four seeds: 0.85 to 0.95 as elsewhere 4.5e-4, 0.95 throughout 2.6e-4, 0.97
        # 1.7e-4, 0.98 1.6e-4, 0.99 7.8e-4.
        momentum = max(float(group["momentum"]) for group in step.groups)
        root = 1.0 / (1.0 + math.sqrt(momentum))  # (1 - √momentum) / (1 - momentum)
        return 1.0 + (root - 1.0) * grown

    def _decays(self, step: Step, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, float]:
        if not parameters:
            return {}
        separable = all(likelihood.is_separable for likelihood in step.estimator.likelihoods.values())
        whole = None if self._full_steps is None else self._full_steps * (_DECAY_LONGER if separable else 1)
        times = _DECAY_EVERY * shrunk(step.number, whole)
        rates = {p: times * float(group.get("cautious_decay", 0.0)) for group in step.groups for p in group["params"]}
        return {p: rates[p] for p in parameters if rates[p] > 0.0}

    def _orthogonalized(self, step: Step, stack: Stack) -> Tensor:
        """`S polar(Sᵀ M)`, with S = I of matrices that have no curvature, or none yet."""
        if stack.differentiated:
            return steepest_by_gradients(step, stack, self._polar)
        if not stack.curved:
            return self._polar(stack.matrices)
        return step.steepest(stack.layers, stack.matrices, self._polar)

    def _precision(self, matrices: Tensor, processes: Processes) -> AbstractContextManager[Any]:
        """In which dtype products of these matrices are taken, whatever the loop around the step casts to."""
        device = matrices.device.type
        long = min(matrices.shape[-2:]) >= _LONG
        dtype = self._products(device, processes) if long else torch.float32
        if dtype == torch.float32 and not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def _measure(self, step: Step) -> None:
        """Agree on the dtype of long products, where there may be any: not all processes have the same of them."""
        shapes = [layer.shape for layer in step.layers] + [plain.shape for plain in step.plain.values()]
        if any(min(shape[-2:]) >= _LONG for shape in shapes):
            for device in sorted({p.device.type for p in step.stepped}):
                self._products(device, step.processes)

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


def _differentiated(step: Step) -> bool:
    """Whether derivatives are taken of the model in its own forward."""
    return any(plain.differentiated for plain in step.plain.values())
