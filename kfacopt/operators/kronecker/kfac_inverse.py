"""The inverse of a damped Kronecker-factored operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfacopt.blocks import Block, EigenBlock
from kfacopt.blocks.data_set import DataSetEigenBlock
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.linalg import kronecker
from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.symmetric import LinAlgError
from kfacopt.operators.kronecker.ekfac import EKFACLinearOperator
from kfacopt.operators.kronecker.statistics import KroneckerLinearOperator

Damping = float | tuple[float, float]


class _Inverses(NamedTuple):
    """Damped inverses of G and A."""

    left: Tensor
    right: Tensor


class KFACInverseLinearOperator(LinearOperator):
    """The inverse of KFAC or EKFAC, damped.

    Three ways to damp, block by block:

    - plain (the default): `(G + damping I)⁻¹ ⊗ (A + damping I)⁻¹`, or with a damping each; by Cholesky.
    - `use_heuristic_damping`: the same with `√damping / π` for G and `π √damping` for A, π² the ratio of the mean
      eigenvalues of A and G (Martens & Grosse 2015, section 6.3), at least `min_damping`.
    - `use_exact_damping`: `(G ⊗ A + damping I)⁻¹` by eigendecomposition; the only one for EKFAC.

    A bias with a block of its own has no A: only G is damped. Diagonal blocks (norm layers, uncovered parameters) have
    the damping added to their diagonal. The damping is in units of the operator's loss, as its reduction has it.

    Args:
        A: The operator.
        damping: One number, or one for the A and one for the G of every layer.
        use_heuristic_damping: See above.
        min_damping: Lower bound of the heuristic's dampings.
        use_exact_damping: See above.
        cache: Whether to keep the inverses between products.
        retry_double_precision: Whether a Cholesky decomposition that fails is tried again in float64.

    Raises:
        ValueError: If `A` is no Kronecker-factored operator, the damping is negative, or its options exclude each
            other.
        RuntimeError: (when applied) If a factor is singular even with the damping; the layer is named.

    >>> model, loss = torch.nn.Linear(3, 2).double(), torch.nn.MSELoss()
    >>> data = [(torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))]
    >>> ekfac = EKFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type="type-2")
    >>> inverse = KFACInverseLinearOperator(ekfac, damping=1e-3, use_exact_damping=True)
    >>> v = torch.ones(8, dtype=torch.float64)
    >>> torch.allclose(ekfac @ (inverse @ v) + 1e-3 * (inverse @ v), v)
    True
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        A: KroneckerLinearOperator,
        damping: Damping = 0.0,
        use_heuristic_damping: bool = False,
        min_damping: float = 1e-8,
        use_exact_damping: bool = False,
        cache: bool = True,
        retry_double_precision: bool = True,
    ) -> None:
        if not isinstance(A, KroneckerLinearOperator):
            raise ValueError(f"A must be a KFACLinearOperator or EKFACLinearOperator, got {type(A).__name__}")
        if use_heuristic_damping and use_exact_damping:
            raise ValueError("use_heuristic_damping and use_exact_damping exclude each other")
        if isinstance(damping, tuple) and (use_heuristic_damping or use_exact_damping):
            raise ValueError(f"heuristic and exact damping take one number, got damping={damping}")
        if isinstance(A, EKFACLinearOperator) and not use_exact_damping:
            raise ValueError("EKFAC's corrected eigenvalues are no product of factors: pass use_exact_damping=True")
        super().__init__(A._out_shape, A._in_shape)
        self._A, self._damping = A, _checked_damping(damping)
        self._heuristic, self._min_damping = use_heuristic_damping, min_damping
        self._exact, self._cache, self._retry = use_exact_damping, cache, retry_double_precision
        self._cached: dict[str, _Inverses | EigenBlock] = {}
        self._cached_for: object = None
        self._bias_only = {layer.name: layer.roles == ("bias",) for layer in A._layers}

    @property
    def device(self) -> torch.device:
        return self._A.device

    @property
    def dtype(self) -> torch.dtype:
        return self._A.dtype

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        A, scale = self._A, self._computed_scale()
        names = {id(block): name for name, block in A.blocks.items()}
        if isinstance(self._damping, tuple) and not all(isinstance(b, FactoredBlock) for b in A.blocks.values()):
            raise ValueError(f"damping={self._damping}: diagonal blocks have no two factors, pass one number")
        single = 0.0 if isinstance(self._damping, tuple) else self._damping

        def solve(block: Block, matrix: Tensor) -> Tensor:
            name = names[id(block)]
            if not isinstance(block, FactoredBlock):
                return matrix / _positive(scale * block.eigenvalues() + single, name)
            if self._exact:
                eigen = self._eigen(name, block)
                _positive(scale * eigen.eigenvalues().min() + single, name)
                return eigen.solve(matrix, single / scale) / scale
            inverses = self._inverses(name, block, scale)
            return kronecker.multiply(inverses.left, matrix, inverses.right)

        def divide(diagonal: Tensor, columns: Tensor) -> Tensor:
            return columns / _positive(scale * diagonal + single, "an uncovered parameter")

        result = A.apply(M, solve, divide)
        if not self._cache:
            self._cached.clear()
        return result

    def _computed_scale(self) -> float:
        self._A.compute()
        if self._cached_for is not self._A.version:
            self._cached.clear()
            self._cached_for = self._A.version
        return self._A._scale

    def _eigen(self, name: str, block: FactoredBlock) -> EigenBlock:
        if isinstance(block, DataSetEigenBlock):
            return block
        found = self._cached.get(name)
        if not isinstance(found, EigenBlock):
            found = EigenBlock()
            found.input_factor, found.gradient_factor = block.input_factor, block.gradient_factor
            found.refresh(0.0)
            self._cached[name] = found
        return found

    def _inverses(self, name: str, block: FactoredBlock, scale: float) -> _Inverses:
        found = self._cached.get(name)
        if isinstance(found, _Inverses):
            return found
        left, right = block.factors()
        owner = block.owner
        if self._bias_only[name]:
            # No A to damp; G is damped as it is for the weight.
            damping_left = self._plain[1] if owner is None else self._dampings(scale * left, owner.factors()[1])[1]
            result = _Inverses(self._invert(name, "G", scale * left, damping_left), torch.ones_like(right))
        else:
            damping_right, damping_left = self._dampings(scale * left, right)
            result = _Inverses(
                self._invert(name, "G", scale * left, damping_left), self._invert(name, "A", right, damping_right)
            )
        self._cached[name] = result
        return result

    @property
    def _plain(self) -> tuple[float, float]:
        return self._damping if isinstance(self._damping, tuple) else (self._damping, self._damping)

    def _dampings(self, left: Tensor, right: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Damping of A and of G, `[*k]` each for the heuristic."""
        if not self._heuristic:
            return self._plain
        assert not isinstance(self._damping, tuple)
        mean_left = kronecker.trace(left) / left.shape[-1]
        mean_right = kronecker.trace(right) / right.shape[-1]
        ratio = (mean_right / mean_left).sqrt()
        usable = (mean_left > 0) & (mean_right >= 0)
        root = self._damping**0.5
        plain = torch.full_like(ratio, self._damping)
        on_right = torch.where(usable, (root * ratio).clamp_min(self._min_damping), plain)
        on_left = torch.where(usable, (root / ratio).clamp_min(self._min_damping), plain)
        return on_right, on_left

    def _invert(self, name: str, which: str, factor: Tensor, damping: Tensor | float) -> Tensor:
        if factor.ndim == 1:
            return 1.0 / _positive(factor + damping, name)
        inverse = kronecker.inverse(factor, damping)
        allowed = 1 if self._retry else 0
        if inverse.retries > allowed:
            raise LinAlgError(
                f"the factor {which} of {name!r} with damping {damping} is not positive definite"
                + ("" if self._retry else f" in {factor.dtype}")
                + ": pass a larger damping, or use_exact_damping=True"
            )
        return inverse.value

    def state_dict(self) -> dict[str, Any]:
        """The operator's state and the damping options."""
        return {
            "A": self._A.state_dict(),
            "damping": self._damping,
            "use_heuristic_damping": self._heuristic,
            "min_damping": self._min_damping,
            "use_exact_damping": self._exact,
            "cache": self._cache,
            "retry_double_precision": self._retry,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the inverses are computed again when they are needed."""
        self._A.load_state_dict(state_dict["A"])
        self._damping = _checked_damping(state_dict["damping"])
        self._heuristic, self._min_damping = state_dict["use_heuristic_damping"], state_dict["min_damping"]
        self._exact, self._cache = state_dict["use_exact_damping"], state_dict["cache"]
        self._retry = state_dict["retry_double_precision"]
        self._cached.clear()

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], A: KroneckerLinearOperator) -> KFACInverseLinearOperator:
        """The inverse of `A`, which takes over its part of the state, with the damping options of the state."""
        options = {name: value for name, value in state_dict.items() if name != "A"}
        inverse = cls(A, **options)
        inverse.load_state_dict(state_dict)
        return inverse


def _checked_damping(damping: Any) -> Damping:
    """As plain numbers, whatever kind they were of.

    Raises:
        ValueError: If it is negative, not a number, or more than two.
    """
    several = isinstance(damping, tuple | list)
    numbers = [float(d) for d in damping] if several else [float(damping)]
    if not all(d >= 0.0 for d in numbers) or len(numbers) != (2 if several else 1):
        raise ValueError(f"damping must be a number of at least zero, or one for A and one for G, got {damping}")
    return (numbers[0], numbers[1]) if several else numbers[0]


def _positive(values: Tensor, name: str) -> Tensor:
    if not bool((values > 0).all()):
        raise LinAlgError(f"{name!r} has a zero eigenvalue and nothing is added to it: pass a positive damping")
    return values
