"""A step that bends: geodesic acceleration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeodesicAcceleration:
    """Let the step follow the curve on which the model stays linear in it to second order (Transtrum & Sethna 2012).

    With `v` the step and `f_vv` the predictions' second derivative along it, the path is `θ + s v + ½ s² a`, where
    `a = -(C + damping I)⁻¹ Jᵀ S Sᵀ f_vv`. It costs two forwards and another solve with the factorisation at hand. In
    the narrow, bent valleys of ill-conditioned least squares (physics-informed networks) steps become several times as
    long. Without a line search a step whose acceleration is large (`2 |a| > limit |v|`) is taken straight.

    Args:
        probe: Where the second derivative is measured, over the length of the last step.
        limit: Largest acceleration without a line search.
    """

    probe: float = 0.1
    limit: float = 0.75

    def __post_init__(self) -> None:
        for name in ("probe", "limit"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
