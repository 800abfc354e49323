"""From exact curvature and a radius to a step: the strategies of `TrustRegionNewton`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kfacopt.linalg.lanczos import Tridiagonal, lanczos
from kfacopt.linalg.secular import trust_region_step
from kfacopt.operators.chain.hessian import ChainGGN, ChainHessian


class Proposal(NamedTuple):
    """A step `[p]`, the shift of the curvature that made it, and what it took (factorisations or products)."""

    step: Tensor
    shift: float
    cost: int


class Curvatures:
    """The curvatures of the loss at the present parameters, each made when first asked for.

    Args:
        make: Makes the operator of a class.
    """

    def __init__(self, make: Callable[[type[ChainHessian]], ChainHessian]) -> None:
        self._make = make

    @cached_property
    def hessian(self) -> ChainHessian:
        """The exact Hessian."""
        return self._make(ChainHessian)

    @cached_property
    def gauss_newton(self) -> ChainHessian:
        """The generalised Gauss-Newton matrix."""
        return self._make(ChainGGN)


class TrustRegionStrategy(ABC):
    """How a step within a radius is made of a gradient and a curvature."""

    def curvature(self, curvatures: Curvatures) -> ChainHessian:
        """The curvature of the strategy's quadratic model: the exact Hessian."""
        return curvatures.hessian

    @abstractmethod
    def propose(self, curvature: ChainHessian, gradient: Tensor, radius: float, shift: float) -> Proposal:
        """A step no longer than about `radius`.

        Args:
            curvature: As chosen by `curvature`.
            gradient: `[p]`, float64, not zero.
            radius: Of the trust region.
            shift: That of the last step, a guess.
        """


@dataclass(frozen=True)
class ExactTrustRegion(TrustRegionStrategy):
    """The minimiser of the quadratic model with the exact Hessian within the radius (Moré & Sorensen 1983).

    Safe where the Hessian is indefinite: the shift is raised until the inertia says that `H + shift I` is positive
    definite, and negative curvature is followed to the boundary.

    Args:
        tolerance: Relative error of the step's length, and share of the model's decrease, that are left on the table
            to save factorisations.
        smallest_shift: The least that is added to H; it bounds the step where H is singular.

    >>> ExactTrustRegion()
    ExactTrustRegion(tolerance=0.2, smallest_shift=1e-07)
    """

    tolerance: float = 0.2
    smallest_shift: float = 1e-7

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if not self.smallest_shift > 0.0:
            raise ValueError(f"smallest_shift must be positive, got {self.smallest_shift}")

    def propose(self, curvature: ChainHessian, gradient: Tensor, radius: float, shift: float) -> Proposal:
        """See `TrustRegionStrategy.propose`; `cost` counts factorisations."""
        found = trust_region_step(
            curvature, gradient, radius, shift=shift, smallest_shift=self.smallest_shift, tolerance=self.tolerance
        )
        return Proposal(found.step, found.shift, found.factorizations)


class GaussNewton(ExactTrustRegion):
    """The minimiser of the Gauss-Newton model within the radius (Levenberg-Marquardt): no negative curvature.

    >>> GaussNewton(tolerance=0.1)
    GaussNewton(tolerance=0.1, smallest_shift=1e-07)
    """

    def curvature(self, curvatures: Curvatures) -> ChainHessian:
        """The Gauss-Newton matrix."""
        return curvatures.gauss_newton


@dataclass(frozen=True)
class SaddleFree(TrustRegionStrategy):
    """`-(|H| + shift I)⁻¹ g` in a Krylov space (Dauphin et al. 2014): saddle points repel, nothing is factored.

    Lanczos started at the gradient finds the k dominant directions that the gradient sees; |H| takes the absolute
    values of their curvatures. The shift is the least with which the step is within the radius.

    Args:
        rank: k, products with the Hessian a step.

    >>> SaddleFree(rank=20)
    SaddleFree(rank=20)
    """

    rank: int = 40

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def propose(self, curvature: ChainHessian, gradient: Tensor, radius: float, shift: float) -> Proposal:
        """See `TrustRegionStrategy.propose`; `cost` counts products."""
        space = lanczos(curvature.__matmul__, gradient, self.rank, reorthogonalize=True)
        step, shift = _absolute_step(space, gradient, radius)
        return Proposal(step, shift, len(space.diagonal))


def _absolute_step(space: Tridiagonal, gradient: Tensor, radius: float) -> tuple[Tensor, float]:
    values, vectors = torch.linalg.eigh(space.dense())
    assert space.basis is not None
    curvatures = values.abs()
    parts = float(gradient.norm()) * vectors[0]
    floor = 1e-7 * float(curvatures.max()) + 1e-12

    def length(shift: float) -> float:
        return float((parts / (curvatures + shift)).norm())

    shift = floor
    if length(floor) > radius:
        low, high = math.log(floor), math.log(float(gradient.norm()) / radius + floor)
        for _ in range(60):  # |d| falls with the shift: bisection on its logarithm
            middle = 0.5 * (low + high)
            low, high = (middle, high) if length(math.exp(middle)) > radius else (low, middle)
        shift = math.exp(high)
    return -(space.basis @ (vectors @ (parts / (curvatures + shift)))), shift
