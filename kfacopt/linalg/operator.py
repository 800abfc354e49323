"""Linear operators on lists of tensors, and what can be made of them: sums, multiples, products, SciPy's.

The space an operator acts on is a list of tensors, shaped as a model's parameters. A vector is such a list, or one flat
tensor; a matrix of K columns has one more axis at the end, K long. What goes in comes out in the same format. The
interface is that of curvlinops 3.0.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Size, Tensor

from kfacopt.linalg.tensors import flat_columns, split_columns
from kfacopt.optional import required

if TYPE_CHECKING:  # an optional dependency of to_scipy alone
    from scipy.sparse.linalg import LinearOperator as SciPyLinearOperator

Shapes = Sequence[Sequence[int]]


class _Format(NamedTuple):
    """How the user wrote a matrix: as a list or flat, as a vector or with columns."""

    as_list: bool
    is_vector: bool


class LinearOperator(ABC):
    """A linear map between lists of tensors; subclasses say `_matmat`, `device`, `dtype`, and `_adjoint` if need be.

    Args:
        in_shape: Shapes of the tensors it is applied to.
        out_shape: Shapes of the tensors it returns.

    Attributes:
        SELF_ADJOINT: Whether the operator is its own adjoint.
        shape: `(rows, columns)` as a matrix.

    >>> identity = IdentityLinearOperator([(2,), (1, 2)])
    >>> (3 * identity + identity) @ torch.ones(4)
    tensor([4., 4., 4., 4.])
    >>> [x.shape for x in identity @ [torch.ones(2, 5), torch.ones(1, 2, 5)]]
    [torch.Size([2, 5]), torch.Size([1, 2, 5])]
    """

    SELF_ADJOINT: bool = False

    def __init__(self, in_shape: Shapes, out_shape: Shapes) -> None:
        self._in_shape = [Size(s) for s in in_shape]
        self._out_shape = [Size(s) for s in out_shape]
        self._in_shape_flat = [s.numel() for s in self._in_shape]  # subclasses written for curvlinops read these
        self._out_shape_flat = [s.numel() for s in self._out_shape]
        self.shape = (sum(self._out_shape_flat), sum(self._in_shape_flat))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the vectors live."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The vectors' type."""

    @abstractmethod
    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        """Apply to K columns: tensors `[*in_shape, K]` to tensors `[*out_shape, K]`; `M` is not to be written to."""

    def _adjoint(self) -> LinearOperator:
        raise NotImplementedError(f"{type(self).__name__} does not define its adjoint (`_adjoint`)")

    def adjoint(self) -> LinearOperator:
        """The adjoint operator; itself if it is self-adjoint."""
        return self if self.SELF_ADJOINT else self._adjoint()

    @overload
    def __matmul__(self, X: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, X: list[Tensor]) -> list[Tensor]: ...
    @overload
    def __matmul__(self, X: LinearOperator) -> LinearOperator: ...
    def __matmul__(self, X: Any) -> Any:
        """Apply the operator to a vector or matrix, or chain it with another operator.

        Args:
            X: `[columns]` or `[columns, K]`; or a list of tensors `[*in_shape]` or `[*in_shape, K]`.

        Returns:
            The product in the format of `X`, or an operator.

        Raises:
            ValueError: If `X` has another format or shape.
        """
        if isinstance(X, LinearOperator):
            return ProductLinearOperator(self, X)
        columns, form = self._columns(X)
        if columns and columns[0].shape[-1] == 0:
            return self._as_given([columns[0].new_zeros(*s, 0) for s in self._out_shape], form)
        result = self._matmat(columns)
        return self._as_given(result, form)

    def _columns(self, X: Any) -> tuple[list[Tensor], _Format]:
        if isinstance(X, Tensor):
            if X.ndim not in (1, 2) or X.shape[0] != self.shape[1]:
                raise ValueError(
                    f"{type(self).__name__} of shape {self.shape} is applied to a tensor of shape [{self.shape[1]}] or "
                    f"[{self.shape[1]}, K], got {list(X.shape)}"
                )
            matrix = X if X.ndim == 2 else X.unsqueeze(-1)
            return split_columns(matrix, self._in_shape), _Format(as_list=False, is_vector=X.ndim == 1)
        if not (isinstance(X, (list, tuple)) and all(isinstance(x, Tensor) for x in X)):
            raise ValueError(
                f"{type(self).__name__} is applied to a tensor or a list of tensors, got {type(X).__name__}"
            )
        shapes = [x.shape for x in X]
        if shapes == self._in_shape:
            return [x.unsqueeze(-1) for x in X], _Format(as_list=True, is_vector=True)
        number = {s[-1] for s in shapes if len(s)}
        if [s[:-1] for s in shapes] == self._in_shape and len(number) == 1:
            return list(X), _Format(as_list=True, is_vector=False)
        raise ValueError(
            f"{type(self).__name__} is applied to a list of tensors with shapes {[list(s) for s in self._in_shape]}, "
            f"with one more axis of the same length at the end for a matrix, got {[list(s) for s in shapes]}"
        )

    def _as_given(self, columns: list[Tensor], form: _Format) -> list[Tensor] | Tensor:
        if form.as_list:
            return [x.squeeze(-1) for x in columns] if form.is_vector else columns
        matrix = flat_columns(columns)
        return matrix.squeeze(-1) if form.is_vector else matrix

    # -- algebra ---------------------------------------------------------------------------------------------------

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SumLinearOperator(self, other)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return SumLinearOperator(self, -1.0 * other)

    def __neg__(self) -> LinearOperator:
        return ScaledLinearOperator(self, -1.0)

    def __mul__(self, scalar: float) -> LinearOperator:
        return ScaledLinearOperator(self, scalar)

    def __rmul__(self, scalar: float) -> LinearOperator:
        return ScaledLinearOperator(self, scalar)

    def to(self, device: torch.device | str) -> LinearOperator:
        """The same operator for vectors on another device; what it is made of stays where it is."""
        device = torch.device(device)
        return self if device == self.device else TransferredLinearOperator(self, device)

    def to_scipy(self, dtype: Any = None) -> SciPyLinearOperator:
        """The operator for SciPy's routines; products are computed by torch, in the operator's own dtype.

        Args:
            dtype: NumPy dtype that SciPy is told; None: NumPy's default, as curvlinops has it.

        Raises:
            ImportError: If SciPy is not installed.
        """
        sparse, numpy = required("scipy.sparse.linalg", "operators"), required("numpy", "operators")
        there, back = _for_numpy(self), _for_numpy(self.adjoint())
        result: SciPyLinearOperator = sparse.LinearOperator(
            self.shape, matvec=there, rmatvec=back, matmat=there, rmatmat=back, dtype=numpy.dtype(dtype)
        )
        return result


def _for_numpy(operator: LinearOperator) -> Callable[[Any], Any]:
    def multiply(X: Any) -> Any:
        result = operator @ torch.as_tensor(X, dtype=operator.dtype, device=operator.device)
        result = result.detach().cpu()
        # NumPy has no bfloat16.
        return (result.float() if result.dtype == torch.bfloat16 else result).numpy().astype(X.dtype)

    return multiply


class IdentityLinearOperator(LinearOperator):
    """The identity: `A + damping * IdentityLinearOperator(...)` is a damped operator.

    Args:
        shape: Shapes of the tensors it is applied to.
        device: Where they live.
        dtype: Their type.

    >>> IdentityLinearOperator([(2, 3)]).shape
    (6, 6)
    """

    SELF_ADJOINT = True

    def __init__(self, shape: Shapes, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(shape, shape)
        self._device, self._dtype = torch.device(device), dtype

    @classmethod
    def like(cls, operator: LinearOperator) -> IdentityLinearOperator:
        """The identity on the space that `operator` is applied to."""
        return cls(operator._in_shape, operator.device, operator.dtype)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return [m.clone() for m in M]


class _Derived(LinearOperator):
    """An operator made of others, whose device and dtype it has."""

    def __init__(self, in_shape: Shapes, out_shape: Shapes, *made_of: LinearOperator) -> None:
        for what in ("device", "dtype"):
            found = {getattr(A, what) for A in made_of}
            if len(found) > 1:
                names = " and ".join(type(A).__name__ for A in made_of)
                raise ValueError(f"{names} differ in {what} ({', '.join(sorted(map(str, found)))}): move one first")
        super().__init__(in_shape, out_shape)
        self._made_of = made_of

    @property
    def device(self) -> torch.device:
        return self._made_of[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self._made_of[0].dtype


class SumLinearOperator(_Derived):
    """`A + B`.

    Raises:
        TypeError: If one is no operator.
        ValueError: If shapes, devices or dtypes of the two differ.
    """

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if not isinstance(B, LinearOperator):
            raise TypeError(
                f"cannot add {type(B).__name__} to {type(A).__name__}; for a damping, add "
                "damping * IdentityLinearOperator.like(operator)"
            )
        if (A._in_shape, A._out_shape) != (B._in_shape, B._out_shape):
            raise ValueError(
                f"cannot add operators of different shapes: {A._out_shape} x {A._in_shape} and "
                f"{B._out_shape} x {B._in_shape}"
            )
        super().__init__(A._in_shape, A._out_shape, A, B)
        self._A, self._B = A, B
        self.SELF_ADJOINT = A.SELF_ADJOINT and B.SELF_ADJOINT

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(self._A._matmat(M), self._B._matmat(M), strict=True)]

    def _adjoint(self) -> LinearOperator:
        return SumLinearOperator(self._A.adjoint(), self._B.adjoint())


class ScaledLinearOperator(_Derived):
    """`scalar A`."""

    def __init__(self, A: LinearOperator, scalar: float) -> None:
        super().__init__(A._in_shape, A._out_shape, A)
        self._A, self._scalar = A, scalar
        self.SELF_ADJOINT = A.SELF_ADJOINT

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return [self._scalar * a for a in self._A._matmat(M)]

    def _adjoint(self) -> LinearOperator:
        return ScaledLinearOperator(self._A.adjoint(), self._scalar)


class ProductLinearOperator(_Derived):
    """`A B`.

    Raises:
        ValueError: If what B returns is not what A is applied to, or devices or dtypes differ.
    """

    def __init__(self, A: LinearOperator, B: LinearOperator) -> None:
        if A._in_shape != B._out_shape:
            raise ValueError(f"cannot chain operators: A is applied to {A._in_shape}, B returns {B._out_shape}")
        super().__init__(B._in_shape, A._out_shape, A, B)
        self._A, self._B = A, B

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return self._A._matmat(self._B._matmat(M))

    def _adjoint(self) -> LinearOperator:
        return ProductLinearOperator(self._B.adjoint(), self._A.adjoint())


class TransferredLinearOperator(LinearOperator):
    """An operator for vectors on another device than its own: they travel there and back.

    Args:
        A: The operator.
        device: Where vectors and results live.
    """

    def __init__(self, A: LinearOperator, device: torch.device) -> None:
        super().__init__(A._in_shape, A._out_shape)
        self._A, self._device = A, device
        self.SELF_ADJOINT = A.SELF_ADJOINT

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._A.dtype

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        result = self._A._matmat([m.to(self._A.device) for m in M])
        return [r.to(self._device) for r in result]

    def _adjoint(self) -> LinearOperator:
        return TransferredLinearOperator(self._A.adjoint(), self._device)


def by_columns(multiply: Callable[[Sequence[Tensor]], Sequence[Tensor]], matrix: Sequence[Tensor]) -> list[Tensor]:
    """A product with vectors for every column of a matrix; tensors have the columns along their last axis.

    >>> by_columns(lambda vector: [2 * vector[0]], [torch.eye(2)])
    [tensor([[2., 0.],
            [0., 2.]])]
    """
    # Every column for itself: as columns lie in memory, neither reading nor writing one alone is fast.
    columns = [m.movedim(-1, 0).contiguous() for m in matrix]
    products = [multiply(column) for column in zip(*columns, strict=True)]
    if len(products) == 1:  # spares a copy
        return [part.unsqueeze(-1) for part in products[0]]
    return [torch.stack(parts).movedim(0, -1) for parts in zip(*products, strict=True)]
