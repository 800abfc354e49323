"""What can be told from a gradient of some data type, and the checks all likelihoods share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """Tolerances for recognising a loss function in its gradient.

    They decide *which* loss a gradient belongs to, not how exact a result is, so they are far above rounding and far
    below the distance between two different losses.

    Attributes:
        sum: Largest sum of a softmax gradient over the classes, relative to the sum of magnitudes.
        cosine: Largest distance from 1 of the cosine between a gradient and what it should be.
        target: Largest distance of a target that counts as 0 or 1 from it.
        saturation: A probability this close to 0 or 1 may be rounded to it.
        quantum: Magnitude below which a gradient's entries may be rounded to zero.
        factor: Largest relative distance between two factors of a loss that are taken for the same.
        rounding: Relative error of a number that was computed in few steps.
        telling: Length of a term's gradient over that of its label, above which rounding leaves its factor that exact.
    """

    sum: float
    cosine: float
    target: float
    saturation: float
    quantum: float
    factor: float
    telling: float
    rounding: float

    @classmethod
    def of(cls, *tensors: Tensor) -> Precision:
        """The tolerances of the coarsest data type among `tensors`."""
        coarsest = max((tensor.dtype for tensor in tensors), key=lambda d: torch.finfo(d).eps)
        limits = torch.finfo(coarsest)
        # float16 has so few exponents that gradients of a mean loss leave them; its smallest number is 2^-24.
        quantum = 2.0**-25 if coarsest == torch.float16 else limits.tiny
        # A sum over classes rounds by √C eps or so: each `sums` leaves at least three orders of magnitude for a large C
        # (half precision: eps is 8e-3, one). A gradient that is not a softmax's has a sum of order 1. A cosine's error
        # is the square of the direction's, hence the smaller numbers. Too tight, right losses are refused; too loose, a
        # wrong one passes that is as near to the right one.
        if coarsest == torch.float64:
            sums, cosine, target, factor = 1e-6, 1e-8, 1e-6, 1e-6
        elif coarsest == torch.float32:
            sums, cosine, target, factor = 1e-3, 1e-4, 1e-3, 1e-3
        else:
            sums, cosine, target, factor = 2e-2, 2e-2, 3e-2, 6e-2
        telling = limits.eps / factor  # a difference of probabilities is exact to an epsilon, absolutely
        return cls(sums, cosine, target, 2.0 * limits.eps, quantum, factor, telling, 8.0 * limits.eps)

    def differ(self, one: float, other: float) -> bool:
        """Whether two numbers, each a sum over a loss' terms, are not the same; none is of what is not finite."""
        return abs(one - other) > self.factor * max(abs(one), abs(other))


def largest_magnitude(lowest: Tensor, highest: Tensor) -> Tensor:
    """Largest magnitude of numbers between these; at least 1e-20, so that it can be inverted."""
    return torch.maximum(-lowest, highest).clamp_min(1e-20)


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """The data type to compute in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(tensor: Tensor) -> Tensor:
    """The tensor in float64 where the device has it: differences of log-probabilities cancel."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def check_prediction(prediction: Tensor, gradient: Tensor | None, loss: str) -> None:
    """Refuse predictions that cannot be read as rows.

    Raises:
        TypeError: If the prediction is not a real floating-point tensor.
        ValueError: If it is empty, or the gradient has another shape.
    """
    if not prediction.is_floating_point():
        raise TypeError(
            f"prediction has dtype {prediction.dtype}, but {loss} needs a real floating-point "
            "prediction: pass logits or means, not complex numbers or integers"
        )
    if prediction.numel() == 0:
        raise ValueError(
            f"prediction of shape {list(prediction.shape)} is an empty batch: it has no loss term, "
            f"so {loss} has no curvature there; skip the batch"
        )
    if gradient is not None and gradient.shape != prediction.shape:
        raise ValueError(
            f"gradient has shape {list(gradient.shape)}, prediction {list(prediction.shape)}: "
            "pass the gradient of the loss with respect to this very prediction"
        )


def check_target(prediction: Tensor, target: Tensor, loss: str) -> None:
    """Refuse, with a ValueError, a target of another shape, where each number has one of its own."""
    if target.shape != prediction.shape:
        raise ValueError(
            f"target has shape {list(target.shape)}, prediction {list(prediction.shape)}: {loss} would broadcast them "
            f"against each other; reshape one to the other"
        )


def check_reduction(reduction: str, known: tuple[str, ...], name: str) -> str:
    """Return `reduction` if it is known, else raise a ValueError that lists the known ones."""
    if reduction not in known:
        raise ValueError(f"{name}: reduction={reduction!r} is unknown, choose one of {list(known)}")
    return reduction
