"""What a layer type has to say so that its curvature can be approximated.

A layer's parameter gradient is a sum over *rows*: of outer products `g aᵀ` for layers that multiply by a matrix, of
elementwise products `g · a` for layers that scale and shift. A `LayerHandler` brings what a hook saw (the layer's
input, a cotangent of its output) to these rows, and a layer's parameters to one matrix and back.

Axes: `v` cotangents (samples, or columns of the Hessian's square root), `k` independent groups, `n` data, `s` places
that share the weights (tokens, pixels), `i` inputs, `o` outputs, `c` channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from kfacopt.layers.unformed import InputsField, UnformedRows
from kfacopt.likelihoods import KFACType


@dataclass(frozen=True, eq=False)
class OneHot:
    """Rows that are columns of the identity matrix, kept as their indices (an embedding's input).

    Their second moment is diagonal (the frequencies), so no `[n s i]` tensor is ever formed.

    Args:
        indices: The place of each row's one, integer `[n s]`.
        size: The rows' length `i`.
        mask: `[n s]`, False where the row is zero instead (an embedding's `padding_idx`); None: nowhere.

    >>> OneHot(torch.tensor([[2, 0]]), size=3).dense(torch.float32)
    tensor([[[0., 0., 1.],
             [1., 0., 0.]]])
    """

    indices: Tensor
    size: int
    mask: Tensor | None = None

    def counts(self, dtype: torch.dtype) -> Tensor:
        """How many rows have their one at each place, `[i]`: the diagonal of `Σ a aᵀ`.

        >>> OneHot(torch.tensor([[2, 0, 2]]), size=4).counts(torch.float32)
        tensor([1., 0., 2., 0.])
        """
        ones = torch.ones_like(self.indices, dtype=dtype) if self.mask is None else self.mask
        counts = torch.zeros(self.size, dtype=dtype, device=self.indices.device)
        return counts.index_add_(0, self.indices.flatten(), ones.flatten().to(dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rows themselves, `[n s i]`; for tests and for small vocabularies."""
        rows = nn.functional.one_hot(self.indices.long(), self.size).to(dtype)
        return rows if self.mask is None else rows * self.mask.unsqueeze(-1).to(dtype)


@dataclass(frozen=True, eq=False)
class Rows:
    """One micro-batch's rows at one layer.

    Args:
        inputs: a, `[*k n s i]` or `OneHot`; `[n s c i]` for an elementwise layer. Of patches they are formed when they
            are first read.
        gradients: g, `[v *k n s o]`, cotangents of the *sum* over the loss terms; `[v n s c]` for an elementwise layer.
            Zeroed here where a `OneHot` row is masked, so that no user of the rows needs to know of the mask.
        terms: The number of loss terms M, what to divide by for the mean loss (a tensor without axes).
        first: Whether these are the first rows made of their batch. Of several chunks over `v` only the first counts
            the batch's terms (`new_terms`) and its inputs.
        reduce: Whether KFAC-reduce is still to be applied (`for_factors`): rows of every place, for a block that needs
            them (EKFAC's corrected eigenvalues are those of the per-datum gradients).
        squares: The mean square of each input, `[*k i]`, where it was asked for and is known.
        transposed: Rows of the same matrix transposed, for a weight that is used both ways: their `a gᵀ` add to the
            gradient. A backend gets them only if it asks for such layers (`CurvatureBackend.refusal`).

    `*k` are leading axes of independent groups (grouped convolutions); most layers have none.
    """

    inputs: InputsField = InputsField()  # noqa: RUF009 - a descriptor, of all instances
    gradients: Tensor  # type: ignore[misc]  # the descriptor is no default
    terms: Tensor  # type: ignore[misc]
    first: bool = True
    reduce: bool = False
    transposed: Rows | None = None
    squares: Tensor | None = None

    def for_factors(self) -> Rows:
        """The rows whose second moments are the Kronecker factors: these, or under KFAC-reduce their ā and ĝ."""
        held = self.held_inputs
        if not self.reduce or isinstance(held, OneHot):
            return self
        inputs = held.averaged() if isinstance(held, UnformedRows) else held.mean(-2, keepdim=True)
        return Rows(inputs, self.gradients.sum(-2, keepdim=True), self.terms, self.first)

    @property
    def held_inputs(self) -> Tensor | OneHot | UnformedRows:
        """The inputs as they are, formed or not."""
        held: Tensor | OneHot | UnformedRows = self.__dict__["inputs"]
        return held

    def but(self, **changes: Any) -> Rows:
        """These rows with other values of some attributes; what is not formed stays so."""
        return replace(self, **({"inputs": self.held_inputs} | changes))

    @property
    def new_terms(self) -> Tensor | float:
        """Loss terms that no earlier chunk has counted."""
        return self.terms if self.first else 0.0

    @property
    def new_rows(self) -> int:
        """Rows that no earlier chunk has counted, but at least one: of each datum one for each place."""
        data, places = self.gradients.shape[-3:-1]
        return max(1, data * places) if self.first else 0

    def __post_init__(self) -> None:
        held = self.held_inputs
        if isinstance(held, OneHot) and held.mask is not None:
            masked = self.gradients * held.mask.unsqueeze(-1).to(self.gradients.dtype)
            object.__setattr__(self, "gradients", masked)


Structure = Literal["outer", "one-hot", "elementwise", "tied"]


class LayerHandler(ABC):
    """How layers of one type become rows and a matrix.

    To support a layer of your own, subclass this, implement `input_rows`, `gradient_rows`, `pack` and `unpack`, and
    give an instance to `kfacopt.layers.register_handler`. For every cotangent of the layer's output, summing the rows
    must give the parameter gradient:

        `pack(gradients) == Σ_ns g aᵀ`  (`structure == "outer"`),
        `pack(gradients) == Σ_ns g · a` (`structure == "elementwise"`), for `expand`.

    A handler keeps no state; one instance serves every layer of its type.
    """

    structure: ClassVar[Structure] = "outer"
    """Whether the gradient sums outer products (Kronecker factors; with `OneHot` inputs one factor is diagonal),
    elementwise products, or outer products of two kinds (`kfacopt.layers.tied`)."""

    batched: ClassVar[bool] = False
    """Whether `pack` and `unpack` take further axes in front, as layers of equal shapes are packed together then.

    It is said of the very class: one that inherits from it, and may pack otherwise, says it anew."""

    parameter_names: tuple[str, ...] = ("weight", "bias")
    """The parameters that a layer of this type may have, in the order of the matrix's columns."""

    def roles(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the parameters of `module` that this handler covers, if they exist.

        >>> from kfacopt.layers import handler_for
        >>> handler_for(nn.Linear(3, 2, bias=False)).roles(nn.Linear(3, 2, bias=False))
        ('weight',)
        """
        return tuple(n for n in self.parameter_names if module._parameters.get(n) is not None)

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot be treated, as a phrase for `coverage()`; None if it can.

        A refused module is never an error: its parameters train by AdamW. Handlers that extend this call it first.
        """
        for name in self.parameter_names:
            parameter = module._parameters.get(name)
            if parameter is not None and is_lazy(parameter):
                return f"lazy module: {name} has no shape before the first forward"
            parametrized = is_parametrized(module, name)
            if parametrized or (parameter is None and getattr(module, name, None) is not None):
                # weight_norm, spectral_norm, pruning, ...: what trains is an input of the parametrization, and a
                # preconditioner for `name` is not one for it.
                return f"{name} is computed from other parameters (weight norm, pruning, ...)"
        return None

    @abstractmethod
    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor | OneHot:
        """The rows a, `[*k n s i]` (elementwise: `[n s c i]`), of the forward's inputs.

        Args:
            module: The layer, as it was in that forward.
            inputs: Positional inputs of the forward.
            kwargs: Keyword inputs of the forward.
            roles: The covered parameters, a subset of `roles`. With `"bias"` the rows end in a column of ones; for
                `("bias",)` they are that column alone.
            approx: `expand` keeps the places s apart; `reduce` averages over them, s = 1 (Eschenhagen et al. 2023,
                arXiv:2311.00636).

        Returns the input's dtype (normalisation layers: at least float32). It is called inside the user's backward pass
        and records no graph.
        """

    def unformed_rows(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], roles: tuple[str, ...]
    ) -> UnformedRows | None:
        """The rows of `expand`, in float32 at least, where what is asked of them takes less unformed; None: not so.

        They are read before the step ends, while the module and its inputs are as they were.
        """
        return None

    def input_squares(
        self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], roles: tuple[str, ...]
    ) -> Tensor | None:
        """The mean square of each input over the rows of `expand`, `[*k i]`, in float32 at least; None: not known.

        Steps of a fixed length are shorter where inputs are large (`kfacopt.optim.step.inputs`).
        """
        return None

    @abstractmethod
    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        """The rows g, `[v *k n s o]` (elementwise: `[v n s c]`), of `[v, *output.shape]`.

        `reduce` sums over the places s.
        """

    @abstractmethod
    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        """One matrix `[*k o i]` (elementwise: `[c i]`) of tensors shaped like parameters.

        The columns are in the order of `parameter_names`, whatever the mapping's order.
        """

    @abstractmethod
    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        """The inverse of `pack`: a matrix's parts, each in its parameter's shape."""


def input_tensor(inputs: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "input") -> Tensor:
    """A layer's only input, given by position or by the keyword `name`; detached.

    Raises:
        TypeError: If there is no such tensor.

    >>> input_tensor((), {"input": torch.zeros(2)})
    tensor([0., 0.])
    """
    value = inputs[0] if inputs else kwargs.get(name)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected a layer's {name} to be a tensor, got {type(value).__name__}: a layer called with anything else "
            "needs its own handler (kfacopt.register_handler)"
        )
    return value.detach()


def with_ones(rows: Tensor, roles: tuple[str, ...]) -> Tensor:
    """`rows` `[... i]` as the parameters see them: with ones for a bias, or only those.

    >>> with_ones(torch.zeros(1, 1, 2), ("weight", "bias"))
    tensor([[[0., 0., 1.]]])
    >>> with_ones(torch.zeros(1, 1, 2), ("bias",))
    tensor([[[1.]]])
    """
    if "bias" not in roles:
        return rows
    ones = rows.new_ones(()).expand(*rows.shape[:-1], 1)
    return torch.cat([rows, ones], dim=-1) if "weight" in roles else ones
