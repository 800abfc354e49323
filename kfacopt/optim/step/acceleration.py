"""A step that bends: geodesic acceleration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeodesicAcceleration:
    """Let the step follow the curve on which the model stays linear in it to second order (Transtrum & Sethna 2012).

    The step v is right for predictions f that are linear in the parameters, and they are not. Go along a parabola
    instead, `θ + s v + ½ s² a`, and expand the predictions to second order in s:

        f(θ + s v + ½ s² a) = f + s J v + ½ s² (J a + f_vv) + O(s³),        f_vv = d²f(θ + s v)/ds² at s = 0

    The path stays what the linear model promised if `J a + f_vv = 0`. That has no solution in general; as for v itself,
    take the damped least squares one in the metric of the loss (S Sᵀ its Hessian with respect to the predictions, and
    `C = Jᵀ S Sᵀ J`): the minimiser of `|Sᵀ (J a + f_vv)|² + damping |a|²`,

        a = -(C + damping I)⁻¹ Jᵀ S Sᵀ f_vv

    which costs two forwards, for `f_vv ≈ (f(θ + h v) - 2 f + f(θ - h v)) / h²`, and another solve with the
    factorisation at hand. In the narrow, bent valleys of ill-conditioned least squares (physics-informed networks)
    steps become several times as long. Without a line search a step whose acceleration is large (`2 |a| > limit |v|`)
    is taken straight.

    Args:
        probe: h, over the length of the last step. The difference's error is h² of what a fourth derivative does plus
            rounding over h²: 0.1, as in the paper, keeps the first below the size of a step, and in float32 the second
            below 1e-5 of the predictions. Far smaller, `f_vv` is noise; far larger, it is not that of this place.
        limit: Largest acceleration without a line search, as a share of the step. At 1 the parabola's second half would
            be as important as its first, and the expansion not to be believed; 0.75 is the paper's. Higher: rarer
            straight steps, and more that raise the loss; lower: less gained in bent valleys.
    """

    probe: float = 0.1
    limit: float = 0.75

    def __post_init__(self) -> None:
        for name in ("probe", "limit"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
