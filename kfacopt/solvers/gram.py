"""The exact damped Gauss-Newton step, solved in sample space (or in parameter space where that is smaller)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfacopt.likelihoods.fisher import Curvature
from kfacopt.linalg.least_squares import DampedKernel, DampedLeastSquares
from kfacopt.linalg.tensors import flat, inner_product, split_like
from kfacopt.solvers.base import Problem, Solved, Solver
from kfacopt.solvers.samples import SampleSpace


class Gram(Solver):
    """Solves with the kernel of all loss terms: exact, at the price of a matrix as large as the batch.

    With `J̃ = Sᵀ J` the whitened Jacobian, `J̃ᵀ J̃` the curvature of the mean loss and the gradient `g = J̃ᵀ r + e`
    (`e` is what the loss has besides its terms, weight decay for instance, and mostly zero):

    .. code-block:: text

        x = J̃ᵀ (J̃ J̃ᵀ + damping I)⁻¹ r + (e - J̃ᵀ (J̃ J̃ᵀ + damping I)⁻¹ J̃ e) / damping

    Where there are fewer parameters than samples, `(J̃ᵀ J̃ + damping I)⁻¹ g` is the same at less cost.

    Of several processes the samples are those of all: rows of `J̃` go to every process, some columns at a time, each
    makes its own rows of the kernel, and all factor the whole.

    Args:
        momentum: Of the solution, in the directions that the batch says nothing of (SPRING, Goldshlager et al. 2024):
            `x_t` is the least squares solution nearest to `momentum · x_{t-1}`; 0: to zero.
        max_bytes: Bound on memory for kernel, rows and factorisation together.

    Raises:
        ValueError: If an argument is out of range.
        MemoryError: In a step whose kernel alone does not fit.
    """

    records = True
    shares_replays = True

    def __init__(self, momentum: float = 0.0, max_bytes: int = 2**31) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        self.momentum, self.max_bytes = momentum, max_bytes
        self._last: list[Tensor] | None = None

    def __repr__(self) -> str:
        return f"Gram(momentum={self.momentum}, max_bytes={self.max_bytes})"

    def check(self, curvature: Curvature) -> None:
        if curvature is Curvature.HESSIAN:
            raise ValueError(
                "curvature='hessian' is no sum of squares, so that it has no sample space: use solver=kfacopt.CG() or "
                "another curvature"
            )

    def solve(self, problem: Problem) -> Solved:
        space = SampleSpace(problem.metric, self.max_bytes // 2)
        self._require_memory(space)
        space.prepare()
        residual, last = space.residual(), self._remembered(problem)
        rest = list(torch._foreach_sub(problem.gradient, space.transposed(residual)))
        # Besides rounding: what the loss has besides its terms.
        threshold = (1e3 * torch.finfo(space.dtype).eps) ** 2
        has_rest = inner_product(rest, rest) > threshold * inner_product(problem.gradient, problem.gradient)
        if last is not None:
            residual = residual - self.momentum * space.jacobian(last)
        smaller = _InParameterSpace if space.dimension < space.size else _InSampleSpace
        system = smaller(space, problem.damping)
        direction = system.solve(residual, rest if has_rest else None)
        if last is not None:
            torch._foreach_add_(direction, last, alpha=self.momentum)
        if self.momentum > 0.0:
            self._last = [x.clone() for x in direction]
        stats = {
            "samples": float(space.size),
            "parameter_space": float(smaller is _InParameterSpace),
            "fallbacks": float(system.retries),
        }
        return Solved(direction, stats, again=lambda rows: system.solve(space.project(rows).to(space.dtype), None))

    def _require_memory(self, space: SampleSpace) -> None:
        bytes_each = torch.finfo(space.dtype).bits // 8
        if space.dimension < space.size:
            needed = bytes_each * space.dimension * 3 * (space.size + space.dimension)
            what = f"the Jacobian of {space.size} samples with respect to {space.dimension} parameters"
        else:
            needed = bytes_each * 3 * space.size**2
            what = f"the kernel of {space.size} samples and its factorisation"
        if needed > self.max_bytes:
            raise MemoryError(
                f"{what} need {needed:,} bytes, more than max_bytes={self.max_bytes:,}: take a smaller batch, "
                f"curvature='mc' (one sample a loss term), solver=kfacopt.CG(), or raise Gram(max_bytes=...)"
            )

    def _remembered(self, problem: Problem) -> list[Tensor] | None:
        last = self._last
        if self.momentum == 0.0 or last is None:
            return None
        return last if [t.shape for t in last] == [t.shape for t in problem.gradient] else None

    def state_dict(self) -> dict[str, Any]:
        return {"last": None if self._last is None else list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = None if state["last"] is None else [x.clone() for x in state["last"]]


class _InSampleSpace:
    """Solves with the kernel of the samples."""

    def __init__(self, space: SampleSpace, damping: float) -> None:
        self._space, self._damping = space, damping
        self._kernel = DampedKernel(space.kernel(), damping)
        self.retries = self._kernel.retries

    def solve(self, residual: Tensor, rest: list[Tensor] | None) -> list[Tensor]:
        space = self._space
        if rest is None:
            return space.transposed(self._kernel.solve(residual))
        value = self._kernel.solve(torch.stack([residual, space.jacobian(rest)], dim=1))
        direction = space.transposed(value[:, 0])
        outside = torch._foreach_sub(rest, space.transposed(value[:, 1]))
        torch._foreach_add_(direction, outside, alpha=1.0 / self._damping)
        return direction


class _InParameterSpace:
    """Solves with the Jacobian itself."""

    retries = 0

    def __init__(self, space: SampleSpace, damping: float) -> None:
        self._space = space
        self._factored = DampedLeastSquares(space.rows(), damping)

    def solve(self, residual: Tensor, rest: list[Tensor] | None) -> list[Tensor]:
        parameters, dtype = self._space.linearization.parameters, self._space.dtype
        outside = None if rest is None else flat(rest).to(dtype)
        parts = split_like(self._factored.solve(residual, outside), parameters)
        return [part.to(p.dtype) for part, p in zip(parts, parameters, strict=True)]
