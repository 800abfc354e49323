"""The Hessian of a deep chain of layers and its exact damped inverse, at a cost linear in depth."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kfacopt.linalg.operator import LinearOperator
from kfacopt.linalg.refinement import refine
from kfacopt.linalg.riccati import NotPositiveDefiniteError, RiccatiFactorization, multiply
from kfacopt.linalg.side_by_side import at_most
from kfacopt.operators.chain.elements import Element, Merge, Split
from kfacopt.operators.chain.loss import AtOutput, ModuleLoss
from kfacopt.operators.chain.parse import elements_of
from kfacopt.operators.convergence import ConvergenceWarning

_STATE_OF_ONE_THREAD = 1024
"""Numbers in a state (data times width) up to which one thread works. On a machine that others used, two took 9.5,
11.4 and 6.2 seconds of processor time for states of 512, 1,024 and 256, one 0.6, 2.6 and 0.2. Larger were not measured.
"""


class ChainStats(NamedTuple):
    """Of the last `solve`: largest relative residual `|(H + damping I) x - b| / |b|`, corrections, and the damping."""

    residual: float
    refinement_steps: int
    damping: float


class ChainHessian(LinearOperator):
    r"""The Hessian of an `nn.Sequential`'s loss on one batch, with its exact damped inverse, inertia and determinant.

    `(H + damping I) x = b` is the optimality system of a linear-quadratic control problem whose states are the layers'
    outputs; each layer's parameters are eliminated in turn (`linalg.riccati`; Rahimi 2026, arXiv 2601.06096). With a =
    batch · width, one symmetric solve a layer of at most a × a: time O(depth · a³), memory O(depth · a²); neither grows
    with the number of parameters. Meant for deep, narrow chains and small batches.

    Layers: `Linear`, convolutions, elementwise activations, `LayerNorm`, `GroupNorm`, `RMSNorm`, pooling, `Flatten`,
    nested `nn.Sequential`, and `kfacopt.operators.Residual` for `z + f(z)`. Convolutions and normalisations form dense
    derivatives of each datum: they are meant to be small. Derivatives are computed once; every product and solve uses
    them, so later changes of the model's parameters are not seen.

    Args:
        model: The chain. Only its trainable parameters count, in the order of `model.parameters()`.
        loss_func: `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`, reduction `"mean"` or `"sum"`.
        X: Inputs, data first.
        y: Targets.
        dtype: In which everything is computed, whatever the model's own: at depth float32 loses the digits.
        tolerance: Relative residual above which `solve` warns.

    Attributes:
        stats: `ChainStats` of the last `solve`; None before.

    Raises:
        TypeError: If a layer or the loss does not fit, by name.
        ValueError: If shapes do not fit, layers share parameters, dropout is on, or nothing is trainable.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    >>> X, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    >>> H = ChainHessian(model, nn.MSELoss(), X, y)
    >>> x = H.solve(torch.ones(26).double(), damping=0.1)
    >>> torch.allclose(H @ x + 0.1 * x, torch.ones(26).double())
    True
    >>> H.inertia(damping=10.0), H.stats.residual < 1e-12
    (0, True)
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        model: nn.Module,
        loss_func: nn.Module,
        X: Tensor,
        y: Tensor,
        *,
        dtype: torch.dtype = torch.float64,
        tolerance: float = 1e-8,
    ) -> None:
        self._linearise(model, ModuleLoss(loss_func, y), X, dtype, tolerance)

    @classmethod
    def at_output(
        cls, model: nn.Module, loss: AtOutput, X: Tensor, *, dtype: torch.dtype = torch.float64, tolerance: float = 1e-8
    ) -> Self:
        """The operator of a loss that is only known by its derivatives at the prediction.

        Args:
            model: As for the class.
            loss: From the prediction (in `dtype`) to the loss's gradient and Hessian blocks there.
            X: As for the class.
            dtype: As for the class.
            tolerance: As for the class.
        """
        operator = cls.__new__(cls)
        operator._linearise(model, loss, X, dtype, tolerance)
        return operator

    @torch.no_grad()
    def _linearise(self, model: nn.Module, loss: AtOutput, X: Tensor, dtype: torch.dtype, tolerance: float) -> None:
        elements = elements_of(model, dtype)
        z = X.detach().to(dtype, copy=True) if X.is_floating_point() else X.clone()
        kept: list[Tensor] = []
        self._largest_state = 0
        with at_most(1):  # how large states are is not known yet; all that follows takes many times as long
            for element in elements:
                z = element.forward(z, kept)
                self._largest_state = max(self._largest_state, z.numel())
            _check_forward(model, X, z)
        with self._threads():
            gradient, hessian = loss(z)
            self._output_gradient = gradient
            for element in reversed(elements):
                gradient = element.backward(gradient, kept)
        self._select_curvature(elements)
        self._stages, self._terminal = _moving_part(elements), hessian
        self._controlled = [element for element in self._stages if element.controls]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        place = {id(parameter): i for i, parameter in enumerate(trainable)}
        self._places = [[place[id(p)] for p in element.parameters] for element in self._controlled]
        self._parameter_dtype, self._dtype, self._device = trainable[0].dtype, dtype, z.device
        self._tolerance = tolerance
        self.stats: ChainStats | None = None
        self._factored: tuple[float, RiccatiFactorization] | None = None
        shapes = [parameter.shape for parameter in trainable]
        super().__init__(shapes, shapes)

    def _select_curvature(self, elements: Sequence[Element]) -> None:
        """Which second derivatives of the layers count: all."""

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' own; inside everything is computed in the `dtype` of the constructor."""
        return self._parameter_dtype

    @property
    def gradient(self) -> list[Tensor]:
        """The loss's gradient with respect to the parameters, in the precision of the computation."""
        found = [element.gradient for element in self._controlled]
        with self._threads():
            return [part.squeeze(-1) for part in self._from_controls([g for g in found if g is not None])]

    def _threads(self) -> AbstractContextManager[None]:
        """One of torch's threads where states are small: over steps this short several wait for each other."""
        return at_most(1) if self._largest_state <= _STATE_OF_ONE_THREAD else nullcontext()

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        with self._threads():
            products = multiply(self._stages, self._terminal, self._to_controls(M))
            return [part.to(m.dtype) for part, m in zip(self._from_controls(products), M, strict=True)]

    def solve(self, v: Any, damping: float) -> Any:
        """`(H + damping I)⁻¹ v`, by the recursion and iterative refinement against exact products.

        Args:
            v: As for `@`: flat or a list of tensors, with columns or not.
            damping: Any number but 0; the last damping's factorisation is kept, so that several calls share it.

        Returns:
            The solution in the format of `v`. How exact it is stands in `stats`.

        Raises:
            ValueError: If `v` has another format, or the damping is 0.
            LinAlgError: If `H + damping I` is singular, or something is not finite.

        Warns:
            ConvergenceWarning: If the relative residual stays above `tolerance`.
        """
        with self._threads():
            return self._solved(v, damping)

    def _solved(self, v: Any, damping: float) -> Any:
        columns, form = self._columns(v)
        factored = self._factorize(damping)
        right = self._to_controls(columns)
        sizes = [part.shape[0] for part in right]

        def product(x: Tensor) -> Tensor:
            return torch.cat(multiply(self._stages, self._terminal, x.split(sizes))) + damping * x

        def precondition(r: Tensor) -> Tensor:
            return torch.cat(factored.solve(r.split(sizes)))

        solution, residual, steps = refine(product, precondition, torch.cat(right), tolerance=self._tolerance)
        self.stats = ChainStats(residual, steps, damping)
        if not residual <= self._tolerance:
            warnings.warn(
                f"{type(self).__name__}.solve reached a relative residual of {residual:.1e} at damping={damping:g}, "
                f"above tolerance={self._tolerance:g}: the system is too badly conditioned for {self._dtype}",
                ConvergenceWarning,
                stacklevel=3,
            )
        parts = self._from_controls(solution.split(sizes))
        return self._as_given([part.to(c.dtype) for part, c in zip(parts, columns, strict=True)], form)

    def inertia(self, damping: float) -> int:
        """How many eigenvalues of `H + damping I` are negative, exactly; damping is any number but 0."""
        return self._factorize(damping).negative()

    def positive_definite(self, damping: float) -> bool:
        """Whether `H + damping I` is positive definite; where it is not, cheaper than `inertia`."""
        if self._factored is not None and self._factored[0] == damping:
            return self._factored[1].negative() == 0
        self._factored = None
        try:
            with self._threads():
                factored = RiccatiFactorization(self._stages, self._terminal, damping, only_if_positive=True)
        except NotPositiveDefiniteError:
            return False
        self._factored = (damping, factored)
        return factored.negative() == 0

    def logdet(self, damping: float) -> float:
        """`log |det(H + damping I)|`; the determinant's sign is that of `(-1) ** inertia(damping)`."""
        return self._factorize(damping).logabsdet()

    def output_decrement(self) -> float:
        """`½ uᵀ S⁺ u`: what Newton's method on the predictions alone would gain, u and S the loss's derivatives there.

        A measure of how much of the loss is left that needs no value of it: MSELoss's own, and near cross-entropy's.
        """
        # rtol: cross-entropy's Hessian is singular along (1, …, 1) up to rounding. A bound below float64's rounding of
        # S (1e-15 of the largest eigenvalue) would divide by noise; one above 1e-6 would drop confident predictions.
        u = self._output_gradient.reshape(*self._terminal.shape[:2], 1)
        return 0.5 * float((u * (torch.linalg.pinv(self._terminal, hermitian=True, rtol=1e-9) @ u)).sum())

    def _factorize(self, damping: float) -> RiccatiFactorization:
        if self._factored is None or self._factored[0] != damping:
            self._factored = None  # freed before the next is made
            with self._threads():
                self._factored = (damping, RiccatiFactorization(self._stages, self._terminal, damping))
        return self._factored[1]

    def _to_controls(self, parts: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self._controlled, self._places, strict=True)
        return [element.pack([parts[i].to(self._dtype) for i in places]) for element, places in pairs]

    def _from_controls(self, controls: Sequence[Tensor]) -> list[Tensor]:
        result: dict[int, Tensor] = {}
        for element, places, x in zip(self._controlled, self._places, controls, strict=True):
            result |= dict(zip(places, element.unpack(x), strict=True))
        return [result[i] for i in range(len(result))]


class ChainGGN(ChainHessian):
    """The generalised Gauss-Newton matrix of a chain, by the same recursion: without the layers' own curvature.

    It is positive semi-definite, so `inertia` is 0 for every positive damping. Arguments and methods are those of
    `ChainHessian`.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> ChainGGN(model, nn.CrossEntropyLoss(), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])).inertia(1e-6)
    0
    """

    def _select_curvature(self, elements: Sequence[Element]) -> None:
        for element in elements:
            element.forget_curvature()


def _moving_part(elements: Sequence[Element]) -> list[Element]:
    """The elements from the first parameters on: no parameter moves what comes before.

    A residual block that is open there adds what does not move, so that its exit has no derivative of interest either.
    """
    first = next(i for i, element in enumerate(elements) if element.controls)
    still: list[bool] = []  # of the open blocks, innermost last: whether their input does not move
    moving: list[Element] = []
    for position, element in enumerate(elements):
        if isinstance(element, Split):
            still.append(position < first)
        if position >= first and not (isinstance(element, Merge) and still[-1]):
            moving.append(element)
        if isinstance(element, Merge):
            still.pop()
    return moving


def _check_forward(model: nn.Module, X: Tensor, prediction: Tensor) -> None:
    """Refuse a model whose forward is not the composition of its layers: a hook or a patched forward may change it.

    Raises:
        RuntimeError: If they differ.
    """
    if not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()):
        return
    dtype = prediction.dtype
    cast = {n: p.to(dtype) for n, p in model.named_parameters()}
    cast |= {n: b.to(dtype) if b.is_floating_point() else b for n, b in model.named_buffers()}
    whole = functional_call(model, cast, (X.detach().to(dtype) if X.is_floating_point() else X,))
    # In float64 the same operations in another order differ by 1e-12 or so, a hook that does something by far more.
    same = whole.shape == prediction.shape and torch.allclose(whole, prediction, rtol=1e-6, atol=1e-6, equal_nan=True)
    if not same:
        raise RuntimeError(
            f"the forward of {type(model).__name__} is not the composition of its layers (a hook that changes what "
            f"passes?): the chain's Hessian would be that of another model"
        )
