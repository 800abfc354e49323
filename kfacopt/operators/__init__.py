"""Curvature as linear operators over a data set; the interface is that of curvlinops 3.0.1."""

from kfacopt.operators.base import IdentityLinearOperator as IdentityLinearOperator
from kfacopt.operators.base import LinearOperator as LinearOperator
from kfacopt.operators.chain import ChainGGN as ChainGGN
from kfacopt.operators.chain import ChainHessian as ChainHessian
from kfacopt.operators.chain import ChainStats as ChainStats
from kfacopt.operators.chain_parse import Residual as Residual
