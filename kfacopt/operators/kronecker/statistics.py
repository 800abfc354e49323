"""What KFAC and EKFAC over a data set have in common: one block a layer, filled by sweeps over the data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from kfacopt.blocks import Block, DiagonalBlock
from kfacopt.blocks.factored import FactoredBlock
from kfacopt.layers.coverage import find_layers
from kfacopt.layers.layer import Layer
from kfacopt.likelihoods import FisherType, KFACType
from kfacopt.likelihoods.estimator import FisherEstimator
from kfacopt.likelihoods.fisher import Fisher
from kfacopt.operators.empirical_risk import Batches, Chained
from kfacopt.operators.kronecker import state
from kfacopt.operators.kronecker.block_diagonal import BlockDiagonalLinearOperator
from kfacopt.operators.kronecker.sweep import Chunk, Sweep
from kfacopt.operators.kronecker.uncovered import DiagonalOfUncovered, refusal, refusal_of_sought, require_found
from kfacopt.operators.matrix_free.products import parameter_names

Uncovered = Literal["error", "diagonal"]


class KroneckerLinearOperator(BlockDiagonalLinearOperator):
    """A block-diagonal Kronecker-factored approximation of the Fisher over a data set.

    Statistics are computed with the first product (or `compute`) and kept; if parameters have changed since, the next
    use says so. Norm layers have the exact diagonal; layers that the prediction does not depend on have zero curvature.

    Args:
        model_func: The model.
        loss_func: torch's `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss`, with any of their arguments.
        params: Parameters of the model: the space that the operator acts on. All require gradients.
        data: Mini-batches `(X, y)`.
        progressbar: Show one (tqdm) while data are run through.
        check_deterministic: Compare two sweeps over the data, and refuse what differs.
        seed: Seed of the generator that draws labels for `"mc"`.
        fisher_type: `"type-2"`, `"mc"`, `"empirical"` (as `EFLinearOperator` has it) or, for KFAC, `"forward-only"`.
        mc_samples: Labels drawn for every loss term.
        kfac_approx: `"expand"` or `"reduce"` for layers that share weights (Eschenhagen et al. 2023).
        num_per_example_loss_terms: Loss terms of a datum; checked if given, as nothing depends on it.
        separate_weight_and_bias: Whether a layer's weight and bias have a block each.
        num_data: Number of data; checked if given.
        batch_size_fn: Tells the batch size of an `X` that is no tensor.
        uncovered: What becomes of parameters in modules that no handler covers: an `"error"` that names them, or the
            `"diagonal"` of their Fisher.
        byte_budget: Bound on temporaries and on rows kept between the two sweeps of EKFAC, in bytes.

    Raises:
        NotImplementedError: If parameters are not covered and `uncovered="error"`; modules and reasons are named.
        TypeError: If the loss is not supported.
        ValueError: If an option has no supported value, or a parameter is frozen or not the model's.
    """

    FISHER_TYPES: tuple[FisherType, ...] = ()
    _all_places = False
    version: object
    """Another one whenever the statistics are."""

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: nn.Module,
        params: Sequence[nn.Parameter],
        data: Batches,
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = 2147483647,
        fisher_type: FisherType | str = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: KFACType | str = KFACType.EXPAND,
        num_per_example_loss_terms: int | None = None,
        separate_weight_and_bias: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        uncovered: Uncovered = "error",
        byte_budget: int = 2**28,
    ) -> None:
        if uncovered not in ("error", "diagonal"):
            raise ValueError(f"uncovered must be 'error' or 'diagonal', got {uncovered!r}")
        if byte_budget < 1:
            raise ValueError(f"byte_budget must be positive, got {byte_budget}")
        try:
            known_type = FisherType(fisher_type)
        except ValueError:
            known_type = None
        if known_type not in self.FISHER_TYPES:
            known = ", ".join(repr(str(known)) for known in self.FISHER_TYPES)
            raise ValueError(f"fisher_type of {type(self).__name__} must be one of {known}, got {fisher_type!r}")
        self._forward_only = known_type is FisherType.FORWARD_ONLY
        self._options: dict[str, Any] = {
            "fisher_type": str(FisherType.MC if self._forward_only else known_type),
            "mc_samples": mc_samples,
            "seed": seed,
            "kfac_approx": str(getattr(kfac_approx, "value", kfac_approx)),
        }
        self._estimator = self._made_estimator(loss_func)
        self._separate, self._uncovered, self._byte_budget = separate_weight_and_bias, uncovered, byte_budget
        self._terms_per_datum = num_per_example_loss_terms
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=False,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )
        self._layers, loose = self._find_layers()
        self._position = {id(p): i for i, p in enumerate(self._params)}
        self._loose = [self._position[id(p)] for p in loose]
        self._reset()
        if check_deterministic:
            self._check_deterministic()

    def _find_layers(self) -> tuple[list[Layer], list[nn.Parameter]]:
        names = dict(zip(map(id, self._params), parameter_names(self._model_func, self._params), strict=True))
        frozen = [names[id(p)] for p in self._params if not p.requires_grad]
        if frozen:
            raise ValueError(f"params {', '.join(frozen)} are frozen: leave them out, or set requires_grad")
        against = refusal if self._uncovered == "error" else refusal_of_sought
        layers, rest = find_layers(self._model_func, self._params, {}, self._separate, against)
        held = {id(p) for layer in layers for p in layer.parameters.values()}
        loose = [p for p in self._params if id(p) not in held]
        if loose and self._uncovered == "error":
            # Those of `rest` that are in no param group are just not in `params`.
            reasons = [f"{'.'.join(filter(None, [r.module, '+'.join(r.parameters)]))} ({r.why})" for r in rest]
            wanted = [text for text, r in zip(reasons, rest, strict=True) if r.treatment == "AdamW"]
            raise NotImplementedError(
                f"no Kronecker factors for {', '.join(wanted)}: leave these parameters out of params, pass "
                "uncovered='diagonal', or register a handler with kfacopt.register_handler"
            )
        return layers, loose

    # -- statistics ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _make_block(self) -> FactoredBlock:
        """A fresh block for a layer with Kronecker factors."""

    @abstractmethod
    def _compute(self) -> None:
        """Fill the blocks from all data."""

    def _reset(self) -> None:
        """Forget all statistics."""
        self.blocks: dict[str, Block] = {}
        owners: dict[object, FactoredBlock] = {}
        for layer in self._layers:
            if layer.handler.structure == "elementwise":
                self.blocks[layer.name] = DiagonalBlock()
                continue
            block = self._make_block()
            if layer.outputs in owners:
                block.share_gradient_factor(owners[layer.outputs])
            owners.setdefault(layer.outputs, block)
            self.blocks[layer.name] = block
        loose = [self._params[i] for i in self._loose]
        self._diagonal = DiagonalOfUncovered(self._model_func, loose, self._elements_at_once)
        self._terms = 0.0
        self._computed = False
        self._fingerprint: list[float] = []
        self.version = object()

    @property
    def _elements_at_once(self) -> int:
        return max(1, self._byte_budget // torch.empty((), dtype=self.dtype).element_size())

    def compute(self) -> None:
        """Compute the statistics now, if they are not there yet.

        Raises:
            RuntimeError: If parameters have changed since they were computed.
        """
        if self._computed:
            self._require_unchanged()
            return
        self._reset()
        self._restart_sampling()
        self._compute()
        self._computed, self._fingerprint = True, state.fingerprint(self._params)

    def _restart_sampling(self) -> None:
        """Draw the same labels again."""
        assert isinstance(self._loss_func, nn.Module)
        self._estimator = self._made_estimator(self._loss_func)

    def _made_estimator(self, loss_func: nn.Module) -> FisherEstimator:
        fisher = Fisher(self._options["fisher_type"], self._options["mc_samples"], self._options["seed"])
        return FisherEstimator(loss_func, fisher=fisher, kfac_approx=self._options["kfac_approx"])

    def _rows(self, desc: str, data: Batches | None = None) -> Iterator[tuple[Any, Chunk]]:
        """Each mini-batch's inputs with its rows, chunk by chunk."""
        assert isinstance(self._loss_func, nn.Module)
        sweep = Sweep(
            self._model_func,
            self._loss_func,
            self._layers,
            self._estimator,
            forward_only=self._forward_only,
            all_places=self._all_places,
            byte_budget=self._byte_budget,
        )
        for X, y in self._loop_over_data(desc, data):
            for chunk in sweep.chunks(X, y):
                yield X, chunk

    def _new_rows(self, data: Batches | None = None) -> Iterator[Chunk]:
        """The rows of data that have not been seen yet (None: of all): their loss terms count from now on."""
        for X, chunk in self._rows("factors", data):
            if chunk.first:
                self._count(X, chunk)
            self._diagonal.update(X, chunk)
            yield chunk

    def _count(self, X: Any, chunk: Chunk) -> None:
        data = self._batch_size(X)
        found = chunk.terms.parameters.shape[0]
        if self._terms_per_datum is not None and found != data * self._terms_per_datum:
            raise ValueError(
                f"num_per_example_loss_terms={self._terms_per_datum}, but a mini-batch of {data} data has {found} "
                "loss terms: leave it out, it is read from the data"
            )
        self._terms += float(chunk.terms.count)

    def _finish(self) -> None:
        """Average what the sweep added; what no row reached has no curvature."""
        for layer in self._layers:
            block = self.blocks[layer.name]
            block.accumulate()
            require_found(layer, block)
            if isinstance(block, FactoredBlock) and not block.estimated:
                self._fill_with_zeros(layer, block)
            elif isinstance(block, DiagonalBlock):
                if block.diagonal.value is None:
                    block.diagonal.value = torch.zeros_like(layer.pack(layer.values()))
                block.refresh(0.0)
            if isinstance(block, FactoredBlock) and self._forward_only and block.gradient_factor.value is not None:
                value = block.gradient_factor.value
                block.gradient_factor.value = torch.eye(value.shape[-1]).to(value).expand_as(value).clone()
        self._diagonal.accumulate()
        self.version = object()

    @staticmethod
    def _fill_with_zeros(layer: Layer, block: FactoredBlock) -> None:
        matrix = layer.pack(layer.values())
        diagonal = layer.handler.structure == "one-hot"
        shape = matrix.shape[-1:] if diagonal else (*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-1])
        if block.input_factor.value is None:
            block.input_factor.value = matrix.new_zeros(shape)
        if block.gradient_factor.value is None:
            block.gradient_factor.value = matrix.new_zeros(*matrix.shape[:-1], matrix.shape[-2])

    def _require_unchanged(self) -> None:
        if state.fingerprint(self._params) != self._fingerprint:
            raise RuntimeError(
                f"parameters have changed since the statistics of this {type(self).__name__} were computed: make a new "
                "operator, or put the old values back"
            )

    # -- streaming -------------------------------------------------------------------------------------------------

    def update(self, data: Batches) -> None:
        """Take in more data, as though they had followed the data so far.

        Args:
            data: Mini-batches as for the constructor.
        """
        if self._computed:
            self._require_unchanged()
        self._data, self._num_data = Chained(self._data, data), None
        if self._computed:
            self._more(data)

    @abstractmethod
    def _more(self, data: Batches) -> None:
        """Update computed statistics with more data."""

    def merge(self, other: KroneckerLinearOperator) -> None:
        """Take in the statistics of another operator of the same model over other data (another shard's).

        The result is that of an operator over both data sets; with `"mc"`, with the labels that each of them drew.

        Raises:
            ValueError: If the other is of another kind, other options or other parameters.
        """
        if type(self) is not type(other) or self._described() != other._described():
            raise ValueError(
                f"cannot merge: {type(self).__name__} with {self._described()} and {type(other).__name__} with "
                f"{other._described()}"
            )
        self.compute()
        other.compute()
        if self._fingerprint != other._fingerprint:
            raise ValueError("cannot merge operators of models whose parameters differ in value")
        self._data, self._num_data = Chained(self._data, other._data), None
        self._merge(other)
        self._finish()
        for mine, others in zip(self._diagonal.averages, other._diagonal.averages, strict=True):
            mine.merge(others)
        self._terms += other._terms
        self.version = object()

    @abstractmethod
    def _merge(self, other: KroneckerLinearOperator) -> None:
        """Average another operator's blocks in."""

    def _described(self) -> dict[str, Any]:
        own = {name: value for name, value in self._options.items() if name != "seed"}
        own["separate_weight_and_bias"] = self._separate
        own["blocks"] = [(layer.name, layer.roles, layer.shape) for layer in self._layers]
        own["loss_func"] = repr(self._estimator.likelihood)
        return own

    @property
    def _scale(self) -> float:
        """Blocks are of the mean over the loss terms; a sum has as many of them."""
        summed = getattr(self._loss_func, "reduction", "mean") == "sum"
        return self._terms if summed and not self._forward_only else 1.0

    @property
    def _diagonals(self) -> list[Tensor]:
        return [average.value for average in self._diagonal.averages if average.value is not None]

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The model's values, loss, options and statistics: tensors and plain Python only, bit for bit."""
        for block in self.blocks.values():
            if isinstance(block, FactoredBlock) and self._computed:
                block.factors()  # a basis may have been found without them
        fisher_type = FisherType.FORWARD_ONLY if self._forward_only else self._options["fisher_type"]
        return self._options | {
            "kind": type(self).__name__,
            "model_func_state_dict": {k: v.detach().clone() for k, v in self._model_func.state_dict().items()},
            "loss": state.describe_loss(self._loss_func),
            "fisher_type": str(fisher_type),
            "progressbar": self._progressbar,
            "num_per_example_loss_terms": self._terms_per_datum,
            "separate_weight_and_bias": self._separate,
            "num_data": self._num_data,
            "uncovered": self._uncovered,
            "byte_budget": self._byte_budget,
            "computed": self._computed,
            "terms": self._terms,
            "blocks": {name: block.state_dict() for name, block in self.blocks.items()} if self._computed else {},
            "diagonal": [average.state_dict() for average in self._diagonal.averages],
            "estimator": self._estimator.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the model gets the stored values, with a warning if they differ.

        Raises:
            ValueError: If it is of another kind of operator, another loss, other options or another model; nothing is
                changed then.
        """
        mine = self.state_dict()
        odd = [
            n for n in ("kind", "fisher_type", "kfac_approx", "separate_weight_and_bias") if mine[n] != state_dict[n]
        ]
        odd += [] if state.same_loss(mine["loss"], state_dict["loss"]) else ["loss"]
        names = [layer.name for layer in self._layers]
        odd += [] if not state_dict["computed"] or list(state_dict["blocks"]) == names else ["blocks"]
        if odd:
            theirs = ", ".join(f"{n}: {state_dict[n]} instead of {mine[n]}" for n in odd if n != "blocks")
            raise ValueError(f"the state is of another operator: {theirs or 'its blocks are of other layers'}")
        state.load_model(self._model_func, state_dict["model_func_state_dict"])
        self._options |= {"mc_samples": state_dict["mc_samples"], "seed": state_dict["seed"]}
        self._reset()
        self._restart_sampling()
        self._estimator.load_state_dict(state_dict["estimator"], self.device)
        self._terms, self._computed = state_dict["terms"], state_dict["computed"]
        self._num_data = state_dict["num_data"]
        for name, stored in state_dict["blocks"].items():
            self.blocks[name].load_state_dict(stored, self.device)
        for average, stored in zip(self._diagonal.averages, state_dict["diagonal"], strict=True):
            average.load_state_dict(stored, self.device)
        self._fingerprint = state.fingerprint(self._params)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: dict[str, Any],
        model_func: nn.Module,
        params: Sequence[nn.Parameter],
        data: Batches,
        check_deterministic: bool = True,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> Self:
        """An operator with the loss, options and statistics of a state; see `load_state_dict`."""
        return state.from_state(cls, state_dict, model_func, params, data, check_deterministic, batch_size_fn)
