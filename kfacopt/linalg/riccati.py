"""The Hessian of a composition of stages, and its damped inverse by a Riccati recursion over the stages.

For `z_l = f_l(z_{l-1}, θ_l)` and a loss of the last state, `(H + damping I) x = b` is the optimality system of a
linear-quadratic control problem (Rahimi 2026, arXiv 2601.06096; Dunn & Bertsekas 1989). To see it, move the parameters
along x, with `x_l` the part of stage l. To first order the states move by `y_l`, which the chain rule gives from stage
to stage; A and B are the stage's Jacobians with respect to its state and to its parameters:

    y_l = A y_{l-1} + B x_l,        y_0 = 0

Differentiate the chain rule once more. Each stage adds its own second derivative along `(y_{l-1}, x_l)`, and the stages
after it carry that on to the loss linearly: what arrives is weighted by the loss's gradient at the stage's output,
which back-propagation knows. The last state adds the loss's own Hessian V. So the curvature along x is a sum over
stages,

    xᵀ H x = y_Lᵀ V y_L + Σ_l (y_{l-1}ᵀ Q y_{l-1} + 2 x_lᵀ C y_{l-1})

with Q and C the weighted second derivatives of the stage (every stage here is linear in its parameters, so there is
none with respect to them twice). Solving `(H + damping I) x = b` is finding where `½ xᵀ H x + ½ damping |x|² - bᵀ x`
is stationary, and in this form Bellman's principle applies: once the state `y_{l-1}` is given, what comes before does
not matter to the controls from l on. Suppose that the stages after l, at their stationary point, cost
`½ yᵀ V y + qᵀ y` from the state `y = y_l`. Put `y_l = A y + B x` in, and stage l's cost is quadratic in its controls x:

    ½ xᵀ T x + xᵀ (F y - r) + …,    T = damping I + Bᵀ V B,    F = Bᵀ V A + C,    r = b - Bᵀ q

It is stationary at `x = T⁻¹ (r - F y)`. With that x the cost is quadratic in y again, and the recursion goes on:

    V ← Aᵀ V A + Q - Fᵀ T⁻¹ F        q ← Aᵀ q + Fᵀ T⁻¹ r

Backward the V (of the matrix alone: factored once) and the q, then forward the x and y: that is a solve. Eliminating a
stage's controls is block Gaussian elimination, and T the Schur complement of that stage's block in H + damping I. Hence
H may be indefinite, as long as no T is singular, and the inertias and log-determinants of the T add up to those of the
whole. Nothing of the size of the parameters is formed: a stage may say that all but k of its controls do not reach the
state (`B = L Pᵀ`, P orthonormal with k columns), and only k × k is factored; for the other controls T is `damping I`.

Vectors are columns: states `[a m]`, controls `[p m]`. A state may carry more rows after those that a stage maps (what a
residual connection will add later); they pass through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfacopt.linalg.elimination import Elimination, eliminate


class Stage(ABC):
    """The derivatives of one stage. A stage without controls implements `_push`, `_pull` and what `curve` needs.

    Attributes:
        rows_in, rows_out: Rows of the state that it maps.
        controls: Its parameters, p.
        reduced: Controls that reach the state, k.
    """

    rows_in: int
    rows_out: int
    controls: int = 0
    reduced: int = 0

    @abstractmethod
    def _push(self, y: Tensor) -> Tensor:
        """`A y` of the rows it maps."""

    @abstractmethod
    def _pull(self, g: Tensor) -> Tensor:
        """`Aᵀ g` of the rows it maps."""

    def push(self, y: Tensor) -> Tensor:
        """`A y`; further rows pass."""
        return _on_top(self._push, self.rows_in, y)

    def pull(self, g: Tensor) -> Tensor:
        """`Aᵀ g`; further rows pass."""
        return _on_top(self._pull, self.rows_out, g)

    def sandwich(self, value: Tensor) -> Tensor:
        """`Aᵀ V A`."""
        return self.pull(self.pull(value).mT)

    def curve(self, y: Tensor) -> Tensor | None:
        """`Q y` of the rows it maps; `None` for zero."""
        return None

    def add_curvature(self, value: Tensor, damping: float) -> None:
        """Add to V in place `Q - Cᵀ (I - P Pᵀ) C / damping`: the second part is of the controls that reach no state."""
        return  # zero, unless a stage says otherwise

    def steer(self, x: Tensor) -> Tensor:
        """`B x`."""
        raise NotImplementedError

    def sense(self, g: Tensor) -> Tensor:
        """`Bᵀ g`."""
        raise NotImplementedError

    def mix(self, y: Tensor) -> Tensor | None:
        """`C y`; `None` for zero."""
        return None

    def mix_transposed(self, x: Tensor) -> Tensor | None:
        """`Cᵀ x`; `None` for zero."""
        return None

    def reduce(self, x: Tensor) -> Tensor:
        """`Pᵀ x`, `[k m]`."""
        return x

    def expand(self, x: Tensor) -> Tensor:
        """`P x`, `[p m]`."""
        return x

    def project(self, g: Tensor) -> Tensor:
        """`Lᵀ g = Pᵀ Bᵀ g`, `[k m]`."""
        return self.reduce(self.sense(g))

    def add_mixed(self, coupling: Tensor) -> None:
        """Add `Pᵀ C` in place to F `[k rows_in]`."""
        return  # zero, unless a stage says otherwise


class Fork(Stage):
    """Keeps a second copy of the state's leading rows, for a `Join` to add."""

    def __init__(self, rows: int) -> None:
        self.rows_in, self.rows_out = rows, 2 * rows

    def _push(self, y: Tensor) -> Tensor:
        return torch.cat([y, y])

    def _pull(self, g: Tensor) -> Tensor:
        return g[: self.rows_in] + g[self.rows_in :]


class Join(Stage):
    """Adds what the `Fork` kept to the leading rows."""

    def __init__(self, rows: int) -> None:
        self.rows_in, self.rows_out = 2 * rows, rows

    def _push(self, y: Tensor) -> Tensor:
        return y[: self.rows_out] + y[self.rows_out :]

    def _pull(self, g: Tensor) -> Tensor:
        return torch.cat([g, g])


def multiply(stages: Sequence[Stage], terminal: Tensor, controls: Sequence[Tensor]) -> list[Tensor]:
    """`H x` by one sweep forward and one backward.

    Args:
        stages: In the order in which they are applied; the first has controls (what comes before has no derivative).
        terminal: Hessian of the loss with respect to the last state, `[n d d]`, one block a datum.
        controls: x of each stage with controls, `[p m]`.
    """
    given = iter(controls)
    states: list[Tensor | None] = []
    steps: list[Tensor | None] = []
    y: Tensor | None = None
    for stage in stages:
        x = next(given) if stage.controls else None
        states.append(y)
        steps.append(x)
        moved = None if y is None else stage.push(y)
        if x is not None:
            moved = _plus_on_top(moved, stage.steer(x))
        y = moved
    assert y is not None
    g = _blocks_times(terminal, y)
    result: list[Tensor] = []
    for stage, state, x in zip(reversed(stages), reversed(states), reversed(steps), strict=True):
        if x is not None:
            out = stage.sense(g[: stage.rows_out])
            mixed = None if state is None else stage.mix(state[: stage.rows_in])
            result.append(out if mixed is None else out + mixed)
        if state is None:
            break
        g = stage.pull(g)
        g = _plus_on_top(g, stage.curve(state[: stage.rows_in]))
        g = _plus_on_top(g, None if x is None else stage.mix_transposed(x))
    return result[::-1]


class NotPositiveDefiniteError(ArithmeticError):
    """A factorisation was to be made only of a positive definite matrix, and this one is not."""


class RiccatiFactorization:
    """`H + damping I` factored: one symmetric elimination a stage.

    Time is linear in the number of stages and cubic in the rows of a state, or in the reduced controls where those are
    fewer; memory linear and quadratic.

    Args:
        stages: As for `multiply`.
        terminal: As for `multiply`.
        damping: Not zero; negative shifts are allowed (the inertia then counts the eigenvalues below `-damping`).
        only_if_positive: Give up at the first negative eigenvalue, which is often in the last stage, the first to go.

    Raises:
        NotPositiveDefiniteError: If there is one and `only_if_positive`.
        ValueError: If the damping is zero or not finite.
        LinAlgError: If a block of the elimination is singular, or the derivatives are not finite.
    """

    def __init__(
        self, stages: Sequence[Stage], terminal: Tensor, damping: float, *, only_if_positive: bool = False
    ) -> None:
        if damping == 0.0 or not math.isfinite(damping):
            raise ValueError(
                f"damping must be a number other than 0, got {damping}: parameter directions that reach no prediction "
                f"have no curvature to divide by"
            )
        self._stages, self._damping = stages, damping
        self._eliminations: list[Elimination | None] = []
        value: Tensor | None = torch.block_diag(*terminal) if terminal.shape[0] > 1 else terminal[0].clone()
        for position in reversed(range(len(stages))):
            assert value is not None
            elimination, value = _backward(stages[position], value, damping, first=position == 0)
            if only_if_positive and elimination is not None and elimination.negative:
                raise NotPositiveDefiniteError(f"H + {damping:g} I has negative eigenvalues")
            self._eliminations.append(elimination)
        self._eliminations.reverse()

    def _controlled(self) -> list[tuple[Stage, Elimination]]:
        pairs = zip(self._stages, self._eliminations, strict=True)
        return [(stage, elimination) for stage, elimination in pairs if elimination is not None]

    def negative(self) -> int:
        """How many eigenvalues of `H + damping I` are negative."""
        unreached = sum(stage.controls - stage.reduced for stage, _ in self._controlled())
        found = sum(elimination.negative for _, elimination in self._controlled())
        return found + (unreached if self._damping < 0.0 else 0)

    def logabsdet(self) -> float:
        """`log |det(H + damping I)|`."""
        unreached = sum(stage.controls - stage.reduced for stage, _ in self._controlled())
        return sum(elimination.logabsdet for _, elimination in self._controlled()) + unreached * math.log(
            abs(self._damping)
        )

    def solve(self, right: Sequence[Tensor]) -> list[Tensor]:
        """`(H + damping I)⁻¹ b` for b of each stage with controls, `[p m]`."""
        given = iter(reversed(right))
        pending: list[tuple[Tensor, Tensor | None] | None] = []  # what b leaves to controls that reach, and do not
        q: Tensor | None = None  # the linear part of the value function; None: zero
        pairs = list(zip(self._stages, self._eliminations, strict=True))
        for position, (stage, elimination) in reversed(list(enumerate(pairs))):
            if elimination is None:
                pending.append(None)
                q = None if q is None else stage.pull(q)
                continue
            b = next(given)
            seen = stage.reduce(b)
            hidden = None if stage.reduced == stage.controls else b - stage.expand(seen)
            if q is not None:
                seen = seen - stage.project(q[: stage.rows_out])
            pending.append((seen, hidden))
            if position:
                back = elimination.adjoint(seen)
                if hidden is not None:
                    back = _plus_on_top(back, stage.mix_transposed(hidden / self._damping))
                q = back if q is None else stage.pull(q) + back
        result: list[Tensor] = []
        y: Tensor | None = None
        for (stage, elimination), rest in zip(pairs, reversed(pending), strict=True):
            moved = None if y is None else stage.push(y)
            if elimination is not None:
                assert rest is not None
                x = self._recover(stage, elimination, *rest, y)
                result.append(x)
                moved = _plus_on_top(moved, stage.steer(x))
            y = moved
        return result

    def _recover(
        self, stage: Stage, elimination: Elimination, seen: Tensor, hidden: Tensor | None, y: Tensor | None
    ) -> Tensor:
        """Controls of a stage, of those that reach the state and of those that do not."""
        x = stage.expand(elimination.recover(seen, y))
        if hidden is None:
            return x
        mixed = None if y is None else stage.mix(y[: stage.rows_in])
        if mixed is not None:
            hidden = hidden - (mixed - stage.expand(stage.reduce(mixed)))
        return x + hidden / self._damping


def _backward(stage: Stage, value: Tensor, damping: float, first: bool) -> tuple[Elimination | None, Tensor | None]:
    """One step of the recursion: the elimination of a stage's controls, and the value function before the stage."""
    matrix = coupling = None
    if stage.controls:
        rows = stage.rows_out
        seen = stage.project(value[:rows])
        matrix = stage.project(seen[:, :rows].mT)
        matrix = matrix.add(matrix.mT).mul_(0.5)
        matrix.diagonal().add_(damping)
        if not first:
            coupling = stage.pull(seen.mT).mT.contiguous()
            stage.add_mixed(coupling[:, : stage.rows_in])
    elimination = None if matrix is None else eliminate(matrix, coupling)
    if first:
        return elimination, None
    value = stage.sandwich(value)
    stage.add_curvature(value[: stage.rows_in, : stage.rows_in], damping)
    if elimination is not None:
        value = value.sub_(elimination.schur())
    return elimination, value


def _on_top(function: Callable[[Tensor], Tensor], rows: int, matrix: Tensor) -> Tensor:
    """The function of the first rows; further rows pass."""
    if matrix.shape[0] == rows:
        return function(matrix)
    return torch.cat([function(matrix[:rows]), matrix[rows:]])


def _plus_on_top(matrix: Tensor | None, addend: Tensor | None) -> Tensor:
    """The sum, where the addend may have fewer rows; either may be absent."""
    if addend is None:
        assert matrix is not None
        return matrix
    if matrix is None:
        return addend
    if matrix.shape[0] == addend.shape[0]:
        return matrix + addend
    result = matrix.clone()
    result[: addend.shape[0]] += addend
    return result


def _blocks_times(blocks: Tensor, y: Tensor) -> Tensor:
    product: Tensor = blocks @ y.unflatten(0, blocks.shape[:2])
    return product.flatten(0, 1)
