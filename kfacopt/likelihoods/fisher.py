"""Which curvature an optimizer divides by: one argument that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

from kfacopt.likelihoods.base import FisherType, Spelled


class Curvature(Spelled):
    """Which curvature a step divides by.

    >>> Curvature("ggn") is Curvature.GGN
    True
    """

    GGN = "ggn"
    """Generalised Gauss-Newton, `Jᵀ H J`: for these losses the Fisher information (Martens 2020). Also "type-2"."""
    MC = "mc"
    """The Fisher estimated from labels that the model draws itself, anew at each step."""
    EMPIRICAL = "empirical"
    """Second moment of the gradients of the loss terms at the data's labels."""
    HESSIAN = "hessian"
    """The loss' own second derivative, which may be negative; `NaturalGradient` by `CG` only."""

    @classmethod
    def _missing_(cls, value: object) -> Curvature | None:
        return cls.GGN if FisherType.TYPE2 in (value, getattr(value, "value", None)) else super()._missing_(value)

    @property
    def fisher_type(self) -> FisherType:
        """As the likelihoods name it."""
        return FisherType.TYPE2 if self in (Curvature.GGN, Curvature.HESSIAN) else FisherType(self.value)


@dataclass(frozen=True)
class Fisher:
    """Which curvature, and how it is sampled.

    Args:
        type: `"mc"`, `"ggn"` (or `"type-2"`), `"empirical"` or `"hessian"` (`kfacopt.Curvature`).
        samples: Labels drawn per loss term for `"mc"`.
        seed: Seed of the generator that draws them. The global generators are never touched.

    Raises:
        ValueError: If the type is not known, or there are samples but nothing to sample.

    >>> Fisher("mc", samples=2)
    Fisher(type='mc', samples=2, seed=0)
    """

    type: Curvature | str = Curvature.MC
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            kind = Curvature(self.type)
        except ValueError:
            known = ", ".join(repr(member.value) for member in Curvature)
            raise ValueError(f"curvature must be one of {known} or a kfacopt.Fisher, got {self.type!r}") from None
        if self.samples < 1:
            raise ValueError(
                f"samples (mc_samples of an operator) must be at least 1 label per loss term, got {self.samples}"
            )
        if self.samples != 1 and kind is not Curvature.MC:
            raise ValueError(
                f"samples (mc_samples of operators) must be 1 with {kind.value!r}: it draws none, got {self.samples}"
            )
        object.__setattr__(self, "type", kind)

    def __repr__(self) -> str:
        return f"Fisher(type={str(self.type)!r}, samples={self.samples}, seed={self.seed})"

    @property
    def kind(self) -> Curvature:
        """The type as a member of `Curvature`."""
        return Curvature(self.type)

    @classmethod
    def of(cls, curvature: Fisher | Curvature | str) -> Fisher:
        """What the argument `curvature=` of an optimizer stands for.

        >>> Fisher.of("type-2")
        Fisher(type='ggn', samples=1, seed=0)
        """
        return curvature if isinstance(curvature, Fisher) else cls(curvature)
