"""Curvature as linear operators over a data set; the interface is that of curvlinops 3.0.1."""

from kfacopt.operators.base import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.operators.base import LinearOperator as LinearOperator
