"""From a prediction to the cotangents whose second moment is the Fisher, with a generator of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kfacopt.likelihoods import KFACType, Likelihood, LossTerms, likelihood_from
from kfacopt.likelihoods.any_loss import AnyLoss
from kfacopt.likelihoods.fisher import Curvature, Fisher
from kfacopt.likelihoods.gaussian_variance import MEAN, VARIANCE, gaussian_pair

Loss = nn.Module | Likelihood
Part = Loss | tuple[float, Loss]
Value = TypeVar("Value")
LossFunction = Loss | Mapping[str, Part] | Sequence[Part]
"""A loss; or losses by the names in the output of a model that returns a dict (or an object with such attributes), or
in the order of those in a tuple; each alone or as `(weight, loss)`."""


class FisherEstimator:
    """The loss as a likelihood, and which Fisher is made of it.

    Args:
        loss_func: One of torch's losses that `likelihood_from` knows, or a `Likelihood`; any loss if `any_loss`.
        fisher: Which curvature, and how it is sampled.
        kfac_approx: `"expand"` or `"reduce"` for layers that share weights (`kfacopt.KFACType`).
        separate_weight_and_bias: Weight and bias of a layer get a block each; otherwise one block for both.
        prediction: `model output -> tensor`, for models whose output does not say which tensor the loss reads.
        extra_terms: Whether something else is added to the loss that depends on the prediction too, so that the
            gradient there is not the loss' own: it is not read then.
        any_loss: Whether a loss of which only gradients are known will do; default: for the empirical Fisher.

    Raises:
        TypeError: If the loss or an option is of no supported kind.
        ValueError: If an option has no supported value.
    """

    likelihoods: Mapping[str, Likelihood]
    """The likelihood by the loss term's name; "" where there is one."""
    weights: Mapping[str, float]
    """What each term counts in the whole loss."""
    loss_modules: Sequence[nn.Module]
    """The losses that were given as torch's modules: a loop that calls them shows their targets."""

    def __init__(
        self,
        loss_func: nn.Module | Likelihood,
        *,
        fisher: Fisher = Fisher(),  # noqa: B008 - it is frozen
        kfac_approx: KFACType | str = KFACType.EXPAND,
        separate_weight_and_bias: bool = False,
        prediction: Callable[[Any], Tensor] | None = None,
        extra_terms: bool = False,
        any_loss: bool | None = None,
    ) -> None:
        if fisher.kind is Curvature.HESSIAN:
            raise ValueError(
                "curvature='hessian' is indefinite, so Kronecker factors cannot stand for it: use 'mc', 'ggn' or "
                "'empirical', or kfacopt.NaturalGradient with solver=kfacopt.CG()"
            )
        self.extra_terms = bool(extra_terms)
        self._any_loss = fisher.kind is Curvature.EMPIRICAL if any_loss is None else any_loss
        self.likelihood = likelihood_from(loss_func, empirical=self._any_loss)
        self.likelihoods, self.weights = {"": self.likelihood}, {"": 1.0}
        if not self.likelihood.is_known:  # of several outputs each is one, by whatever name
            self.likelihoods, self.weights = _Same(self.likelihoods), _Same(self.weights)
        self.loss_modules = self._seen_modules([loss_func])
        self.fisher_type, self.mc_samples = fisher.kind.fisher_type, fisher.samples
        self.kfac_approx = _member(KFACType, "kfac_approx", kfac_approx)
        self.separate_weight_and_bias = bool(separate_weight_and_bias)
        self.prediction = prediction
        self._seed = fisher.seed
        self._stream: int | None = None
        self._generator: torch.Generator | None = None

    def _seen_modules(self, losses: Iterable[Any]) -> list[nn.Module]:
        """Those that are called with a prediction and its target, as torch's that are known are."""
        return [
            loss
            for loss in losses
            if isinstance(loss, nn.Module) and likelihood_from(loss, empirical=self._any_loss).is_known
        ]

    def predictions(self, output: Any) -> dict[str, Tensor]:
        """The tensors of a model's output that the loss is taken of, by the loss term's name."""
        return {"": find_prediction(output, self.prediction)}

    @property
    def guesses(self) -> bool:
        """Whether nobody has said where in an output the prediction is."""
        return self.prediction is None and "" in self.likelihoods

    def sampled(self, likelihood: Likelihood, terms: LossTerms) -> Tensor:
        """Gradients at labels drawn from the model, `[v m c]`."""
        return likelihood.sample(terms, self.mc_samples, self._generator_on(terms.parameters.device))

    def cotangents(self, terms: LossTerms, name: str = "") -> Iterator[Tensor]:
        """Chunks `[v, *prediction.shape]` of cotangents of the sum over the terms of the loss `name`."""
        generator = self._generator_on(terms.parameters.device)
        likelihood = self.likelihoods[name] if name else self.likelihood
        return likelihood.cotangents(terms, self.fisher_type, self.mc_samples, generator)

    def begin_stream(self, step: int, rank: int) -> None:
        """Draw step `step`'s labels from a stream that no other step, rank or seed has.

        Of several processes each has to draw labels of its own, or their mean has as much noise as one of them; and a
        checkpoint, which one of them writes, must serve them all.
        """
        digest = hashlib.blake2b(f"{self._seed} {step} {rank}".encode(), digest_size=8).digest()
        self._stream = int.from_bytes(digest, "big") >> 1
        if self._generator is not None:
            self._generator.manual_seed(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state (None before it was first used)."""
        generator = self._generator
        return {
            "seed": self._seed,
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over the generator's state."""
        self._seed, self._generator = int(state["seed"]), None
        if state["generator"] is not None:
            self._generator_on(device).set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        device = None if self._generator is None else str(self._generator.device)
        return self.__dict__ | {"_generator": (device, self.state_dict())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, generator = state.pop("_generator")
        self.__dict__.update(state)
        self._generator = None
        if device is not None:
            self.load_state_dict(generator, torch.device(device))

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            seed = self._seed if self._stream is None else self._stream
            self._generator = torch.Generator(device=device).manual_seed(seed)
        return self._generator


class TermsEstimator(FisherEstimator):
    """Several loss terms, each with a likelihood and a weight, of a model that returns a tensor for each.

    Args:
        loss_func: A loss as for `FisherEstimator`; or a dict of them by the names in the model's output, or a tuple or
            list of them by position, each alone (weight 1) or as `(weight, loss)`. The whole loss is the weighted sum
            of their means; an output that is None has none in that forward.
        options: As for `FisherEstimator`.

    Raises:
        TypeError, ValueError: A loss or weight that cannot be handled, by name.
    """

    _other_names: Mapping[str, tuple[str, ...]] = {}
    """Other names that an output may have for a loss term's prediction."""

    def __init__(self, loss_func: LossFunction, **options: Any) -> None:
        if isinstance(loss_func, nn.GaussianNLLLoss):
            self._init_pair(loss_func, options)
            return
        if isinstance(loss_func, Sequence):
            if loss_func and isinstance(loss_func[0], (int, float)):
                raise ValueError(f"loss_func {loss_func!r} is a weight and a loss: of a sole loss it has no meaning")
            loss_func = {str(place): part for place, part in enumerate(loss_func)}
        if not isinstance(loss_func, Mapping):
            super().__init__(loss_func, **options)
            return
        if not loss_func:
            raise ValueError("loss_func is an empty dict: name at least one loss term")
        if options.get("prediction") is not None:
            raise ValueError("prediction= has no meaning with a dict of losses: their names say where the tensors are")
        pairs: dict[str, tuple[float, Any]] = {
            name: part if isinstance(part, tuple) else (1.0, part) for name, part in loss_func.items()
        }
        super().__init__(next(iter(pairs.values()))[1], **options)
        self.likelihoods = {name: likelihood_from(loss, empirical=self._any_loss) for name, (_, loss) in pairs.items()}
        if not all(likelihood.is_known for likelihood in self.likelihoods.values()):
            # What one loss counts beside another the gradients have already, and nothing else does.
            self.likelihoods = {name: AnyLoss(loss) for name, (_, loss) in pairs.items()}
            pairs = {name: (1.0, loss) for name, (_, loss) in pairs.items()}
        self.weights = {name: float(weight) for name, (weight, _) in pairs.items()}
        self.loss_modules = self._seen_modules(loss for _, loss in pairs.values())
        for name, weight in self.weights.items():
            if not weight > 0.0:
                raise ValueError(f"the weight of loss term {name!r} must be positive, got {weight}")
            if self.likelihoods[name].reduction == "sum":
                raise ValueError(f"the loss term {name!r} has reduction='sum': use 'mean' and a weight")

    def _init_pair(self, loss_func: nn.GaussianNLLLoss, options: dict[str, Any]) -> None:
        """A mean and a variance beside it, the first two parts of an output or those that are called so."""
        if loss_func.reduction == "sum" or options.get("prediction") is not None:
            raise ValueError(
                "loss_func GaussianNLLLoss: use reduction='mean', leave prediction= out, and let the model return the "
                "mean and the variance: a tuple of them, or a dict or object with 'mean' and 'variance' (or 'var')"
            )
        pair = gaussian_pair(loss_func)
        super().__init__(pair[MEAN], **options)
        self.likelihoods, self.weights = pair, dict.fromkeys(pair, 1.0)
        self.loss_modules = [loss_func]
        self._other_names = {MEAN: ("0",), VARIANCE: ("var", "1")}

    def predictions(self, output: Any) -> dict[str, Tensor]:
        if "" in self.likelihoods:
            return super().predictions(output)
        named = _parts_of(output)
        if named is None:
            raise ValueError(
                f"loss_func names the terms {sorted(self.likelihoods)}, but the model returned no dict (or tuple, or "
                f"object with such parts): it returned a {type(output).__name__}"
            )
        known = {name: (name, *self._other_names.get(name, ())) for name in self.likelihoods}
        found = {name: named[key] for name, keys in known.items() for key in keys[::-1] if key in named}
        missing = [name for name in self.likelihoods if not isinstance(found.get(name, 0), Tensor | None)]
        if missing:
            raise ValueError(f"the model's output has no tensors {missing}, which loss_func names; has {list(named)}")
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class _Same(dict[str, Value]):
    """One value by every name."""

    def __missing__(self, name: str) -> Value:
        return self[""]


def _parts_of(output: Any) -> Mapping[str, Any] | None:
    """The parts of a model's output by name, or by place as a string; None: it has none.

    >>> _parts_of((1, 2)), _parts_of({"a": 1}), _parts_of(torch.zeros(2))
    ({'0': 1, '1': 2}, {'a': 1}, None)
    """
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        return output
    if isinstance(output, (tuple, list)):
        by_name: dict[str, Any] = output._asdict() if hasattr(output, "_asdict") else {}
        return by_name | {str(place): part for place, part in enumerate(output)}
    return vars(output) if hasattr(output, "__dict__") else None


def find_prediction(output: Any, select: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The tensor of a model's output that the loss is taken of.

    A tensor; `.logits` of an object or `["logits"]` of a dict; the only floating-point tensor of a tuple, list or dict
    that a gradient can flow to and that has axes (what has none is a loss); or what `select` says.

    Raises:
        TypeError: If `select` returns something else than a tensor.
        ValueError: If there are several candidates, or none.
    """
    if select is not None:
        chosen = select(output)
        if not isinstance(chosen, Tensor):
            raise TypeError(f"prediction= must return a tensor, got {type(chosen).__name__}")
        return chosen
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    candidates = [t for t in tensors_of(output) if may_be_prediction(t)]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(
        f"an output of type {type(output).__name__} with {len(candidates)} differentiable tensors (losses left out) "
        f"does not say which is the prediction: pass prediction=lambda output: ... to the optimizer"
    )


def may_be_prediction(tensor: Tensor) -> bool:
    """Whether a loss may be taken of a tensor: a number without axes is one."""
    return tensor.is_floating_point() and tensor.requires_grad and tensor.ndim > 0


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order: of nested tuples, lists, dicts, or an object's attributes."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors_of(value)]
    return [v for v in vars(output).values() if isinstance(v, Tensor)] if hasattr(output, "__dict__") else []


def _member(enum: Any, name: str, value: Any) -> Any:
    try:
        return enum(value)
    except ValueError:
        known = ", ".join(repr(member.value) for member in enum)
        raise ValueError(f"{name} must be one of {known}, got {value!r}") from None
